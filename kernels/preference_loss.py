"""Losses of preference pairs, as pure functions of sequence log-probabilities.

**Math** Each docstring gives its formula, with lp_w, lp_l the policy's log-probabilities of the chosen and the rejected
  response, h = lp_policy − lp_reference, and |y| a response's number of counted tokens. σ is the logistic function, Δ is
  h_w − h_l. Where TRL has the name, β, sums and defaults are TRL's unless the docstring says otherwise.
**Shapes** every tensor is [B], one number per pair (kto: per response); the loss is [B], and its mean is the caller's.
  Nothing is broadcast but a tensor [], one number for all, where the docstring says so. Tokens outside a mask or past the last
  boundary count for nothing, whatever they hold.
**Dtypes** those of the inputs: pass fp32 sums.
**Traffic** a few numbers per pair.
**Source** beside each formula. Where one name means different mathematics, the docstring says which is meant.
**Limits** Sequence sums and means come from token log-probabilities, by `sequence_sum`. Exponents are limited to
  EXPONENT_LIMIT and log odds by CERTAIN_LOGPROB; beyond, they have no gradient. These are
  elementwise torch on any device; no kernel will replace them, and the formulas are their own references.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from .sequence_sum import check_cu_seqlens, check_vectors, counted_length, counted_tokens, sequence_sum, spread

EXPONENT_LIMIT = 80.0  # TRL's, in f-DPO's alpha divergence: exp(80) is 5.5e34, finite in fp32 and bf16
CERTAIN_LOGPROB = -1e-7  # log odds of 16.1; an average of fp32 log-probabilities is not known to more than that


def dpo(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """−(1 − ε) log σ(β(h_w − h_l)) − ε log σ(−β(h_w − h_l)); ε > 0 is conservative DPO. arXiv 2305.18290.

    Takes sums over tokens. Averages in their place make the length-normalised DPO of Tülu 3 (TRL's `sigmoid_norm`).
    """
    _check_share("label_smoothing", label_smoothing)
    margin_B = beta * _margin(policy_chosen_B, policy_rejected_B, reference_chosen_B, reference_rejected_B)
    return -(1 - label_smoothing) * logsigmoid(margin_B) - label_smoothing * logsigmoid(-margin_B)


def robust_dpo(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Tensor:
    """(−(1 − ε) log σ(βΔ) + ε log σ(−βΔ)) / (1 − 2ε), Δ = h_w − h_l, unbiased under labels flipped with chance ε.

    Takes sums. arXiv 2403.00409. With ε = 0 it is DPO; unlike `dpo`, the flipped term is subtracted.
    """
    _check_share("label_smoothing", label_smoothing)
    margin_B = beta * _margin(policy_chosen_B, policy_rejected_B, reference_chosen_B, reference_rejected_B)
    kept_B, flipped_B = -logsigmoid(margin_B), -logsigmoid(-margin_B)
    return ((1 - label_smoothing) * kept_B - label_smoothing * flipped_B) / (1 - 2 * label_smoothing)


def hinge(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """max(0, 1 − β(h_w − h_l)), of sums: the RSO form of SLiC's loss. arXiv 2309.06657."""
    return relu(1 - beta * _margin(policy_chosen_B, policy_rejected_B, reference_chosen_B, reference_rejected_B))


def ipo(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    beta: float = 0.1,
    chosen_length_B: Tensor | None = None,
    rejected_length_B: Tensor | None = None,
) -> Tensor:
    """(h_w/|y_w| − h_l/|y_l| − 1/(2β))², β being the paper's τ. arXiv 2310.12036.

    Takes sums, and both lengths: TRL's convention, length-averaged (its authors' reading). Without lengths h is taken as
    it is: given sums that is OpenRLHF's convention, given averages TRL's again. The average of no tokens is 0.
    """
    if (chosen_length_B is None) != (rejected_length_B is None):
        raise ValueError("ipo received the length of one side; expected both or neither: pass the other one too")
    _check_positive(beta=beta)
    chosen_B, rejected_B = _log_ratios(policy_chosen_B, policy_rejected_B, reference_chosen_B, reference_rejected_B)
    if chosen_length_B is not None and rejected_length_B is not None:
        _check_same_shape(policy_chosen_B, chosen_length=chosen_length_B, rejected_length=rejected_length_B)
        chosen_B, rejected_B = chosen_B / chosen_length_B.clamp(min=1), rejected_B / rejected_length_B.clamp(min=1)
    return (chosen_B - rejected_B - 1 / (2 * beta)).square()


def kto(
    policy_B: Tensor,
    reference_B: Tensor,
    is_desirable_B: Tensor,
    baseline: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Desirable: λ_D (1 − σ(β(h − z₀))); undesirable: λ_U (1 − σ(β(z₀ − h))). arXiv 2402.01306.

    Takes sums of single responses, no pairs. `baseline` is z₀ = `kto_baseline(...)` over the *global* batch: average it
    over data-parallel ranks first. It is one number, a float or a tensor [], and treated as a constant.
    """
    check_vectors(policy=policy_B, reference=reference_B)
    _check_same_shape(policy_B, is_desirable=is_desirable_B)
    if is_desirable_B.dtype != torch.bool:
        raise ValueError(f"is_desirable is {is_desirable_B.dtype}; expected torch.bool: True where the response is good")
    if isinstance(baseline, Tensor):
        if baseline.dim() != 0:
            raise ValueError(
                f"baseline is {list(baseline.shape)}; expected a float or []: it is one number for the global batch"
            )
        baseline = baseline.detach()
    advantage_B = beta * (policy_B - reference_B - baseline)
    desirable_B = desirable_weight * torch.sigmoid(-advantage_B)
    return torch.where(is_desirable_B, desirable_B, undesirable_weight * torch.sigmoid(advantage_B))


def kto_baseline(mismatched_policy_B: Tensor, mismatched_reference_B: Tensor) -> Tensor:
    """z₀ = max(0, mean h) over prompts with another prompt's response, detached: an estimate of KL(policy ‖ reference).

    0 for an empty batch.
    """
    check_vectors(mismatched_policy=mismatched_policy_B, mismatched_reference=mismatched_reference_B)
    log_ratio_B = (mismatched_policy_B - mismatched_reference_B).detach()
    return (log_ratio_B.sum() / max(1, len(log_ratio_B))).clamp(min=0)


def orpo(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    nll_chosen_B: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """NLL_w − β log σ(log odds_w − log odds_l), log odds = lp − log(1 − e^lp). arXiv 2403.07691, whose λ is β here.

    `policy_*` are *averages* over the response's tokens, below 0: above CERTAIN_LOGPROB they are taken for it, and have no
    gradient. `nll_chosen_B` ([B] or []) is the mean negative log-likelihood of the chosen sequence, prompt and response in
    the paper and TRL. No reference model.
    """
    check_vectors(policy_chosen=policy_chosen_B, policy_rejected=policy_rejected_B)
    _check_same_shape(policy_chosen_B, or_one_number=True, nll_chosen=nll_chosen_B)
    log_odds_B = _log_odds(policy_chosen_B) - _log_odds(policy_rejected_B)
    return nll_chosen_B - beta * logsigmoid(log_odds_B)


def simpo(policy_chosen_B: Tensor, policy_rejected_B: Tensor, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """−log σ(β(lp_w/|y_w| − lp_l/|y_l|) − γ), of *averages*; no reference model, no NLL. arXiv 2405.14734.

    γ is the margin after the multiplication by β (the authors tune γ/β, about 0.5), as in TRL; Liger adds an NLL term to
    the same name by default: that is `cpo` with averages.
    """
    check_vectors(policy_chosen=policy_chosen_B, policy_rejected=policy_rejected_B)
    return -logsigmoid(beta * (policy_chosen_B - policy_rejected_B) - gamma)


def cpo(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    nll_chosen_B: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    gamma: float = 0.0,
) -> Tensor:
    """−log σ(β(lp_w − lp_l) − γ) + α NLL_w, of sums; no reference model. arXiv 2401.08417 (γ = 0).

    `nll_chosen_B` ([B] or []) is the mean negative log-likelihood of the chosen sequence (TRL). Averages and γ > 0 make
    CPO-SimPO.
    """
    _check_same_shape(policy_chosen_B, or_one_number=True, nll_chosen=nll_chosen_B)
    return simpo(policy_chosen_B, policy_rejected_B, beta=beta, gamma=gamma) + alpha * nll_chosen_B


def exo_pair(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> Tensor:
    """σ(βΔ)(log σ(βΔ) − log(1 − ε)) + σ(−βΔ)(log σ(−βΔ) − log ε): KL of the policy's preference to the label's.

    arXiv 2402.00856, eq. 16. ε > 0: 1e-3 is the paper's.
    """
    if not 0.0 < label_smoothing < 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected 0 < label_smoothing < 1: the paper takes 1e-3")
    margin_B = beta * _margin(policy_chosen_B, policy_rejected_B, reference_chosen_B, reference_rejected_B)
    kept_B, flipped_B = logsigmoid(margin_B), logsigmoid(-margin_B)
    rest = math.log1p(-label_smoothing), math.log(label_smoothing)
    return kept_B.exp() * (kept_B - rest[0]) + flipped_B.exp() * (flipped_B - rest[1])


def nca_pair(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """−log σ(β h_w) − ½ log σ(−β h_w) − ½ log σ(−β h_l). arXiv 2402.05369."""
    chosen_B, rejected_B = _log_ratios(policy_chosen_B, policy_rejected_B, reference_chosen_B, reference_rejected_B)
    chosen_B, rejected_B = beta * chosen_B, beta * rejected_B
    return -logsigmoid(chosen_B) - 0.5 * logsigmoid(-chosen_B) - 0.5 * logsigmoid(-rejected_B)


def bco_pair(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    beta: float = 0.1,
    shift: float = 0.0,
) -> Tensor:
    """−log σ(β h_w − δ) − log σ(−(β h_l − δ)). arXiv 2404.04656, whose δ is a running mean of rewards; TRL's pair has none."""
    chosen_B, rejected_B = _log_ratios(policy_chosen_B, policy_rejected_B, reference_chosen_B, reference_rejected_B)
    return -logsigmoid(beta * chosen_B - shift) - logsigmoid(shift - beta * rejected_B)


def sppo_hard(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """(h_w − 1/(2β))² + (h_l + 1/(2β))²: SPPO with probabilities of 1 and 0. arXiv 2405.00675, eq. 4.7; its η is 1/β."""
    chosen_B, rejected_B = _log_ratios(policy_chosen_B, policy_rejected_B, reference_chosen_B, reference_rejected_B)
    _check_positive(beta=beta)
    return (chosen_B - 0.5 / beta).square() + (rejected_B + 0.5 / beta).square()


def aot(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    is_paired: bool = True,
) -> Tensor:
    """DPO's loss of the difference of *sorted* values over the batch. arXiv 2406.05882.

    Paired: sorted lp_w − lp_l against the reference's sorted; unpaired: sorted h_w against sorted h_l. The batch is the
    distribution, so the loss of half a batch is not half the loss: gather the values over ranks first.
    """
    _check_share("label_smoothing", label_smoothing)
    one_B, other_B = _log_ratios(policy_chosen_B, policy_rejected_B, reference_chosen_B, reference_rejected_B)
    if is_paired:
        one_B, other_B = policy_chosen_B - policy_rejected_B, reference_chosen_B - reference_rejected_B
    margin_B = beta * (one_B.sort(0).values - other_B.sort(0).values)
    return -(1 - label_smoothing) * logsigmoid(margin_B) - label_smoothing * logsigmoid(-margin_B)


def apo_zero(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """(1 − σ(β h_w)) + σ(β h_l): chosen up, rejected down. arXiv 2408.06266, eq. 7. (Unpaired: `kto` with baseline 0.)"""
    chosen_B, rejected_B = _log_ratios(policy_chosen_B, policy_rejected_B, reference_chosen_B, reference_rejected_B)
    return torch.sigmoid(-beta * chosen_B) + torch.sigmoid(beta * rejected_B)


def apo_down(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """σ(β h_w) + (1 − σ(βΔ)): both down, rejected more; for chosen answers worse than the model's. arXiv 2408.06266, eq. 8."""
    chosen_B, rejected_B = _log_ratios(policy_chosen_B, policy_rejected_B, reference_chosen_B, reference_rejected_B)
    return torch.sigmoid(beta * chosen_B) + torch.sigmoid(-beta * (chosen_B - rejected_B))


def discopop(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    beta: float = 0.1,
    tau: float = 0.05,
) -> Tensor:
    """(1 − m)(−log σ(βΔ)) + m exp(−βΔ), m = σ(βΔ/τ). arXiv 2406.08414, eq. 5.

    The second term is exp(log m − βΔ), which vanishes with m for τ < 1; for τ > 1 its exponent grows, up to EXPONENT_LIMIT.
    """
    _check_positive(tau=tau)
    margin_B = beta * _margin(policy_chosen_B, policy_rejected_B, reference_chosen_B, reference_rejected_B)
    exponential_B = torch.exp((logsigmoid(margin_B / tau) - margin_B).clamp(max=EXPONENT_LIMIT))
    return exponential_B - torch.sigmoid(-margin_B / tau) * logsigmoid(margin_B)


def f_dpo(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"],
    beta: float = 0.1,
    alpha: float = 0.5,
) -> Tensor:
    """−log σ(β(f'(e^h_w) − f'(e^h_l))) for the divergence that holds the policy to the reference. arXiv 2309.16240.

    f' up to a constant: h (reverse_kl, which is DPO), −e^−h (forward_kl), log σ(h) (js), e^((α−1)h)/(α−1) (alpha, α ≠ 1).
    Exponents are at most EXPONENT_LIMIT; a pair of which both sides are beyond has the loss log 2 and no gradient.
    """
    scores = {
        "reverse_kl": lambda h_B: h_B,
        "forward_kl": lambda h_B: -torch.exp((-h_B).clamp(max=EXPONENT_LIMIT)),
        "js": logsigmoid,
        "alpha": lambda h_B: torch.exp(((alpha - 1) * h_B).clamp(max=EXPONENT_LIMIT)) / (alpha - 1),
    }
    if divergence not in scores or (divergence == "alpha" and alpha == 1):
        raise ValueError(f"divergence is {divergence!r} (alpha {alpha}); expected one of {list(scores)}, and alpha not 1")
    chosen_B, rejected_B = _log_ratios(policy_chosen_B, policy_rejected_B, reference_chosen_B, reference_rejected_B)
    return -logsigmoid(beta * (scores[divergence](chosen_B) - scores[divergence](rejected_B)))


def length_desensitised(
    logprob_T: Tensor, cu_seqlens: Tensor, shared_length_B: Tensor, *, alpha: float, mask_T: Tensor | None = None
) -> Tensor:
    """LD-DPO's sequence log-probability [B]: the first `shared_length` counted tokens whole, those behind them times α.

    `shared_length` is the shorter response's counted length, for both of a pair. Goes into `dpo`. arXiv 2409.06411.
    """
    check_vectors(logprob=logprob_T)
    is_counted_T = counted_tokens(logprob_T, mask_T=mask_T, cu_seqlens=cu_seqlens)
    num_sequences = cu_seqlens.numel() - 1
    if shared_length_B.shape != (num_sequences,):
        raise ValueError(f"shared_length is {list(shared_length_B.shape)}; expected [{num_sequences}]: one a sequence")
    so_far_T = torch.cat([cu_seqlens.new_zeros(1), is_counted_T.cumsum(0)])
    place_T = so_far_T[1:] - spread(so_far_T[cu_seqlens[:-1].long()], cu_seqlens, len(logprob_T))  # 1 at the first counted one
    is_shared_T = place_T <= spread(shared_length_B, cu_seqlens, len(logprob_T))
    clean_T = torch.where(is_counted_T, logprob_T, 0.0)
    shared_B = sequence_sum(torch.where(is_shared_T, clean_T, 0.0), cu_seqlens)
    return shared_B + alpha * sequence_sum(torch.where(is_shared_T, 0.0, clean_T), cu_seqlens)


def wpo_weight(logprob_T: Tensor, sum_p2_T: Tensor, cu_seqlens: Tensor, *, mask_T: Tensor | None = None) -> Tensor:
    """WPO's weight of a response [B], exp(mean over counted tokens of (lp − log Σ p²)), detached: how likely the policy is to
    say it, against what it expects of itself. A pair's loss is multiplied by both. arXiv 2406.11827, eq. 2; Σ p² comes
    from `linear_logprob(..., sum_p2=True)`.
    """
    check_vectors(logprob=logprob_T, sum_p2=sum_p2_T)
    is_counted_T = counted_tokens(logprob_T, mask_T=mask_T, cu_seqlens=cu_seqlens)
    aligned_T = torch.where(is_counted_T, logprob_T - sum_p2_T.log(), 0.0).detach()
    return torch.exp(sequence_sum(aligned_T, cu_seqlens) / counted_length(is_counted_T, cu_seqlens).clamp(min=1))


# Reward models: rewards instead of log-probabilities.


def bradley_terry(
    reward_chosen_B: Tensor, reward_rejected_B: Tensor, *, margin_B: Tensor | float = 0.0, centring: float = 0.0
) -> Tensor:
    """−log σ(r_w − r_l − margin) + η (r_w + r_l)²; the margin ([B], [] or a float) is Llama 2's, η (TRL: 0.01) centres
    rewards at 0."""
    check_vectors(reward_chosen=reward_chosen_B, reward_rejected=reward_rejected_B)
    if isinstance(margin_B, Tensor):
        _check_same_shape(reward_chosen_B, or_one_number=True, margin=margin_B)
    loss_B = -logsigmoid(reward_chosen_B - reward_rejected_B - margin_B)
    return loss_B + centring * (reward_chosen_B + reward_rejected_B).square()


def ranking(reward_B: Tensor, rank_B: Tensor, cu_seqlens: Tensor) -> Tensor:
    """InstructGPT's: −Σ over pairs of log σ(r_better − r_worse), divided by C(K, 2), one number per prompt. arXiv 2203.02155.

    The K completions of a prompt are consecutive, prompts bounded by cu_seqlens [P + 1]; rank 1 is best. A tie is no pair, but
    C(K, 2) counts all K; a prompt of fewer than two completions has loss 0. All pairs of a prompt from K forwards.
    """
    check_vectors(reward=reward_B)
    _check_same_shape(reward_B, rank=rank_B)
    if (num_used := check_cu_seqlens(cu_seqlens, len(reward_B))) != len(reward_B):
        raise ValueError(f"cu_seqlens ends at {num_used}; expected {len(reward_B)}: every completion belongs to a prompt")
    length_P = cu_seqlens.long().diff()
    prompt_B = torch.repeat_interleave(length_P, output_size=len(reward_B))
    is_pair_BB = (prompt_B[:, None] == prompt_B) & (rank_B[:, None] < rank_B)
    loss_BB = torch.where(is_pair_BB, -logsigmoid(reward_B[:, None] - reward_B), 0.0)
    num_pairs_P = (length_P * (length_P - 1) // 2).clamp(min=1)
    return sequence_sum(loss_BB.sum(1), cu_seqlens) / num_pairs_P


def _log_ratios(
    policy_chosen_B: Tensor, policy_rejected_B: Tensor, reference_chosen_B: Tensor, reference_rejected_B: Tensor
) -> tuple[Tensor, Tensor]:
    """h_w and h_l."""
    named = {"policy_chosen": policy_chosen_B, "policy_rejected": policy_rejected_B}
    check_vectors(**named, reference_chosen=reference_chosen_B, reference_rejected=reference_rejected_B)
    return policy_chosen_B - reference_chosen_B, policy_rejected_B - reference_rejected_B


def _margin(policy_chosen_B: Tensor, policy_rejected_B: Tensor, chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    h_chosen_B, h_rejected_B = _log_ratios(policy_chosen_B, policy_rejected_B, chosen_B, rejected_B)
    return h_chosen_B - h_rejected_B


def _log_odds(logprob_B: Tensor) -> Tensor:
    logprob_B = logprob_B.clamp(max=CERTAIN_LOGPROB)
    return logprob_B - torch.log(-torch.expm1(logprob_B))


def _check_same_shape(like_B: Tensor, *, or_one_number: bool = False, **named: Tensor) -> None:
    for name, tensor in named.items():
        if tensor.shape != like_B.shape and not (or_one_number and tensor.dim() == 0):
            expected = f"{list(like_B.shape)}{' or []' if or_one_number else ''}"
            raise ValueError(
                f"{name} is {list(tensor.shape)}; expected {expected}: one number a response, nothing is broadcast"
            )


def _check_positive(**options: float) -> None:
    for name, value in options.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}; expected a number > 0: the loss divides by it")


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value < 0.5:
        raise ValueError(f"{name} is {value}; expected 0 <= {name} < 0.5: at one half the labels say nothing")
