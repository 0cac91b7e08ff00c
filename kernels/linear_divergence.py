"""Divergences between a teacher's and a student's next-token distributions, straight from both sides' hidden states.

**Math** t and s are the softmaxes of the teacher's and the student's logits z (made as in linear_logprob, both divided
  by the temperature, with no T² factor), m = β t + (1 − β) s. Per token, with the gradient in the student's logits:
    forward_kl  Σ t log(t/s)                      s − t
    reverse_kl  KL = Σ s log(s/t)                 s (log(s/t) − KL)
    jsd         β KL(t‖m) + (1 − β) KL(s‖m)       (1 − β) s (log(s/m) − KL(s‖m))
  jsd tends to 0 as β tends to 0 or 1, so the ends are refused rather than read as one of the KLs.
  Divergences from a cached top k are in `linear_topk`, and importable from here.
**Shapes** hidden [T, D], weight [V, D], teacher_hidden [T, U], teacher_weight [V, U] → divergence [T].
**Dtypes** As in linear_logprob: products in `product_dtype` (default: each side's hidden dtype), accumulated in fp32; the rest
  fp32, or fp64 if any input is fp64.
**Traffic** 2TV(D + U) FLOPs forward; 2TV(D + U) + 4TVD backward, which makes both sides' logits again. Memory: see
  `vocabulary_sweep`; the jsd alone keeps logits, of both sides, in its forward.
**Source** GKD, arXiv 2306.13649 (the jsd; its reference weighting); MiniLLM, arXiv 2306.08543 (reverse KL).
**Limits** The teacher is a constant: it never gets a gradient, required or not. With a `group` the jsd gathers twice: its
  mixture needs both sides' normalisers first. First derivatives only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear_logprob import check_head, needed_gradients, reference_logits, shard_of
from .linear_topk import check_mask, linear_topk, linear_topk_divergence
from .logit_block import (
    KINDS,
    Coefficient,
    Divergence,
    LogitMap,
    PairStatistic,
    Side,
    divergence_reference,
    logit_block,
    new_pair_statistics,
)
from .vocabulary_sweep import (
    Chunk,
    Form,
    Gradients,
    Head,
    Needed,
    Shard,
    chunks,
    combine_pair_statistics,
    gather,
    reduce_d_hidden,
    statistic_dtype,
    sweep,
    underflow_factor,
    valid_rows,
    written_over,
)

__all__ = ["linear_divergence", "linear_divergence_reference", "linear_topk", "linear_topk_divergence"]


def linear_divergence_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    teacher_hidden_TU: Tensor,
    teacher_weight_VU: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    mask_T: Tensor | None = None,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    teacher_bias_V: Tensor | None = None,
    teacher_softcap: float | None = None,
) -> Tensor:
    """The divergence from the full logits of both sides."""
    student = reference_logits(hidden_TD, weight_VD, bias_V, temperature, softcap)
    with torch.no_grad():
        teacher = reference_logits(teacher_hidden_TU, teacher_weight_VU, teacher_bias_V, temperature, teacher_softcap)
    value_T = divergence_reference(Side(student, None, LogitMap()), Side(teacher, None, LogitMap()), Divergence(kind, beta))
    return value_T if mask_T is None else value_T.masked_fill(~mask_T, 0.0)


# ---- Forward and backward, on every device ----


class Call(NamedTuple):
    """The options of one call, as the registered operator takes them."""

    divergence: Divergence
    temperature: float
    softcap: float | None
    teacher_softcap: float | None
    product_dtype: torch.dtype | None
    shard: Shard
    reduce_d_hidden: bool = True


class Inputs(NamedTuple):
    hidden_TD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    teacher_hidden_TU: Tensor
    teacher_weight_VU: Tensor
    teacher_bias_V: Tensor | None
    mask_T: Tensor | None


class _Pair:
    """A student and a teacher with the tokens that are computed: those of the mask, or all, with those dropped marked."""

    def __init__(self, inputs: Inputs, call: Call):
        self.inputs, self.call = inputs, call
        self.student = self._head(inputs[:3], call.softcap)
        self.teacher = self._head(inputs[3:6], call.teacher_softcap)
        self.blocking, self.steps = self.student.form.blocking, logit_block(inputs.hidden_TD.device)
        self.kept_T = self.dropped_T = None
        if inputs.mask_T is not None and not self.blocking.leaves_out:
            self.dropped_T = ~inputs.mask_T
        elif inputs.mask_T is not None and not inputs.mask_T.all():
            self.kept_T = inputs.mask_T.nonzero()[:, 0]
        self.hidden_XD, self.teacher_hidden_XU = map(self.kept, (inputs.hidden_TD, inputs.teacher_hidden_TU))
        self.like = self.hidden_XD.new_empty(0, dtype=self.student.form.statistic_dtype)

    def _head(self, side: tuple[Tensor, Tensor, Tensor | None], softcap: float | None) -> Head:
        """Multiplies in its own hidden states' dtype, if no other is asked for; both sides' statistics have the wider one."""
        form = Form.of((*side, *self.inputs[:6]), self.call.temperature, softcap, self.call.product_dtype)
        return Head(*valid_rows(side[1], side[2], self.call.shard), form)

    def kept(self, x_T: Tensor) -> Tensor:
        return x_T if self.kept_T is None else x_T[self.kept_T]

    def restored(self, x_X: Tensor) -> Tensor:
        """Among the zeros of tokens that do not count."""
        num_tokens = len(self.inputs.hidden_TD)
        if self.kept_T is not None:
            return x_X.new_zeros(num_tokens, *x_X.shape[1:]).index_copy_(0, self.kept_T, x_X)
        mask_T = self.inputs.mask_T
        return x_X if mask_T is None else x_X.masked_fill(~mask_T.view(-1, *[1] * (x_X.dim() - 1)), 0.0)

    def chunks(self, elements: int, columns: int) -> Iterator[tuple[Chunk, Chunk]]:
        num_tokens = self.student.tokens_per_chunk(elements, columns)
        sides = ((self.hidden_XD, self.student), (self.teacher_hidden_XU, self.teacher))
        return zip(*(chunks(hidden, num_tokens, head.form, self.dropped_T) for hidden, head in sides), strict=True)

    def blocks(self, pair: tuple[Chunk, Chunk], are_kept: bool = False) -> Iterator[tuple[slice, Side, Side]]:
        """(tokens, both sides) of every block of a chunk."""
        sweeps = (sweep(chunk, head, are_kept) for chunk, head in zip(pair, (self.student, self.teacher), strict=True))
        return ((tokens, student, teacher) for (_, tokens, student), (_, _, teacher) in zip(*sweeps, strict=True))


def _forward(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence [T], the student's and the teacher's [MAX, LOG_SUM, value] [3, X]); the value is that which the gradient
    needs, and X the tokens that are computed."""
    pair, kind = _Pair(inputs, call), call.divergence.kind
    statistics = new_pair_statistics(len(pair.hidden_XD), pair.like)
    with torch.autocast(inputs.hidden_TD.device.type, enabled=False):
        if kind == "jsd" and call.shard.group_name is None:
            return _jsd_of_kept_blocks(pair, statistics)
        for chunk in pair.chunks(pair.blocking.backward_elements, pair.blocking.columns):
            for tokens, student, teacher in pair.blocks(chunk):
                pair.steps.pair_statistics(student, teacher, call.divergence, statistics[:, tokens])
        whole = combine_pair_statistics(gather(statistics, call.shard), kind)
        student_table, teacher_table = _tables(whole)
        if kind == "jsd":
            return _jsd_of_a_group(pair, student_table, teacher_table)
    row = PairStatistic
    total, other = (row.TEACHER_SUM, row.SUM) if kind == "forward_kl" else (row.SUM, row.TEACHER_SUM)
    student_table[2] = whole[row.CROSS] / whole[total] + (whole[other] / whole[total]).log()
    return pair.restored(student_table[2].clone()), student_table, teacher_table


def _tables(whole: Tensor) -> tuple[Tensor, Tensor]:
    row, tables = PairStatistic, []
    for maximum, total in ((row.MAX, row.SUM), (row.TEACHER_MAX, row.TEACHER_SUM)):
        tables.append(torch.stack([whole[maximum], whole[total].log(), torch.zeros_like(whole[total])]))
    return tables[0], tables[1]


def _jsd_of_kept_blocks(pair: _Pair, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each product once: a chunk's blocks of both sides are kept from its statistics to its divergence."""
    sums = statistics.new_zeros(2, statistics.shape[1])
    tables = statistics.new_zeros(2, 3, statistics.shape[1])
    for chunk in pair.chunks(pair.blocking.kept_elements // 2, len(pair.student.weight_VD)):
        blocks = list(pair.blocks(chunk, are_kept=True))
        for tokens, student, teacher in blocks:
            pair.steps.pair_statistics(student, teacher, pair.call.divergence, statistics[:, tokens])
        here = chunk[0].tokens
        tables[0, :, here], tables[1, :, here] = _tables(statistics[:, here])
        for tokens, student, teacher in blocks:
            normalisers = (tables[0, :, tokens], tables[1, :, tokens])
            pair.steps.divergence(student, teacher, pair.call.divergence.beta, normalisers, sums[:, tokens])
    return _jsd(pair, sums, tables[0], tables[1])


def _jsd_of_a_group(pair: _Pair, student_table: Tensor, teacher_table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With the group's normalisers, which are known only once all ranks have walked over their rows: products again."""
    sums = student_table.new_zeros(2, student_table.shape[1])
    for chunk in pair.chunks(pair.blocking.backward_elements, pair.blocking.columns):
        for tokens, student, teacher in pair.blocks(chunk):
            normalisers = (student_table[:, tokens], teacher_table[:, tokens])
            pair.steps.divergence(student, teacher, pair.call.divergence.beta, normalisers, sums[:, tokens])
    return _jsd(pair, gather(sums, pair.call.shard).sum(0), student_table, teacher_table)


def _jsd(pair: _Pair, sums: Tensor, student_table: Tensor, teacher_table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    beta = pair.call.divergence.beta
    student_table[2] = sums[1]
    return pair.restored(beta * sums[0] + (1.0 - beta) * sums[1]), student_table, teacher_table


def _backward(
    inputs: Inputs, tables: tuple[Tensor, Tensor], d_value_T: Tensor, needed: tuple[bool, bool, bool], call: Call
) -> tuple[Tensor | None, ...]:
    """(d_hidden, d_weight, d_bias), those that are needed."""
    pair = _Pair(inputs, call)
    mask_T, blocking = inputs.mask_T, pair.blocking
    upstream_T = d_value_T if mask_T is None else d_value_T.masked_fill(~mask_T, 0.0)
    coefficients = pair.like.new_zeros(len(Coefficient), len(pair.hidden_XD))
    coefficients[Coefficient.MAX], coefficients[Coefficient.LOG_SUM], coefficients[Coefficient.B] = tables[0]
    coefficients[Coefficient.A] = pair.kept(upstream_T)
    factor = underflow_factor(pair.student.form, coefficients[Coefficient.A])
    if factor is not None:
        coefficients[Coefficient.A] /= factor
    asked = Needed(*needed, len(inputs.weight_VD), call.shard.group_name is not None and call.reduce_d_hidden)
    num_tokens = pair.student.tokens_per_chunk(blocking.backward_elements, blocking.backward_columns)
    gradients = Gradients(pair.hidden_XD, pair.student, asked, -(-len(pair.hidden_XD) // num_tokens), factor)
    with torch.autocast(inputs.hidden_TD.device.type, enabled=False):
        for chunk, teacher_chunk in pair.chunks(blocking.backward_elements, blocking.backward_columns):
            gradients.begin(chunk)
            for columns in pair.student.columns(blocking.backward_columns):
                block = pair.like.new_empty(chunk.num_padded, columns.stop - columns.start)
                out = written_over(block, pair.student.form)
                for rows in chunk.rows(columns, pair.student.form):
                    here, tokens = chunk.inside(rows), chunk.of_batch(rows)
                    teacher_block = torch.empty_like(block[rows])
                    chunk.products(rows, pair.student, columns, block[rows])
                    teacher_chunk.products(rows, pair.teacher, columns, teacher_block)
                    student = pair.student.side(block[here], columns)
                    teacher = pair.teacher.side(teacher_block[: here.stop - here.start], columns)
                    at = (coefficients[:, tokens], tables[1][:, tokens])
                    pair.steps.divergence_gradient(student, teacher, call.divergence, *at, out[here])
                gradients.add(columns, out)
            gradients.end()
    d_hidden, d_weight, d_bias = gradients.finished()
    if d_hidden is not None:
        d_hidden = pair.restored(reduce_d_hidden(d_hidden, call.shard) if call.reduce_d_hidden else d_hidden)
    pairs = zip((d_hidden, d_weight, d_bias), inputs, strict=False)
    return tuple(None if d is None or x is None else d.to(x.dtype) for d, x in pairs)


# ---- The registered operators, for compiled callers ----


def _call_of(kind: str, beta: float, options: tuple) -> Call:
    temperature, softcap, teacher_softcap, product_dtype, vocab_start, vocab_size, group_name, reduce_d_hidden = options
    shard = Shard(vocab_start, vocab_size, group_name)
    return Call(Divergence(kind, beta), temperature, softcap, teacher_softcap, product_dtype, shard, reduce_d_hidden)


@torch.library.custom_op("warpline::linear_divergence", mutates_args=())
def _divergence_op(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, teacher_hidden_TU: Tensor, teacher_weight_VU: Tensor,
    teacher_bias_V: Tensor | None, mask_T: Tensor | None, kind: str, beta: float, temperature: float, softcap: float | None,
    teacher_softcap: float | None, product_dtype: torch.dtype | None, vocab_start: int, vocab_size: int,
    group_name: str | None, reduce_d_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = Inputs(hidden_TD, weight_VD, bias_V, teacher_hidden_TU, teacher_weight_VU, teacher_bias_V, mask_T)
    options = (temperature, softcap, teacher_softcap, product_dtype, vocab_start, vocab_size, group_name, reduce_d_hidden)
    return _padded(_forward(inputs, _call_of(kind, beta, options)), inputs)


def _padded(values: tuple[Tensor, Tensor, Tensor], inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """With tables of all T tokens, so that no shape depends on the mask's content; what is behind X is not read."""
    value_T, *tables = values
    padded = (torch.nn.functional.pad(table, (0, len(inputs.hidden_TD) - table.shape[1])) for table in tables)
    return value_T.clone(), *padded  # type: ignore[return-value]


@_divergence_op.register_fake
def _(hidden_TD, weight_VD, bias_V, *rest):
    value_T = hidden_TD.new_empty(hidden_TD.shape[0], dtype=statistic_dtype(hidden_TD, weight_VD, bias_V, *rest[:3]))
    return value_T, *(value_T.new_empty(3, hidden_TD.shape[0]) for _ in range(2))


@torch.library.custom_op("warpline::linear_divergence_backward", mutates_args=())
def _divergence_backward_op(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, teacher_hidden_TU: Tensor, teacher_weight_VU: Tensor,
    teacher_bias_V: Tensor | None, mask_T: Tensor | None, student_table: Tensor, teacher_table: Tensor, d_value_T: Tensor,
    needed: list[bool], kind: str, beta: float, temperature: float, softcap: float | None, teacher_softcap: float | None,
    product_dtype: torch.dtype | None, vocab_start: int, vocab_size: int, group_name: str | None, reduce_d_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = Inputs(hidden_TD, weight_VD, bias_V, teacher_hidden_TU, teacher_weight_VU, teacher_bias_V, mask_T)
    options = (temperature, softcap, teacher_softcap, product_dtype, vocab_start, vocab_size, group_name, reduce_d_hidden)
    call = _call_of(kind, beta, options)
    num_kept = len(_Pair(inputs, call).hidden_XD)
    tables = (student_table[:, :num_kept], teacher_table[:, :num_kept])
    gradients = _backward(inputs, tables, d_value_T, (needed[0], needed[1], needed[2]), call)
    return tuple(hidden_TD.new_empty(0) if d is None else d for d in gradients)  # type: ignore[return-value]


@_divergence_backward_op.register_fake
def _(hidden_TD, weight_VD, bias_V, *rest):
    pairs = zip((hidden_TD, weight_VD, bias_V), rest[7], strict=True)
    return tuple(x.new_empty(x.shape) if x is not None and asked else hidden_TD.new_empty(0) for x, asked in pairs)


def _save_for_op(ctx, inputs, output):
    ctx.options = inputs[7:]
    ctx.save_for_backward(*inputs[:7], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward_of_op(ctx, d_value_T, *_):
    needed = [bool(asked) for asked in ctx.needs_input_grad[:3]]
    gradients = _divergence_backward_op(*ctx.saved_tensors, d_value_T, needed, *ctx.options)
    return *(d if asked else None for d, asked in zip(gradients, needed, strict=True)), *[None] * (4 + len(ctx.options))


_divergence_op.register_autograd(_backward_of_op, setup_context=_save_for_op)


# ---- Autograd, for eager callers ----


class _LinearDivergence(torch.autograd.Function):
    """Saves the inputs and three numbers per token and side."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias_V, teacher_hidden_TU, teacher_weight_VU, teacher_bias_V, mask_T, call):
        inputs = Inputs(hidden_TD, weight_VD, bias_V, teacher_hidden_TU, teacher_weight_VU, teacher_bias_V, mask_T)
        value_T, *tables = _forward(inputs, call)
        ctx.save_for_backward(*inputs, *tables)
        ctx.call = call
        return value_T

    @staticmethod
    @once_differentiable
    def backward(ctx, d_value_T):
        tensors = ctx.saved_tensors  # read once: a non-reentrant checkpoint allows no more
        inputs, tables = Inputs(*tensors[:7]), tensors[7:]
        needed = needed_gradients(ctx, inputs.bias_V is not None)
        return *_backward(inputs, tables, d_value_T, needed, ctx.call), *[None] * 5


# ---- The public functions ----


def linear_divergence(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    teacher_hidden_TU: Tensor,
    teacher_weight_VU: Tensor,
    *,
    kind: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    mask_T: Tensor | None = None,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    teacher_bias_V: Tensor | None = None,
    teacher_softcap: float | None = None,
    product_dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    reduce_d_hidden: bool = True,
) -> Tensor:
    """Divergence of each token, differentiable in the student; the teacher, of any width, is a constant.

    Tokens where `mask_T` is False yield 0. With `group`, both matrices are sharded alike (see `linear_logprob`).
    CPU: torch, block by block, on the tokens of the mask. CUDA: the vendor's products of all tokens, Triton between them.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {list(KINDS)}")
    if kind == "jsd" and not 0.0 < beta < 1.0:
        raise ValueError(f"beta is {beta}; jsd expects 0 < beta < 1: at the ends use kind='forward_kl' or 'reverse_kl'")
    check_head(hidden_TD, weight_VD, bias_V, temperature, softcap, product_dtype)
    check_head(teacher_hidden_TU, teacher_weight_VU, teacher_bias_V, temperature, teacher_softcap, product_dtype)
    if len(hidden_TD) != len(teacher_hidden_TU) or len(weight_VD) != len(teacher_weight_VU):
        sizes, teacher_sizes = (len(hidden_TD), len(weight_VD)), (len(teacher_hidden_TU), len(teacher_weight_VU))
        raise ValueError(f"the teacher has (T, V) = {teacher_sizes}; expected the student's {sizes}: share the tokenizer")
    check_mask(mask_T, hidden_TD)
    shard = shard_of(weight_VD, group, vocab_start, vocab_size)
    teacher = (None if x is None else x.detach() for x in (teacher_hidden_TU, teacher_weight_VU, teacher_bias_V))
    tensors = (hidden_TD, weight_VD, bias_V, *teacher, mask_T)
    beta = beta if kind == "jsd" else 0.5
    if torch.compiler.is_compiling():
        options = (temperature, softcap, teacher_softcap, product_dtype, *shard, reduce_d_hidden)
        return _divergence_op(*tensors, kind, beta, *options)[0]
    call = Call(Divergence(kind, beta), temperature, softcap, teacher_softcap, product_dtype, shard, reduce_d_hidden)
    return _LinearDivergence.apply(*tensors, call)
