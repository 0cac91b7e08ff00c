"""Advantages along sequences: generalised advantage estimation, and what goes into and out of it.

**Math** over the counted tokens t of a sequence (others are skipped: the next counted token follows directly):
    δ_t = r_t + γ V_{t+1} − V_t,    A_t = δ_t + γ λ A_{t+1},    R_t = A_t + V_t,    V and A being 0 behind the last one.
  λ = 1 and V = 0 make A the discounted reward-to-go. Blocks of BLOCK tokens, last first: A = M δ + decay · A_next, with
  M_ij = (γ λ)^(j − i) for j ≥ i, so that a sequence costs a few small products instead of a step a token.
**Shapes** reward, value [T] packed; cu_seqlens [B + 1]; mask [T], True where a token counts; results [T], 0 elsewhere.
**Dtypes** those of the inputs; powers of γ λ in the same.
**Traffic** a few numbers per token.
**Source** GAE, arXiv 1506.02438; the KL in the reward, InstructGPT, arXiv 2203.02155; REINFORCE++, arXiv 2501.03262.
**Limits** No gradient: rewards and values are constants here. Tokens outside the mask or past the last boundary may hold
  anything. Reads the boundaries and the longest sequence's length on the host.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .sequence_sum import check_vectors, counted_length, counted_tokens, sequence_of_token

BLOCK = 64


def gae_reference(
    reward_T: Tensor, value_T: Tensor, cu_seqlens: Tensor, *, gamma: float, lam: float, mask_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step a token, from the last backwards."""
    advantage_T, return_T = torch.zeros_like(value_T), torch.zeros_like(value_T)
    for start, stop in pairwise(cu_seqlens.tolist()):
        next_value = next_advantage = value_T.new_zeros(())
        for t in reversed(range(start, stop)):
            if mask_T is not None and not mask_T[t]:
                continue
            delta = reward_T[t] + gamma * next_value - value_T[t]
            advantage_T[t] = delta + gamma * lam * next_advantage
            return_T[t] = advantage_T[t] + value_T[t]
            next_value, next_advantage = value_T[t], advantage_T[t]
    return advantage_T, return_T


@torch.no_grad()
def gae(
    reward_T: Tensor, value_T: Tensor, cu_seqlens: Tensor, *, gamma: float, lam: float, mask_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(advantages [T], returns [T]); masked tokens, such as a tool's answer, are carried over and get 0."""
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma, lam are {gamma}, {lam}; expected numbers from 0 to 1")
    check_vectors(reward=reward_T, value=value_T)
    if reward_T.dtype != value_T.dtype:
        raise ValueError(
            f"received reward {reward_T.dtype}, value {value_T.dtype}; expected one dtype: convert the coarser one"
        )
    is_counted_T = counted_tokens(value_T, mask_T=mask_T, cu_seqlens=cu_seqlens)
    sequence_T, counted = sequence_of_token(cu_seqlens, len(value_T)), is_counted_T.nonzero()[:, 0]
    num_sequences, length_B = cu_seqlens.numel() - 1, counted_length(is_counted_T, cu_seqlens)
    first_B = length_B.cumsum(0) - length_B
    width = -(-max(1, int(length_B.max()) if num_sequences else 0) // BLOCK) * BLOCK
    # Sequences stand at the left of rows of `width`; what is behind them is 0 and adds nothing.
    place = torch.arange(len(counted), device=value_T.device) - first_B[sequence_T[counted]]
    rows = sequence_T[counted], place
    delta_BS = value_T.new_zeros(num_sequences, width + 1)
    delta_BS[rows] = value_T[counted]
    delta_BS[:, :-1] = gamma * delta_BS[:, 1:] - delta_BS[:, :-1]
    delta_BS[rows] += reward_T[counted]
    advantage_BS = _discounted_sums(delta_BS[:, :-1], gamma * lam)
    advantage_T, return_T = torch.zeros_like(value_T), torch.zeros_like(value_T)
    advantage_T[counted] = advantage_BS[rows]
    return_T[counted] = advantage_BS[rows] + value_T[counted]
    return advantage_T, return_T


def _discounted_sums(x_BS: Tensor, factor: float) -> Tensor:
    """y_t = x_t + factor · y_{t+1} along rows whose length is a multiple of BLOCK."""
    index = torch.arange(BLOCK, device=x_BS.device)
    distance = index - index[:, None]
    powers = torch.where(distance >= 0, x_BS.new_tensor(factor) ** distance.clamp(min=0).to(x_BS.dtype), 0.0)
    decay = x_BS.new_tensor(factor) ** (BLOCK - index).to(x_BS.dtype)
    following_B1, blocks = x_BS.new_zeros(len(x_BS), 1), []
    for block_BK in reversed(x_BS.split(BLOCK, dim=1)):
        blocks.append(block_BK @ powers.t() + following_B1 * decay)
        following_B1 = blocks[-1][:, :1]
    return torch.cat(blocks[::-1], dim=1)


def reward_per_token(
    reward_B: Tensor,
    logprob_T: Tensor,
    reference_logprob_T: Tensor,
    cu_seqlens: Tensor,
    *,
    beta: float,
    mask_T: Tensor | None = None,
) -> Tensor:
    """InstructGPT's reward: −β (lp − lp_ref) at every counted token, and the sequence's reward at its last one.

    β is 0.02 there, and the reference is the model that PPO starts from. A sequence without a counted token gets nothing.
    """
    check_vectors(logprob=logprob_T, reference_logprob=reference_logprob_T)
    is_counted_T = counted_tokens(logprob_T, mask_T=mask_T, cu_seqlens=cu_seqlens)
    num_tokens, num_sequences = len(logprob_T), cu_seqlens.numel() - 1
    if reward_B.shape != (num_sequences,):
        raise ValueError(f"reward is {list(reward_B.shape)}; expected [{num_sequences}]: one number for each sequence")
    reward_T = torch.where(is_counted_T, -beta * (logprob_T - reference_logprob_T).detach(), 0.0)
    last_B = torch.full((num_sequences + 1,), -1, device=logprob_T.device)
    token_T = torch.where(is_counted_T, torch.arange(num_tokens, device=logprob_T.device), -1)
    last_B = last_B.scatter_reduce(0, sequence_of_token(cu_seqlens, num_tokens), token_T, "amax")[:-1]
    has_token_B = last_B >= 0
    return reward_T.index_add(0, last_B[has_token_B], reward_B[has_token_B].detach().to(reward_T.dtype))


def moments(values_T: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """[count, Σ x, Σ x²] of counted values in fp64: add these up over ranks and accumulation, then `whiten`."""
    check_vectors(values=values_T)
    is_counted_T = counted_tokens(values_T, mask_T=mask_T)
    x_T = torch.where(is_counted_T, values_T, 0.0).double()
    return torch.stack([is_counted_T.sum().double(), x_T.sum(), x_T.square().sum()])


def whiten(values_T: Tensor, total: Tensor, *, shift: bool = True, eps: float = 1e-8) -> Tensor:
    """(x − mean) / √(variance + eps) with the *global* moments [3], the variance unbiased; `shift=False` adds the mean back.

    PPO whitens its advantages so; REINFORCE++ its reward-to-go with the KL in the reward, over the whole batch.
    """
    if total.shape != (3,):
        raise ValueError(f"total is {list(total.shape)}; expected [3]: the sum of `moments` over ranks and accumulation")
    count = total[0].clamp(min=1)
    mean = total[1] / count
    variance = (total[2] / count - mean.square()).clamp(min=0) * count / (count - 1).clamp(min=1)
    whitened_T = (values_T - mean) * torch.rsqrt(variance + eps)
    return (whitened_T if shift else whitened_T + mean).to(values_T.dtype)
