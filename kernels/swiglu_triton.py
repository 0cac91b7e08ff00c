"""`swiglu` in Triton: elementwise, each element read and written once.

**Math**, **Shapes**, **Dtypes**, **Traffic** as in `swiglu`. A program owns TILE columns of a row; tensors without gaps are one
  row, so that rows narrower than a tile waste nothing.
**Source** see `swiglu`.
**Limits** Unmeasured on a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from .rms_norm_triton import rows_of
from .triton_jit import jit, tl, triton

# 8 elements a thread: one 16-byte load of each 16-bit input. Unmeasured.
TILE, NUM_WARPS = 2048, 8


@jit
def _silu(g):
    s = 1.0 / (1.0 + tl.exp(-g))
    return g * s, s


@jit
def forward_kernel(gate, gate_stride, up, up_stride, out, width, tiles, TILE: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    column = (program % tiles) * TILE + tl.arange(0, TILE)
    inside = column < width
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    activation, _ = _silu(g)
    tl.store(out + row * width + column, (activation * u).to(out.dtype.element_ty), mask=inside)


@jit
def backward_kernel(
    d_out, d_out_stride, gate, gate_stride, up, up_stride, d_gate, d_up, width, tiles,
    NEEDS_GATE: tl.constexpr, NEEDS_UP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    column = (program % tiles) * TILE + tl.arange(0, TILE)
    inside = column < width
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(d_out + row * d_out_stride + column, mask=inside, other=0.0).to(tl.float32)
    activation, s = _silu(g)
    if NEEDS_UP:
        tl.store(d_up + row * width + column, (d * activation).to(d_up.dtype.element_ty), mask=inside)
    if NEEDS_GATE:
        u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
        slope = s * (1.0 + g * (1.0 - s))
        tl.store(d_gate + row * width + column, (d * u * slope).to(d_gate.dtype.element_ty), mask=inside)


# ---- The host's side ----


def _walk(*tensors: Tensor) -> tuple[list[Tensor], int, int, int]:
    """(the tensors as rows, rows, columns, tiles of a row); tensors without gaps are one row."""
    if all(x.is_contiguous() for x in tensors):
        rows = [x.view(1, -1) for x in tensors]
    else:
        rows = [rows_of(x) for x in tensors]
    num_rows, width = rows[0].shape
    return rows, num_rows, width, triton.cdiv(width, TILE)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    out = gate.new_empty(gate.shape)
    if out.numel():
        (g, u), num_rows, width, tiles = _walk(gate, up)
        with torch.cuda.device(gate.device) if gate.is_cuda else nullcontext():
            forward_kernel[(num_rows * tiles,)](
                g, g.stride(0), u, u.stride(0), out, width, tiles, TILE=TILE, num_warps=NUM_WARPS, enable_fp_fusion=True
            )
    return out


def backward(d_out: Tensor, gate: Tensor, up: Tensor, needed: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """(d_gate, d_up), those that are needed."""
    d_gate, d_up = (x.new_empty(x.shape) if asked else None for x, asked in zip((gate, up), needed, strict=True))
    if gate.numel():
        (d, g, u), num_rows, width, tiles = _walk(d_out, gate, up)
        with torch.cuda.device(gate.device) if gate.is_cuda else nullcontext():
            backward_kernel[(num_rows * tiles,)](
                d, d.stride(0), g, g.stride(0), u, u.stride(0), d_gate, d_up, width, tiles, NEEDS_GATE=needed[0],
                NEEDS_UP=needed[1], TILE=TILE, num_warps=NUM_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    return d_gate, d_up
