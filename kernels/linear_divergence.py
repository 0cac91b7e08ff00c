"""Divergences between a teacher's and a student's next-token distributions, straight from both sides' hidden states.

**Math** t and s are the softmaxes of the teacher's and the student's logits z (made as in linear_logprob, both divided
  by the temperature, with no T² factor), m = β t + (1 − β) s. Per token, with the gradient in the student's logits:
    forward_kl  Σ t log(t/s)                      s − t
    reverse_kl  KL = Σ s log(s/t)                 s (log(s/t) − KL)
    jsd         β KL(t‖m) + (1 − β) KL(s‖m)       (1 − β) s (log(s/m) − KL(s‖m))
  jsd tends to 0 as β tends to 0 or 1, so the ends are refused rather than read as one of the KLs.
  Against a cached top k (K the cached ids, o all other ids as one bucket, t' and s' renormalised over K):
    tail          forward_kl                                  reverse_kl
    bucket        Σ_K t log(t/s) + t_o log(t_o/s_o)           Σ_K s log(s/t) + s_o log(s_o/t_o)
    renormalise   Σ_K t' log(t'/s)                            Σ_K s' log(s'/t')
    ignore        Σ_K t log(t/s)                              Σ_K s log(s/t)
**Shapes** hidden [T, D], weight [V, D], teacher_hidden [T, U], teacher_weight [V, U], caches [T, C] → divergence [T].
**Dtypes** As in linear_logprob: products in each side's hidden dtype, accumulated in fp32; the rest fp32, or fp64
  if any input is fp64.
**Traffic** 2TV(D + U) FLOPs forward; 2TV(D + U) + 4TVD backward, which makes both sides' logits again. Largest buffers:
  a few TOKENS_PER_CHUNK × V.
**Source** GKD, arXiv 2306.13649 (the jsd; its reference weighting); MiniLLM, arXiv 2306.08543 (reverse KL).
**Limits** The teacher is a constant: it never gets a gradient, required or not. One device holds the whole vocabulary.
  First derivatives only. "bucket" finds s_o as 1 − Σ_K s, so it has no gradient once s_o is below the dtype's rounding
  of 1. "renormalise" over-sharpens (forward) or leaves the mass outside K free (reverse); reverse "ignore" is negative
  where s < t on K, and smallest at s = t / e: a term of other losses, not a divergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear_logprob import (
    Gradients,
    LogitForm,
    centre_logits,
    check_head,
    chunk_logits,
    chunk_slope,
    chunks,
    drop_tokens,
    implementation_for,
    linear_logprob,
    nothing,
    operand,
    reference_logits,
    restore_tokens,
    statistic_dtype,
)

_IGNORED = -100


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
    logs_TV = reference_logits(hidden_TD, weight_VD, bias_V, temperature, softcap).log_softmax(-1)
    teacher = (teacher_hidden_TU, teacher_weight_VU, teacher_bias_V)
    with torch.no_grad():
        logt_TV = reference_logits(*teacher, temperature, teacher_softcap).log_softmax(-1)
    logm_TV = torch.logaddexp(logt_TV + math.log(beta), logs_TV + math.log(1 - beta))
    value = {
        "forward_kl": lambda: _reference_kl(logt_TV, logs_TV),
        "reverse_kl": lambda: _reference_kl(logs_TV, logt_TV),
        "jsd": lambda: beta * _reference_kl(logt_TV, logm_TV) + (1 - beta) * _reference_kl(logs_TV, logm_TV),
    }[kind]()
    return value if mask_T is None else value.masked_fill(~mask_T, 0.0)


def _reference_kl(logp_TV: Tensor, logq_TV: Tensor) -> Tensor:
    """Σ p log(p/q), where 0 log 0 is 0."""
    floor = torch.finfo(logp_TV.dtype).min / 4
    return (logp_TV.exp() * (logp_TV.clamp(min=floor) - logq_TV.clamp(min=floor))).sum(-1)


# The chunked implementation. Each kind takes log s and log t of a chunk, which it may overwrite, and either returns the
# divergence or, given its upstream gradient, the gradient in the student's logits.


def _forward_kl(logs_XV: Tensor, logt_XV: Tensor, beta: float, upstream_X: Tensor | None) -> Tensor:
    if upstream_X is not None:
        return logs_XV.exp_().sub_(logt_XV.exp_()).mul_(upstream_X[:, None])
    t_XV = logt_XV.exp()
    return logt_XV.sub_(logs_XV).mul_(t_XV).sum(1)


def _reverse_kl(logs_XV: Tensor, logt_XV: Tensor, beta: float, upstream_X: Tensor | None) -> Tensor:
    s_XV = logs_XV.exp()
    logs_XV.sub_(logt_XV)
    if upstream_X is None:
        return logs_XV.mul_(s_XV).sum(1)
    value_X = (logs_XV * s_XV).sum(1)
    return logs_XV.sub_(value_X[:, None]).mul_(s_XV).mul_(upstream_X[:, None])


def _jsd(logs_XV: Tensor, logt_XV: Tensor, beta: float, upstream_X: Tensor | None) -> Tensor:
    s_XV = logs_XV.exp()
    log_weights = s_XV.new_tensor([beta, 1.0 - beta]).log().unbind()
    logm_XV = torch.logaddexp(logt_XV + log_weights[0], logs_XV + log_weights[1])
    student_X = logs_XV.sub_(logm_XV).mul(s_XV).sum(1)
    if upstream_X is not None:
        return logs_XV.sub_(student_X[:, None]).mul_(s_XV).mul_(upstream_X[:, None] * (1.0 - beta))
    t_XV = logt_XV.exp()
    return beta * logt_XV.sub_(logm_XV).mul_(t_XV).sum(1) + (1.0 - beta) * student_X


_KINDS: dict[str, Callable[[Tensor, Tensor, float, Tensor | None], Tensor]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
}


def _log_softmax(logits_XV: Tensor, has_bias: bool) -> Tensor:
    """In place but for one buffer; entries that a bias of −inf turned off stay finite."""
    centre_logits(logits_XV, has_bias)
    return logits_XV.sub_(logits_XV.exp().sum(1).log_()[:, None])


class _ChunkedDivergence(torch.autograd.Function):
    """Saves the inputs only; the backward makes each chunk's logits of both sides again."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias_V, teacher, forms, kind, beta):
        """`teacher` is (hidden, weight, bias), constants; `forms` the student's and the teacher's LogitForm."""
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, *teacher)
        ctx.forms, ctx.kind, ctx.beta = forms, kind, beta
        student = (hidden_TD, operand(weight_VD, forms[0]), bias_V)
        teacher = (teacher[0], operand(teacher[1], forms[1]), teacher[2])
        values = []
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for rows in chunks(len(hidden_TD)):
                logs_XV = _chunk_log_softmax(student, rows, forms[0])
                logt_XV = _chunk_log_softmax(teacher, rows, forms[1])
                values.append(_KINDS[kind](logs_XV, logt_XV, beta, None))
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_value_T):
        hidden_TD, weight_VD, bias_V, *teacher = ctx.saved_tensors
        form, teacher_form = ctx.forms
        weight = operand(weight_VD, form)
        teacher = (teacher[0], operand(teacher[1], teacher_form), teacher[2])
        gradients = Gradients((hidden_TD, weight_VD, bias_V), ctx.needs_input_grad, form)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for rows in chunks(len(hidden_TD)):
                hidden_XD = operand(hidden_TD[rows], form)
                logits_XV = chunk_logits(hidden_XD, weight, bias_V, form)
                slope = chunk_slope(logits_XV, form)
                logs_XV = _log_softmax(logits_XV, bias_V is not None)
                logt_XV = _chunk_log_softmax(teacher, rows, teacher_form)
                d_XV = _KINDS[ctx.kind](logs_XV, logt_XV, ctx.beta, d_value_T[rows])
                gradients.add(rows, d_XV, slope, hidden_XD, weight)
        return *gradients.cast(), None, None, None, None


def _chunk_log_softmax(side: tuple[Tensor, Tensor, Tensor | None], rows: slice, form: LogitForm) -> Tensor:
    hidden, weight, bias_V = side
    return _log_softmax(chunk_logits(operand(hidden[rows], form), weight, bias_V, form), bias_V is not None)


# The one place where a device's kernel enters: the Triton kernel replaces the "cuda" entry, which until then is this
# same chunked path on the vendor's matrix products.
_IMPLEMENTATIONS = {"cpu": _ChunkedDivergence.apply, "cuda": _ChunkedDivergence.apply}


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
) -> Tensor:
    """Divergence of each token, differentiable in the student; the teacher, of any width, is a constant.

    Tokens where `mask_T` is False are dropped before the products and yield 0. CPU and CUDA run the chunked torch path.
    """
    _check_kind(kind, _KINDS)
    if kind == "jsd" and not 0.0 < beta < 1.0:
        raise ValueError(f"beta is {beta}; jsd expects 0 < beta < 1: at the ends use kind='forward_kl' or 'reverse_kl'")
    check_head(hidden_TD, weight_VD, bias_V, temperature, softcap)
    check_head(teacher_hidden_TU, teacher_weight_VU, teacher_bias_V, temperature, teacher_softcap)
    sizes, teacher_sizes = (len(hidden_TD), len(weight_VD)), (len(teacher_hidden_TU), len(teacher_weight_VU))
    if sizes != teacher_sizes:
        raise ValueError(f"the teacher has (T, V) = {teacher_sizes}; expected the student's {sizes}: share the tokenizer")
    teacher = tuple(None if x is None else x.detach() for x in (teacher_hidden_TU, teacher_weight_VU, teacher_bias_V))
    keep_T = _check_mask(mask_T, hidden_TD)
    implementation = implementation_for(_IMPLEMENTATIONS, hidden_TD)
    dtype = statistic_dtype(hidden_TD, weight_VD, bias_V, *teacher)
    kept_TD, kept_teacher_TU, kept_T = drop_tokens(keep_T, hidden_TD, teacher_hidden_TU.detach())
    if not len(kept_TD):
        value_T = nothing((kept_TD, weight_VD, bias_V), dtype).expand(0)
    else:
        forms = (
            LogitForm(temperature, softcap, hidden_TD.dtype, dtype),
            LogitForm(temperature, teacher_softcap, teacher_hidden_TU.dtype, dtype),
        )
        value_T = implementation(kept_TD, weight_VD, bias_V, (kept_teacher_TU, *teacher[1:]), forms, kind, beta)
    return restore_tokens(value_T, kept_T, len(hidden_TD))


def _check_kind(kind: str, kinds: dict) -> None:
    if kind not in kinds:
        raise ValueError(f"kind is {kind!r}; expected one of {list(kinds)}")


def _check_mask(mask_T: Tensor | None, hidden_TD: Tensor) -> Tensor:
    if mask_T is None:
        return torch.ones(len(hidden_TD), dtype=torch.bool, device=hidden_TD.device)
    if mask_T.dtype != torch.bool or mask_T.shape != hidden_TD.shape[:1]:
        received = f"{mask_T.dtype} of shape {tuple(mask_T.shape)}"
        raise ValueError(f"mask is {received}; expected bool of shape ({len(hidden_TD)},), True where a token counts")
    return mask_T


@torch.no_grad()
def linear_topk(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The k most probable ids of each token and their log-probabilities (over the whole vocabulary), best first.

    Makes the caches of `linear_topk_divergence`: a constant, without gradient.
    """
    check_head(hidden_TD, weight_VD, bias_V, temperature, softcap)
    if not 1 <= k <= len(weight_VD):
        raise ValueError(f"k is {k}; expected 1 to the vocabulary's {len(weight_VD)}")
    dtype = statistic_dtype(hidden_TD, weight_VD, bias_V)
    form = LogitForm(temperature, softcap, hidden_TD.dtype, dtype)
    weight = operand(weight_VD, form)
    ids_TC = torch.empty(len(hidden_TD), k, dtype=torch.int64, device=hidden_TD.device)
    logprobs_TC = torch.empty(len(hidden_TD), k, dtype=dtype, device=hidden_TD.device)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        for rows in chunks(len(hidden_TD)):
            logp_XV = _chunk_log_softmax((hidden_TD, weight, bias_V), rows, form)
            logprobs_TC[rows], ids_TC[rows] = logp_XV.topk(k, dim=1)
    return ids_TC, logprobs_TC


def _log_complement(logp_TC: Tensor) -> Tensor:
    """log(1 − Σ exp), the bucket of everything else, no lower than the dtype can tell from 0."""
    limit = 1.0 - torch.finfo(logp_TC.dtype).eps
    return torch.log1p(-logp_TC.exp().sum(1, keepdim=True).clamp(max=limit))


def _with_bucket(logp_TC: Tensor) -> Tensor:
    return torch.cat([logp_TC, _log_complement(logp_TC)], dim=1)


def _renormalised(logp_TC: Tensor) -> Tensor:
    return logp_TC - logp_TC.logsumexp(1, keepdim=True)


def _as_is(logp_TC: Tensor) -> Tensor:
    return logp_TC


# tail → (student's map, teacher's map) of the cached log-probabilities, per kind.
_TAILS: dict[str, dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]] = {
    "forward_kl": {
        "bucket": (_with_bucket, _with_bucket),
        "renormalise": (_as_is, _renormalised),
        "ignore": (_as_is, _as_is),
    },
    "reverse_kl": {
        "bucket": (_with_bucket, _with_bucket),
        "renormalise": (_renormalised, _renormalised),
        "ignore": (_as_is, _as_is),
    },
}


def _topk_divergence(logs_TC: Tensor, topk_ids_TC: Tensor, topk_logprobs_TC: Tensor, kind: str, tail: str) -> Tensor:
    """Arithmetic on the student's log-probabilities of the cached ids; padding (-100) counts as probability 0."""
    _check_kind(kind, _TAILS)
    if tail not in _TAILS[kind]:
        raise ValueError(f"tail is {tail!r}; expected one of {list(_TAILS[kind])}")
    floor = torch.finfo(logs_TC.dtype).min / 4
    is_padding_TC = topk_ids_TC == _IGNORED
    student_map, teacher_map = _TAILS[kind][tail]
    logs = student_map(logs_TC.masked_fill(is_padding_TC, floor))
    logt = teacher_map(topk_logprobs_TC.detach().to(logs_TC.dtype).masked_fill(is_padding_TC, floor).clamp(min=floor))
    log_p, log_q = (logt, logs) if kind == "forward_kl" else (logs, logt)
    return (log_p.exp() * (log_p - log_q)).sum(1)


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
    value_T = _reference_kl(logt_TC, logs_TC) if kind == "forward_kl" else _reference_kl(logs_TC, logt_TC)
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
) -> Tensor:
    """Divergence of each token from a teacher known by its k largest log-probabilities, differentiable in the student.

    The temperature divides the student's logits; the cache holds the teacher's at the same temperature, already. A
    cache is padded with id -100; a token of padding only, or with `mask_T` False, is dropped and yields 0.
    """
    if topk_ids_TC.dim() != 2 or topk_ids_TC.shape != topk_logprobs_TC.shape:
        shapes = f"{tuple(topk_ids_TC.shape)} and {tuple(topk_logprobs_TC.shape)}"
        raise ValueError(f"the cache's ids and log-probabilities have shapes {shapes}; expected [T, C] twice")
    keep_T = _check_mask(mask_T, hidden_TD) & (topk_ids_TC != _IGNORED).any(1)
    kept_TD, ids_TC, logprobs_TC, kept_T = drop_tokens(keep_T, hidden_TD, topk_ids_TC, topk_logprobs_TC)
    stats = linear_logprob(
        kept_TD, weight_VD, ids_TC, bias_V=bias_V, temperature=temperature, softcap=softcap, ignore_index=_IGNORED
    )
    return restore_tokens(_topk_divergence(stats.logprob_T, ids_TC, logprobs_TC, kind, tail), kept_T, len(hidden_TD))
