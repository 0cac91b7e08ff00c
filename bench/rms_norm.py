"""rms_norm alone and with a residual, in bytes a second beside a plain copy, and beside what a user would take instead.

Run     python -m warpline.bench.rms_norm [--quick] [--out DIR]      (PYTHONPATH=src from a checkout)
Writes  DIR/<machine>/rms_norm.json (default bench/results)
Expect  a row per candidate, direction and shape of R rows and D columns. Bytes are those the operation needs: forward 2
        elements an element of x (4 with a residual), backward 3 (4); torch's own rms_norm multiplies before it rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels.rms_norm import TABLE, rms_norm, rms_norm_reference
from .measure import absent
from .streaming import Streaming, run


def shapes(is_gpu: bool, is_quick: bool) -> list[tuple[int, int]]:
    """Rows and columns: from what stays in the L2 to 16 times the L2, as the targets are stated."""
    if not is_gpu:
        return [(4096, 512)] if is_quick else [(1024, 512), (4096, 1024)]
    return [(1024, 1024), (4096, 4096), (16384, 8192)] + ([] if is_quick else [(8192, 4096), (16384, 16384), (16384, 32768)])


def functions(device: torch.device) -> dict[str, Callable[..., Any]]:
    """Ours first; the others without the fused addition add first."""
    ours = "triton" if device.type == "cuda" else "torch"

    def added(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
            if residual is None:
                return function(x, weight)
            z = x + residual
            return function(z, weight), z

        return call

    found = {
        f"warpline {ours}": lambda x, w, r=None: rms_norm(x, w, residual=r, backend=ours),
        "eager": lambda x, w, r=None: rms_norm_reference(x, w, residual=r),
        "torch rms_norm": added(lambda x, w: F.rms_norm(x, w.shape, w, 1e-6)),
    }
    if device.type == "cuda":
        found["torch.compile"] = torch.compile(lambda x, w, r=None: rms_norm_reference(x, w, residual=r), dynamic=False)
    for name in ("transformer-engine", "apex"):
        reason = TABLE[name].absent(device)
        if reason is None:
            found[name] = added(partial(rms_norm, backend=name))
        else:
            print(f"absent: {name}: {reason}")
    reason = absent("liger_kernel") if device.type == "cuda" else "liger_kernel runs on CUDA"
    if reason is None:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        found["liger"] = added(lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False))
    else:
        print(f"absent: {reason}")
    return found


def problems(rows: int, columns: int, device: torch.device) -> list[Streaming]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    sizes = ((rows, columns), (columns,), (rows, columns))
    x, weight, residual = (torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes)
    size, shape, found = x.numel() * x.element_size(), {"R": rows, "D": columns}, functions(device)

    def reference(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor | None = None) -> Any:
        return rms_norm_reference(x, w, residual=r)

    return [
        Streaming("rms_norm", shape, [x, weight], found, reference, 2 * size, 3 * size),
        Streaming("rms_norm + residual", shape, [x, weight, residual], found, reference, 4 * size, 4 * size),
    ]


if __name__ == "__main__":
    run("rms_norm", __doc__, shapes, problems)
