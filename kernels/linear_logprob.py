"""Per-token statistics of a softmax over a vocabulary, and cross-entropy, straight from hidden states.

**Math**
  z = softcap(hidden weightᵀ + bias) / temperature,  softcap(x) = cap tanh(x / cap),  p = softmax(z), per token:
    logprob = z[target] − lse        d/dz = δ[target] − p
    lse     = log Σ exp z            d/dz = p
    entropy = −Σ p log p             d/dz = −p (log p + entropy)
    sum_p2  = Σ p²                   d/dz = 2 p (p − sum_p2)
    mean_logit = Σ z / V             d/dz = 1 / V
  so every upstream gradient gives d_z = p (a + b log p + c p) + const + scatter(target), a, b, c per token.
  Cross-entropy is arithmetic on top, with torch's label smoothing ε:
    loss = −(1 − ε) logprob + ε (lse − mean_logit) + z_loss lse²
**Shapes** hidden [T, D], weight [V, D], bias [V], target [T] or [T, C]; every statistic [T] (logprob as target).
**Dtypes** Products round their operands to `product_dtype` (default: hidden's) and accumulate in fp32; logits,
  statistics and the sum of d_weight are fp64 if any input is fp64, else fp32; gradients are cast once, to their input's.
**Traffic** 2TDV FLOPs forward and 6TDV backward (one product recomputes the logits); cross-entropy with "mean" or
  "sum" forms its gradients in the forward pass: 6TDV in all. Each product that no input needs is skipped. Largest
  buffer: TOKENS_PER_CHUNK × V, or V × D for the gradient of the matrix; never T × V.
**Source** Cut Cross-Entropy, arXiv 2411.09009 (no stored logits); Liger-Kernel, arXiv 2410.10989 (gradient in forward).
**Limits** One device holds the whole vocabulary. First derivatives only. Dropping ignored tokens and checking targets
  each read the device once per call. bf16 and fp16 products run in fp32 on operands rounded to that type: torch's CPU
  products do not return their fp32 accumulator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Cross-entropy forward and backward, fp32, 2 CPU cores, 2026-11-23, median ms for chunks of 128/256/512/1024/2048 tokens:
# T=4096 D=128 V=2048: 99/81/90/73/83 (torch's full logits 140); T=2048 D=1024 V=32768: 4681/4024/3740/3598/5061 (4270).
TOKENS_PER_CHUNK = 1024


class TokenStats(NamedTuple):
    """What the losses need to know of each token; what was not asked for is None. Ignored tokens are 0 everywhere."""

    logprob_T: Tensor
    lse_T: Tensor
    entropy_T: Tensor | None = None
    argmax_T: Tensor | None = None
    sum_p2_T: Tensor | None = None
    mean_logit_T: Tensor | None = None


@dataclass(frozen=True)
class LogitForm:
    """How logits are made of hidden states: the map, and the dtypes of its products and of everything after them."""

    temperature: float
    softcap: float | None
    product_dtype: torch.dtype
    statistic_dtype: torch.dtype


@dataclass(frozen=True)
class _Wanted:
    entropy: bool = False
    argmax: bool = False
    sum_p2: bool = False
    mean_logit: bool = False


@dataclass(frozen=True)
class _LossTerms:
    z_loss: float
    label_smoothing: float
    scale: float
    is_recorded: bool  # autograd does not tell a Function's forward that it runs under no_grad


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
    logprob_TC = logp_TV.gather(1, target_TC.masked_fill(ignored_TC, 0)).masked_fill(ignored_TC, 0.0)
    stats = (
        logits_TV.logsumexp(-1),
        -(logp_TV.exp() * logp_TV.clamp(min=torch.finfo(logp_TV.dtype).min)).sum(-1),
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
        logits_TV, target_T, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    loss_T = loss_T + z_loss * logits_TV.logsumexp(-1).square() * counted_T
    if reduction == "none":
        return loss_T
    return loss_T.sum() / (counted_T.sum().clamp(min=1) if reduction == "mean" else 1)


def reference_logits(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float, softcap: float | None
) -> Tensor:
    """The logits of the whole batch, in the statistics' dtype: for references only."""
    inputs = [x for x in (hidden_TD, weight_VD, bias_V) if x is not None]
    dtype = statistic_dtype(*inputs)
    logits_TV = torch.nn.functional.linear(*(x.to(dtype) for x in inputs))
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    return logits_TV / temperature


# The chunked implementation: logits of a chunk of tokens at a time, its buffers reused in place.


def statistic_dtype(*inputs: Tensor | None) -> torch.dtype:
    """fp64 if any input is fp64, else fp32."""
    is_double = any(x is not None and x.dtype == torch.float64 for x in inputs)
    return torch.float64 if is_double else torch.float32


def operand(x: Tensor, form: LogitForm) -> Tensor:
    """x as a product takes it: rounded to the product's dtype, stored in the dtype the product accumulates in."""
    rounded = x.to(form.product_dtype)
    return rounded.float() if form.product_dtype.itemsize < 4 else rounded


def add_product(sum_VD: Tensor, left_VT: Tensor, right_TD: Tensor) -> None:
    """sum += left right, in place, in the sum's dtype."""
    if left_VT.dtype == sum_VD.dtype:
        sum_VD.addmm_(left_VT, right_TD)
    else:
        sum_VD.add_(left_VT @ right_TD)


def chunk_logits(hidden_XD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, form: LogitForm) -> Tensor:
    """Logits of one chunk; both operands already went through `operand`."""
    logits_XV = (hidden_XD @ weight_VD.t()).to(form.statistic_dtype)
    if bias_V is not None:
        logits_XV.add_(bias_V)
    if form.softcap is not None:
        logits_XV.div_(form.softcap).tanh_().mul_(form.softcap)
    return logits_XV if form.temperature == 1.0 else logits_XV.div_(form.temperature)


def chunk_slope(logits_XV: Tensor, form: LogitForm) -> Tensor | float:
    """d logits / d product, taken before the logits are overwritten: a number unless there is a softcap."""
    if form.softcap is None:
        return 1.0 / form.temperature
    capped_XV = logits_XV * (form.temperature / form.softcap)
    return capped_XV.square_().neg_().add_(1.0).div_(form.temperature)


def chunks(num_tokens: int) -> Iterator[slice]:
    return (slice(i, min(i + TOKENS_PER_CHUNK, num_tokens)) for i in range(0, num_tokens, TOKENS_PER_CHUNK))


class Gradients:
    """Gradients of hidden states, matrix and bias, gathered chunk by chunk; only those that are needed."""

    def __init__(self, inputs: tuple[Tensor, Tensor, Tensor | None], needed: tuple[bool, ...], form: LogitForm) -> None:
        self.inputs, self.form = inputs, form
        hidden_TD, weight_VD, bias_V = inputs
        self.d_hidden_TD = torch.empty_like(hidden_TD, memory_format=torch.contiguous_format) if needed[0] else None
        self.d_weight_VD = torch.zeros_like(weight_VD, dtype=form.statistic_dtype) if needed[1] else None
        self.d_bias_V = None
        if needed[2] and bias_V is not None:
            self.d_bias_V = torch.zeros_like(bias_V, dtype=form.statistic_dtype)

    def add(self, rows: slice, d_logits_XV: Tensor, slope: Tensor | float, hidden_XD: Tensor, weight_VD: Tensor):
        """Takes one chunk's gradient of the logits (overwritten) back through the softcap and the product."""
        if isinstance(slope, Tensor) or slope != 1.0:
            d_logits_XV.mul_(slope)
        if self.d_bias_V is not None:
            self.d_bias_V.add_(d_logits_XV.sum(0))
        d_product_XV = operand(d_logits_XV, self.form)
        if self.d_hidden_TD is not None:
            self.d_hidden_TD[rows] = d_product_XV @ weight_VD
        if self.d_weight_VD is not None:
            add_product(self.d_weight_VD, d_product_XV.t(), hidden_XD)

    def cast(self) -> tuple[Tensor | None, ...]:
        sums = (self.d_hidden_TD, self.d_weight_VD, self.d_bias_V)
        return tuple(d if d is None or x is None else d.to(x.dtype) for d, x in zip(sums, self.inputs, strict=True))


def centre_logits(logits_XV: Tensor, has_bias: bool) -> Tensor:
    """Subtracts each row's maximum in place and returns it. A bias of −inf is made finite, so that 0 · log 0 = 0."""
    max_X = logits_XV.amax(1)
    logits_XV.sub_(max_X[:, None])
    if has_bias:
        logits_XV.clamp_(min=torch.finfo(logits_XV.dtype).min / 4)
    return max_X


def _chunk_statistics(logits_XV: Tensor, target_XC: Tensor, has_bias: bool, wanted: _Wanted) -> tuple[Any, ...]:
    """Statistics of one chunk as in TokenStats, then the maximum and log Σ exp(z − max); overwrites the logits."""
    argmax_X = logits_XV.argmax(1) if wanted.argmax else None
    mean_X = logits_XV.mean(1) if wanted.mean_logit else None
    max_X = centre_logits(logits_XV, has_bias)
    picked_XC = logits_XV.gather(1, target_XC.clamp(min=0))
    exp_XV = logits_XV.exp() if wanted.entropy else logits_XV.exp_()
    sum_X = exp_XV.sum(1)
    log_sum_X = sum_X.log()
    entropy_X = log_sum_X - logits_XV.mul_(exp_XV).sum(1) / sum_X if wanted.entropy else None
    sum_p2_X = exp_XV.square_().sum(1) / sum_X.square() if wanted.sum_p2 else None
    logprob_XC = (picked_XC - log_sum_X[:, None]).masked_fill_(target_XC < 0, 0.0)
    return logprob_XC, max_X + log_sum_X, entropy_X, argmax_X, sum_p2_X, mean_X, max_X, log_sum_X


class _ChunkedStatistics(torch.autograd.Function):
    """Saves the inputs and a few numbers per token; the backward makes each chunk's logits again."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias_V, target_TC, form, wanted):
        weight = operand(weight_VD, form)
        pieces = []
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for rows in chunks(len(hidden_TD)):
                logits_XV = chunk_logits(operand(hidden_TD[rows], form), weight, bias_V, form)
                pieces.append(_chunk_statistics(logits_XV, target_TC[rows], bias_V is not None, wanted))
        stats = [None if column[0] is None else torch.cat(column) for column in zip(*pieces, strict=True)]
        logprob_TC, lse_T, entropy_T, argmax_T, sum_p2_T, mean_T, max_T, log_sum_T = stats
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, target_TC, entropy_T, sum_p2_T, max_T, log_sum_T)
        ctx.form = form
        ctx.set_materialize_grads(False)
        if argmax_T is not None:
            ctx.mark_non_differentiable(argmax_T)
        return logprob_TC, lse_T, entropy_T, argmax_T, sum_p2_T, mean_T

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprob_TC, d_lse_T, d_entropy_T, _d_argmax_T, d_sum_p2_T, d_mean_T):
        hidden_TD, weight_VD, bias_V, target_TC, entropy_T, sum_p2_T, max_T, log_sum_T = ctx.saved_tensors
        form = ctx.form
        # d_z = e (a + b (z − max) + c e) + d_mean / V + scatter(d_logprob), where e = exp(z − max) and p = e / Σe.
        a_T = torch.zeros_like(max_T) if d_lse_T is None else d_lse_T.clone()
        b_T = c_T = None
        if d_logprob_TC is not None:
            d_logprob_TC = d_logprob_TC.masked_fill(target_TC < 0, 0.0)
            a_T -= d_logprob_TC.sum(1)
        if d_entropy_T is not None:
            a_T += d_entropy_T * (log_sum_T - entropy_T)
            b_T = -d_entropy_T / log_sum_T.exp()
        if d_sum_p2_T is not None:
            a_T -= 2 * d_sum_p2_T * sum_p2_T
            c_T = 2 * d_sum_p2_T / (2 * log_sum_T).exp()
        a_T /= log_sum_T.exp()
        weight = operand(weight_VD, form)
        gradients = Gradients((hidden_TD, weight_VD, bias_V), ctx.needs_input_grad, form)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for rows in chunks(len(hidden_TD)):
                hidden_XD = operand(hidden_TD[rows], form)
                d_XV = chunk_logits(hidden_XD, weight, bias_V, form)
                slope = chunk_slope(d_XV, form)
                d_XV.sub_(max_T[rows, None])
                if b_T is None:
                    factor = a_T[rows, None]
                else:
                    centred_XV = d_XV.clamp(min=torch.finfo(d_XV.dtype).min / 4)
                    factor = centred_XV.mul_(b_T[rows, None]).add_(a_T[rows, None])
                d_XV.exp_()
                if c_T is not None:
                    factor = factor + d_XV * c_T[rows, None]
                d_XV.mul_(factor)
                if d_mean_T is not None:
                    d_XV.add_(d_mean_T[rows, None] / len(weight_VD))
                if d_logprob_TC is not None:
                    d_XV.scatter_add_(1, target_TC[rows].clamp(min=0), d_logprob_TC[rows])
                gradients.add(rows, d_XV, slope, hidden_XD, weight)
        return *gradients.cast(), None, None, None


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The loss and its gradients in one pass; the backward only scales them by the upstream number."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias_V, target_T, form, terms):
        inputs = (hidden_TD, weight_VD, bias_V)
        needed = tuple(is_needed and terms.is_recorded for is_needed in ctx.needs_input_grad)
        gradients = Gradients(inputs, needed, form)
        weight = operand(weight_VD, form)
        smoothing = terms.label_smoothing
        loss = torch.zeros((), dtype=form.statistic_dtype, device=hidden_TD.device)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for rows in chunks(len(hidden_TD)):
                hidden_XD, target_X1 = operand(hidden_TD[rows], form), target_T[rows, None]
                logits_XV = chunk_logits(hidden_XD, weight, bias_V, form)
                slope = chunk_slope(logits_XV, form) if any(needed) else 1.0
                mean_X = logits_XV.mean(1) if smoothing else 0.0
                max_X = centre_logits(logits_XV, bias_V is not None)
                picked_X = logits_XV.gather(1, target_X1)[:, 0]
                sum_X = logits_XV.exp_().sum(1)
                log_sum_X = sum_X.log()
                lse_X = max_X + log_sum_X
                loss_X = (1 - smoothing) * (log_sum_X - picked_X) + smoothing * (lse_X - mean_X)
                loss += (loss_X + terms.z_loss * lse_X.square()).sum()
                if not any(needed):
                    continue
                d_lse_X = (1.0 + 2.0 * terms.z_loss * lse_X) * terms.scale
                d_XV = logits_XV.mul_((d_lse_X / sum_X)[:, None])
                if smoothing:
                    d_XV.sub_(smoothing * terms.scale / len(weight_VD))
                d_XV.scatter_add_(1, target_X1, d_XV.new_full(target_X1.shape, (smoothing - 1.0) * terms.scale))
                gradients.add(rows, d_XV, slope, hidden_XD, weight)
        ctx.save_for_backward(gradients.d_hidden_TD, gradients.d_weight_VD, gradients.d_bias_V)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return loss * terms.scale

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if d is None else (d * d_loss).to(dtype) for d, dtype in pairs), None, None, None


class _Implementation(NamedTuple):
    statistics: Callable[..., tuple[Tensor | None, ...]]
    cross_entropy: Callable[..., Tensor]


# The one place where a device's kernels enter: the Triton kernels replace the "cuda" entry, which until then is this
# same chunked path on the vendor's matrix products.
_CHUNKED = _Implementation(_ChunkedStatistics.apply, _ChunkedCrossEntropy.apply)
_IMPLEMENTATIONS: dict[str, _Implementation] = {"cpu": _CHUNKED, "cuda": _CHUNKED}


def implementation_for(table: dict[str, Any], x: Tensor) -> Any:
    """The table's entry for x's device."""
    if x.device.type not in table:
        raise ValueError(f"no implementation for device {x.device.type!r}; expected {sorted(table)}: move the inputs")
    return table[x.device.type]


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None) -> None:
    """Refuses shapes and numbers that cannot be a softmax over a vocabulary."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"hidden and weight have shapes {shapes}; expected [T, D] and [V, D]: pack the tokens")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({len(weight)},): one number per row of weight")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected > 0: for greedy choices ask for argmax=True")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; expected > 0, or None for no cap")


def _check_target(target: Tensor, hidden: Tensor, num_entries: int, ignore_index: int) -> None:
    if target.dtype not in (torch.int64, torch.int32) or target.dim() not in (1, 2) or len(target) != len(hidden):
        received = f"{target.dtype} of shape {tuple(target.shape)}"
        expected = f"int64 or int32 of shape ({len(hidden)},) or ({len(hidden)}, C)"
        raise ValueError(f"target is {received}; expected {expected}: one row of targets per hidden state")
    is_bad = ((target < 0) | (target >= num_entries)) & (target != ignore_index)
    if is_bad.any():
        where = is_bad.nonzero()[0].tolist()
        value = target[tuple(where)].item()
        position = where[0] if len(where) == 1 else tuple(where)
        remedy = f"expected 0 to {num_entries - 1}, or ignore_index {ignore_index}: check the tokenizer's size"
        raise ValueError(f"target at position {position} is {value}; {remedy}")


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
) -> TokenStats:
    """Log-probability of each target, and what else is asked for, differentiable (argmax aside), without full logits.

    `target_T` may be [T, C]: then `logprob_T` is [T, C], and a token all of whose targets are ignored is dropped. CPU
    and CUDA both run the chunked torch path. `product_dtype=torch.float32` is the fp32 head.
    """
    check_head(hidden_TD, weight_VD, bias_V, temperature, softcap)
    _check_target(target_T, hidden_TD, len(weight_VD), ignore_index)
    implementation = implementation_for(_IMPLEMENTATIONS, hidden_TD)
    wanted = _Wanted(entropy, argmax, sum_p2, mean_logit)
    dtype = statistic_dtype(hidden_TD, weight_VD, bias_V)
    form = LogitForm(temperature, softcap, product_dtype or hidden_TD.dtype, dtype)
    target_TC = (target_T if target_T.dim() == 2 else target_T[:, None]).long()
    target_TC = target_TC.masked_fill(target_TC == ignore_index, -1)
    kept_TD, kept_target_TC, kept_T = drop_tokens((target_TC >= 0).any(1), hidden_TD, target_TC)
    if len(kept_TD):
        stats = implementation.statistics(kept_TD, weight_VD, bias_V, kept_target_TC, form, wanted)
    else:
        stats = _empty_statistics((kept_TD, weight_VD, bias_V), kept_target_TC, dtype, wanted)
    stats = [None if stat is None else restore_tokens(stat, kept_T, len(hidden_TD)) for stat in stats]
    return TokenStats(stats[0].view(target_T.shape), *stats[1:])


def drop_tokens(keep_T: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
    """The kept rows of each tensor, and their positions: None where all are kept, which copies nothing."""
    if keep_T.all():
        return *tensors, None
    kept_T = keep_T.nonzero()[:, 0]
    return *(x.index_select(0, kept_T) for x in tensors), kept_T


def restore_tokens(values: Tensor, kept_T: Tensor | None, num_tokens: int) -> Tensor:
    """Puts kept rows back among zeros."""
    if kept_T is None:
        return values
    return values.new_zeros(num_tokens, *values.shape[1:]).index_copy(0, kept_T, values)


def nothing(inputs: tuple[Tensor | None, ...], dtype: torch.dtype) -> Tensor:
    """The number 0, whose gradients with respect to the inputs are zeros rather than None."""
    return torch.stack([x.narrow(0, 0, 0).sum(dtype=dtype) for x in inputs if x is not None]).sum()


def _empty_statistics(inputs: tuple, target_TC: Tensor, dtype: torch.dtype, wanted: _Wanted) -> tuple[Any, ...]:
    zero_TC = nothing(inputs, dtype).expand(target_TC.shape)
    zero_T = nothing(inputs, dtype).expand(0)
    asked = (wanted.entropy, wanted.argmax, wanted.sum_p2, wanted.mean_logit)
    values = (zero_T, target_TC.new_zeros(0), zero_T, zero_T)
    return zero_TC, zero_T, *(x if is_asked else None for x, is_asked in zip(values, asked, strict=True))


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
) -> Tensor:
    """Cross-entropy of hidden weightᵀ, without full logits; "mean" divides by the number of tokens not ignored.

    `z_loss` adds z_loss · lse² per counted token. Over no tokens the loss is 0 with zero gradients. "mean" and "sum"
    form their gradients in the forward pass. CPU and CUDA both run the chunked torch path.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean', 'sum' or 'none'")
    if target_T.dim() != 1:
        raise ValueError(f"target has shape {tuple(target_T.shape)}; expected [T]: linear_logprob takes [T, C]")
    if reduction == "none":
        stats = linear_logprob(
            hidden_TD,
            weight_VD,
            target_T,
            bias_V=bias_V,
            softcap=softcap,
            ignore_index=ignore_index,
            mean_logit=label_smoothing != 0.0,
            product_dtype=product_dtype,
        )
        loss_T = (label_smoothing - 1.0) * stats.logprob_T + z_loss * stats.lse_T.square()
        return loss_T if stats.mean_logit_T is None else loss_T + label_smoothing * (stats.lse_T - stats.mean_logit_T)
    check_head(hidden_TD, weight_VD, bias_V, 1.0, softcap)
    _check_target(target_T, hidden_TD, len(weight_VD), ignore_index)
    implementation = implementation_for(_IMPLEMENTATIONS, hidden_TD)
    dtype = statistic_dtype(hidden_TD, weight_VD, bias_V)
    form = LogitForm(1.0, softcap, product_dtype or hidden_TD.dtype, dtype)
    kept_TD, kept_target_T, _ = drop_tokens(target_T != ignore_index, hidden_TD, target_T.long())
    if not len(kept_TD):
        return nothing((kept_TD, weight_VD, bias_V), dtype)
    scale = 1.0 / len(kept_TD) if reduction == "mean" else 1.0
    terms = _LossTerms(z_loss, label_smoothing, scale, torch.is_grad_enabled())
    return implementation.cross_entropy(kept_TD, weight_VD, bias_V, kept_target_T, form, terms)
