"""Divergences from both sides' hidden states, against full logits in torch and Liger's fused JSD, and the bare products.

Run     python -m warpline.bench.linear_divergence [--quick] [--out DIR]
Writes  DIR/<machine>/linear_divergence.json
Expect  a row per kind, candidate and shape, forward and backward. The products needed: the student's logits twice and the
        teacher's twice (the backward makes both again), d_hidden and d_weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.linear_divergence import linear_divergence, linear_divergence_reference, linear_topk, linear_topk_divergence
from .measure import Report, Row, absent, begin, interleaved, peak_mib, relative_error

# T, D, U, V: an 8B-sized student's width beside a larger teacher's, and the laptop line's.
GPU_SHAPES = [(8192, 4096, 4096, 131072), (4096, 2048, 4096, 151936)]
CPU_SHAPES = [(2048, 256, 512, 16384), (4096, 128, 128, 1024)]
CPU_QUICK = [(512, 64, 128, 4096)]
CHECKED_TOKENS = 64
CACHE_ENTRIES = 64


class Problem:
    def __init__(self, shape: tuple[int, int, int, int], device: torch.device):
        tokens, width, teacher_width, entries = shape
        self.shape, self.device = shape, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)

        def random(*size: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(size, generator=generator, device=device)).to(self.dtype)

        self.hidden, self.weight = random(tokens, width), random(entries, width, scale=2.0 / width**0.5)
        self.teacher = random(tokens, teacher_width), random(entries, teacher_width, scale=2.0 / teacher_width**0.5)
        self.hidden.requires_grad_()
        self.weight.requires_grad_()

    def products(self) -> Callable[[], None]:
        d_logits = torch.randn(self.shape[0], self.shape[3], device=self.device, dtype=self.dtype)
        hidden, weight, (teacher_hidden, teacher_weight) = self.hidden.detach(), self.weight.detach(), self.teacher

        def all_of_them() -> None:
            for _ in range(2):
                hidden @ weight.t()
                teacher_hidden @ teacher_weight.t()
            d_logits @ weight
            d_logits.t() @ hidden

        return all_of_them


def eager(p: Problem, kind: str) -> Tensor:
    student, teacher = F.linear(p.hidden, p.weight).float(), F.linear(*p.teacher).float()
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    if kind == "forward_kl":
        return F.kl_div(log_s, log_t, reduction="sum", log_target=True)
    if kind == "reverse_kl":
        return F.kl_div(log_t, log_s, reduction="sum", log_target=True)
    log_m = torch.logaddexp(log_s, log_t) - 0.6931471805599453
    parts = (F.kl_div(log_m, log_p, reduction="sum", log_target=True) for log_p in (log_s, log_t))
    return 0.5 * sum(parts, torch.zeros((), device=p.device))


def ours(p: Problem, kind: str) -> Tensor:
    return linear_divergence(p.hidden, p.weight, *p.teacher, kind=kind).sum()  # type: ignore[arg-type]


def _liger(p: Problem) -> Callable[[], Tensor]:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    jsd = LigerFusedLinearJSD(jsd_beta=0.5)
    return lambda: jsd(p.hidden, p.weight, p.teacher[0], p.teacher[1]) * len(p.hidden)


def both_ways(p: Problem, loss: Callable[[], Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(), (p.hidden, p.weight))


def error_of(p: Problem, loss: Callable[[Problem, str], Tensor], kind: str) -> float:
    """Of d_hidden of the first tokens against fp64."""
    hidden = p.hidden.detach()[:CHECKED_TOKENS]
    part = Problem.__new__(Problem)
    part.__dict__.update(p.__dict__)
    part.hidden = hidden.clone().requires_grad_()
    part.teacher = p.teacher[0][:CHECKED_TOKENS], p.teacher[1]
    doubled = [x.detach().double() for x in (hidden, p.weight, *part.teacher)]
    doubled[0].requires_grad_()
    truth = linear_divergence_reference(*doubled, kind=kind).sum()
    actual = torch.autograd.grad(loss(part, kind), part.hidden)[0]
    return relative_error(actual, torch.autograd.grad(truth, doubled[0])[0])


def run(shape: tuple[int, int, int, int], device: torch.device, report: Report, seconds: float) -> None:
    p = Problem(shape, device)
    tokens, width, teacher_width, entries = shape
    sizes, dtype = dict(zip("TDUV", shape, strict=True)), str(p.dtype).removeprefix("torch.")
    flops = 2 * tokens * entries * (4 * width + 2 * teacher_width)
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        losses: dict[str, Callable[[], Tensor]] = {"warpline": partial(ours, p, kind), "eager torch": partial(eager, p, kind)}
        if kind == "jsd":
            reason = absent("liger_kernel.transformers.fused_linear_jsd") if device.type == "cuda" else "runs on a GPU only"
            if reason is None:
                losses["liger"] = _liger(p)
            else:
                print(f"absent: liger: {reason}")
        candidates = {name: partial(both_ways, p, loss) for name, loss in losses.items()}
        times = interleaved({"bare products": p.products(), **candidates}, device, seconds)
        errors = {name: error_of(p, f, kind) for name, f in (("warpline", ours), ("eager torch", eager))}
        for name, (median, spread) in times.items():
            report.add(Row(
                f"{kind}, forward + backward", name, sizes, dtype, median, spread, tflops=flops / median / 1e9,
                of_bare_products=median / times["bare products"][0],
                peak_mib=peak_mib(candidates[name], device) if name in candidates else None,
                error=errors.get(name), eager_error=errors["eager torch"] if name in errors else None,
            ))  # fmt: skip
    cache = linear_topk(*p.teacher, CACHE_ENTRIES)
    cached: dict[str, Callable[[], object]] = {
        "top 64 of the teacher": lambda: linear_topk(*p.teacher, CACHE_ENTRIES),
        "against the cache": partial(both_ways, p, lambda: linear_topk_divergence(p.hidden, p.weight, *cache).sum()),
    }
    for name, (median, spread) in interleaved(cached, device, seconds).items():
        report.add(Row("top-k", name, sizes, dtype, median, spread, peak_mib=peak_mib(cached[name], device)))


def main() -> None:
    device, report, is_quick = begin("linear_divergence", __doc__, "one shape, half a second a candidate")
    shapes = {
        ("cuda", False): GPU_SHAPES, ("cuda", True): GPU_SHAPES[:1], ("cpu", False): CPU_SHAPES, ("cpu", True): CPU_QUICK,
    }[device.type, is_quick]  # fmt: skip
    for shape in shapes:
        run(shape, device, report, 0.5 if is_quick else 2.0)


if __name__ == "__main__":
    main()
