"""The three steps that every loss over a vocabulary takes on one block of logits: statistics, divergence, gradient.

**Math**
  A block is the product of R hidden states with W rows of the output matrix; its logits are
    z = softcap(product + bias) / temperature,    softcap(x) = cap tanh(x / cap),    p = softmax over the whole vocabulary.
  *Statistics* fold a block into a few running numbers per token, m being the running maximum (on a new maximum m' the
  sums are first multiplied by exp(m − m')):
    SUM = Σ exp(z − m)    SUM_Z = Σ exp(z − m) (z − m)    SUM_SQUARES = Σ exp(2 (z − m))    SUM_LOGITS = Σ z
  and the targets' logits are picked out. With L = log SUM: lse = m + L, logprob = (z − m) − L,
    entropy = L − SUM_Z / SUM,    Σ p² = SUM_SQUARES / SUM²,    mean logit = SUM_LOGITS / V.
  Two distributions, a student's s and a teacher's t, need a maximum and a SUM each, and for a KL one running number more:
    forward: CROSS = Σ exp(z_t − m_t) ((z_t − m_t) − (z_s − m_s)),    KL(t‖s) = CROSS / SUM_t + log(SUM_s / SUM_t);
    reverse: the same with s and t exchanged.
  *Divergence* sums t log(t / m) and s log(s / m), m = β t + (1 − β) s, once both SUMs are known: the jsd mixes both
  distributions under the logarithm, so nothing that runs along gives it.
  *Gradient*, with lp = (z − m) − L = log p and the token's upstream numbers folded into a, b, c, k:
    d_z = p (a + b lp + c p) + k + scatter(d_target)                                    every statistic above
    d_z = g (s − t)  |  g s (log(s/t) − KL)  |  g (1 − β) s (log(s/m) − KL(s‖m))        forward KL | reverse KL | jsd
  and d_product = d_z (1 − (z temperature / cap)²) / temperature.
**Why this is enough** Every loss of the family is arithmetic on those running numbers, so its forward is the statistics
  step and its backward is the gradient step. The products themselves are left to the vendor's matrix product: see
  `vocabulary_sweep`, which walks over blocks. A new loss adds no kernel unless it is not of the form above.
**Shapes** product [R, W]; bias [W]; target [R, C] (columns of the block count from `first_column`; an id outside the
  block is not in it); statistics [6, R], pair statistics [5, R], coefficients [6, R]; picked, d_target [R, C].
**Dtypes** product fp32, or fp64 on the CPU; everything per token in the product's dtype; the gradient in `out`'s.
  The gradient step writes over its product: `out` is the same memory, row by row, in a dtype that is not wider.
**Traffic** statistics read the block once (4 bytes an element), the gradient reads it once and writes 2 or 4.
**Source** online softmax, arXiv 1805.02867; Cut Cross-Entropy, arXiv 2411.09009.
**Limits** Logits below LOWEST count as LOWEST, so that a bias of −inf gives probability 0 and no NaN. A NaN or +inf among
  a token's logits makes its statistics NaN. The argmax is kept as a floating-point number: exact below 2^24 in fp32.
  The Triton kernels (`logit_block_triton`) refuse fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import interprets

LOWEST = -1e30  # far below any logit, and LOWEST · V still finite in fp32


class Statistic(IntEnum):
    """Rows of a statistics tensor [6, T]."""

    MAX = 0
    SUM = 1
    SUM_Z = 2
    SUM_SQUARES = 3
    SUM_LOGITS = 4
    ARGMAX = 5


class PairStatistic(IntEnum):
    """Rows of a pair's statistics [5, T]."""

    MAX = 0
    SUM = 1
    TEACHER_MAX = 2
    TEACHER_SUM = 3
    CROSS = 4


class Coefficient(IntEnum):
    """Rows of the coefficients [6, T] of a gradient step; a divergence's upstream g stands in A, its value in B."""

    MAX = 0
    LOG_SUM = 1
    A = 2
    B = 3
    C = 4
    K = 5


class Wanted(NamedTuple):
    """Which statistics are kept beside the maximum, the sum and the picked logits; to the gradient step, which of them
    have an upstream gradient, and so which of the coefficients b, c, k are not zero."""

    entropy: bool = False
    argmax: bool = False
    sum_p2: bool = False
    mean_logit: bool = False


class LogitMap(NamedTuple):
    """From a product to a logit; the bias belongs to the block."""

    temperature: float = 1.0
    softcap: float | None = None


class Side(NamedTuple):
    """One distribution's part of a block: the product [R, W], the bias [W], and how logits are made of them."""

    product: Tensor
    bias_W: Tensor | None
    map: LogitMap


class Targets(NamedTuple):
    """Target ids [R, C] in the whole vocabulary, and the vocabulary id of the block's first column."""

    id_RC: Tensor
    first_column: int


class Divergence(NamedTuple):
    """A divergence's name and, for the jsd, its β."""

    kind: str
    beta: float = 0.5


KINDS = ("forward_kl", "reverse_kl", "jsd")


def new_statistics(num_tokens: int, num_targets: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics [6, T] and picked logits [T, C] of no block yet; a target that is never met keeps −inf."""
    statistics = like.new_zeros(len(Statistic), num_tokens)
    statistics[Statistic.MAX] = LOWEST
    return statistics, like.new_full((num_tokens, num_targets), -torch.inf)


def new_pair_statistics(num_tokens: int, like: Tensor) -> Tensor:
    statistics = like.new_zeros(len(PairStatistic), num_tokens)
    statistics[PairStatistic.MAX] = statistics[PairStatistic.TEACHER_MAX] = LOWEST
    return statistics


def logits_of(side: Side) -> Tensor:
    """The block's logits, as a new tensor; differentiable, so that references may use it."""
    z = side.product if side.bias_W is None else side.product + side.bias_W.to(side.product.dtype)
    if side.map.softcap is not None:
        z = side.map.softcap * torch.tanh(z / side.map.softcap)
    return (z / side.map.temperature).clamp(min=LOWEST)


def logit_block_reference(
    side: Side, target: Targets, upstream: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """What the statistics and the gradient step compute together where the block is the whole vocabulary, by autograd.

    Returns {logprob [R, C], lse, entropy, sum_p2, mean_logit, argmax [R]} and, with `upstream` gradients of some of
    them, the gradient of the product [R, W].
    """
    product = side.product.detach().requires_grad_()
    z = logits_of(side._replace(product=product))
    logp = z.log_softmax(-1)
    local_RC = target.id_RC - target.first_column
    inside_RC = (local_RC >= 0) & (local_RC < z.shape[1])
    values = {
        "logprob": logp.gather(1, local_RC.clamp(0, z.shape[1] - 1)).masked_fill(~inside_RC, 0.0),
        "lse": z.logsumexp(-1),
        "entropy": -(logp.exp() * logp).sum(-1),
        "sum_p2": logp.exp().square().sum(-1),
        "mean_logit": z.mean(-1),
        "argmax": z.argmax(-1),
    }
    if upstream is None:
        return values, None
    loss = torch.stack([(values[name] * d).sum() for name, d in upstream.items()]).sum()
    d_product = torch.autograd.grad(loss, product)[0]
    return {name: value.detach() for name, value in values.items()}, d_product


def divergence_reference(student: Side, teacher: Side, divergence: Divergence) -> Tensor:
    """The divergence [R] where the block is the whole vocabulary; differentiable in the student's product."""
    log_s, log_t = logits_of(student).log_softmax(-1), logits_of(teacher).log_softmax(-1)
    beta = divergence.beta
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    return {
        "forward_kl": lambda: (log_t.exp() * (log_t - log_s)).sum(-1),
        "reverse_kl": lambda: (log_s.exp() * (log_s - log_t)).sum(-1),
        "jsd": lambda: beta * (log_t.exp() * (log_t - log_m)).sum(-1) + (1 - beta) * (log_s.exp() * (log_s - log_m)).sum(-1),
    }[divergence.kind]()


# ---- torch, for the CPU. Blocks are small enough to stay in the cache ----


def _logits(side: Side) -> tuple[Tensor, bool]:
    """The logits, and whether they are a new tensor rather than the product itself."""
    z, is_new = side.product, False
    if side.bias_W is not None:
        z, is_new = z + side.bias_W, True
    if side.map.softcap is not None:
        z = z.div_(side.map.softcap) if is_new else z / side.map.softcap
        z, is_new = z.tanh_().mul_(side.map.softcap), True
    if side.map.temperature != 1.0:
        z, is_new = z.div_(side.map.temperature) if is_new else z / side.map.temperature, True
    return z if side.bias_W is None else z.clamp_(min=LOWEST), is_new


def _centred(z: Tensor, is_new: bool, shift_R: Tensor) -> Tensor:
    return z.sub_(shift_R[:, None]) if is_new else z - shift_R[:, None]


def _logprobs(z: Tensor, is_new: bool, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
    """log p of `_logits`: in `out` if it has their dtype (it may be the product itself), else in place of new ones."""
    into = out if out is not None and out.dtype == z.dtype else z if is_new else None
    centred = torch.sub(z, coefficients[Coefficient.MAX][:, None], out=into)
    return centred.sub_(coefficients[Coefficient.LOG_SUM][:, None])


def _finish(d: Tensor, slope: Tensor | float, out: Tensor) -> None:
    """out = d · slope, where `d` may be `out` already."""
    if d is not out or not isinstance(slope, float) or slope != 1.0:
        torch.mul(d, slope, out=out)


def _slope(z: Tensor, form: LogitMap) -> Tensor | float:
    """d logit / d product."""
    if form.softcap is None:
        return 1.0 / form.temperature
    return (z * (form.temperature / form.softcap)).square_().neg_().add_(1.0).div_(form.temperature)


def _rescaled(old_max_R: Tensor, block_max_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The new maximum, how far it moved (≤ 0), and the factor of the old sums."""
    max_R = torch.maximum(old_max_R, block_max_R)
    moved_R = old_max_R - max_R
    return max_R, moved_R, moved_R.exp()


def _statistics_torch(side: Side, target: Targets, statistics: Tensor, picked_RC: Tensor, wanted: Wanted) -> None:
    z, is_new = _logits(side)
    width = z.shape[1]
    local_RC = target.id_RC - target.first_column
    inside_RC = (local_RC >= 0) & (local_RC < width)
    picked_RC.copy_(torch.where(inside_RC, z.gather(1, local_RC.clamp(0, width - 1)), picked_RC))
    if wanted.argmax:
        block_max_R, place_R = z.max(1)
        is_best_R = block_max_R > statistics[Statistic.MAX]
        place_R = (place_R + target.first_column).to(z.dtype)
        statistics[Statistic.ARGMAX] = torch.where(is_best_R, place_R, statistics[Statistic.ARGMAX])
    else:
        block_max_R = z.amax(1)
    if wanted.mean_logit:
        statistics[Statistic.SUM_LOGITS] += z.sum(1)
    max_R, moved_R, factor_R = _rescaled(statistics[Statistic.MAX], block_max_R)
    z = _centred(z, is_new, max_R)
    e = z.exp() if wanted.entropy else z.exp_()
    if wanted.entropy:
        before_R = factor_R * (statistics[Statistic.SUM_Z] + moved_R * statistics[Statistic.SUM])
        statistics[Statistic.SUM_Z] = before_R + z.mul_(e).sum(1)
    statistics[Statistic.SUM] = factor_R * statistics[Statistic.SUM] + e.sum(1)
    if wanted.sum_p2:
        statistics[Statistic.SUM_SQUARES] = factor_R.square() * statistics[Statistic.SUM_SQUARES] + e.square_().sum(1)
    statistics[Statistic.MAX] = max_R


def _pair_statistics_torch(student: Side, teacher: Side, divergence: Divergence, statistics: Tensor) -> None:
    row = PairStatistic
    (z_s, is_new_s), (z_t, is_new_t) = _logits(student), _logits(teacher)
    max_s, moved_s, factor_s = _rescaled(statistics[row.MAX], z_s.amax(1))
    max_t, moved_t, factor_t = _rescaled(statistics[row.TEACHER_MAX], z_t.amax(1))
    z_s, z_t = _centred(z_s, is_new_s, max_s), _centred(z_t, is_new_t, max_t)
    e_s, e_t = z_s.exp(), z_t.exp()
    if divergence.kind != "jsd":
        is_forward = divergence.kind == "forward_kl"
        weight, gap = (e_t, z_t.sub_(z_s)) if is_forward else (e_s, z_s.sub_(z_t))
        factor_R, total_R = (factor_t, statistics[row.TEACHER_SUM]) if is_forward else (factor_s, statistics[row.SUM])
        moved_R = moved_t - moved_s if is_forward else moved_s - moved_t
        # A side that has met no logit yet has a SUM of 0 and moves from LOWEST: 0 · 1e30 is 0.
        statistics[row.CROSS] = factor_R * (statistics[row.CROSS] + moved_R * total_R) + gap.mul_(weight).sum(1)
    statistics[row.SUM] = factor_s * statistics[row.SUM] + e_s.sum(1)
    statistics[row.TEACHER_SUM] = factor_t * statistics[row.TEACHER_SUM] + e_t.sum(1)
    statistics[row.MAX], statistics[row.TEACHER_MAX] = max_s, max_t


def _log_mixture(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))


def _divergence_torch(student: Side, teacher: Side, beta: float, normalisers: tuple[Tensor, Tensor], sums: Tensor) -> None:
    log_s, log_t = _logprobs(*_logits(student), normalisers[0]), _logprobs(*_logits(teacher), normalisers[1])
    log_m = _log_mixture(log_s, log_t, beta)
    for row, log_p in enumerate((log_t, log_s)):
        weight = log_p.exp()
        sums[row] += log_p.sub_(log_m).mul_(weight).sum(1)


def _gradient_torch(
    side: Side, coefficients: Tensor, target: Targets, d_target_RC: Tensor | None, present: Wanted, out: Tensor
) -> None:
    z, is_new = _logits(side)
    slope = _slope(z, side.map)
    lp = _logprobs(z, is_new, coefficients, out)
    a, b, c, k = (coefficients[row][:, None] for row in (Coefficient.A, Coefficient.B, Coefficient.C, Coefficient.K))
    factor = (lp * b).add_(a) if present.entropy else a
    p = lp.exp_()
    if present.sum_p2:
        factor = factor + p * c
    d = p.mul_(factor)
    if present.mean_logit:
        d.add_(k)
    if d_target_RC is not None:
        local_RC = target.id_RC - target.first_column
        inside_RC = (local_RC >= 0) & (local_RC < d.shape[1])
        d.scatter_add_(1, local_RC.clamp(0, d.shape[1] - 1), d_target_RC.masked_fill(~inside_RC, 0.0))
    _finish(d, slope, out)


def _divergence_gradient_torch(
    student: Side, teacher: Side, divergence: Divergence, coefficients: Tensor, normaliser: Tensor, out: Tensor
) -> None:
    z, is_new = _logits(student)
    slope = _slope(z, student.map)
    log_s, log_t = _logprobs(z, is_new, coefficients, out), _logprobs(*_logits(teacher), normaliser)
    upstream, value = coefficients[Coefficient.A][:, None], coefficients[Coefficient.B][:, None]
    if divergence.kind == "forward_kl":
        d = log_s.exp_().sub_(log_t.exp_()).mul_(upstream)
    else:
        s = log_s.exp()
        is_jsd = divergence.kind == "jsd"
        other = _log_mixture(log_s, log_t, divergence.beta) if is_jsd else log_t
        d = log_s.sub_(other).sub_(value).mul_(s).mul_(upstream * (1.0 - divergence.beta) if is_jsd else upstream)
    _finish(d, slope, out)


# ---- The one place where a device's kernels enter ----


class LogitBlock(NamedTuple):
    """The steps on one device. Statistics and divergence only read the products."""

    statistics: Callable[[Side, Targets, Tensor, Tensor, Wanted], None]
    pair_statistics: Callable[[Side, Side, Divergence, Tensor], None]
    divergence: Callable[[Side, Side, float, tuple[Tensor, Tensor], Tensor], None]
    gradient: Callable[[Side, Tensor, Targets, Tensor | None, Wanted, Tensor], None]
    divergence_gradient: Callable[[Side, Side, Divergence, Tensor, Tensor, Tensor], None]


_TORCH = LogitBlock(_statistics_torch, _pair_statistics_torch, _divergence_torch, _gradient_torch, _divergence_gradient_torch)


def logit_block(device: torch.device) -> LogitBlock:
    """The steps for a device: Triton on CUDA, and on the CPU where Triton interprets; torch on the CPU."""
    if device.type == "cuda" or (device.type == "cpu" and interprets()):
        from . import logit_block_triton as kernels

        return LogitBlock(
            kernels.statistics, kernels.pair_statistics, kernels.divergence, kernels.gradient, kernels.divergence_gradient
        )
    if device.type == "cpu":
        return _TORCH
    raise ValueError(f"no implementation for device {device.type!r}; expected cpu or cuda: move the inputs")
