"""`rope` in Triton: the norm of a head and its rotation in one pass over q, and one over k.

**Math**, **Shapes**, **Dtypes** as in `rope`. A program turns `HEADS` heads of a token at a time: the two halves that turn
  together and the rest are tiles of their own. In a backward with a norm it owns a run of tokens, and adds up its part of
  d_weight in registers; the parts [programs, H] are added up by torch.
**Traffic** forward 2 elements an element of x, backward 2 without a norm and 3 with; the tables once per token and block.
**Source** see `rope`.
**Limits** Equal inputs give equal bits: the parts depend on the number of tokens alone. Unmeasured on a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from .triton_jit import jit, tl, triton

# Elements of a tile, in heads of the padded width; programs of a backward, two for each of the 132 multiprocessors of an H100.
# Unmeasured.
ELEMENTS_PER_TILE, PROGRAMS, NUM_WARPS = 2048, 264, 4


@jit
def _load(x, head_stride, head, column, begin, end, num_heads):
    """[HEADS, …] of the columns begin + column, below `end`, of some heads, in fp32; 0 elsewhere."""
    at = begin + column
    mask = (head < num_heads)[:, None] & (at < end)[None, :]
    return tl.load(x + head[:, None] * head_stride + at[None, :], mask=mask, other=0.0).to(tl.float32)


@jit
def _store(y, head_stride, head, column, begin, end, num_heads, value):
    at = begin + column
    mask = (head < num_heads)[:, None] & (at < end)[None, :]
    tl.store(y + head[:, None] * head_stride + at[None, :], value.to(y.dtype.element_ty), mask=mask)


@jit
def _weights(weight, column, begin, end, ZERO_CENTRED: tl.constexpr):
    at = begin + column
    w = tl.load(weight + at, mask=at < end, other=0.0).to(tl.float32)
    if ZERO_CENTRED:
        w = 1.0 + w
    return w[None, :]


@jit
def forward_kernel(
    x, x_stride, x_head_stride, cos, sin, weight, y, num_tokens, num_heads, table_rows, width, half, eps, sign,
    HAS_NORM: tl.constexpr, HAS_REST: tl.constexpr, ZERO_CENTRED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """One token's block of heads; `sign` is −1 in the backward without a norm."""
    blocks = tl.cdiv(num_heads, HEADS)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    head = ((tl.program_id(0) % blocks) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    column, rest_column = tl.arange(0, HALF), tl.arange(0, REST)
    x += token * x_stride
    y += token * num_heads * width
    a = _load(x, x_head_stride, head, column, 0, half, num_heads)
    b = _load(x, x_head_stride, head, column, half, 2 * half, num_heads)
    if HAS_NORM:
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if HAS_REST:
            rest = _load(x, x_head_stride, head, rest_column, 2 * half, width, num_heads)
            squares += tl.sum(rest * rest, 1)
        r = tl.rsqrt(squares / width + eps)[:, None]
        a = a * r * _weights(weight, column, 0, half, ZERO_CENTRED)
        b = b * r * _weights(weight, column, half, 2 * half, ZERO_CENTRED)
        if HAS_REST:
            rest = rest * r * _weights(weight, rest_column, 2 * half, width, ZERO_CENTRED)
            _store(y, width, head, rest_column, 2 * half, width, num_heads, rest)
    elif HAS_REST:
        rest = _load(x, x_head_stride, head, rest_column, 2 * half, width, num_heads)
        _store(y, width, head, rest_column, 2 * half, width, num_heads, rest)
    table = (token % table_rows) * half + column
    c = tl.load(cos + table, mask=column < half, other=0.0).to(tl.float32)[None, :]
    s = sign * tl.load(sin + table, mask=column < half, other=0.0).to(tl.float32)[None, :]
    _store(y, width, head, column, 0, half, num_heads, a * c - b * s)
    _store(y, width, head, column, half, 2 * half, num_heads, b * c + a * s)


@jit
def backward_kernel(
    d_y, d_y_stride, d_y_head_stride, x, x_stride, x_head_stride, cos, sin, weight, d_x, parts, num_tokens, num_heads,
    table_rows, width, half, eps, tokens_per_program,
    NEEDS_X: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, HAS_REST: tl.constexpr, ZERO_CENTRED: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """With a norm: turns d_y back, and takes it through the norm of x, which is made again."""
    program = tl.program_id(0).to(tl.int64)
    column, rest_column = tl.arange(0, HALF), tl.arange(0, REST)
    w_a = _weights(weight, column, 0, half, ZERO_CENTRED)
    w_b = _weights(weight, column, half, 2 * half, ZERO_CENTRED)
    w_rest = _weights(weight, rest_column, 2 * half, width, ZERO_CENTRED)
    total_a = tl.zeros([HEADS, HALF], tl.float32)
    total_b = tl.zeros([HEADS, HALF], tl.float32)
    total_rest = tl.zeros([HEADS, REST], tl.float32)
    begin = program * tokens_per_program
    for token in range(begin, tl.minimum(begin + tokens_per_program, num_tokens)):
        table = (token % table_rows) * half + column
        c = tl.load(cos + table, mask=column < half, other=0.0).to(tl.float32)[None, :]
        s = tl.load(sin + table, mask=column < half, other=0.0).to(tl.float32)[None, :]
        for first in range(0, num_heads, HEADS):
            head = (first + tl.arange(0, HEADS)).to(tl.int64)
            d_one = _load(d_y + token * d_y_stride, d_y_head_stride, head, column, 0, half, num_heads)
            d_two = _load(d_y + token * d_y_stride, d_y_head_stride, head, column, half, 2 * half, num_heads)
            a = _load(x + token * x_stride, x_head_stride, head, column, 0, half, num_heads)
            b = _load(x + token * x_stride, x_head_stride, head, column, half, 2 * half, num_heads)
            d_a, d_b = d_one * c + d_two * s, d_two * c - d_one * s
            squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
            dots = tl.sum(d_a * w_a * a, 1) + tl.sum(d_b * w_b * b, 1)
            if HAS_REST:
                rest = _load(x + token * x_stride, x_head_stride, head, rest_column, 2 * half, width, num_heads)
                d_rest = _load(d_y + token * d_y_stride, d_y_head_stride, head, rest_column, 2 * half, width, num_heads)
                squares += tl.sum(rest * rest, 1)
                dots += tl.sum(d_rest * w_rest * rest, 1)
            r = tl.rsqrt(squares / width + eps)[:, None]
            mean = dots[:, None] * r * r / width  # of g·x̂, times r: what x̂ is multiplied by is x then
            if NEEDS_WEIGHT:
                total_a += d_a * a * r
                total_b += d_b * b * r
                if HAS_REST:
                    total_rest += d_rest * rest * r
            if NEEDS_X:
                out = d_x + token * num_heads * width
                _store(out, width, head, column, 0, half, num_heads, r * (d_a * w_a - a * mean))
                _store(out, width, head, column, half, 2 * half, num_heads, r * (d_b * w_b - b * mean))
                if HAS_REST:
                    _store(out, width, head, rest_column, 2 * half, width, num_heads, r * (d_rest * w_rest - rest * mean))
    if NEEDS_WEIGHT:
        parts += program * width
        tl.store(parts + column, tl.sum(total_a, 0), mask=column < half)
        tl.store(parts + half + column, tl.sum(total_b, 0), mask=column < half)
        if HAS_REST:
            tl.store(parts + 2 * half + rest_column, tl.sum(total_rest, 0), mask=2 * half + rest_column < width)


# ---- The host's side ----


def _tokens_of(x: Tensor) -> Tensor:
    """As [tokens, heads, H] whose heads have no gaps."""
    rows = x.reshape(-1, *x.shape[-2:])
    return rows if rows.stride(2) == 1 else rows.contiguous()


def _constants(width: int, half: int, num_heads: int) -> dict[str, int]:
    padded = triton.next_power_of_2(width)
    heads = min(triton.next_power_of_2(num_heads), max(1, ELEMENTS_PER_TILE // padded))
    rest = width - 2 * half
    return {
        "HAS_REST": rest > 0,
        "HEADS": heads,
        "HALF": triton.next_power_of_2(half),
        "REST": triton.next_power_of_2(max(1, rest)),
    }


def _table(table: Tensor) -> Tensor:
    return table.reshape(-1, table.shape[-1]).contiguous()


def forward(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, zero_centred: bool, sign: float = 1.0
) -> Tensor:
    """x [..., heads, H] normed, if a weight is given, and turned."""
    y = x.new_empty(x.shape)
    if not x.numel():
        return y
    x_TNH, cos, sin = _tokens_of(x), _table(cos), _table(sin)
    num_tokens, num_heads, width = x_TNH.shape
    constants = _constants(width, cos.shape[1], num_heads)
    grid = (num_tokens * triton.cdiv(num_heads, constants["HEADS"]),)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        forward_kernel[grid](
            x_TNH, x_TNH.stride(0), x_TNH.stride(1), cos, sin, None if weight is None else weight.contiguous(), y, num_tokens,
            num_heads, len(cos), width, cos.shape[1], eps, sign, HAS_NORM=weight is not None, ZERO_CENTRED=zero_centred,
            **constants, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def backward(
    d_y: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, zero_centred: bool,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(d_x, d_weight), those that are needed; without a norm x is not read."""
    if x is None or weight is None:
        return forward(d_y, cos, sin, None, eps, zero_centred, -1.0), None
    d_x = x.new_empty(x.shape) if needed[0] else None
    if not x.numel():
        return d_x, torch.zeros_like(weight) if needed[1] else None
    d_y_TNH, x_TNH, cos, sin = _tokens_of(d_y), _tokens_of(x), _table(cos), _table(sin)
    num_tokens, num_heads, width = x_TNH.shape
    tokens_per_program = triton.cdiv(num_tokens, PROGRAMS)
    num_programs = triton.cdiv(num_tokens, tokens_per_program)
    parts = weight.new_empty(num_programs, width, dtype=torch.float32) if needed[1] else None
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        backward_kernel[(num_programs,)](
            d_y_TNH, d_y_TNH.stride(0), d_y_TNH.stride(1), x_TNH, x_TNH.stride(0), x_TNH.stride(1), cos, sin,
            weight.contiguous(), d_x, parts, num_tokens, num_heads, len(cos), width, cos.shape[1], eps, tokens_per_program,
            NEEDS_X=needed[0], NEEDS_WEIGHT=needed[1], ZERO_CENTRED=zero_centred,
            **_constants(width, cos.shape[1], num_heads), num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return d_x, None if parts is None else parts.sum(0).to(weight.dtype)
