"""Per-token statistics of a softmax over a vocabulary, and cross-entropy, straight from hidden states.

**Math**
  z = softcap(hidden weightᵀ + bias) / temperature,  softcap(x) = cap tanh(x / cap),  p = softmax(z), per token:
    logprob = z[target] − lse        d/dz = δ[target] − p
    lse     = log Σ exp z            d/dz = p
    entropy = −Σ p log p             d/dz = −p (log p + entropy)
    sum_p2  = Σ p²                   d/dz = 2 p (p − sum_p2)
    mean_logit = Σ z / V             d/dz = 1 / V
  so every upstream gradient gives d_z = p (a + b log p + c p) + k + scatter(target), a, b, c, k per token: one gradient
  step serves all. Cross-entropy is arithmetic on top, with torch's label smoothing ε:
    loss = −(1 − ε) logprob + ε (lse − mean_logit) + z_loss lse²
**Shapes** hidden [T, D], weight [V, D], bias [V], target [T] or [T, C]; every statistic [T] (logprob as target).
**Dtypes** Products round their operands to `product_dtype` (default: hidden's) and accumulate in fp32; logits, statistics
  and sums of gradients are fp64 if any input is fp64, else fp32; gradients are cast once, to their input's dtype.
**Traffic** 2TDV FLOPs forward and 6TDV backward (one product makes the logits again); cross-entropy with "mean" or "sum" on
  one rank forms its gradients in the forward pass: 6TDV in all. A product whose result nobody needs is not computed, also
  where a pipeline schedule asks for the two gradients apart. Memory: see `vocabulary_sweep`.
**Source** Cut Cross-Entropy, arXiv 2411.09009 (no stored logits); Liger-Kernel, arXiv 2410.10989 (gradient in forward).
**Limits** First derivatives only. A target outside the vocabulary is refused on the CPU, with its position; on CUDA, where
  finding it would read the device, its log-probability is −inf and nothing outside the matrix is read.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import FLOATS
from .logit_block import LogitMap, Side, Wanted, logits_of
from .token_statistics import Call, Inputs, LossTerms, Upstream, backward, cross_entropy_with_gradients, forward
from .vocabulary_sweep import BLOCKING, Shard, statistic_dtype


class TokenStats(NamedTuple):
    """What the losses need to know of each token; what was not asked for is None. Ignored tokens are 0 everywhere."""

    logprob_T: Tensor
    lse_T: Tensor
    entropy_T: Tensor | None = None
    argmax_T: Tensor | None = None
    sum_p2_T: Tensor | None = None
    mean_logit_T: Tensor | None = None


def linear_logprob_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> TokenStats:
    """Every statistic from the full logits."""
    logits_TV = reference_logits(hidden_TD, weight_VD, bias_V, temperature, softcap)
    logp_TV = logits_TV.log_softmax(-1)
    target_TC = target_T if target_T.dim() == 2 else target_T[:, None]
    ignored_TC = target_TC == ignore_index
    dropped_T = ignored_TC.all(-1)
    logprob_TC = logp_TV.gather(1, target_TC.masked_fill(ignored_TC, 0).long()).masked_fill(ignored_TC, 0.0)
    stats = (
        logits_TV.logsumexp(-1),
        -(logp_TV.exp() * logp_TV).sum(-1),
        logits_TV.argmax(-1),
        logp_TV.exp().square().sum(-1),
        logits_TV.mean(-1),
    )
    return TokenStats(logprob_TC.view(target_T.shape), *(stat_T.masked_fill(dropped_T, 0) for stat_T in stats))


def linear_cross_entropy_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """torch's own cross-entropy on the full logits, plus the z-loss."""
    logits_TV = reference_logits(hidden_TD, weight_VD, bias_V, 1.0, softcap)
    counted_T = target_T != ignore_index
    loss_T = torch.nn.functional.cross_entropy(
        logits_TV, target_T.long(), ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    loss_T = loss_T + z_loss * logits_TV.logsumexp(-1).square() * counted_T
    if reduction == "none":
        return loss_T
    return loss_T.sum() / (counted_T.sum().clamp(min=1) if reduction == "mean" else 1)


def reference_logits(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float, softcap: float | None
) -> Tensor:
    """The logits of the whole batch, in the statistics' dtype: for references only."""
    dtype = statistic_dtype(hidden_TD, weight_VD, bias_V)
    product_TV = torch.nn.functional.linear(hidden_TD.to(dtype), weight_VD.to(dtype))
    return logits_of(Side(product_TV, bias_V, LogitMap(temperature, softcap)))


# ---- The registered operators, for compiled callers: plain values in, empty tensors for what is None ----


@torch.library.custom_op("warpline::linear_logprob", mutates_args=())
def _linear_logprob_op(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_TC: Tensor, temperature: float, softcap: float | None,
    ignore_index: int, wanted: list[bool], product_dtype: torch.dtype | None, vocab_start: int, vocab_size: int,
    group_name: str | None, reduce_d_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shard = Shard(vocab_start, vocab_size, group_name)
    call = Call(temperature, softcap, ignore_index, Wanted(*wanted), product_dtype, shard, reduce_d_hidden)
    return forward(Inputs(hidden_TD, weight_VD, bias_V, target_TC), call)  # type: ignore[return-value]


@_linear_logprob_op.register_fake
def _(hidden_TD, weight_VD, bias_V, target_TC, temperature, softcap, ignore_index, wanted, *rest):
    dtype = statistic_dtype(hidden_TD, weight_VD, bias_V)
    per_token = hidden_TD.new_empty(target_TC.shape[0], dtype=dtype)
    none = per_token.new_empty(0)
    entropy, argmax, sum_p2, mean_logit = (torch.empty_like(per_token) if asked else none.clone() for asked in wanted)
    whole = (torch.empty_like(per_token) for _ in range(3))
    return (
        per_token.new_empty(target_TC.shape), next(whole), entropy, argmax.long() if wanted[1] else argmax, sum_p2, mean_logit,
        next(whole), next(whole),
    )  # fmt: skip


@torch.library.custom_op("warpline::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward_op(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_TC: Tensor, max_T: Tensor, log_sum_T: Tensor,
    entropy_T: Tensor, sum_p2_T: Tensor, d_logprob_TC: Tensor | None, d_lse_T: Tensor | None, d_entropy_T: Tensor | None,
    d_sum_p2_T: Tensor | None, d_mean_T: Tensor | None, needed: list[bool], temperature: float, softcap: float | None,
    ignore_index: int, wanted: list[bool], product_dtype: torch.dtype | None, vocab_start: int, vocab_size: int,
    group_name: str | None, reduce_d_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shard = Shard(vocab_start, vocab_size, group_name)
    call = Call(temperature, softcap, ignore_index, Wanted(*wanted), product_dtype, shard, reduce_d_hidden)
    inputs, saved = Inputs(hidden_TD, weight_VD, bias_V, target_TC), (max_T, log_sum_T, entropy_T, sum_p2_T)
    upstream = Upstream(d_logprob_TC, d_lse_T, d_entropy_T, d_sum_p2_T, d_mean_T)
    gradients = backward(inputs, saved, upstream, (needed[0], needed[1], needed[2]), call)
    return tuple(hidden_TD.new_empty(0) if d is None else d for d in gradients)  # type: ignore[return-value]


@_linear_logprob_backward_op.register_fake
def _(hidden_TD, weight_VD, bias_V, *rest):
    needed = rest[10]
    pairs = zip((hidden_TD, weight_VD, bias_V), needed, strict=True)
    return tuple(x.new_empty(x.shape) if x is not None and asked else hidden_TD.new_empty(0) for x, asked in pairs)


def _save_for_op(ctx, inputs, output):
    hidden_TD, weight_VD, bias_V, target_TC, *ctx.options = inputs
    _, _, entropy_T, argmax_T, sum_p2_T, _, max_T, log_sum_T = output
    ctx.save_for_backward(hidden_TD, weight_VD, bias_V, target_TC, max_T, log_sum_T, entropy_T, sum_p2_T)
    ctx.mark_non_differentiable(argmax_T, max_T, log_sum_T)
    ctx.set_materialize_grads(False)


def _backward_of_op(ctx, d_logprob, d_lse, d_entropy, d_argmax, d_sum_p2, d_mean, d_max, d_log_sum):
    options = ctx.options
    has_entropy, _, has_sum_p2, has_mean = options[3]
    asked = ((d_entropy, has_entropy), (d_sum_p2, has_sum_p2), (d_mean, has_mean))
    upstream = (d_logprob, d_lse, *(d if is_asked else None for d, is_asked in asked))
    needed = [bool(asked) for asked in ctx.needs_input_grad[:3]]
    gradients = _linear_logprob_backward_op(*ctx.saved_tensors, *upstream, needed, *options)
    return *(d if asked else None for d, asked in zip(gradients, needed, strict=True)), *[None] * (1 + len(options))


_linear_logprob_op.register_autograd(_backward_of_op, setup_context=_save_for_op)


@torch.library.custom_op("warpline::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy_op(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_TC: Tensor, needed: list[bool], softcap: float | None,
    ignore_index: int, product_dtype: torch.dtype | None, vocab_size: int, z_loss: float, label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = Call(1.0, softcap, ignore_index, Wanted(mean_logit=label_smoothing != 0.0), product_dtype, Shard(0, vocab_size))
    inputs, terms = Inputs(hidden_TD, weight_VD, bias_V, target_TC), LossTerms(z_loss, label_smoothing)
    loss, *gradients = cross_entropy_with_gradients(inputs, (needed[0], needed[1], needed[2]), call, terms)
    pairs = zip(gradients, inputs, strict=False)
    d_hidden, d_weight, d_bias = (loss.new_empty(0) if d is None else d.to(_kept_dtype(x, loss)) for d, x in pairs)
    return loss, d_hidden, d_weight, d_bias


def _kept_dtype(x: Tensor | None, loss: Tensor) -> torch.dtype:
    """Of a gradient that waits for its upstream number: fp16 has not the range."""
    return loss.dtype if x is None or x.dtype == torch.float16 else x.dtype


@_linear_cross_entropy_op.register_fake
def _(hidden_TD, weight_VD, bias_V, target_TC, needed, *rest):
    loss = hidden_TD.new_empty((), dtype=statistic_dtype(hidden_TD, weight_VD, bias_V))
    pairs = zip((hidden_TD, weight_VD, bias_V), needed, strict=True)
    return loss, *(
        x.new_empty(x.shape, dtype=_kept_dtype(x, loss)) if x is not None and asked else loss.new_empty(0) for x, asked in pairs
    )


def _save_gradients(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [x.dtype if x is not None and asked else None for x, asked in zip(inputs[:3], inputs[4], strict=True)]
    ctx.num_inputs = len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx, d_loss, *_):
    pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    return *(None if dtype is None else (d * d_loss).to(dtype) for d, dtype in pairs), *[None] * (ctx.num_inputs - 3)


_linear_cross_entropy_op.register_autograd(_scale_gradients, setup_context=_save_gradients)


# ---- Autograd, for eager callers ----


def needed_gradients(ctx, has_bias: bool) -> tuple[bool, bool, bool]:
    """Which of d_hidden, d_weight, d_bias this backward pass has a use for.

    `needs_input_grad` says what requires a gradient at all. A schedule that asks for the inputs' and the weights' gradients in
    two passes runs this node in both, and what the engine will not use is not computed. Hidden states, matrix and bias
    are the Function's first three arguments; an absent bias has no edge.
    """
    edges = [node for node, _ in ctx.next_functions]
    used = [asked and _engine_uses(edges[index]) for index, asked in enumerate(ctx.needs_input_grad[:2])]
    return used[0], used[1], has_bias and ctx.needs_input_grad[2] and _engine_uses(edges[2])


def _engine_uses(node: Any) -> bool:
    """Whether the running backward pass executes or captures this node."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch's answer for a leaf whose gradient torch.autograd.grad captures (torch 2.11 to 2.13)
        return True


class _LinearLogprob(torch.autograd.Function):
    """Saves the inputs and a few numbers per token."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias_V, target_TC, call):
        values = forward(Inputs(hidden_TD, weight_VD, bias_V, target_TC), call)
        _, _, entropy_T, argmax_T, sum_p2_T, _, max_T, log_sum_T = values
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, target_TC, max_T, log_sum_T, entropy_T, sum_p2_T)
        ctx.call = call
        ctx.mark_non_differentiable(argmax_T, max_T, log_sum_T)
        ctx.set_materialize_grads(False)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprob, d_lse, d_entropy, _d_argmax, d_sum_p2, d_mean, _d_max, _d_log_sum):
        tensors = ctx.saved_tensors  # read once: a non-reentrant checkpoint allows no more
        inputs, saved = Inputs(*tensors[:4]), tensors[4:]
        upstream = Upstream(d_logprob, d_lse, d_entropy, d_sum_p2, d_mean)
        needed = needed_gradients(ctx, inputs.bias_V is not None)
        return *backward(inputs, saved, upstream, needed, ctx.call), None, None


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses and its gradients in one pass; the backward only scales them by the upstream number."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias_V, target_TC, call, terms, is_recorded):
        needed = tuple(asked and is_recorded for asked in ctx.needs_input_grad[:3])
        inputs = Inputs(hidden_TD, weight_VD, bias_V, target_TC)
        loss, *gradients = cross_entropy_with_gradients(inputs, needed, call, terms)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if d is None else scaled(d, d_loss, dtype) for d, dtype in pairs), None, None, None, None


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x · factor, cast once."""
    return torch.mul(x, factor, out=x.new_empty(x.shape, dtype=dtype))


# ---- The public functions ----


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    product_dtype: torch.dtype | None = None,
) -> None:
    """Refuses what cannot be a softmax over a vocabulary, and a matrix that is sharded without the group being named."""
    if hasattr(weight, "device_mesh") or hasattr(hidden, "device_mesh"):
        remedy = (
            "pass the matrix as the module's forward sees it under FSDP (compute the loss inside forward), .full_tensor(), or "
            "under tensor parallelism .to_local() with group="
        )
        raise ValueError(f"hidden or weight is a DTensor, expected plain tensors; {remedy}")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"hidden and weight have shapes {shapes}; expected [T, D] and [V, D]: pack the tokens")
    dtypes = [x.dtype for x in (hidden, weight, bias) if x is not None]
    if not all(dtype in FLOATS for dtype in dtypes) or product_dtype not in (None, *FLOATS):
        received = f"{', '.join(map(str, dtypes))} with product_dtype {product_dtype}"
        raise ValueError(f"hidden, weight and bias are {received}; expected fp16, bf16, fp32 or fp64: cast them")
    if product_dtype == torch.float64 and statistic_dtype(hidden, weight, bias) != torch.float64:
        raise ValueError("product_dtype is fp64, but hidden, weight and bias are not; expected one of them in fp64: cast it")
    if hidden.device.type not in BLOCKING:
        expected = " or ".join(BLOCKING)
        raise ValueError(f"no implementation for device {hidden.device.type!r}; expected {expected}: move the inputs")
    if hidden.device != weight.device or (bias is not None and bias.device != weight.device):
        raise ValueError(f"hidden is on {hidden.device} and weight on {weight.device}; expected one device: move them")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({len(weight)},): one number per row of weight")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected > 0: for greedy choices ask for argmax=True")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; expected > 0 and finite, or None for no cap")


def shard_of(weight_VD: Tensor, group: dist.ProcessGroup | None, vocab_start: int | None, vocab_size: int | None) -> Shard:
    """This rank's part of the vocabulary: with neither start nor size, equal shares in rank order and no padding."""
    rank, num_ranks = (0, 1) if group is None else (group.rank(), group.size())
    if (vocab_start is None) != (vocab_size is None) and group is not None:
        raise ValueError(
            "received one of vocab_start and vocab_size; with a group expected both or neither: give the other too"
        )
    start = rank * len(weight_VD) if vocab_start is None else vocab_start
    size = num_ranks * len(weight_VD) if vocab_size is None else vocab_size
    if start < 0 or size < 1 or (group is None and (start != 0 or size > len(weight_VD))):
        expected = "0 <= vocab_start, and without a group vocab_start 0 and vocab_size at most the matrix's rows"
        raise ValueError(f"vocab_start is {start} and vocab_size {size} for {len(weight_VD)} rows; expected {expected}")
    return Shard(start, size, None if group is None else group.group_name)


def _checked_target(target: Tensor, hidden: Tensor) -> Tensor:
    """As [T, C]."""
    is_shaped = target.dim() in (1, 2) and len(target) == len(hidden) and (target.dim() == 1 or target.shape[1] > 0)
    if target.dtype not in (torch.int64, torch.int32) or not is_shaped or target.device != hidden.device:
        received = f"{target.dtype} of shape {tuple(target.shape)} on {target.device}"
        expected = f"int64 or int32 of shape ({len(hidden)},) or ({len(hidden)}, C >= 1) on {hidden.device}"
        raise ValueError(f"target is {received}; expected {expected}: one row of targets per hidden state")
    return target if target.dim() == 2 else target[:, None]


def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    argmax: bool = False,
    sum_p2: bool = False,
    mean_logit: bool = False,
    product_dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    reduce_d_hidden: bool = True,
) -> TokenStats:
    """Log-probability of each target, and what else is asked for, differentiable (argmax aside), without full logits.

    `target_T` [T] or [T, C] of ids in the whole vocabulary; `logprob_T` has its shape, and a token all of whose targets are
    ignored is 0 everywhere. `product_dtype=torch.float32` is the fp32 head. With `group`, V is sharded over its ranks in
    rank order (`vocab_start` is the id of this rank's first row, rows at or past `vocab_size` are padding): one all-gather of
    a few numbers per token forward, one all-reduce of d_hidden backward, left out with `reduce_d_hidden=False`.
    CPU: torch, block by block. CUDA: the vendor's products with Triton between them.
    """
    check_head(hidden_TD, weight_VD, bias_V, temperature, softcap, product_dtype)
    target_TC = _checked_target(target_T, hidden_TD)
    shard = shard_of(weight_VD, group, vocab_start, vocab_size)
    wanted = Wanted(entropy, argmax, sum_p2, mean_logit)
    if torch.compiler.is_compiling():
        options = (temperature, softcap, ignore_index, list(wanted), product_dtype, *shard, reduce_d_hidden)
        values = _linear_logprob_op(hidden_TD, weight_VD, bias_V, target_TC, *options)
    else:
        call = Call(temperature, softcap, ignore_index, wanted, product_dtype, shard, reduce_d_hidden)
        values = _LinearLogprob.apply(hidden_TD, weight_VD, bias_V, target_TC, call)
    logprob_TC, lse_T, entropy_T, argmax_T, sum_p2_T, mean_T, _, _ = values
    asked = zip((entropy_T, argmax_T, sum_p2_T, mean_T), wanted, strict=True)
    return TokenStats(logprob_TC.view(target_T.shape), lse_T, *(value if is_asked else None for value, is_asked in asked))


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    product_dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    reduce_d_hidden: bool = True,
) -> Tensor:
    """Cross-entropy of hidden weightᵀ, without full logits; "mean" divides by the number of tokens not ignored.

    `z_loss` adds z_loss · lse² per counted token. Over no tokens the loss is 0 with zero gradients. "mean" and "sum" on one
    rank form their gradients in the forward pass; "none", and any reduction with a `group`, make the logits again in the
    backward. Sharding and devices as in `linear_logprob`.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean', 'sum' or 'none'")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected 0 <= label_smoothing <= 1: a share of the target")
    if target_T.dim() != 1:
        raise ValueError(f"target has shape {tuple(target_T.shape)}; expected [T]: linear_logprob takes [T, C]")
    if reduction != "none" and group is None:
        check_head(hidden_TD, weight_VD, bias_V, 1.0, softcap, product_dtype)
        shard = shard_of(weight_VD, None, vocab_start, vocab_size)
        inputs = (hidden_TD, weight_VD, bias_V, _checked_target(target_T, hidden_TD))
        if torch.compiler.is_compiling():
            needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs[:3]]
            options = (needed, softcap, ignore_index, product_dtype, shard.size, z_loss, label_smoothing)
            loss = _linear_cross_entropy_op(*inputs, *options)[0]
        else:
            wanted = Wanted(mean_logit=label_smoothing != 0.0)
            call = Call(1.0, softcap, ignore_index, wanted, product_dtype, shard)
            loss = _LinearCrossEntropy.apply(*inputs, call, LossTerms(z_loss, label_smoothing), torch.is_grad_enabled())
    else:
        stats = linear_logprob(
            hidden_TD, weight_VD, target_T, bias_V=bias_V, softcap=softcap, ignore_index=ignore_index,
            mean_logit=label_smoothing != 0.0, product_dtype=product_dtype, group=group, vocab_start=vocab_start,
            vocab_size=vocab_size, reduce_d_hidden=reduce_d_hidden,
        )  # fmt: skip
        loss_T = (label_smoothing - 1.0) * stats.logprob_T + z_loss * stats.lse_T.square()
        if stats.mean_logit_T is not None:
            loss_T = loss_T + label_smoothing * (stats.lse_T - stats.mean_logit_T)
        loss = loss_T if reduction == "none" else loss_T.sum()
    if reduction == "mean":
        loss = loss / (target_T != ignore_index).sum().clamp(min=1)
    return loss
