"""The most probable tokens of each position, without logits, and divergences from a teacher known by them.

**Math** `linear_topk` keeps each token's k largest logits while it walks over the vocabulary, and its log-sum-exp.
  Divergences against such a cache (K the cached ids, o all other ids as one bucket, t' and s' renormalised over K):
    tail          forward_kl                                  reverse_kl
    bucket        Σ_K t log(t/s) + t_o log(t_o/s_o)           Σ_K s log(s/t) + s_o log(s_o/t_o)
    renormalise   Σ_K t' log(t'/s)                            Σ_K s' log(s'/t')
    ignore        Σ_K t log(t/s)                              Σ_K s log(s/t)
  are arithmetic on the student's log-probabilities of the cached ids, which are `linear_logprob` with C targets a token.
**Shapes** hidden [T, D], weight [V, D], caches [T, C] → divergence [T]; ids and log-probabilities [T, k].
**Dtypes** as in `linear_logprob`; ids int64.
**Traffic** `linear_topk`: 2TDV FLOPs; the divergence: as `linear_logprob`, 2TDV forward and 6TDV backward.
**Source** DistillKit, NeMo-RL and TRL each name one of the tails their own: MiniLLM, arXiv 2306.08543, for the reverse KL.
**Limits** "bucket" finds s_o as 1 − Σ_K s: no less than the statistics' rounding of 1 (1.2e-7 in fp32), where it has no
  gradient; t_o in fp64, no less than 2.2e-16: as exact as the cache. "renormalise"
  over-sharpens (forward) or leaves the mass outside K free (reverse); reverse "ignore" is negative where s < t on K, and
  smallest at s = t / e: a term of other losses, not a divergence. Among equal logits at the k-th place the choice is torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .linear_logprob import check_head, linear_logprob, reference_logits, shard_of
from .logit_block import Statistic, Targets, Wanted, logit_block, logits_of, new_statistics
from .vocabulary_sweep import Form, Head, Shard, chunks, combine_statistics, gather, statistic_dtype, sweep, valid_rows

_IGNORED = -100


def check_mask(mask_T: Tensor | None, hidden_TD: Tensor) -> None:
    if mask_T is None:
        return
    if mask_T.dtype != torch.bool or mask_T.shape != hidden_TD.shape[:1] or mask_T.device != hidden_TD.device:
        received = f"{mask_T.dtype} of shape {tuple(mask_T.shape)} on {mask_T.device}"
        expected = f"bool of shape ({len(hidden_TD)},) on {hidden_TD.device}"
        raise ValueError(f"mask is {received}; expected {expected}, True where a token counts")


def linear_topk_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """From the full logits."""
    logprobs_TV = reference_logits(hidden_TD, weight_VD, bias_V, temperature, softcap).log_softmax(-1)
    logprobs_TC, ids_TC = logprobs_TV.topk(k, dim=1)
    return ids_TC, logprobs_TC


@torch.library.custom_op("warpline::linear_topk", mutates_args=())
def _topk_op(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, k: int, temperature: float, softcap: float | None,
    product_dtype: torch.dtype | None, vocab_start: int, vocab_size: int, group_name: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shard = Shard(vocab_start, vocab_size, group_name)
    form = Form.of((hidden_TD, weight_VD, bias_V), temperature, softcap, product_dtype)
    head, steps = Head(*valid_rows(weight_VD, bias_V, shard), form), logit_block(hidden_TD.device)
    like = hidden_TD.new_empty(0, dtype=form.statistic_dtype)
    statistics, none_T0 = new_statistics(len(hidden_TD), 1, like)
    best_TC = like.new_full((len(hidden_TD), k), -torch.inf)
    ids_TC = torch.zeros(best_TC.shape, dtype=torch.int64, device=best_TC.device)
    nowhere_T1 = ids_TC[:, :1].fill_(_IGNORED)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        for chunk in chunks(hidden_TD, head.tokens_per_chunk(form.blocking.backward_elements, form.blocking.columns), form):
            for columns, tokens, side in sweep(chunk, head):
                target = Targets(nowhere_T1[tokens], shard.start + columns.start)
                steps.statistics(side, target, statistics[:, tokens], none_T0[tokens], Wanted())
                here_RC, place_RC = logits_of(side).topk(min(k, columns.stop - columns.start), dim=1)
                values = torch.cat([best_TC[tokens], here_RC], 1)
                ids = torch.cat([ids_TC[tokens], place_RC + (shard.start + columns.start)], 1)
                best_TC[tokens], chosen = values.topk(k, dim=1)
                ids_TC[tokens] = ids.gather(1, chosen)
    whole = combine_statistics(gather(statistics, shard), Wanted())
    if shard.group_name is not None:
        everyone_nTC, ids_nTC = gather(best_TC, shard), gather(ids_TC, shard)
        best_TC, chosen = everyone_nTC.transpose(0, 1).flatten(1).topk(k, dim=1)
        ids_TC = ids_nTC.transpose(0, 1).flatten(1).gather(1, chosen)
    return ids_TC, best_TC - whole[Statistic.MAX][:, None] - whole[Statistic.SUM].log()[:, None]


@_topk_op.register_fake
def _(hidden_TD, weight_VD, bias_V, k, *rest):
    logprobs = hidden_TD.new_empty(hidden_TD.shape[0], k, dtype=statistic_dtype(hidden_TD, weight_VD, bias_V))
    return torch.empty_like(logprobs, dtype=torch.int64), logprobs


@torch.no_grad()
def linear_topk(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    product_dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k most probable ids of each token and their log-probabilities (over the whole vocabulary), best first.

    Makes the caches of `linear_topk_divergence`: a constant, without gradient. Sharding as in `linear_logprob`; its ranks
    exchange their candidates too.
    """
    check_head(hidden_TD, weight_VD, bias_V, temperature, softcap, product_dtype)
    shard = shard_of(weight_VD, group, vocab_start, vocab_size)
    if not isinstance(k, int) or not 1 <= k <= shard.size:
        raise ValueError(f"k is {k!r}; expected an int from 1 to the vocabulary's {shard.size}")
    return _topk_op(hidden_TD, weight_VD, bias_V, k, temperature, softcap, product_dtype, *shard)


def _with_bucket(logp_TC: Tensor) -> Tensor:
    """And log(1 − Σ exp), the bucket of everything else, no lower than the dtype can tell from 0."""
    limit = 1.0 - torch.finfo(logp_TC.dtype).eps
    return torch.cat([logp_TC, torch.log1p(-logp_TC.exp().sum(1, keepdim=True).clamp(max=limit))], dim=1)


def _with_exact_bucket(logp_TC: Tensor) -> Tensor:
    """The same in fp64, from 1 minus the largest: a peaked teacher's bucket is far below fp32's rounding of 1."""
    sorted_TC = logp_TC.double().sort(dim=1, descending=True).values
    rest_T1 = -torch.expm1(sorted_TC[:, :1]) - sorted_TC[:, 1:].exp().sum(1, keepdim=True)
    bucket_T1 = rest_T1.clamp(min=torch.finfo(torch.float64).eps).log()
    return torch.cat([logp_TC, bucket_T1.to(logp_TC.dtype)], dim=1)


def _renormalised(logp_TC: Tensor) -> Tensor:
    return logp_TC - logp_TC.logsumexp(1, keepdim=True)


def _as_is(logp_TC: Tensor) -> Tensor:
    return logp_TC


# tail → (student's map, teacher's map) of the cached log-probabilities, per kind.
_TAILS: dict[str, dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]] = {
    "forward_kl": {
        "bucket": (_with_bucket, _with_exact_bucket),
        "renormalise": (_as_is, _renormalised),
        "ignore": (_as_is, _as_is),
    },
    "reverse_kl": {
        "bucket": (_with_bucket, _with_exact_bucket),
        "renormalise": (_renormalised, _renormalised),
        "ignore": (_as_is, _as_is),
    },
}


def _topk_divergence(logs_TC: Tensor, topk_ids_TC: Tensor, topk_logprobs_TC: Tensor, kind: str, tail: str) -> Tensor:
    """Arithmetic on the student's log-probabilities of the cached ids; padding (-100) counts as probability 0."""
    if kind not in _TAILS:
        raise ValueError(f"kind is {kind!r}; expected one of {list(_TAILS)}")
    if tail not in _TAILS[kind]:
        raise ValueError(f"tail is {tail!r}; expected one of {list(_TAILS[kind])}")
    logs_TC = logs_TC.to(statistic_dtype(logs_TC, topk_logprobs_TC))
    floor = torch.finfo(logs_TC.dtype).min / 4
    is_padding_TC = topk_ids_TC == _IGNORED
    student_map, teacher_map = _TAILS[kind][tail]
    logs = student_map(logs_TC.masked_fill(is_padding_TC, floor))
    logt = teacher_map(topk_logprobs_TC.detach().to(logs_TC.dtype).masked_fill(is_padding_TC, floor).clamp(min=floor))
    log_p, log_q = (logt, logs) if kind == "forward_kl" else (logs, logt)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def _reference_kl(logp_TC: Tensor, logq_TC: Tensor) -> Tensor:
    """Σ p log(p/q), where 0 log 0 is 0."""
    floor = torch.finfo(logp_TC.dtype).min / 4
    return (logp_TC.exp() * (logp_TC.clamp(min=floor) - logq_TC.clamp(min=floor))).sum(-1)


def linear_topk_divergence_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    topk_ids_TC: Tensor,
    topk_logprobs_TC: Tensor,
    *,
    kind: str = "forward_kl",
    tail: str = "bucket",
    temperature: float = 1.0,
    mask_T: Tensor | None = None,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The same divergence from the student's full softmax."""
    logs_TV = reference_logits(hidden_TD, weight_VD, bias_V, temperature, softcap).log_softmax(-1)
    is_padding_TC = topk_ids_TC == _IGNORED
    logs_TC = logs_TV.gather(1, topk_ids_TC.clamp(min=0)).masked_fill(is_padding_TC, -torch.inf)
    logt_TC = topk_logprobs_TC.to(logs_TC.dtype).masked_fill(is_padding_TC, -torch.inf)
    if tail == "bucket":
        logs_TC, logt_TC = (torch.cat([x, (1 - x.exp().sum(1, keepdim=True)).log()], 1) for x in (logs_TC, logt_TC))
    if tail == "renormalise":
        logt_TC = logt_TC.log_softmax(1)
        logs_TC = logs_TC.log_softmax(1) if kind == "reverse_kl" else logs_TC
    pair = (logt_TC, logs_TC) if kind == "forward_kl" else (logs_TC, logt_TC)
    value_T = _reference_kl(*pair)
    return value_T if mask_T is None else value_T.masked_fill(~mask_T, 0.0)


def linear_topk_divergence(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    topk_ids_TC: Tensor,
    topk_logprobs_TC: Tensor,
    *,
    kind: Literal["forward_kl", "reverse_kl"] = "forward_kl",
    tail: Literal["bucket", "renormalise", "ignore"] = "bucket",
    temperature: float = 1.0,
    mask_T: Tensor | None = None,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    product_dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    reduce_d_hidden: bool = True,
) -> Tensor:
    """Divergence of each token from a teacher known by its k largest log-probabilities, differentiable in the student.

    The temperature divides the student's logits; the cache holds the teacher's at the same temperature, already. A
    cache is padded with id -100; a token of padding only, or with `mask_T` False, yields 0. Sharding as in `linear_logprob`.
    """
    if topk_ids_TC.dim() != 2 or topk_ids_TC.shape != topk_logprobs_TC.shape:
        shapes = f"{tuple(topk_ids_TC.shape)} and {tuple(topk_logprobs_TC.shape)}"
        raise ValueError(f"the cache's ids and log-probabilities have shapes {shapes}; expected [T, C] twice")
    if not topk_logprobs_TC.dtype.is_floating_point or topk_logprobs_TC.device != hidden_TD.device:
        received = f"{topk_logprobs_TC.dtype} on {topk_logprobs_TC.device}"
        raise ValueError(f"the cache's log-probabilities are {received}; expected floats on {hidden_TD.device}: move the cache")
    check_mask(mask_T, hidden_TD)
    ids_TC = topk_ids_TC if mask_T is None else topk_ids_TC.masked_fill(~mask_T[:, None], _IGNORED)
    stats = linear_logprob(
        hidden_TD, weight_VD, ids_TC, bias_V=bias_V, temperature=temperature, softcap=softcap, ignore_index=_IGNORED,
        product_dtype=product_dtype, group=group, vocab_start=vocab_start, vocab_size=vocab_size,
        reduce_d_hidden=reduce_d_hidden,
    )  # fmt: skip
    divergence_T = _topk_divergence(stats.logprob_T, ids_TC, topk_logprobs_TC, kind, tail)
    return divergence_T.masked_fill((ids_TC == _IGNORED).all(1), 0.0)
