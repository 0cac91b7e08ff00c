"""Cross-entropy and log-probabilities from hidden states, against what a trainer would use instead, and the bare products.

Run     python -m warpline.bench.linear_logprob [--quick] [--out DIR]      (PYTHONPATH=src from a checkout)
Writes  DIR/<machine>/linear_logprob.json (default bench/results)
Expect  a row per candidate, operation and shape. "× products" is the time over that of the matrix products the operation
        needs: 3 for a cross-entropy with its gradients, 4 for log-probabilities (one makes the logits again), 1 forward.
        The error is that of 64 tokens' values and d_hidden against fp64, beside eager torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.linear_logprob import linear_cross_entropy, linear_logprob
from .measure import Report, Row, absent, begin, interleaved, peak_mib, relative_error

# T, D, V. GPU: the shape the targets are stated for, Qwen 3's vocabulary, a small model. CPU: the stated one, the laptop line.
GPU_SHAPES = [(8192, 4096, 131072), (8192, 4096, 151936), (16384, 2048, 128256)]
GPU_QUICK = GPU_SHAPES[:1]
CPU_SHAPES = [(4096, 512, 32768), (4096, 128, 1024)]
CPU_QUICK = [(512, 128, 4096)]
CHECKED_TOKENS = 64
Candidates = dict[str, Callable[[], object]]


class Problem:
    """Random inputs, never zeros: a bf16 product of zeros is faster than one of numbers."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device):
        tokens, width, entries = shape
        self.shape, self.device = shape, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)

        def random(*size: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(size, generator=generator, device=device)).to(self.dtype)

        self.hidden = random(tokens, width).requires_grad_()
        self.weight = random(entries, width, scale=2.0 / width**0.5).requires_grad_()
        self.target = torch.randint(0, entries, (tokens,), generator=generator, device=device)
        self.upstream = torch.randn(tokens, generator=generator, device=device)

    def products(self, count: int) -> Callable[[], object]:
        """The bare products of that many thirds of a linear layer's forward and backward."""
        with torch.no_grad():
            d_logits = torch.randn(self.shape[0], self.shape[2], device=self.device, dtype=self.dtype)
        hidden, weight = self.hidden.detach(), self.weight.detach()
        kinds = (lambda: hidden @ weight.t(), lambda: d_logits @ weight, lambda: d_logits.t() @ hidden)
        chosen = [kinds[number % 3] for number in range(count)]
        return lambda: [product() for product in chosen]


def both_ways(p: Problem, loss: Callable[[], Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(), (p.hidden, p.weight))


@torch.no_grad()
def forward_only(loss: Callable[[], Tensor]) -> Tensor:
    return loss()


def our_cross_entropy(p: Problem) -> Tensor:
    return linear_cross_entropy(p.hidden, p.weight, p.target)


def eager_cross_entropy(p: Problem) -> Tensor:
    return F.cross_entropy(F.linear(p.hidden, p.weight).float(), p.target)


def eager_logprob_entropy(p: Problem) -> Tensor:
    logp = F.linear(p.hidden, p.weight).float().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return ((logp.gather(1, p.target[:, None])[:, 0] + 0.01 * entropy) * p.upstream).sum()


def our_logprob_entropy(p: Problem) -> Tensor:
    stats = linear_logprob(p.hidden, p.weight, p.target, entropy=True)
    assert stats.entropy_T is not None
    return ((stats.logprob_T + 0.01 * stats.entropy_T) * p.upstream).sum()


def cross_entropies(p: Problem) -> tuple[dict[str, Callable[[], Tensor]], list[str]]:
    """(losses by candidate, why the others are absent)."""
    compiled = torch.compile(eager_cross_entropy)
    found: dict[str, Callable[[], Tensor]] = {
        "warpline": partial(our_cross_entropy, p),
        "eager torch": partial(eager_cross_entropy, p),
        "torch.compile": partial(compiled, p),
    }
    missing = []
    for name, module, make in (
        ("liger", "liger_kernel.ops.fused_linear_cross_entropy", _liger),
        ("cce", "cut_cross_entropy", _cce),
    ):
        reason = absent(module) if p.device.type == "cuda" else "runs on a GPU only"
        if reason is None:
            found[name] = make(p)
        else:
            missing.append(f"{name}: {reason}")
    return found, missing


def _liger(p: Problem) -> Callable[[], Tensor]:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def loss() -> Tensor:
        out = LigerFusedLinearCrossEntropyFunction.apply(p.hidden, p.weight, p.target)
        return out[0] if isinstance(out, tuple) else out

    return loss


def _cce(p: Problem) -> Callable[[], Tensor]:
    from cut_cross_entropy import linear_cross_entropy as cce

    return lambda: cce(p.hidden, p.weight, p.target)


def error_of(p: Problem, loss: Callable[[Problem], Tensor]) -> float:
    """Of d_hidden against fp64."""
    doubled = Problem.__new__(Problem)
    doubled.__dict__.update(p.__dict__)
    doubled.hidden, doubled.weight = (x.detach().double().requires_grad_() for x in (p.hidden, p.weight))
    truth = loss(doubled)
    d_truth = torch.autograd.grad(truth, doubled.hidden)[0]
    return relative_error(torch.autograd.grad(loss(p), p.hidden)[0], d_truth)


def first_tokens(p: Problem) -> Problem:
    part = Problem.__new__(Problem)
    part.__dict__.update(p.__dict__)
    part.hidden = p.hidden.detach()[:CHECKED_TOKENS].requires_grad_()
    part.target, part.upstream = p.target[:CHECKED_TOKENS], p.upstream[:CHECKED_TOKENS]
    return part


def run(shape: tuple[int, int, int], device: torch.device, report: Report, seconds: float) -> None:
    p = Problem(shape, device)
    sizes = dict(zip("TDV", shape, strict=True))
    unit = 2 * shape[0] * shape[1] * shape[2]
    part = first_tokens(p)
    losses, missing = cross_entropies(p)
    for reason in missing:
        print(f"absent: {reason}")
    logprobs = {"warpline": partial(our_logprob_entropy, p), "eager torch": partial(eager_logprob_entropy, p)}
    forwards: Candidates = {name: partial(forward_only, loss) for name, loss in logprobs.items()}
    groups: list[tuple[str, int, Candidates, tuple[Callable[[Problem], Tensor], ...]]] = [
        ("cross-entropy, forward + backward", 3, {n: partial(both_ways, p, f) for n, f in losses.items()},
         (our_cross_entropy, eager_cross_entropy)),
        ("logprob + entropy, forward", 1, forwards, ()),
        ("logprob + entropy, forward + backward", 4, {n: partial(both_ways, p, f) for n, f in logprobs.items()},
         (our_logprob_entropy, eager_logprob_entropy)),
    ]  # fmt: skip
    for operation, num_products, candidates, checked in groups:
        times = interleaved({"bare products": p.products(num_products), **candidates}, device, seconds)
        bare = times["bare products"][0]
        errors = dict(zip(("warpline", "eager torch"), (error_of(part, loss) for loss in checked), strict=False))
        for name, (median, spread) in times.items():
            peak = peak_mib(candidates[name], device) if name in candidates else None
            report.add(Row(
                operation, name, sizes, str(p.dtype).removeprefix("torch."), median, spread,
                tflops=num_products * unit / median / 1e9, of_bare_products=median / bare, peak_mib=peak,
                error=errors.get(name), eager_error=errors.get("eager torch") if name in errors else None,
            ))  # fmt: skip


def main() -> None:
    device, report, is_quick = begin("linear_logprob", __doc__, "one shape, half a second a candidate")
    shapes = {
        ("cuda", False): GPU_SHAPES, ("cuda", True): GPU_QUICK, ("cpu", False): CPU_SHAPES, ("cpu", True): CPU_QUICK,
    }[device.type, is_quick]  # fmt: skip
    for shape in shapes:
        run(shape, device, report, 0.5 if is_quick else 2.0)


if __name__ == "__main__":
    main()
