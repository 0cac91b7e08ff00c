"""Policy-gradient losses, as pure functions of token log-probabilities with an explicit global denominator.

**Math** r = exp(logprob − old_logprob), A the advantage. Every loss is
    Σ over counted tokens (or sequences) of weight · ℓ, divided by `denominator`
  with ℓ given by the name, and the aggregation by two arguments, so that half batches add up to the whole exactly:
    aggregation              weight of a token     denominator, counted over ranks and accumulation     names
    token-mean               1                     number of counted tokens                   ppo dapo cispo vespo kimi dppo
    seq-mean-token-mean      1 / own length        number of sequences                                  grpo gspo sapo
    seq-mean-token-sum-norm  1                     number of sequences × the largest length             dr_grpo
    sequence                 one term a sequence   number of sequences                                  rloo gmpo luspo
  Advantages: `group_advantage` here; GAE, reward-to-go, whitening (PPO, REINFORCE++) and the KL in the reward in `gae`.
**Shapes** T packed tokens of B sequences, bounded by cu_seqlens [B + 1]; reward [B]; a mask is True where a token counts
  (model tokens of completions). Nothing is broadcast; losses are scalars. Tokens outside the mask, of weight 0 or past the
  last boundary count for nothing, in value and gradient, and may hold anything, NaN included; so for a sequence of such tokens.
**Dtypes** those of the inputs: pass fp32 log-probabilities. Log-ratios are limited to ±LOG_RATIO_LIMIT, beyond which
  they have no gradient.
**Traffic** a few numbers per token.
**Source** PPO arXiv 1707.06347; dual clip 1912.09729; GRPO 2402.03300; Dr. GRPO 2503.20783; DAPO 2503.14476;
  GSPO 2507.18071; CISPO 2506.13585; RLOO 2402.14740; SAPO 2511.20347; GMPO 2507.20673; VESPO, LUSPO as in TRL; Kimi K2.5
  2602.02276; DPPO 2602.04879; InstructGPT 2203.02155; k1, k2, k3: J. Schulman, "Approximating KL divergence", 2020.
**Limits** A sequence lies whole on one rank: gspo and rloo sum its log-ratios. Old log-probabilities and weights are
  constants. cu_seqlens are read on the host. These are elementwise torch on any device; the formulas are their own references.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .sequence_sum import check_vectors, counted_length, counted_tokens, sequence_sum, spread

# As verl and NeMo-RL do: exp(20) is 4.9e8, finite in every float type but fp16, and far past any clip.
LOG_RATIO_LIMIT = 20.0


def group_advantage(
    reward_B: Tensor,
    group_size: int,
    *,
    normalise: Literal["group_std", "none", "leave_one_out", "group_mean"] = "group_std",
    eps: float = 1e-4,
) -> Tensor:
    """Advantage of each completion against its group: `group_size` consecutive completions of one prompt.

    "group_std" is GRPO's (r − mean) / (std + eps), std unbiased as in TRL (whose eps is 1e-4; verl's 1e-6); "none" is
    Dr. GRPO's r − mean; "leave_one_out" is RLOO's r − mean of the others = G/(G − 1) (r − mean); "group_mean" is MaxRL's
    (r − mean) / mean, for rewards ≥ 0: a group without any reward has no advantage.
    """
    if group_size < 2 or reward_B.dim() != 1 or len(reward_B) % group_size:
        received = f"{tuple(reward_B.shape)} rewards in groups of {group_size}"
        raise ValueError(f"received {received}; expected [B], B a multiple of a group size >= 2: sample more completions")
    check_vectors(reward=reward_B)
    reward_PG = reward_B.reshape(-1, group_size)
    centred_PG = reward_PG - reward_PG.mean(1, keepdim=True)
    scales: dict[str, Callable[[], Tensor | float]] = {
        "group_std": lambda: 1 / (reward_PG.std(1, keepdim=True) + eps),
        "none": lambda: 1.0,
        "leave_one_out": lambda: group_size / (group_size - 1),
        "group_mean": lambda: 1 / reward_PG.mean(1, keepdim=True).clamp(min=eps),
    }
    if normalise not in scales:
        raise ValueError(f"normalise is {normalise!r}; expected one of {list(scales)}")
    return (centred_PG * scales[normalise]()).reshape(-1)


def kl_k1(logprob_T: Tensor, reference_logprob_T: Tensor, *, mask_T: Tensor | None = None) -> Tensor:
    """lp − lp_ref: unbiased, of either sign. For the reward (PPO, RLOO): as a loss its expected gradient is zero.

    `mask_T`: where False, 0 in value and gradient. For the k2 and k3 of NaN a mask given to `weighted_sum` alone is too late.
    """
    check_vectors(logprob=logprob_T, reference_logprob=reference_logprob_T)
    return _only(counted_tokens(logprob_T, mask_T=mask_T), logprob_T - reference_logprob_T)


def kl_k2(logprob_T: Tensor, reference_logprob_T: Tensor, *, mask_T: Tensor | None = None) -> Tensor:
    """½ (lp − lp_ref)²: biased, but its gradient on-policy is the reverse KL's."""
    return 0.5 * kl_k1(logprob_T, reference_logprob_T, mask_T=mask_T).square()


def kl_k3(logprob_T: Tensor, reference_logprob_T: Tensor, *, mask_T: Tensor | None = None) -> Tensor:
    """exp(lp_ref − lp) − (lp_ref − lp) − 1: unbiased and never negative, GRPO's loss term. Gradient 1 − exp(lp_ref − lp)."""
    log_ratio_T = -kl_k1(logprob_T, reference_logprob_T, mask_T=mask_T).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(log_ratio_T) - log_ratio_T


def weighted_sum(
    values_T: Tensor,
    *,
    denominator: float | Tensor,
    mask_T: Tensor | None = None,
    weight_T: Tensor | None = None,
) -> Tensor:
    """Σ weight · value over counted tokens / denominator: the aggregation of every loss here, and of a KL term beside it."""
    check_vectors(values=values_T)
    if denominator.dim() != 0 if isinstance(denominator, Tensor) else not denominator > 0:
        received = list(denominator.shape) if isinstance(denominator, Tensor) else denominator
        raise ValueError(f"denominator is {received}; expected one number > 0: count tokens or sequences over all ranks")
    is_counted_T = counted_tokens(values_T, mask_T=mask_T, weight_T=weight_T)
    values_T = _only(is_counted_T, values_T)
    return (values_T if weight_T is None else values_T * _only(is_counted_T, weight_T.detach())).sum() / denominator


def sequence_mean_weight(
    cu_seqlens: Tensor, num_tokens: int, *, mask_T: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weight of each token, 1 / counted tokens of its sequence: seq-mean-token-mean. 0 for tokens that do not count."""
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; expected a floating-point one: weights are fractions")
    like_T = cu_seqlens.new_empty(num_tokens)
    is_counted_T = counted_tokens(like_T, mask_T=mask_T, cu_seqlens=cu_seqlens)
    weight_B = (1 / counted_length(is_counted_T, cu_seqlens).clamp(min=1).double()).to(dtype)
    return _only(is_counted_T, spread(weight_B, cu_seqlens, num_tokens))


def clipped_surrogate(
    ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """max(−rA, −clip(r, 1 − low, 1 + high) A); with a dual clip c > 1, at most −cA where A < 0."""
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(f"clip_low, clip_high are {clip_low}, {clip_high}; expected 0 <= clip_low <= 1, clip_high >= 0")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}; expected > 1, or None for no dual clip")
    if ratio.shape != advantage.shape:
        shapes = f"ratio {list(ratio.shape)}, advantage {list(advantage.shape)}"
        raise ValueError(f"received {shapes}; expected one shape: give every ratio its advantage")
    loss = torch.maximum(-ratio * advantage, -ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    if dual_clip is None:
        return loss
    return torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)


def ppo(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    *,
    denominator: float | Tensor,
    mask_T: Tensor | None = None,
    weight_T: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """The token-level clipped loss. Token-mean: `denominator` is the global number of counted tokens.

    `weight_T` may also carry a detached importance weight (rollout mismatch). grpo, dr_grpo and dapo are this loss with
    another aggregation or clip.
    """
    tokens = _tokens(logprob_T, old_logprob_T, advantage_T, mask_T=mask_T, weight_T=weight_T)
    loss_T = clipped_surrogate(torch.exp(tokens.log_ratio_T), tokens.advantage_T, clip_low, clip_high, dual_clip)
    return weighted_sum(loss_T, denominator=denominator, mask_T=tokens.is_counted_T, weight_T=weight_T)


def grpo(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    *,
    weight_T: Tensor,
    denominator: float | Tensor,
    mask_T: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """The clipped loss, seq-mean-token-mean: `weight_T` is `sequence_mean_weight(...)`, `denominator` the global number
    of sequences. A "group_std" advantage and a kl_k3 term (same weights and denominator) complete the paper's GRPO.
    """
    tokens = _tokens(logprob_T, old_logprob_T, advantage_T, mask_T=mask_T, weight_T=weight_T)
    loss_T = clipped_surrogate(torch.exp(tokens.log_ratio_T), tokens.advantage_T, clip_low, clip_high)
    return weighted_sum(loss_T, denominator=denominator, mask_T=tokens.is_counted_T, weight_T=weight_T)


def dr_grpo(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    *,
    denominator: float | Tensor,
    mask_T: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """The clipped loss without a length bias: `denominator` is the global number of sequences × the *largest allowed*
    completion length, a constant of the run. Goes with a "none" advantage.
    """
    return ppo(
        logprob_T, old_logprob_T, advantage_T, denominator=denominator, mask_T=mask_T, clip_low=clip_low, clip_high=clip_high
    )


def dapo(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    *,
    denominator: float | Tensor,
    mask_T: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Tensor:
    """The clipped loss with a higher upper clip, token-mean: `denominator` is the global number of counted tokens.

    The paper's dynamic sampling and overlong penalty act on data and reward. (TRL's "dapo" is the aggregation alone.)
    """
    return ppo(
        logprob_T, old_logprob_T, advantage_T, denominator=denominator, mask_T=mask_T, clip_low=clip_low, clip_high=clip_high
    )


def gspo(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    *,
    cu_seqlens: Tensor,
    denominator: float | Tensor,
    mask_T: Tensor | None = None,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Tensor:
    """The clipped loss on the sequence's ratio s = exp(mean log r), seq-mean-token-mean: `denominator` is the global
    number of sequences. Written per token as sg[s] · π / sg[π] (the paper's GSPO-token, verl's form): with one advantage
    per sequence it has GSPO's value and gradient, and it also takes advantages that differ by token.
    """
    tokens = _tokens(logprob_T, old_logprob_T, advantage_T, mask_T=mask_T, cu_seqlens=cu_seqlens)
    log_ratio_T, length_B = tokens.log_ratio_T, counted_length(tokens.is_counted_T, cu_seqlens)
    mean_B = sequence_sum(log_ratio_T.detach(), cu_seqlens) / length_B.clamp(min=1)
    ratio_T = torch.exp(spread(mean_B, cu_seqlens, len(logprob_T)) + log_ratio_T - log_ratio_T.detach())
    loss_T = clipped_surrogate(ratio_T, tokens.advantage_T, clip_low, clip_high)
    weight_T = sequence_mean_weight(cu_seqlens, len(logprob_T), mask_T=tokens.is_counted_T, dtype=mean_B.dtype)
    return weighted_sum(loss_T, denominator=denominator, weight_T=weight_T)


def cispo(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    *,
    denominator: float | Tensor,
    mask_T: Tensor | None = None,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
    bound: Literal["relative", "absolute"] = "relative",
) -> Tensor:
    """−sg[clip(r, 1 − low, 1 + high)] A lp, token-mean: no token's gradient is dropped, only its weight is bounded.

    "relative" bounds are distances from 1, as in verl, slime and NeMo-RL; with "absolute" the weight itself is at most
    `clip_high` and `clip_low` is not used, as in TRL and Liger (whose default then is 0.2: a fifth of every gradient). The
    defaults are no lower bound, and ScaleRL's absolute 5 (arXiv 2510.13786).
    """
    bounds = {"relative": (1 - clip_low, 1 + clip_high), "absolute": (None, clip_high)}
    if bound not in bounds:
        raise ValueError(f"bound is {bound!r}; expected one of {list(bounds)}")
    _check_not_negative(clip_low=clip_low, clip_high=clip_high)
    tokens = _tokens(logprob_T, old_logprob_T, advantage_T, mask_T=mask_T)
    weight_T = torch.exp(tokens.log_ratio_T).detach().clamp(*bounds[bound])
    return weighted_sum(-weight_T * tokens.advantage_T * tokens.logprob_T, denominator=denominator)


def sapo(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    *,
    weight_T: Tensor,
    denominator: float | Tensor,
    mask_T: Tensor | None = None,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> Tensor:
    """−A σ(τ(r − 1)) 4/τ, τ by the advantage's sign: a soft gate of slope 1 at r = 1 in place of the clip.

    Aggregated as GRPO: `weight_T` is `sequence_mean_weight(...)`, `denominator` the global number of sequences.
    """
    temperatures = temperature_positive, temperature_negative
    if not all(temperature > 0 for temperature in temperatures):
        raise ValueError(f"temperatures are {temperatures}; expected numbers > 0: the paper's are 1 and 1.05")
    tokens = _tokens(logprob_T, old_logprob_T, advantage_T, mask_T=mask_T, weight_T=weight_T)
    ratio_T = torch.exp(tokens.log_ratio_T)
    tau_T = _choose(tokens.advantage_T > 0, *temperatures, ratio_T.dtype)
    loss_T = -tokens.advantage_T * torch.sigmoid(tau_T * (ratio_T - 1)) * 4 / tau_T
    return weighted_sum(loss_T, denominator=denominator, mask_T=tokens.is_counted_T, weight_T=weight_T)


def gmpo(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_B: Tensor,
    *,
    cu_seqlens: Tensor,
    denominator: float | Tensor,
    mask_T: Tensor | None = None,
    log_clip_low: float = 0.4,
    log_clip_high: float = 0.4,
) -> Tensor:
    """−A exp(mean of clipped log r), one term a sequence: `denominator` is the global number of sequences.

    Each token's log-ratio is clipped before the geometric mean, to ±0.4 and only in the direction of the advantage: from
    above where A ≥ 0, from below where A < 0.
    """
    _check_not_negative(log_clip_low=log_clip_low, log_clip_high=log_clip_high)
    tokens, advantage_B = _sequences(logprob_T, old_logprob_T, advantage_B, mask_T, cu_seqlens)
    is_good_T = spread(advantage_B >= 0, cu_seqlens, len(logprob_T))
    length_B = counted_length(tokens.is_counted_T, cu_seqlens)
    chosen_T = torch.where(is_good_T, tokens.log_ratio_T.clamp(max=log_clip_high), tokens.log_ratio_T.clamp(min=-log_clip_low))
    ratio_B = torch.exp(sequence_sum(chosen_T, cu_seqlens) / length_B.clamp(min=1))
    return weighted_sum(-ratio_B * advantage_B, denominator=denominator)


def luspo(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_B: Tensor,
    *,
    cu_seqlens: Tensor,
    denominator: float | Tensor,
    mask_T: Tensor | None = None,
    clip_low: float = 2e-3,
    clip_high: float = 2.5e-3,
) -> Tensor:
    """GSPO's clipped loss of each sequence times its number of counted tokens: `denominator` is the global number of
    sequences, so that long sequences are not paid less per token."""
    tokens, advantage_B = _sequences(logprob_T, old_logprob_T, advantage_B, mask_T, cu_seqlens)
    length_B = counted_length(tokens.is_counted_T, cu_seqlens)
    ratio_B = torch.exp(sequence_sum(tokens.log_ratio_T, cu_seqlens) / length_B.clamp(min=1))
    loss_B = clipped_surrogate(ratio_B, advantage_B, clip_low, clip_high) * length_B
    return weighted_sum(loss_B, denominator=denominator)


def vespo(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_B: Tensor,
    *,
    cu_seqlens: Tensor,
    denominator: float | Tensor,
    mask_T: Tensor | None = None,
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
) -> Tensor:
    """−sg[φ(w)] A lp, token-mean; φ(w) = e^λ w^k e^(−λw) of the sequence's whole ratio w = exp(Σ log r), so that φ(1) = 1.

    `positive` and `negative` are (k, λ) by the advantage's sign. log w is limited to [log 1e-8, 20], as in TRL.
    """
    for k, lam in (positive, negative):
        _check_not_negative(k=k, λ=lam)
    tokens, advantage_B = _sequences(logprob_T, old_logprob_T, advantage_B, mask_T, cu_seqlens)
    log_w_B = sequence_sum(tokens.log_ratio_T.detach(), cu_seqlens).clamp(math.log(1e-8), LOG_RATIO_LIMIT)
    is_good_B = advantage_B >= 0
    k_B, lambda_B = (_choose(is_good_B, *pair, log_w_B.dtype) for pair in zip(positive, negative, strict=True))
    phi_B = torch.exp(lambda_B + k_B * log_w_B - lambda_B * log_w_B.exp())
    loss_T = -spread(phi_B * advantage_B, cu_seqlens, len(logprob_T)) * tokens.logprob_T
    return weighted_sum(loss_T, denominator=denominator)


def kimi(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    *,
    denominator: float | Tensor,
    low: float,
    high: float,
    mask_T: Tensor | None = None,
) -> Tensor:
    """−A lp where low ≤ log r ≤ high, whatever A's sign, and nothing elsewhere; token-mean over all counted tokens.

    Kimi K2.5's; its advantage is (r − mean) / τ, its bounds are not published.
    """
    if not low <= high:
        raise ValueError(f"low, high are {low}, {high}; expected low <= high: bounds of log r, around 0")
    tokens = _tokens(logprob_T, old_logprob_T, advantage_T, mask_T=mask_T)
    is_kept_T = (tokens.log_ratio_T >= low) & (tokens.log_ratio_T <= high)
    return weighted_sum(-tokens.advantage_T * tokens.logprob_T, denominator=denominator, mask_T=is_kept_T)


def dppo(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    *,
    denominator: float | Tensor,
    mask_T: Tensor | None = None,
    limit: float = 0.2,
    log_ratio_weight: float = 1e-3,
) -> Tensor:
    """−A r, dropped where the token's *probability* has moved by more than `limit` in the advantage's direction, plus
    `log_ratio_weight` (log r)² on every counted token: prime-rl's default, whose `old_logprob_T` is the rollout engine's."""
    _check_not_negative(limit=limit, log_ratio_weight=log_ratio_weight)
    tokens = _tokens(logprob_T, old_logprob_T, advantage_T, mask_T=mask_T)
    moved_T = (tokens.logprob_T.exp() - tokens.old_logprob_T.exp()).detach()
    is_dropped_T = torch.where(tokens.advantage_T > 0, moved_T > limit, moved_T < -limit)
    surrogate_T = torch.where(is_dropped_T, 0.0, -tokens.advantage_T * torch.exp(tokens.log_ratio_T))
    return weighted_sum(surrogate_T + log_ratio_weight * tokens.log_ratio_T.square(), denominator=denominator)


def rloo(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_B: Tensor,
    *,
    cu_seqlens: Tensor,
    denominator: float | Tensor,
    mask_T: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """The clipped loss on each sequence's whole ratio exp(Σ log r), one term a sequence: `denominator` is the global
    number of sequences. TRL's convention (verl's "rloo" is the "leave_one_out" advantage with the token-level loss).
    On-policy its gradient is REINFORCE's, −A Σ d lp.
    """
    tokens, advantage_B = _sequences(logprob_T, old_logprob_T, advantage_B, mask_T, cu_seqlens)
    log_ratio_B = sequence_sum(tokens.log_ratio_T, cu_seqlens).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    loss_B = clipped_surrogate(torch.exp(log_ratio_B), advantage_B, clip_low, clip_high)
    return weighted_sum(loss_B, denominator=denominator)


def clipped_value_loss(
    value_T: Tensor,
    old_value_T: Tensor,
    return_T: Tensor,
    *,
    denominator: float | Tensor,
    mask_T: Tensor | None = None,
    clip: float = 0.2,
) -> Tensor:
    """PPO's ½ max((V − R)², (clip(V, V_old ± clip) − R)²), token-mean."""
    _check_not_negative(clip=clip)
    check_vectors(value=value_T, old_value=old_value_T, returns=return_T)
    is_counted_T = counted_tokens(value_T, mask_T=mask_T)
    value_T, old_value_T, return_T = (_only(is_counted_T, values_T) for values_T in (value_T, old_value_T, return_T))
    clipped_T = torch.minimum(torch.maximum(value_T, old_value_T - clip), old_value_T + clip)
    loss_T = 0.5 * torch.maximum((value_T - return_T).square(), (clipped_T - return_T).square())
    return weighted_sum(loss_T, denominator=denominator)


def pretraining_mix(
    logprob_T: Tensor, *, denominator: float | Tensor, gamma: float = 27.8, mask_T: Tensor | None = None
) -> Tensor:
    """InstructGPT's PPO-ptx term, −γ log π of pretraining tokens; added to the policy's loss, or its gradient to theirs.

    The paper gives γ = 27.8 but not what the sum is divided by, and γ means something only with that: the global number of
    these tokens (token-mean), of examples (example-mean), or 1 (sum).
    """
    _check_not_negative(gamma=gamma)
    return -gamma * weighted_sum(logprob_T, denominator=denominator, mask_T=mask_T)


class _Tokens(NamedTuple):
    """What a token-level loss computes with: 0 at tokens that do not count, so that what they hold gets no further."""

    logprob_T: Tensor
    old_logprob_T: Tensor
    log_ratio_T: Tensor
    advantage_T: Tensor
    is_counted_T: Tensor


def _tokens(logprob_T: Tensor, old_logprob_T: Tensor, advantage_T: Tensor, **conditions: Tensor | None) -> _Tokens:
    check_vectors(logprob=logprob_T, old_logprob=old_logprob_T, advantage=advantage_T)
    is_counted_T = counted_tokens(logprob_T, **conditions)
    logprob_T, old_logprob_T = _only(is_counted_T, logprob_T), _only(is_counted_T, old_logprob_T.detach())
    log_ratio_T = (logprob_T - old_logprob_T).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return _Tokens(logprob_T, old_logprob_T, log_ratio_T, _only(is_counted_T, advantage_T), is_counted_T)


def _sequences(
    logprob_T: Tensor, old_logprob_T: Tensor, advantage_B: Tensor, mask_T: Tensor | None, cu_seqlens: Tensor
) -> tuple[_Tokens, Tensor]:
    """The tokens, and each sequence's advantage, 0 where none of its tokens counts."""
    check_vectors(advantage=advantage_B)
    tokens = _tokens(logprob_T, old_logprob_T, torch.zeros_like(logprob_T), mask_T=mask_T, cu_seqlens=cu_seqlens)
    length_B = counted_length(tokens.is_counted_T, cu_seqlens)
    if advantage_B.shape != length_B.shape:
        raise ValueError(f"advantage is {list(advantage_B.shape)}; expected {list(length_B.shape)}: one number a sequence")
    return tokens, _only(length_B > 0, advantage_B)


def _only(is_counted: Tensor, values: Tensor) -> Tensor:
    return torch.where(is_counted, values, 0.0)


def _choose(is_first: Tensor, first: float, second: float, dtype: torch.dtype) -> Tensor:
    """`first` or `second` in the dtype of the loss: torch.where of two numbers would round them to fp32."""
    return torch.full_like(is_first, second, dtype=dtype).masked_fill(is_first, first)


def _check_not_negative(**options: float) -> None:
    for name, value in options.items():
        if not value >= 0:
            raise ValueError(f"{name} is {value}; expected a number >= 0: leave out its sign")
