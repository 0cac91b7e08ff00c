"""swiglu in bytes a second beside a plain copy, and beside what a user would take instead.

Run     python -m warpline.bench.swiglu [--quick] [--out DIR]      (PYTHONPATH=src from a checkout)
Writes  DIR/<machine>/swiglu.json (default bench/results)
Expect  a row per candidate, direction and shape of R rows and F columns. Bytes are those the operation needs: forward 3
        elements an element, backward 5.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels.swiglu import TABLE, swiglu, swiglu_reference
from .measure import absent
from .streaming import Streaming, run


def shapes(is_gpu: bool, is_quick: bool) -> list[tuple[int, int]]:
    if not is_gpu:
        return [(4096, 512)] if is_quick else [(1024, 512), (4096, 1024)]
    return [(1024, 1024), (4096, 4096), (16384, 8192)] + ([] if is_quick else [(8192, 14336), (8192, 32768), (16384, 32768)])


def functions(device: torch.device) -> dict[str, Callable[..., Any]]:
    """Ours first."""
    ours = "triton" if device.type == "cuda" else "torch"
    found: dict[str, Callable[..., Any]] = {
        f"warpline {ours}": partial(swiglu, backend=ours),
        "eager": lambda gate, up: F.silu(gate) * up,
    }
    if device.type == "cuda":
        found["torch.compile"] = torch.compile(found["eager"], dynamic=False)
    reason = TABLE["transformer-engine"].absent(device)
    if reason is None:
        found["transformer-engine"] = partial(swiglu, backend="transformer-engine")
    else:
        print(f"absent: transformer-engine: {reason}")
    reason = absent("liger_kernel") if device.type == "cuda" else "liger_kernel runs on CUDA"
    if reason is None:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        found["liger"] = LigerSiLUMulFunction.apply
    else:
        print(f"absent: {reason}")
    return found


def problems(rows: int, columns: int, device: torch.device) -> list[Streaming]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    gate, up = (torch.randn(rows, columns, generator=generator, device=device).to(dtype) for _ in range(2))
    size = gate.numel() * gate.element_size()
    shape = {"R": rows, "F": columns}
    return [Streaming("swiglu", shape, [gate, up], functions(device), swiglu_reference, 3 * size, 5 * size)]


if __name__ == "__main__":
    run("swiglu", __doc__, shapes, problems)
