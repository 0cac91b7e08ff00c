"""Preference losses from hidden states to gradients, against full logits in torch and Liger's chunked DPO.

Run     warpline bench preference_loss [--quick] [--out DIR]
Expect  a row per loss, candidate and shape: P pairs, chosen first, of equal length, so that who needs padding needs none. DPO
        runs the reference model's output matrix too (one product more than the four of log-probabilities); SimPO and ORPO
        have no reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..kernels.linear_logprob import linear_logprob
from ..kernels.preference_loss import dpo, orpo, simpo
from ..kernels.sequence_sum import sequence_sum
from .head import (
    Loss,
    both_ways,
    case_sizes,
    chunks,
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
from .measure import Case, Inputs

LENGTH = 256  # tokens of a response, where so many are there
PairLoss = Callable[[Tensor, Inputs], Tensor]


def halves(values_B: Tensor) -> tuple[Tensor, Tensor]:
    """(chosen, rejected)."""
    chosen, rejected = values_B.chunk(2)
    return chosen, rejected


def dpo_of(logprob_T: Tensor, x: Inputs) -> Tensor:
    policy, reference = sequence_sum(logprob_T, x["cu_seqlens"]), x["reference_sums"].to(logprob_T.dtype)
    return dpo(*halves(policy), *halves(reference)).mean()


def simpo_of(logprob_T: Tensor, x: Inputs) -> Tensor:
    return simpo(*halves(sequence_sum(logprob_T, x["cu_seqlens"]) / x["length"])).mean()


def orpo_of(logprob_T: Tensor, x: Inputs) -> Tensor:
    chosen, rejected = halves(sequence_sum(logprob_T, x["cu_seqlens"]) / x["length"])
    return orpo(chosen, rejected, -chosen).mean()


LOSSES: dict[str, PairLoss] = {"DPO with its reference": dpo_of, "SimPO": simpo_of, "ORPO": orpo_of}


def inputs_of(shape: tuple[int, int, int], generator: torch.Generator) -> Inputs:
    """Policy and reference: hidden states near each other under matrices near each other."""
    x = head(*shape, generator)
    tokens = shape[0]
    length = min(LENGTH, tokens // 4)
    for name in ("hidden", "weight"):
        noise = torch.randn(x[name].shape, generator=generator, device=generator.device).to(x[name].dtype)
        x[f"reference_{name}"] = (x[name] + 0.02 * x[name].detach().std() * noise).detach()
    x["cu_seqlens"] = torch.arange(0, tokens + 1, length, device=generator.device, dtype=torch.int32)
    x["length"] = length
    return x


def with_reference(x: Inputs, loss: PairLoss, logprobs: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Inputs:
    """The inputs, with the reference's sums where the loss has one."""
    if loss is not dpo_of:
        return x
    with torch.no_grad():
        logprob_T = logprobs(x["reference_hidden"], x["reference_weight"], x["target"])
        return {**x, "reference_sums": sequence_sum(logprob_T, x["cu_seqlens"])}


def our_logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, target).logprob_T


def eager_logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return logprobs_of(hidden, weight, target)[0]


def loss_with(x: Inputs, loss: PairLoss, logprobs: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    return loss(logprobs(x["hidden"], x["weight"], x["target"]), with_reference(x, loss, logprobs))


def reference(x: Inputs, dtype: torch.dtype, loss: PairLoss) -> list[Tensor]:
    def in_chunks(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        parts = chunks(len(hidden), len(weight), hidden.device)
        return torch.cat([eager_logprobs(hidden[part], weight, target[part]) for part in parts])

    x = with_reference(x, loss, in_chunks)
    return reference_of(lambda logprob_T, _, inputs: loss(logprob_T, inputs), x, dtype)


def cases(device: torch.device, is_quick: bool) -> Iterator[Case]:
    peers, missing = gpu_peers(device, {"liger": ("liger_kernel.chunked_loss", _liger)})
    chosen = linear_shapes(device, is_quick)
    for number, shape in enumerate(chosen if device.type == "cpu" else chosen[:6]):
        sizes, tokens, unit = case_sizes(shape)
        for name, loss in LOSSES.items() if number == 0 else list(LOSSES.items())[:1]:
            losses: dict[str, Loss] = {
                "warpline": partial(loss_with, loss=loss, logprobs=our_logprobs),
                "eager": partial(loss_with, loss=loss, logprobs=eager_logprobs),
            }
            if device.type == "cuda":
                losses["torch.compile"] = compiled(losses["eager"])
            losses |= peers if loss is dpo_of else {}
            num_products = 5 if loss is dpo_of else 4
            yield Case(
                f"{name}, forward + backward", {**sizes, "P": tokens // min(LENGTH, tokens // 4) // 2}, working_dtype(device),
                partial(inputs_of, shape), {who: both_ways(made) for who, made in losses.items()},
                partial(reference, loss=loss), flops=num_products * unit,
                bytes_moved=2 * head_bytes(shape, working_dtype(device)), tokens=tokens,
                limits={"bare products": products(num_products)}, absent=missing,
            )  # fmt: skip


def _liger() -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    fused = LigerFusedLinearDPOLoss(beta=0.1)

    def loss(x: Inputs) -> Tensor:
        def rows(values: Tensor) -> Tensor:
            return values.unflatten(0, (-1, x["length"]))

        out = fused(x["weight"], rows(x["hidden"]), rows(x["target"]), None, rows(x["reference_hidden"]), x["reference_weight"])
        return out[0] if isinstance(out, tuple) else out

    return loss
