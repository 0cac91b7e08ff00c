"""Losses of preference pairs, as pure functions of sequence log-probabilities.

**Math** Each docstring gives its formula, with lp_w, lp_l the policy's log-probabilities of the chosen and the rejected
  response, h = lp_policy − lp_reference, and |y| a response's number of counted tokens. σ is the logistic function.
**Shapes** every tensor is [B], one number per pair (kto: per response); the loss is [B], and its mean is the caller's.
**Dtypes** those of the inputs: pass fp32 sums.
**Traffic** a few numbers per pair.
**Source** beside each formula. Where one name means different mathematics, the docstring says which is meant.
**Limits** Nothing is summed here: every sequence sum or mean comes from token log-probabilities upstream. These are
  elementwise torch on any device; no kernel will replace them, and the formulas are their own references.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu


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
    it is: given sums that is OpenRLHF's convention, given averages TRL's again.
    """
    if (chosen_length_B is None) != (rejected_length_B is None):
        raise ValueError("ipo received the length of one side; expected both or neither: pass the other one too")
    chosen_B = policy_chosen_B - reference_chosen_B
    rejected_B = policy_rejected_B - reference_rejected_B
    if chosen_length_B is not None and rejected_length_B is not None:
        chosen_B, rejected_B = chosen_B / chosen_length_B, rejected_B / rejected_length_B
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
    over data-parallel ranks first. It is treated as a constant.
    """
    if is_desirable_B.dtype != torch.bool:
        raise ValueError(f"is_desirable is {is_desirable_B.dtype}; expected torch.bool: True where the response is good")
    baseline = baseline.detach() if isinstance(baseline, Tensor) else baseline
    advantage_B = beta * (policy_B - reference_B - baseline)
    desirable_B = desirable_weight * torch.sigmoid(-advantage_B)
    return torch.where(is_desirable_B, desirable_B, undesirable_weight * torch.sigmoid(advantage_B))


def kto_baseline(mismatched_policy_B: Tensor, mismatched_reference_B: Tensor) -> Tensor:
    """z₀ = max(0, mean h) over prompts with another prompt's response, detached: an estimate of KL(policy ‖ reference)."""
    return (mismatched_policy_B - mismatched_reference_B).detach().mean().clamp(min=0)


def orpo(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    nll_chosen_B: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """NLL_w − β log σ(log odds_w − log odds_l), log odds = lp − log(1 − e^lp). arXiv 2403.07691, whose λ is β here.

    `policy_*` are *averages* over the response's tokens, below 0; `nll_chosen_B` is the mean negative log-likelihood of
    the chosen sequence, prompt and response in the paper and TRL. No reference model.
    """
    log_odds_B = _log_odds(policy_chosen_B) - _log_odds(policy_rejected_B)
    return nll_chosen_B - beta * logsigmoid(log_odds_B)


def simpo(policy_chosen_B: Tensor, policy_rejected_B: Tensor, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """−log σ(β(lp_w/|y_w| − lp_l/|y_l|) − γ), of *averages*; no reference model, no NLL. arXiv 2405.14734.

    γ is the margin after the multiplication by β (the authors tune γ/β, about 0.5), as in TRL; Liger adds an NLL term to
    the same name by default: that is `cpo` with averages.
    """
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

    `nll_chosen_B` is the mean negative log-likelihood of the chosen sequence (TRL). Averages and γ > 0 make CPO-SimPO.
    """
    return simpo(policy_chosen_B, policy_rejected_B, beta=beta, gamma=gamma) + alpha * nll_chosen_B


def _margin(policy_chosen_B: Tensor, policy_rejected_B: Tensor, chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    return (policy_chosen_B - chosen_B) - (policy_rejected_B - rejected_B)


def _log_odds(logprob_B: Tensor) -> Tensor:
    return logprob_B - torch.log(-torch.expm1(logprob_B))


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value < 0.5:
        raise ValueError(f"{name} is {value}; expected 0 <= {name} < 0.5: at one half the labels say nothing")
