"""The walk of every loss over the vocabulary: matrix products block by block, and what they share between ranks.

**Math** product = hidden weightᵀ, d_hidden = d_product weight, d_weight = d_productᵀ hidden, in blocks of rows × columns;
  between the products, the steps of `logit_block`. With a `group`, each rank walks over its own rows of the matrix.
**Shapes** hidden [T, D], weight [V, D], bias [V]; statistics [N, T].
**Dtypes** operands are rounded to `product_dtype`; products accumulate in `statistic_dtype`, fp64 if any input is fp64,
  else fp32; so do d_hidden and d_weight over blocks, and each is cast once, at the end.
**Traffic** 2·T·D·V FLOPs a product. Memory beside inputs, outputs and the accumulator of d_weight: one block of
  `elements` forward; one of `backward_elements`, and d_hidden's sum of as many tokens, in a backward; `kept_elements`, at
  least rows × V, where a loss needs all logits of a token twice (`Blocking`). Nothing grows with T.
**Why blocks** The vendor's matrix product is the ceiling, so it does the products. A forward block is made small enough
  to stay in the cache between the product that writes it and the step that reads it.
**Same bits** Every product that makes logits or d_hidden has exactly `rows` rows, the last of a chunk padded with zeros,
  and widths that depend on V and D alone: a token's numbers are bitwise independent of the other tokens.
**Source** Megatron-LM's vocab-parallel cross-entropy, arXiv 1909.08053 (which partial numbers the ranks exchange).
**Limits** torch's CPU products do not return their fp32 accumulator, so there bf16 and fp16 operands are rounded and then
  multiplied in fp32. Tokens that do not count are left out on the CPU; on CUDA, where that would read the device, their
  hidden states count as zeros and their products are computed. With fp16 products, the power of two that keeps a
  gradient's factor from underflowing is the batch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .logit_block import LogitMap, PairStatistic, Side, Statistic, Wanted


class Blocking(NamedTuple):
    """Sizes of the walk, none of which depends on T: rows of every product; columns and elements of a forward's block, and of
    a backward's; elements of the logits that are kept from a forward to its gradient. And whether tokens that do not count
    are left out of the products, which reads the device."""

    rows: int
    columns: int
    elements: int
    backward_columns: int
    backward_elements: int
    kept_elements: int
    leaves_out: bool = True

    def tokens(self, elements: int, width: int) -> int:
        """How many tokens make that many elements with this many columns, in whole products: one at least."""
        return max(1, elements // max(1, width) // self.rows) * self.rows


BLOCKING = {
    # AMD EPYC (Zen 3), 2 threads, fp32, torch 2.13, cross-entropy forward + backward against torch's full logits, medians,
    # 2026-11-25: T=4096 D=512 V=32768: 0.62; 128 rows 0.71, 512 rows 0.60; 2048 to 8192 columns alike. T=4096 D=128 V=1024:
    # 1.45, of which 1.2 are the products' smaller pieces; 512 rows 1.3.
    "cpu": Blocking(256, 4096, 2**20, 4096, 2**22, 2**24),
    # One wave of 128 x 256 tiles on 132 multiprocessors, and 16 MiB of fp32 logits to stay in the L2; 256 MiB in a backward,
    # so that d_hidden's accumulator is passed over seldom; 1 GiB kept. Unmeasured.
    "cuda": Blocking(1024, 4096, 2**22, 8192, 2**26, 2**28, leaves_out=False),
}


@dataclass(frozen=True)
class Form:
    """How one distribution is computed: the map to logits, dtypes and block sizes."""

    map: LogitMap
    product_dtype: torch.dtype
    statistic_dtype: torch.dtype
    blocking: Blocking

    @classmethod
    def of(
        cls, inputs: tuple[Tensor | None, ...], temperature: float, softcap: float | None, product_dtype: torch.dtype | None
    ) -> Form:
        """The form of a head: `inputs` are its hidden states, matrix and bias, and whatever else decides the precision."""
        hidden = inputs[0]
        assert hidden is not None
        logit_map = LogitMap(temperature, softcap)
        return cls(logit_map, product_dtype or hidden.dtype, statistic_dtype(*inputs), BLOCKING[hidden.device.type])


class Shard(NamedTuple):
    """Which part of the vocabulary is here: ids from `start`, of `size` in all, sharded over the named group (None: all)."""

    start: int
    size: int
    group_name: str | None = None


class Head(NamedTuple):
    """An output matrix [V, D] (its valid rows only) with its bias [V] and its form."""

    weight_VD: Tensor
    bias_V: Tensor | None
    form: Form

    def side(self, product: Tensor, columns: slice) -> Side:
        return Side(product, None if self.bias_V is None else self.bias_V[columns], self.form.map)

    def tokens_per_chunk(self, elements: int, columns: int) -> int:
        return self.form.blocking.tokens(elements, min(columns, len(self.weight_VD)))

    def columns(self, width: int) -> Iterator[slice]:
        num_columns = len(self.weight_VD)
        return (slice(start, min(start + width, num_columns)) for start in range(0, num_columns, width))


def statistic_dtype(*inputs: Tensor | None) -> torch.dtype:
    """fp64 if any input is fp64, else fp32."""
    is_double = any(x is not None and x.dtype == torch.float64 for x in inputs)
    return torch.float64 if is_double else torch.float32


def valid_rows(weight_VD: Tensor, bias_V: Tensor | None, shard: Shard) -> tuple[Tensor, Tensor | None]:
    """Without the rows at or past the vocabulary's size, which are padding; the bias as kernels read it, without gaps."""
    num_valid = min(len(weight_VD), max(0, shard.size - shard.start))
    return weight_VD[:num_valid], None if bias_V is None else bias_V[:num_valid].contiguous()


def operand(x: Tensor, form: Form) -> Tensor:
    """x as a product takes it: rounded to the product's dtype, on a CPU stored in the dtype the product accumulates in."""
    rounded = x.to(form.product_dtype)
    return rounded.float() if rounded.dtype.itemsize < 4 and not rounded.is_cuda else rounded


def multiply(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> None:
    """out = left right, or out += left right, accumulated in out's dtype where the device's product can."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=int(add), out=out)
    elif left.is_cuda and out.dtype == torch.float32:
        if add:
            torch.ops.aten.addmm.dtype_out(out, left, right, torch.float32, out=out)
        else:
            torch.ops.aten.mm.dtype_out(left, right, torch.float32, out=out)
    elif add:
        out.add_(left @ right)
    else:
        out.copy_(left @ right)


class Chunk:
    """Hidden states of consecutive tokens as products take them, in blocks of exactly `rows` rows; zeros for those dropped."""

    def __init__(self, hidden_TD: Tensor, tokens: slice, form: Form, dropped_T: Tensor | None = None):
        self.tokens, self.size = tokens, tokens.stop - tokens.start
        self.num_rows = form.blocking.rows
        hidden_XD = hidden_TD[tokens] if dropped_T is None else hidden_TD[tokens].masked_fill(dropped_T[tokens, None], 0.0)
        self.hidden_XD = operand(hidden_XD, form).contiguous()
        self.num_padded = -(-self.size // self.num_rows) * self.num_rows
        tail = self.size - self.size % self.num_rows
        self.tail_RD = None
        if tail < self.size:
            self.tail_RD = self.hidden_XD.new_zeros(self.num_rows, self.hidden_XD.shape[1])
            self.tail_RD[: self.size - tail] = self.hidden_XD[tail:]

    def rows(self, columns: slice, form: Form) -> Iterator[slice]:
        """The chunk's rows, padding included, in parts that with these columns make a forward's block."""
        part = form.blocking.tokens(form.blocking.elements, columns.stop - columns.start)
        return (slice(start, min(start + part, self.num_padded)) for start in range(0, self.num_padded, part))

    def products(self, rows: slice, head: Head, columns: slice, out: Tensor) -> None:
        """out [rows, W] = some of the chunk's hidden states times some rows of the matrix, `num_rows` at a time."""
        weight_DW = operand(head.weight_VD[columns], head.form).t()
        for start in range(rows.start, rows.stop, self.num_rows):
            stop = start + self.num_rows
            hidden_RD = self.hidden_XD[start:stop] if stop <= self.size or self.tail_RD is None else self.tail_RD
            multiply(hidden_RD, weight_DW, out[start - rows.start : stop - rows.start])

    def inside(self, rows: slice) -> slice:
        """Without the padding."""
        return slice(rows.start, min(rows.stop, self.size))

    def of_batch(self, rows: slice) -> slice:
        """The batch's tokens in some of the chunk's rows."""
        inside = self.inside(rows)
        return slice(self.tokens.start + inside.start, self.tokens.start + inside.stop)


def chunks(hidden_TD: Tensor, num_tokens: int, form: Form, dropped_T: Tensor | None = None) -> Iterator[Chunk]:
    for start in range(0, len(hidden_TD), num_tokens):
        yield Chunk(hidden_TD, slice(start, min(start + num_tokens, len(hidden_TD))), form, dropped_T)


def written_over(block: Tensor, form: Form) -> Tensor:
    """The block's memory as the gradient step writes it: in the product's dtype on CUDA, row by row; else as it is."""
    dtype = form.product_dtype if block.is_cuda else block.dtype
    return block if dtype == block.dtype else block.view(dtype)[:, : block.shape[1]]


def sweep(chunk: Chunk, head: Head, are_kept: bool = False) -> Iterator[tuple[slice, slice, Side]]:
    """(columns, tokens of the batch, their part of a block) of a forward, one block after the other: in the same memory, or
    where they are kept each in its own."""
    form = head.form
    elements = min(max(form.blocking.elements, chunk.num_rows * form.blocking.columns), chunk.num_padded * len(head.weight_VD))
    buffer = chunk.hidden_XD.new_empty(elements, dtype=form.statistic_dtype)
    for columns in head.columns(form.blocking.columns):
        width = columns.stop - columns.start
        for rows in chunk.rows(columns, form):
            shape = (rows.stop - rows.start, width)
            block = buffer.new_empty(shape) if are_kept else buffer[: shape[0] * width].view(shape)
            chunk.products(rows, head, columns, block)
            tokens = chunk.of_batch(rows)
            yield columns, tokens, head.side(block[: tokens.stop - tokens.start], columns)


class Needed(NamedTuple):
    """Which gradients are asked for; the matrix's rows, padding included, whose gradient is zero; and whether what is gathered
    of d_hidden and of d_weight stays in the statistics' dtype, because something is still to be done to it."""

    hidden: bool
    weight: bool
    bias: bool
    num_rows: int
    keeps_hidden: bool = False
    keeps_weight: bool = False


class Gradients:
    """d_hidden, d_weight and d_bias of one head, gathered block by block and times `factor`; only those that are needed."""

    def __init__(self, hidden_TD: Tensor, head: Head, needed: Needed, num_chunks: int, factor: Tensor | None = None):
        self.head, self.num_valid, dtype = head, len(head.weight_VD), head.form.statistic_dtype
        self.factor = factor
        self.d_hidden_TD = self.d_weight_VD = self.d_bias_V = None
        if needed.hidden:
            self.d_hidden_TD = hidden_TD.new_empty(hidden_TD.shape, dtype=dtype if needed.keeps_hidden else hidden_TD.dtype)
        if needed.weight:
            # One chunk forms each row of d_weight at once; several need an accumulator.
            stored = dtype if num_chunks > 1 or needed.keeps_weight else head.weight_VD.dtype
            self.d_weight_VD = head.weight_VD.new_empty(needed.num_rows, hidden_TD.shape[1], dtype=stored)
            self.d_weight_VD[self.num_valid if num_chunks else 0 :] = 0
        if needed.bias and head.bias_V is not None:
            self.d_bias_V = head.bias_V.new_zeros(needed.num_rows, dtype=dtype)
        self.is_first_chunk = True

    def begin(self, chunk: Chunk) -> None:
        self.chunk = chunk
        if self.d_hidden_TD is not None:
            self.sum_XD = chunk.hidden_XD.new_zeros(
                chunk.num_padded, chunk.hidden_XD.shape[1], dtype=self.head.form.statistic_dtype
            )

    def add(self, columns: slice, d_product: Tensor) -> None:
        """One block's gradient [num_padded, W] of the products; rows past the chunk's end may hold anything finite."""
        form, chunk = self.head.form, self.chunk
        d_operand = operand(d_product, form)
        if self.d_hidden_TD is not None:
            weight_WD = operand(self.head.weight_VD[columns], form)
            for start in range(0, chunk.num_padded, chunk.num_rows):
                rows = slice(start, start + chunk.num_rows)
                multiply(d_operand[rows], weight_WD, self.sum_XD[rows], add=True)
        d_valid = d_operand[: chunk.size]
        if self.d_weight_VD is not None:
            total_WD = self.d_weight_VD[columns]
            if total_WD.dtype == form.statistic_dtype:
                multiply(d_valid.t(), chunk.hidden_XD, total_WD, add=not self.is_first_chunk)
            else:
                exact_WD = total_WD.new_empty(total_WD.shape, dtype=form.statistic_dtype)
                multiply(d_valid.t(), chunk.hidden_XD, exact_WD)
                total_WD.copy_(self._times_factor(exact_WD))
        if self.d_bias_V is not None:
            self.d_bias_V[columns] += d_valid.sum(0, dtype=form.statistic_dtype)

    def end(self) -> None:
        if self.d_hidden_TD is not None:
            self.d_hidden_TD[self.chunk.tokens] = self._times_factor(self.sum_XD[: self.chunk.size])
        self.is_first_chunk = False

    def _times_factor(self, x: Tensor) -> Tensor:
        return x if self.factor is None else x.mul_(self.factor)

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(d_hidden, d_weight, d_bias), of which those still in the statistics' dtype are to be cast."""
        if self.d_weight_VD is not None and self.d_weight_VD.dtype == self.head.form.statistic_dtype:
            self._times_factor(self.d_weight_VD)
        if self.d_bias_V is not None:
            self._times_factor(self.d_bias_V)
        return self.d_hidden_TD, self.d_weight_VD, self.d_bias_V


def underflow_factor(form: Form, *coefficients: Tensor | None) -> Tensor | None:
    """Where d_product is rounded to fp16, the power of two that its coefficients are to be divided by, and the gradients
    multiplied with in the statistics' dtype, so that small upstream gradients survive; else None. Reads nothing."""
    present = [x for x in coefficients if x is not None and x.numel()]
    if form.product_dtype != torch.float16 or not present:
        return None
    largest = torch.stack([x.abs().amax() for x in present]).amax()
    power = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
    return torch.where((largest > 0) & largest.isfinite(), power, 1.0)


# ---- Vocab-parallel: what the ranks of a group exchange ----


def _group(name: str) -> dist.ProcessGroup:
    """Registered operators take no process group, so it travels by its name."""
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def gather(partial: Tensor, shard: Shard) -> Tensor:
    """[n, …]: every rank's partial numbers in rank order, by one all-gather; without a group, those that are here."""
    if shard.group_name is None:
        return partial[None]
    return all_gather(partial, _group(shard.group_name))


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, …]: every rank's x, of one shape, in rank order."""
    everyone = x.new_empty(group.size(), *x.shape)
    gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name from torch 2.13 on
    gather_into(everyone.view(-1), x.contiguous().view(-1), group=group)
    return everyone


def reduce_d_hidden(d_hidden_TD: Tensor, shard: Shard) -> Tensor:
    """The sum over ranks, by one all-reduce."""
    if shard.group_name is not None:
        dist.all_reduce(d_hidden_TD, group=_group(shard.group_name))
    return d_hidden_TD


def combine_statistics(parts_nNT: Tensor, wanted: Wanted) -> Tensor:
    """Statistics [N, T] of the whole from those [n, N, T] of its parts, added in order; the targets' logits follow the six."""
    row = Statistic
    if len(parts_nNT) == 1:
        return parts_nNT[0]
    maxima_nT = parts_nNT[:, row.MAX]
    max_T, best_T = maxima_nT.max(0)
    moved_nT = maxima_nT - max_T
    factor_nT = moved_nT.exp()
    whole = torch.zeros_like(parts_nNT[0])
    whole[row.MAX] = max_T
    whole[row.SUM] = (factor_nT * parts_nNT[:, row.SUM]).sum(0)
    whole[row.SUM_Z] = (factor_nT * (parts_nNT[:, row.SUM_Z] + moved_nT * parts_nNT[:, row.SUM])).sum(0)
    whole[row.SUM_SQUARES] = (factor_nT.square() * parts_nNT[:, row.SUM_SQUARES]).sum(0)
    whole[row.SUM_LOGITS] = parts_nNT[:, row.SUM_LOGITS].sum(0)
    if wanted.argmax:
        whole[row.ARGMAX] = parts_nNT[:, row.ARGMAX].gather(0, best_T[None])[0]
    whole[len(row) :] = parts_nNT[:, len(row) :].amax(0)
    return whole


def combine_pair_statistics(parts_nNT: Tensor, kind: str) -> Tensor:
    """Pair statistics [5, T] of the whole from those [n, 5, T] of its parts."""
    row = PairStatistic
    if len(parts_nNT) == 1:
        return parts_nNT[0]
    whole, moved, factors = torch.zeros_like(parts_nNT[0]), {}, {}
    for maximum, total in ((row.MAX, row.SUM), (row.TEACHER_MAX, row.TEACHER_SUM)):
        whole[maximum] = parts_nNT[:, maximum].amax(0)
        moved[total] = parts_nNT[:, maximum] - whole[maximum]
        factors[total] = moved[total].exp()
        whole[total] = (factors[total] * parts_nNT[:, total]).sum(0)
    one, other = (row.TEACHER_SUM, row.SUM) if kind == "forward_kl" else (row.SUM, row.TEACHER_SUM)
    shifted_nT = parts_nNT[:, row.CROSS] + (moved[one] - moved[other]) * parts_nNT[:, one]
    whole[row.CROSS] = (factors[one] * shifted_nT).sum(0)
    return whole
