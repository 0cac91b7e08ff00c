"""What the benches of losses from hidden states share: a model's last hidden states and output matrix, and their truth in fp64.

Run     by `linear_logprob`, `linear_divergence`, `policy_loss` and `preference_loss`
Expect  the truth is of the whole shape, values and both gradients, made in chunks of tokens: all fp64 logits would not fit
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .measure import Candidate, Inputs, absent

Loss = Callable[[Inputs], Tensor]


def working_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def head(tokens: int, width: int, entries: int, generator: torch.Generator) -> Inputs:
    """Hidden states [T, D], a matrix [V, D] whose logits have a deviation of 2, and targets [T]; random, never zeros."""
    device = generator.device
    dtype = working_dtype(device)
    return {
        "hidden": _random((tokens, width), 1.0, generator).to(dtype).requires_grad_(),
        "weight": _random((entries, width), 2.0 / width**0.5, generator).to(dtype).requires_grad_(),
        "target": torch.randint(0, entries, (tokens,), generator=generator, device=device),
    }


def _random(size: tuple[int, ...], scale: float, generator: torch.Generator) -> Tensor:
    return scale * torch.randn(size, generator=generator, device=generator.device)


def both_ways(loss: Loss) -> Candidate:
    """Value and both gradients."""

    def call(x: Inputs) -> tuple[Tensor, ...]:
        value = loss(x)
        return value.detach(), *torch.autograd.grad(value, (x["hidden"], x["weight"]))

    return Candidate(call)


def forward_only(values: Callable[[Inputs], Sequence[Tensor]]) -> Candidate:
    return Candidate(torch.no_grad()(values))


def products(count: int) -> Candidate:
    """The bare products of that many thirds of a linear layer's forward and backward."""

    def prepare(x: Inputs) -> list[Callable[[], Tensor]]:
        hidden, weight = x["hidden"].detach(), x["weight"].detach()
        d_logits = torch.randn(len(hidden), len(weight), device=hidden.device, dtype=hidden.dtype)
        kinds = (lambda: hidden @ weight.t(), lambda: d_logits @ weight, lambda: d_logits.t() @ hidden)
        return [kinds[number % 3] for number in range(count)]

    return Candidate(lambda chosen: [product() for product in chosen], prepare)


def logprobs_of(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability, entropy) [T] from full logits, in fp32 at least: what plain torch does."""
    logits = F.linear(hidden, weight)
    logp = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def reference_of(loss: Callable[[Tensor, Tensor, Inputs], Tensor], x: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """[value, d_hidden, d_weight] of `loss(logprob_T, entropy_T, inputs)`, chunk by chunk in `dtype`."""
    hidden, weight = (x[name].detach().to(dtype) for name in ("hidden", "weight"))
    parts = [logprobs_of(hidden[part], weight, x["target"][part]) for part in chunks(len(hidden), len(weight), hidden.device)]
    streams = [torch.cat(stream).requires_grad_() for stream in zip(*parts, strict=True)]
    value = loss(streams[0], streams[1], x)
    upstream = torch.autograd.grad(value, streams, materialize_grads=True)

    def part_of(hidden: Tensor, weight: Tensor, part: slice) -> Tensor:
        made = logprobs_of(hidden, weight, x["target"][part])
        return sum(((m * u[part]).sum() for m, u in zip(made, upstream, strict=True)), torch.zeros((), device=hidden.device))

    return [value.detach(), *gradients_in_chunks(part_of, hidden, weight)]


def gradients_in_chunks(loss: Callable[[Tensor, Tensor, slice], Tensor], hidden: Tensor, weight: Tensor) -> list[Tensor]:
    """[d_hidden, d_weight] of the sum of `loss(hidden[part], weight, part)` over the parts of the tokens."""
    d_hidden, d_weight = (
        torch.empty_like(hidden),
        torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)),
    )
    weight = weight.detach().requires_grad_()
    for part in chunks(len(hidden), len(weight), hidden.device):
        leaf = hidden[part].detach().requires_grad_()
        d_hidden[part], added = torch.autograd.grad(loss(leaf, weight, part), (leaf, weight))
        d_weight += added
    return [d_hidden, d_weight]


def chunks(tokens: int, entries: int, device: torch.device) -> list[slice]:
    """Parts of the tokens whose fp64 logits are 2 GiB (CPU: 64 MiB)."""
    size = max(64, (2**31 if device.type == "cuda" else 2**26) // 8 // entries)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def compiled(loss: Loss) -> Loss:
    return torch.compile(loss, dynamic=False)


def gpu_peers(device: torch.device, peers: dict[str, tuple[str, Callable[[], Loss]]]) -> tuple[dict[str, Loss], dict[str, str]]:
    """(losses of the peers that import, why the others are absent); peer → (its module, what makes its loss)."""
    found, missing = {}, {}
    for name, (module, make) in peers.items():
        reason = absent(module) if device.type == "cuda" else "runs on CUDA"
        if reason is None:
            found[name] = make()
        else:
            missing[name] = reason
    return found, missing


def linear_shapes(device: torch.device, is_quick: bool) -> list[tuple[int, int, int]]:
    """T, D, V. GPU: each size of the targets' shape varied alone. CPU: a small model's, and the laptop line's."""
    if device.type == "cpu":
        return [(512, 128, 4096)] if is_quick else [(4096, 128, 1024), (1024, 128, 4096)]
    middle = (8192, 4096, 131072)
    if is_quick:
        return [middle]
    return [
        *((tokens, *middle[1:]) for tokens in (1024, 2048, 4096, 8192, 16384, 32768)),
        *((middle[0], middle[1], entries) for entries in (32768, 151936, 256000)),
        *((middle[0], width, middle[2]) for width in (2048, 8192)),
    ]


def case_sizes(shape: tuple[int, int, int]) -> tuple[dict[str, int], int, float]:
    """(sizes by letter, T, FLOPs of one product)."""
    return dict(zip("TDV", shape, strict=True)), shape[0], 2.0 * shape[0] * shape[1] * shape[2]


def head_bytes(shape: tuple[int, int, int], dtype: torch.dtype) -> float:
    """Hidden states and matrix, once: what a forward must read, and a backward read and write."""
    tokens, width, entries = shape
    return float((tokens + entries) * width * dtype.itemsize)
