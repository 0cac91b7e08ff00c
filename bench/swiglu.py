"""swiglu in bytes a second beside a plain copy, and beside what a user would take instead.

Run     warpline bench swiglu [--quick] [--out DIR]
Expect  a row per candidate, direction and shape of R rows and F columns. Bytes are those the operation needs: forward 3
        elements an element, backward 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from ..kernels.swiglu import TABLE, swiglu, swiglu_reference
from .measure import Case
from .peers import Function, add_peers, on_cuda
from .streaming import Streaming, cases_of


def shapes(device: torch.device, is_quick: bool) -> list[tuple[int, int]]:
    if device.type == "cpu":
        return [(4096, 512)] if is_quick else [(1024, 512), (4096, 1024)]
    if is_quick:
        return [(4096, 4096), (8192, 14336)]
    return [(1024, 1024), (4096, 4096), (8192, 14336), (16384, 8192), (8192, 32768), (16384, 32768)]


def functions(device: torch.device) -> tuple[dict[str, Function], dict[str, str]]:
    """(ours first, why others are absent)."""
    ours = "triton" if device.type == "cuda" else "torch"
    found: dict[str, Function] = {f"warpline {ours}": partial(swiglu, backend=ours), "eager": plain}
    found["torch.compile"] = torch.compile(plain, dynamic=False)
    missing = add_peers(found, {
        "transformer-engine": (TABLE["transformer-engine"].absent(device), _engine),
        "liger": (on_cuda("liger_kernel", device), _liger),
    })  # fmt: skip
    return found, missing


def plain(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def cases(device: torch.device, is_quick: bool) -> Iterator[Case]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found, missing = functions(device)
    for rows, columns in shapes(device, is_quick):
        count, sizes, shape = rows * columns, ((rows, columns),) * 2, {"R": rows, "F": columns}
        work = (3 * count * dtype.itemsize, 5 * count * dtype.itemsize, 5 * count, 11 * count)
        yield from cases_of(Streaming("swiglu", shape, dtype, sizes, found, swiglu_reference, *work, missing))


def _engine() -> Function:
    return partial(swiglu, backend="transformer-engine")


def _liger() -> Function:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply
