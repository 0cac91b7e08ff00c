"""Cross-entropy and log-probabilities from hidden states, against what a trainer would use instead, and the bare products.

Run     warpline bench linear_logprob [--quick] [--out DIR]
Expect  a row per candidate, operation and shape. The products needed: 3 for a cross-entropy with its gradients, 4 for
        log-probabilities with theirs (one makes the logits again), 1 forward. Errors are of the value and both gradients.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.linear_logprob import linear_cross_entropy, linear_logprob
from .head import (
    Loss,
    both_ways,
    case_sizes,
    chunks,
    compiled,
    forward_only,
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


def our_cross_entropy(x: Inputs) -> Tensor:
    return linear_cross_entropy(x["hidden"], x["weight"], x["target"])


def eager_cross_entropy(x: Inputs) -> Tensor:
    return F.cross_entropy(F.linear(x["hidden"], x["weight"]).float(), x["target"])


def our_streams(x: Inputs) -> tuple[Tensor, Tensor]:
    stats = linear_logprob(x["hidden"], x["weight"], x["target"], entropy=True)
    assert stats.entropy_T is not None
    return stats.logprob_T, stats.entropy_T


def eager_streams(x: Inputs) -> tuple[Tensor, Tensor]:
    return logprobs_of(x["hidden"], x["weight"], x["target"])


def weighted(logprob_T: Tensor, entropy_T: Tensor, x: Inputs) -> Tensor:
    """A loss with an upstream number of its own for every token, as policy losses have."""
    return ((logprob_T + 0.01 * entropy_T) * x["upstream"]).sum()


def cases(device: torch.device, is_quick: bool) -> Iterator[Case]:
    peers, missing = gpu_peers(
        device, {"liger": ("liger_kernel.ops.fused_linear_cross_entropy", _liger), "cce": ("cut_cross_entropy", _cce),
                 "quack": ("quack.linear_cross_entropy", _quack)},
    )  # fmt: skip
    for shape in linear_shapes(device, is_quick):
        sizes, tokens, unit = case_sizes(shape)
        dtype = working_dtype(device)
        once = head_bytes(shape, dtype)

        def inputs(generator: torch.Generator, shape: tuple[int, int, int] = shape) -> Inputs:
            upstream = torch.randn(shape[0], generator=generator, device=generator.device)
            return {**head(*shape, generator), "upstream": upstream}

        losses: dict[str, Loss] = {"warpline": our_cross_entropy, "eager": eager_cross_entropy}
        losses["torch.compile"] = compiled(eager_cross_entropy)
        yield Case(
            "cross-entropy, forward + backward", sizes, dtype, inputs,
            {name: both_ways(loss) for name, loss in {**losses, **peers}.items()},
            lambda x, d: reference_of(lambda logprob_T, _, __: -logprob_T.mean(), x, d),
            flops=3 * unit, bytes_moved=2 * once, tokens=tokens, limits={"bare products": products(3)}, absent=missing,
        )  # fmt: skip
        yield Case(
            "logprob + entropy, forward", sizes, dtype, inputs,
            {"warpline": forward_only(our_streams), "eager": forward_only(eager_streams)},
            _forward_reference, flops=unit, bytes_moved=once, tokens=tokens, limits={"bare products": products(1)},
        )  # fmt: skip
        yield Case(
            "logprob + entropy, forward + backward", sizes, dtype, inputs,
            {
                "warpline": both_ways(lambda x: weighted(*our_streams(x), x)),
                "eager": both_ways(lambda x: weighted(*eager_streams(x), x)),
            },
            lambda x, d: reference_of(weighted, x, d), flops=4 * unit, bytes_moved=2 * once, tokens=tokens,
            limits={"bare products": products(4)},
        )  # fmt: skip


@torch.no_grad()
def _forward_reference(x: Inputs, dtype: torch.dtype) -> list[Tensor]:
    hidden, weight = x["hidden"].to(dtype), x["weight"].to(dtype)
    parts = [logprobs_of(hidden[p], weight, x["target"][p]) for p in chunks(len(hidden), len(weight), hidden.device)]
    return [torch.cat(stream) for stream in zip(*parts, strict=True)]


def _liger() -> Loss:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def loss(x: Inputs) -> Tensor:
        out = LigerFusedLinearCrossEntropyFunction.apply(x["hidden"], x["weight"], x["target"])
        return out[0] if isinstance(out, tuple) else out

    return loss


def _cce() -> Loss:
    from cut_cross_entropy import linear_cross_entropy as cce

    return lambda x: cce(x["hidden"], x["weight"], x["target"])


def _quack() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy  # type: ignore[import-not-found, unused-ignore]

    return lambda x: chunked_linear_cross_entropy(x["hidden"], x["weight"], x["target"], reduction="mean")
