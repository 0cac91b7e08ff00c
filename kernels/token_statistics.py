"""Statistics of every token of a batch and their gradients, block by block: what `linear_logprob` and `linear_cross_entropy`
compute, without autograd.

**Math** as in `linear_logprob`: the forward folds blocks of logits into running statistics; the backward makes the logits
  again, block by block, and takes the tokens' upstream numbers back through them. `cross_entropy_with_gradients` keeps
  the logits of a chunk of tokens instead, so that one product serves both directions.
**Shapes** hidden [T, D], weight [V, D], bias [V], target [T, C]; X the tokens that are computed, of T.
**Dtypes**, **Traffic**, **Source**, **Limits** as in `linear_logprob` and `vocabulary_sweep`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .logit_block import Coefficient, Statistic, Targets, Wanted, logit_block, new_statistics
from .vocabulary_sweep import (
    BLOCKING,
    Chunk,
    Form,
    Gradients,
    Head,
    Needed,
    Shard,
    chunks,
    combine_statistics,
    gather,
    reduce_d_hidden,
    sweep,
    underflow_factor,
    valid_rows,
    written_over,
)

NO_TARGET = -(2**62)  # far from any id, so that a target outside the vocabulary is not taken for it


class Call(NamedTuple):
    """The options of one call, all of them plain values, as the registered operator takes them."""

    temperature: float
    softcap: float | None
    ignore_index: int
    wanted: Wanted
    product_dtype: torch.dtype | None
    shard: Shard
    reduce_d_hidden: bool = True


class Inputs(NamedTuple):
    hidden_TD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    target_TC: Tensor


def _head(inputs: Inputs, call: Call) -> Head:
    form = Form.of(inputs[:3], call.temperature, call.softcap, call.product_dtype)
    return Head(*valid_rows(inputs.weight_VD, inputs.bias_V, call.shard), form)


class _Tokens(NamedTuple):
    """Hidden states and targets (`NO_TARGET` for ignored ones) of the tokens that are computed: those that count, at the
    positions kept; or all, positions None, with those marked that do not count."""

    hidden_XD: Tensor
    target_XC: Tensor
    kept_T: Tensor | None = None
    dropped_T: Tensor | None = None


def _prepared(inputs: Inputs, call: Call) -> _Tokens:
    hidden_TD = inputs.hidden_TD
    target_TC = inputs.target_TC.long().contiguous()
    is_ignored_TC = target_TC == call.ignore_index
    if hidden_TD.device.type == "cpu":
        _check_range(target_TC, is_ignored_TC, call)
    target_TC = target_TC.masked_fill(is_ignored_TC, NO_TARGET)
    if not BLOCKING[hidden_TD.device.type].leaves_out:
        return _Tokens(hidden_TD, target_TC, dropped_T=is_ignored_TC.all(1))
    if not is_ignored_TC.any():
        return _Tokens(hidden_TD, target_TC)
    kept_T = (~is_ignored_TC.all(1)).nonzero()[:, 0]
    return _Tokens(hidden_TD[kept_T], target_TC[kept_T], kept_T)


def _check_range(target_TC: Tensor, is_ignored_TC: Tensor, call: Call) -> None:
    is_bad_TC = ((target_TC < 0) | (target_TC >= call.shard.size)) & ~is_ignored_TC
    if is_bad_TC.any():
        where = is_bad_TC.nonzero()[0].tolist()
        position = where[0] if target_TC.shape[1] == 1 else tuple(where)
        remedy = f"expected 0 to {call.shard.size - 1}, or ignore_index {call.ignore_index}: check the tokenizer's size"
        raise ValueError(f"target at position {position} is {target_TC[tuple(where)].item()}; {remedy}")


def forward(inputs: Inputs, call: Call) -> tuple[Tensor, ...]:
    """(logprob [T, C], lse, entropy, argmax, sum_p2, mean_logit, maximum, log Σ exp(z − maximum)); a statistic that is not
    wanted is empty."""
    hidden_XD, target_XC, kept_T, dropped_T = _prepared(inputs, call)
    head = _head(inputs, call)
    steps, blocking, num_targets = logit_block(hidden_XD.device), head.form.blocking, target_XC.shape[1]
    like = hidden_XD.new_empty(0, dtype=head.form.statistic_dtype)
    statistics, picked_XC = new_statistics(len(hidden_XD), num_targets, like)
    with torch.autocast(hidden_XD.device.type, enabled=False):
        num_tokens = head.tokens_per_chunk(blocking.backward_elements, blocking.columns)
        for chunk in chunks(hidden_XD, num_tokens, head.form, dropped_T):
            for columns, tokens, side in sweep(chunk, head):
                target = Targets(target_XC[tokens], call.shard.start + columns.start)
                steps.statistics(side, target, statistics[:, tokens], picked_XC[tokens], call.wanted)
    parts = gather(torch.cat([statistics, picked_XC.t()]), call.shard)
    values = _values(combine_statistics(parts, call.wanted), target_XC, call)
    return tuple(like.new_empty(0) if value is None else _restored(value, kept_T, inputs) for value in values)


def _values(whole: Tensor, target_XC: Tensor, call: Call) -> tuple[Tensor | None, ...]:
    """The forward's results from the statistics [6 + C, X], None for those not wanted; tokens all of whose targets are
    ignored are 0 everywhere."""
    row, wanted = Statistic, call.wanted
    is_ignored_XC = target_XC == NO_TARGET
    is_dropped_X = is_ignored_XC.all(1)
    max_X, sum_X = whole[row.MAX], whole[row.SUM]
    log_sum_X = sum_X.log()
    logprob_XC = (whole[len(row) :] - max_X - log_sum_X).t()

    def kept(value_X: Tensor) -> Tensor:
        return value_X.masked_fill(is_dropped_X, 0)

    return (
        logprob_XC.masked_fill(is_ignored_XC, 0.0),
        kept(max_X + log_sum_X),
        kept(log_sum_X - whole[row.SUM_Z] / sum_X) if wanted.entropy else None,
        kept(whole[row.ARGMAX].long()) if wanted.argmax else None,
        kept(whole[row.SUM_SQUARES] / sum_X.square()) if wanted.sum_p2 else None,
        kept(whole[row.SUM_LOGITS] / call.shard.size) if wanted.mean_logit else None,
        max_X.clone(),
        log_sum_X,
    )


def _restored(value: Tensor, kept_T: Tensor | None, inputs: Inputs) -> Tensor:
    """Puts kept tokens back among zeros."""
    if kept_T is None:
        return value.contiguous()
    return value.new_zeros(len(inputs.hidden_TD), *value.shape[1:]).index_copy_(0, kept_T, value)


class Upstream(NamedTuple):
    """Gradients of the forward's differentiable results; None where there is none."""

    logprob_TC: Tensor | None
    lse_T: Tensor | None
    entropy_T: Tensor | None
    sum_p2_T: Tensor | None
    mean_logit_T: Tensor | None

    @property
    def present(self) -> Wanted:
        has = (self.entropy_T is not None, self.sum_p2_T is not None, self.mean_logit_T is not None)
        return Wanted(entropy=has[0], sum_p2=has[1], mean_logit=has[2])


def coefficients_of(
    saved: tuple[Tensor, Tensor, Tensor, Tensor], upstream: Upstream, target_TC: Tensor, size: int
) -> tuple[Tensor, Tensor | None]:
    """(coefficients [6, T], d_target [T, C]) of the gradient step; `saved` is (maximum, log_sum, entropy, sum_p2)."""
    max_T, log_sum_T, entropy_T, sum_p2_T = saved
    row = Coefficient
    table = max_T.new_zeros(len(row), len(max_T))
    table[row.MAX], table[row.LOG_SUM] = max_T, log_sum_T
    is_ignored_TC = target_TC == NO_TARGET
    d_target_TC = None
    if upstream.lse_T is not None:
        table[row.A] += upstream.lse_T
    if upstream.logprob_TC is not None:
        d_target_TC = upstream.logprob_TC.to(max_T.dtype).masked_fill(is_ignored_TC, 0.0).contiguous()
        table[row.A] -= d_target_TC.sum(1)
    if upstream.entropy_T is not None:
        table[row.A] -= upstream.entropy_T * entropy_T
        table[row.B] = -upstream.entropy_T
    if upstream.sum_p2_T is not None:
        table[row.A] -= 2 * upstream.sum_p2_T * sum_p2_T
        table[row.C] = 2 * upstream.sum_p2_T
    if upstream.mean_logit_T is not None:
        table[row.K] = upstream.mean_logit_T / size
    table[row.A :].masked_fill_(is_ignored_TC.all(1), 0.0)
    return table, d_target_TC


def backward(
    inputs: Inputs, saved: tuple[Tensor, ...], upstream: Upstream, needed: tuple[bool, bool, bool], call: Call
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(d_hidden, d_weight, d_bias), those that are needed; `saved` as in `coefficients_of`, for all tokens."""
    hidden_XD, target_XC, kept_T, dropped_T = _prepared(inputs, call)
    if kept_T is not None:
        saved = tuple(x if len(x) == 0 else x[kept_T] for x in saved)
        upstream = Upstream(*(None if x is None else x[kept_T] for x in upstream))
    table, d_target_XC = coefficients_of(saved, upstream, target_XC, call.shard.size)  # type: ignore[arg-type]
    head = _head(inputs, call)
    factor = underflow_factor(head.form, table[Coefficient.A :], d_target_XC)
    if factor is not None:
        table[Coefficient.A :] /= factor
        d_target_XC = None if d_target_XC is None else d_target_XC / factor
    blocking, steps = head.form.blocking, logit_block(hidden_XD.device)
    num_tokens = head.tokens_per_chunk(blocking.backward_elements, blocking.backward_columns)
    asked = Needed(*needed, len(inputs.weight_VD), call.shard.group_name is not None and call.reduce_d_hidden)
    gradients = Gradients(hidden_XD, head, asked, -(-len(hidden_XD) // num_tokens), factor)
    with torch.autocast(hidden_XD.device.type, enabled=False):
        for chunk in chunks(hidden_XD, num_tokens, head.form, dropped_T):
            gradients.begin(chunk)
            for columns in head.columns(blocking.backward_columns):
                block = table.new_empty(chunk.num_padded, columns.stop - columns.start)
                out = written_over(block, head.form)
                for rows in chunk.rows(columns, head.form):
                    chunk.products(rows, head, columns, block[rows])
                    here, tokens = chunk.inside(rows), chunk.of_batch(rows)
                    target = Targets(target_XC[tokens], call.shard.start + columns.start)
                    d_target = None if d_target_XC is None else d_target_XC[tokens]
                    side = head.side(block[here], columns)
                    steps.gradient(side, table[:, tokens], target, d_target, upstream.present, out[here])
                gradients.add(columns, out)
            gradients.end()
    return _finished(gradients, inputs, kept_T, call)


def _finished(gradients: Gradients, inputs: Inputs, kept_T: Tensor | None, call: Call) -> tuple[Any, Any, Any]:
    """Summed over ranks, put back among zeros, and cast: once."""
    d_hidden, d_weight, d_bias = gradients.finished()
    if d_hidden is not None:
        if call.reduce_d_hidden:
            d_hidden = reduce_d_hidden(d_hidden, call.shard)
        d_hidden = _restored(d_hidden, kept_T, inputs)
    gathered = (d_hidden, d_weight, d_bias)
    one, other, last = (None if d is None or x is None else d.to(x.dtype) for d, x in zip(gathered, inputs[:3], strict=True))
    return one, other, last


class LossTerms(NamedTuple):
    z_loss: float
    label_smoothing: float


def cross_entropy_with_gradients(
    inputs: Inputs, needed: tuple[bool, bool, bool], call: Call, terms: LossTerms
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(sum of the losses, and its gradients, as they were accumulated), on one rank, with one product for the logits: as
    many as fit are kept until their gradient is written over them. Gradients of fp16 tensors stay in the statistics' dtype:
    a sum over tokens, or its share in a scaled loss, leaves fp16's range."""
    hidden_XD, target_XC, kept_T, dropped_T = _prepared(inputs, call)
    head = _head(inputs, call)
    blocking = head.form.blocking
    num_tokens = head.tokens_per_chunk(blocking.kept_elements, len(head.weight_VD))
    keeps = (x.dtype == torch.float16 for x in (inputs.hidden_TD, inputs.weight_VD))
    asked = Needed(*needed, len(inputs.weight_VD), *keeps)
    gradients = Gradients(hidden_XD, head, asked, -(-len(hidden_XD) // num_tokens))
    loss = hidden_XD.new_zeros((), dtype=head.form.statistic_dtype)
    num_rows = min(num_tokens, -(-len(hidden_XD) // blocking.rows) * blocking.rows)
    widths = [columns.stop - columns.start for columns in head.columns(blocking.columns)]
    kept = [loss.new_empty(num_rows, width) for width in (widths if any(needed) else widths[:1])]
    with torch.autocast(hidden_XD.device.type, enabled=False):
        for chunk in chunks(hidden_XD, num_tokens, head.form, dropped_T):
            target_X1 = target_XC[chunk.tokens]
            values = _kept_statistics(chunk, head, target_X1, kept, call)
            loss += _loss_of(values, terms).sum()
            if any(needed):
                gradients.begin(chunk)
                _add_kept_gradients(gradients, kept, values, target_X1, call, terms)
    d_hidden = gradients.d_hidden_TD
    return loss, None if d_hidden is None else _restored(d_hidden, kept_T, inputs), gradients.d_weight_VD, gradients.d_bias_V


def _kept_statistics(chunk: Chunk, head: Head, target_X1: Tensor, kept: list[Tensor], call: Call) -> tuple[Any, ...]:
    """The forward's values; the chunk's products stay in `kept`, one buffer a block of columns, or one for all."""
    steps, like = logit_block(target_X1.device), kept[0].new_empty(0)
    statistics, picked_X1 = new_statistics(chunk.size, 1, like)
    for number, columns in enumerate(head.columns(head.form.blocking.columns)):
        block = kept[min(number, len(kept) - 1)][:, : columns.stop - columns.start]
        for rows in chunk.rows(columns, head.form):
            chunk.products(rows, head, columns, block[rows])
            here = chunk.inside(rows)
            target = Targets(target_X1[here], columns.start)
            steps.statistics(head.side(block[here], columns), target, statistics[:, here], picked_X1[here], call.wanted)
    return _values(torch.cat([statistics, picked_X1.t()]), target_X1, call)


def _loss_of(values: tuple[Any, ...], terms: LossTerms) -> Tensor:
    """−(1 − ε) logprob + ε (lse − mean_logit) + z_loss lse², per token; 0 where the target is ignored."""
    logprob_X1, lse_X, mean_X = values[0], values[1], values[5]
    loss_X = (terms.label_smoothing - 1.0) * logprob_X1[:, 0] + terms.z_loss * lse_X.square()
    return loss_X + terms.label_smoothing * (lse_X - mean_X) if terms.label_smoothing else loss_X


def _add_kept_gradients(
    gradients: Gradients, kept: list[Tensor], values: tuple[Any, ...], target_X1: Tensor, call: Call, terms: LossTerms
) -> None:
    """Of the chunk that `gradients` is at."""
    lse_X, smoothing = values[1], terms.label_smoothing
    ones_X = torch.ones_like(lse_X)
    d_lse_X = 2.0 * terms.z_loss * lse_X + smoothing
    upstream = Upstream((ones_X * (smoothing - 1.0))[:, None], d_lse_X, None, None, -smoothing * ones_X if smoothing else None)
    saved = (values[6], values[7], values[2], values[4])
    table, d_target_X1 = coefficients_of(saved, upstream, target_X1, call.shard.size)
    head, steps, chunk = gradients.head, logit_block(target_X1.device), gradients.chunk
    assert d_target_X1 is not None
    for columns, buffer in zip(head.columns(head.form.blocking.columns), kept, strict=True):
        block = buffer[: chunk.num_padded]
        out = written_over(block, head.form)
        for rows in chunk.rows(columns, head.form):
            here = chunk.inside(rows)
            target = Targets(target_X1[here], columns.start)
            side = head.side(block[here], columns)
            steps.gradient(side, table[:, here], target, d_target_X1[here], upstream.present, out[here])
        gradients.add(columns, out)
    gradients.end()
