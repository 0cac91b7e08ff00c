"""One AdamW step of fp32 parameters: torch's implementations, apex's where it is found, beside a plain copy of as many bytes.

Run     python -m warpline.bench.adamw [--quick] [--out DIR]      (PYTHONPATH=src from a checkout)
Writes  DIR/<machine>/adamw.json (default bench/results)
Expect  a row per candidate and model; P parameters in L layers of a Llama's matrices. A step reads parameter, gradient and both
        moments and writes all but the gradient: 28 bytes a parameter. The stages use torch's fused step; a kernel of ours
        has a place here once it beats that on a GPU, which is not measured yet.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..kernels.backend import cuda_package_absent
from .measure import Row, begin, host_microseconds, interleaved

BYTES_PER_PARAMETER = 28


def parameters(width: int, layers: int, device: torch.device) -> list[torch.nn.Parameter]:
    """A Llama's matrices and norms, with gradients."""
    generator = torch.Generator(device).manual_seed(0)
    shapes: list[tuple[int, ...]] = [(width, width), (width // 4, width), (width // 4, width), (width, width)]
    shapes += [(7 * width // 2, width), (7 * width // 2, width), (width, 7 * width // 2), (width,), (width,)]
    found = []
    for shape in shapes * layers:
        parameter = torch.nn.Parameter(torch.randn(shape, generator=generator, device=device))
        parameter.grad = torch.randn(shape, generator=generator, device=device)
        found.append(parameter)
    return found


def steps(width: int, layers: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """One step of each implementation, each with parameters of its own."""
    options: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
    found: dict[str, Callable[[], Any]] = {
        "torch fused": torch.optim.AdamW(parameters(width, layers, device), fused=True, **options).step,
        "torch foreach": torch.optim.AdamW(parameters(width, layers, device), foreach=True, **options).step,
    }
    reason = cuda_package_absent("apex", "apex.optimizers")(device)
    if reason is None:
        apex: Any = importlib.import_module("apex.optimizers")
        found["apex FusedAdam"] = apex.FusedAdam(parameters(width, layers, device), adam_w_mode=True, **options).step
    else:
        print(f"absent: apex: {reason}")
    return found


def main() -> None:
    device, report, is_quick = begin("adamw", __doc__, "one model, a fifth of a second a candidate")
    models = ((2048, 16), (4096, 8)) if device.type == "cuda" else ((128, 4), (512, 4))
    for width, layers in models[:1] if is_quick else models:
        calls = steps(width, layers, device)
        num_parameters = sum(p.numel() for p in parameters(width, layers, device))
        source = torch.randn(num_parameters * BYTES_PER_PARAMETER // 8, device=device)
        times = interleaved(
            {"copy": partial(torch.empty_like(source).copy_, source), **calls}, device, 0.2 if is_quick else 1.0
        )
        copy_rate = num_parameters * BYTES_PER_PARAMETER / times["copy"][0] / 1e6
        for name, (median, spread) in times.items():
            rate = num_parameters * BYTES_PER_PARAMETER / median / 1e6
            host = host_microseconds(calls[name], device) if name in calls else None
            report.add(Row(
                "adamw step", name, {"P": num_parameters, "L": layers}, "float32", median, spread, gbytes_per_second=rate,
                of_copy=rate / copy_rate, host_microseconds=host,
            ))  # fmt: skip


if __name__ == "__main__":
    main()
