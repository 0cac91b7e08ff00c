"""`rms_norm` in Triton: a program holds whole rows in registers, and reads and writes each element once.

**Math**, **Shapes**, **Dtypes** as in `rms_norm`. Forward: a program owns `rows` rows. Backward: a program owns a run of rows,
  and adds up its part of d_weight in registers; the parts [programs, D] are added up by torch.
**Traffic** forward 2 elements an element of x (4 with a residual); backward 3 or 4, and 8 bytes × PROGRAMS × D for d_weight.
**Source** see `rms_norm`.
**Limits** Rows of at most MAX_WIDTH elements. Equal inputs give equal bits: the parts of d_weight depend on the number of rows
  alone, not on the card. Unmeasured on a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from .triton_jit import jit, tl, triton

MAX_WIDTH = 32768
# Elements of a tile, in rows of the padded width; a wider row is a tile by itself. Two programs for each of the 132
# multiprocessors of an H100 in a backward. Unmeasured: chosen so that no forward spills, and no backward below 16384
# columns, where 16 warps of twice as many numbers would spill more (72 bytes a thread, and 56).
ELEMENTS_PER_TILE = 4096
PROGRAMS = 264


def _layout(width: int) -> tuple[int, int, int]:
    """(rows of a tile, padded width, warps)."""
    padded = triton.next_power_of_2(width)
    return max(1, ELEMENTS_PER_TILE // padded), padded, max(8, min(32, padded // 512))


@jit
def forward_kernel(
    x, x_stride, residual, residual_stride, weight, y, z, inverse_rms, num_rows, width, eps,
    HAS_RESIDUAL: tl.constexpr, ZERO_CENTRED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(z.dtype.element_ty)
        tl.store(z + row[:, None] * width + column[None, :], rounded, mask=inside)
        value = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
    x_hat = value * r[:, None]
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    if ZERO_CENTRED:
        out = x_hat * (1.0 + w)
    else:
        out = x_hat.to(x.dtype.element_ty).to(tl.float32) * w
    tl.store(y + row[:, None] * width + column[None, :], out.to(y.dtype.element_ty), mask=inside)
    tl.store(inverse_rms + row, r, mask=row < num_rows)


@jit
def backward_kernel(
    d_y, d_y_stride, d_z, d_z_stride, z, z_stride, weight, inverse_rms, d_x, parts, num_rows, width, rows_per_program,
    HAS_D_Z: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, ZERO_CENTRED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    if ZERO_CENTRED:
        w = 1.0 + w
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    begin = program * rows_per_program
    end = tl.minimum(begin + rows_per_program, num_rows)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (column < width)[None, :]
        value = tl.load(z + row[:, None] * z_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        d_out = tl.load(d_y + row[:, None] * d_y_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        r = tl.load(inverse_rms + row, mask=row < end, other=0.0)[:, None]
        x_hat = value * r
        if NEEDS_WEIGHT:
            total += d_out * x_hat
        if NEEDS_X:
            g = d_out * w
            mean = tl.sum(g * x_hat, 1) / width
            d_value = r * (g - x_hat * mean[:, None])
            if HAS_D_Z:
                d_value += tl.load(d_z + row[:, None] * d_z_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
            tl.store(d_x + row[:, None] * width + column[None, :], d_value.to(d_x.dtype.element_ty), mask=inside)
    if NEEDS_WEIGHT:
        tl.store(parts + program * width + column, tl.sum(total, 0), mask=column < width)


# ---- The host's side ----


def rows_of(x: Tensor) -> Tensor:
    """As [rows, D] whose rows have no gaps."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, zero_centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, z, r [..., 1])."""
    y = x.new_empty(x.shape, dtype=x.dtype if zero_centred else torch.promote_types(x.dtype, weight.dtype))
    z = x if residual is None else x.new_empty(x.shape)
    inverse_rms = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    x_RD, residual_RD = rows_of(x), None if residual is None else rows_of(residual)
    residual_stride = 0 if residual_RD is None else residual_RD.stride(0)
    num_rows, width = x_RD.shape
    if y.numel():
        rows, padded, warps = _layout(width)
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            forward_kernel[(triton.cdiv(num_rows, rows),)](
                x_RD, x_RD.stride(0), residual_RD, residual_stride, weight.contiguous(), y, z, inverse_rms, num_rows, width,
                eps, HAS_RESIDUAL=residual is not None, ZERO_CENTRED=zero_centred, ROWS=rows, WIDTH=padded, num_warps=warps,
                enable_fp_fusion=True,
            )  # fmt: skip
    return y, z, inverse_rms


def backward(
    d_y: Tensor,
    d_z: Tensor | None,
    z: Tensor,
    weight: Tensor,
    inverse_rms: Tensor,
    zero_centred: bool,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of x and residual, d_weight), those that are needed."""
    d_x = z.new_empty(z.shape) if needed[0] else None
    z_RD, d_y_RD, d_z_RD = rows_of(z), rows_of(d_y), None if d_z is None else rows_of(d_z)
    num_rows, width = z_RD.shape
    if not z.numel():
        return d_x, torch.zeros_like(weight) if needed[1] else None
    rows, padded, warps = _layout(width)
    rows_per_program = triton.cdiv(triton.cdiv(num_rows, rows), PROGRAMS) * rows
    num_programs = triton.cdiv(num_rows, rows_per_program)
    parts = weight.new_empty(num_programs, width, dtype=torch.float32) if needed[1] else None
    with torch.cuda.device(z.device) if z.is_cuda else nullcontext():
        backward_kernel[(num_programs,)](
            d_y_RD, d_y_RD.stride(0), d_z_RD, 0 if d_z_RD is None else d_z_RD.stride(0), z_RD, z_RD.stride(0),
            weight.contiguous(), inverse_rms, d_x, parts, num_rows, width, rows_per_program, HAS_D_Z=d_z is not None,
            NEEDS_X=needed[0], NEEDS_WEIGHT=needed[1], ZERO_CENTRED=zero_centred, ROWS=rows, WIDTH=padded, num_warps=warps,
            enable_fp_fusion=True,
        )  # fmt: skip
    return d_x, None if parts is None else parts.sum(0).to(weight.dtype)
