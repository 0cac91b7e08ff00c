"""Policy losses from hidden states to gradients, against full logits in torch and Liger's chunked GRPO.

Run     warpline bench policy_loss [--quick] [--out DIR]
Expect  a row per loss, candidate and shape. Our losses are arithmetic on `linear_logprob`: four products, as there.
        Completions have lengths as text has them (`lengths`). Liger's takes every token as a row, 1024 rows a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..kernels.linear_logprob import linear_logprob
from ..kernels.policy_loss import cispo, gspo, kl_k3, ppo, sequence_mean_weight, weighted_sum
from .head import (
    Loss,
    both_ways,
    case_sizes,
    compiled,
    gpu_peers,
    head,
    head_bytes,
    linear_shapes,
    logprobs_of,
    products,
    reference_of,
    working_dtype,
)
from .lengths import boundaries
from .measure import Case, Inputs

MEAN_LENGTH = 256
ENTROPY_WEIGHT, KL_WEIGHT = 0.01, 0.04


def grpo_with_kl(logprob_T: Tensor, entropy_T: Tensor, x: Inputs) -> Tensor:
    """GRPO with its k3 term and an entropy bonus."""
    weight_T, count = x["sequence_weight"], len(x["cu_seqlens"]) - 1
    kl_T = kl_k3(logprob_T, x["reference"].to(logprob_T.dtype))
    surrogate = ppo(logprob_T, x["old"].to(logprob_T.dtype), x["advantage"], weight_T=weight_T, denominator=count)
    return surrogate + weighted_sum(KL_WEIGHT * kl_T - ENTROPY_WEIGHT * entropy_T, denominator=count, weight_T=weight_T)


def dapo_tokens(logprob_T: Tensor, entropy_T: Tensor, x: Inputs) -> Tensor:
    old_T = x["old"].to(logprob_T.dtype)
    return ppo(logprob_T, old_T, x["advantage"], denominator=len(logprob_T), clip_low=0.2, clip_high=0.28)


def gspo_sequences(logprob_T: Tensor, entropy_T: Tensor, x: Inputs) -> Tensor:
    bounds = x["cu_seqlens"]
    return gspo(logprob_T, x["old"].to(logprob_T.dtype), x["advantage"], cu_seqlens=bounds, denominator=len(bounds) - 1)


def cispo_tokens(logprob_T: Tensor, entropy_T: Tensor, x: Inputs) -> Tensor:
    return cispo(logprob_T, x["old"].to(logprob_T.dtype), x["advantage"], denominator=len(logprob_T))


LOSSES: dict[str, Callable[[Tensor, Tensor, Inputs], Tensor]] = {
    "GRPO + KL + entropy": grpo_with_kl, "DAPO": dapo_tokens, "GSPO": gspo_sequences, "CISPO": cispo_tokens,
}  # fmt: skip


def inputs_of(shape: tuple[int, int, int], generator: torch.Generator) -> Inputs:
    """Old and reference log-probabilities near the policy's own, as in training, and an advantage of each completion."""
    x = head(*shape, generator)
    device, tokens = generator.device, shape[0]
    with torch.no_grad():
        logprob_T = linear_logprob(x["hidden"], x["weight"], x["target"]).logprob_T.float()
    noise = torch.randn(2, tokens, generator=generator, device=device)
    x["old"], x["reference"] = logprob_T + 0.05 * noise[0], logprob_T + 0.1 * noise[1]
    x["cu_seqlens"] = boundaries(tokens, max(4, tokens // MEAN_LENGTH), device)
    lengths = x["cu_seqlens"].diff().long()
    x["advantage"] = torch.randn(len(lengths), generator=generator, device=device).repeat_interleave(lengths)
    x["sequence_weight"] = sequence_mean_weight(x["cu_seqlens"], tokens)
    return x


def ours(x: Inputs, loss: Callable[[Tensor, Tensor, Inputs], Tensor], entropy: bool) -> Tensor:
    stats = linear_logprob(x["hidden"], x["weight"], x["target"], entropy=entropy)
    return loss(stats.logprob_T, stats.logprob_T if stats.entropy_T is None else stats.entropy_T, x)


def eager(x: Inputs, loss: Callable[[Tensor, Tensor, Inputs], Tensor]) -> Tensor:
    return loss(*logprobs_of(x["hidden"], x["weight"], x["target"]), x)


def reference(x: Inputs, dtype: torch.dtype, loss: Callable[[Tensor, Tensor, Inputs], Tensor]) -> list[Tensor]:
    made = {name: x[name].to(dtype) for name in ("advantage", "sequence_weight")} if dtype == torch.float64 else {}
    return reference_of(loss, {**x, **made}, dtype)


def cases(device: torch.device, is_quick: bool) -> Iterator[Case]:
    peers, missing = gpu_peers(device, {"liger": ("liger_kernel.chunked_loss", _liger)})
    chosen = linear_shapes(device, is_quick)
    for number, shape in enumerate(chosen if device.type == "cpu" else chosen[:6]):
        sizes, tokens, unit = case_sizes(shape)
        for name, loss in LOSSES.items() if number == 0 else list(LOSSES.items())[:1]:
            needs_entropy = loss is grpo_with_kl
            losses: dict[str, Loss] = {"warpline": partial(ours, loss=loss, entropy=needs_entropy)}
            losses["eager"] = partial(eager, loss=loss)
            if device.type == "cuda" and loss is not gspo_sequences:
                losses["torch.compile"] = compiled(losses["eager"])
            losses |= peers if loss is dapo_tokens else {}
            yield Case(
                f"{name}, forward + backward", sizes, working_dtype(device), partial(inputs_of, shape),
                {who: both_ways(made) for who, made in losses.items()}, partial(reference, loss=loss),
                flops=4 * unit,
                bytes_moved=2 * head_bytes(shape, working_dtype(device)), tokens=tokens,
                limits={"bare products": products(4)}, absent=missing,
            )  # fmt: skip


def _liger() -> Loss:
    """It takes [B, S, D] with one advantage a row: with every token a row of its own, DAPO's token mean is the same number."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    fused = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=0.2, epsilon_high=0.28, loss_type="dapo", chunk_size=1024
    )

    def loss(x: Inputs) -> Tensor:
        columns = {name: x[name][:, None] for name in ("target", "old")}
        out = fused(
            x["hidden"][:, None], x["weight"], columns["target"], torch.ones_like(columns["target"]), x["advantage"],
            old_per_token_logps=columns["old"],
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    return loss
