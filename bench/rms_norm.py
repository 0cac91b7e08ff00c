"""rms_norm alone and with a residual, in bytes a second beside a plain copy, and beside what a user would take instead.

Run     warpline bench rms_norm [--quick] [--out DIR]
Expect  a row per candidate, direction and shape of R rows and D columns. Bytes are those the operation needs: forward 2
        elements an element of x (4 with a residual), backward 3 (4); torch's own rms_norm multiplies before it rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.rms_norm import TABLE, rms_norm, rms_norm_reference
from .measure import Case
from .peers import Function, add_peers, on_cuda
from .streaming import Streaming, cases_of


def shapes(device: torch.device, is_quick: bool) -> list[tuple[int, int]]:
    """Rows and columns: from what stays in the L2 to 16 times the L2, as the targets are stated."""
    if device.type == "cpu":
        return [(4096, 512)] if is_quick else [(1024, 512), (4096, 1024)]
    if is_quick:
        return [(4096, 4096), (16384, 8192)]
    return [(1024, 1024), (4096, 4096), (8192, 4096), (16384, 8192), (16384, 16384), (16384, 32768)]


def added(function: Function) -> Function:
    """For who has no fused addition: it adds first."""

    def call(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return function(x, weight)
        z = x + residual
        return function(z, weight), z

    return call


def functions(device: torch.device) -> tuple[dict[str, Function], dict[str, str]]:
    """(ours first, why others are absent)."""
    ours = "triton" if device.type == "cuda" else "torch"
    found: dict[str, Function] = {
        f"warpline {ours}": lambda x, w, r=None: rms_norm(x, w, residual=r, backend=ours),
        "eager": reference,
        "torch rms_norm": added(lambda x, w: F.rms_norm(x, w.shape, w, 1e-6)),
        "torch.compile": torch.compile(reference, dynamic=False),
    }
    missing = add_peers(found, {
        **{name: (TABLE[name].absent(device), partial(_backend, name)) for name in ("transformer-engine", "apex")},
        "liger": (on_cuda("liger_kernel", device), _liger), "quack": (on_cuda("quack", device), _quack),
    })  # fmt: skip
    return found, missing


def reference(x: Tensor, w: Tensor, r: Tensor | None = None) -> Any:
    return rms_norm_reference(x, w, residual=r)


def cases(device: torch.device, is_quick: bool) -> Iterator[Case]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found, missing = functions(device)
    for rows, columns in shapes(device, is_quick):
        count, shape = rows * columns, {"R": rows, "D": columns}
        size, x, weight = count * dtype.itemsize, (rows, columns), (columns,)
        work = (2 * size, 3 * size, 4 * count, 10 * count)
        yield from cases_of(Streaming("rms_norm", shape, dtype, (x, weight), found, reference, *work, missing))
        work = (4 * size, 4 * size, 5 * count, 11 * count)
        yield from cases_of(Streaming("rms_norm + residual", shape, dtype, (x, weight, x), found, reference, *work, missing))


def _backend(name: str) -> Function:
    return added(partial(rms_norm, backend=name))


def _liger() -> Function:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return added(lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False))


def _quack() -> Function:
    from quack import rmsnorm  # type: ignore[import-not-found, unused-ignore]

    def call(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return rmsnorm(x, weight, eps=1e-6)
        return rmsnorm(x, weight, residual=residual, eps=1e-6, prenorm=True)

    return call
