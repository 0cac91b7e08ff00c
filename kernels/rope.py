"""Rotary position embedding of queries and keys, with their optional RMS norm before it.

Math      the first R of a head's H channels, halves x = (a, b), turn by their position's angles:
          a' = a·cos − b·sin,  b' = b·cos + a·sin  ("rotate_half": channel i pairs with i + R/2, not with i + 1);
          the other H − R pass unchanged. Backward: the same with −sin, then the norm's.
Shapes    q [..., N, H], k [..., K, H]; cos, sin half width [T, R/2], [S, R/2] or [B, S, R/2] (R ≤ H: partial rotation);
          norm weights [H]; outputs as q and k. Tables: positions [...] to cos, sin [..., R/2].
Dtypes    in: fp64, fp32, bf16, fp16; computed in fp64 for fp64, else fp32; outputs: q's and k's. Norm: see rms_norm; on CUDA
          it is not rounded before it is turned.
Traffic   forward and backward 2 elements per element of q and k, cos and sin once per token.
Source    RoFormer, arXiv:2104.09864; the Llama 3.1 frequencies, arXiv:2407.21783.
Limits    Saves only cos and sin, and with a norm its input. cos and sin get no gradient. First-order gradients only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import check_floats, runs_triton
from .rms_norm import backward_torch as norm_backward
from .rms_norm import forward_torch as norm_forward
from .rms_norm import rms_norm_reference


@dataclass(frozen=True)
class Llama3Scaling:
    """Wavelengths above original/low_freq_factor tokens are stretched by `factor`, those under original/high_freq_factor
    are kept, those between are interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


def rope_tables(
    positions: Tensor,
    head_width: int,
    theta: float,
    *,
    scaling: Llama3Scaling | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """cos and sin [..., head_width/2] of integer positions [...]; angles in fp64 for fp64 tables, else in fp32.

    `head_width` counts the rotated channels: pass fewer than H for a partial rotation.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"rope_tables: received dtype {dtype}, expected a floating-point one; cosines are fractions")
    if head_width <= 0 or head_width % 2:
        raise ValueError(f"rope_tables: received head_width {head_width}, expected an even width; channels turn in pairs")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    channel = torch.arange(0, head_width, 2, device=positions.device, dtype=wide)
    frequency = 1.0 / theta ** (channel / head_width)
    if scaling is not None:
        wavelength = 2 * math.pi / frequency
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = (scaling.original_max_position_embeddings / wavelength - low) / (high - low)
        kept = kept.clamp(0.0, 1.0)
        frequency = (1 - kept) * frequency / scaling.factor + kept * frequency
    angle = positions[..., None].to(wide) * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rope_reference(q, k, cos, sin, *, q_norm_weight=None, k_norm_weight=None, eps=1e-6, zero_centred=False):
    """The definition, by autograd; fp32 unless the inputs are fp64."""
    outputs = []
    for x, norm_weight in ((q, q_norm_weight), (k, k_norm_weight)):
        y = x if norm_weight is None else rms_norm_reference(x, norm_weight, eps=eps, zero_centred=zero_centred)
        y = y if y.dtype == torch.float64 else y.float()
        half = cos.shape[-1]
        a, b, rest = y[..., :half], y[..., half : 2 * half], y[..., 2 * half :]
        c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)
        outputs.append(torch.cat([a * c - b * s, b * c + a * s, rest], -1).to(x.dtype))
    return tuple(outputs)


# ---- torch, for the CPU ----


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    cos, sin = (table.to(wide.dtype).unsqueeze(-2) for table in (cos, sin))
    half = cos.shape[-1]
    y = torch.empty_like(wide, memory_format=torch.contiguous_format)
    a, b = wide[..., :half], wide[..., half : 2 * half]
    torch.mul(a, cos, out=y[..., :half]).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=y[..., half : 2 * half]).addcmul_(a, sin, value=sign)
    y[..., 2 * half :] = wide[..., 2 * half :]
    return y.to(x.dtype)


def _forward_torch(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, zero_centred: bool) -> Tensor:
    """x [..., heads, H] normed, if a weight is given, and turned."""
    if weight is not None:
        x = norm_forward(x, weight, None, eps, zero_centred)[0].to(x.dtype)
    return _rotated(x, cos, sin, 1.0)


def _backward_torch(
    d_y: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None,
    eps: float,
    zero_centred: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """(d_x, d_weight), those that are needed; without a norm x is not read."""
    d_normed = _rotated(d_y, cos, sin, -1.0)
    if weight is None:
        return d_normed, None
    inverse_rms = norm_forward(x, weight, None, eps, zero_centred)[2]
    return norm_backward(d_normed, None, x, weight, inverse_rms, zero_centred, needs)


def _steps(x: Tensor) -> tuple[Any, Any]:
    """Forward and backward on a tensor's device."""
    if runs_triton(x):
        from . import rope_triton as kernels

        return kernels.forward, kernels.backward
    return _forward_torch, _backward_torch


# ---- The registered operators, for compiled callers ----


@torch.library.custom_op("warpline::rope", mutates_args=())
def _rope_op(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, zero_centred: bool) -> Tensor:
    return _steps(x)[0](x, cos, sin, weight, eps, zero_centred)


@_rope_op.register_fake
def _(x, cos, sin, weight, eps, zero_centred):
    return x.new_empty(x.shape)


@torch.library.custom_op("warpline::rope_backward", mutates_args=())
def _rope_backward_op(
    d_y: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, zero_centred: bool,
    needed: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    gradients = _steps(d_y)[1](d_y, x, cos, sin, weight, eps, zero_centred, tuple(needed))
    d_x, d_weight = (d_y.new_empty(0) if d is None else d for d in gradients)
    return d_x, d_weight


@_rope_backward_op.register_fake
def _(d_y, x, cos, sin, weight, eps, zero_centred, needed):
    d_weight = d_y.new_empty(0) if weight is None else weight.new_empty(weight.shape if needed[1] else 0)
    return d_y.new_empty(d_y.shape if weight is None or needed[0] else 0), d_weight


def _save_for_op(ctx, inputs, output):
    x, cos, sin, weight, *ctx.options = inputs
    ctx.save_for_backward(None if weight is None else x, cos, sin, weight)


def _backward_of_op(ctx, d_y):
    needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[3]]
    d_x, d_weight = _rope_backward_op(d_y, *ctx.saved_tensors, *ctx.options, needed)
    return d_x if needed[0] else None, None, None, d_weight if needed[1] else None, None, None


_rope_op.register_autograd(_backward_of_op, setup_context=_save_for_op)


# ---- Autograd, for eager callers ----


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, weight, eps, zero_centred):
        ctx.save_for_backward(None if weight is None else x, cos, sin, weight)
        ctx.options = eps, zero_centred
        return _steps(x)[0](x, cos, sin, weight, eps, zero_centred)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        needed = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        d_x, d_weight = _steps(d_y)[1](d_y, *ctx.saved_tensors, *ctx.options, needed)
        return d_x, None, None, d_weight, None, None


# ---- The public function ----


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    zero_centred: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotated (q, k), each normed first where its weight is given, as `rms_norm` does. Triton on CUDA, torch operations on the
    CPU and for fp64.
    """
    check_floats("rope", q, k, cos, sin, q_norm_weight, k_norm_weight)
    if (
        cos.dim() < 2
        or cos.shape[-1] == 0
        or cos.shape != sin.shape
        or q.dim() < 2
        or 2 * cos.shape[-1] > q.shape[-1]
        or q.shape[-1] != k.shape[-1]
    ):
        received = f"q {list(q.shape)}, k {list(k.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}"
        expected = "one head width, and equal tables of a row per token, at most half as wide"
        raise ValueError(f"rope: received {received}, expected {expected}; make the tables with rope_tables")
    tokens = list(q.shape[:-2])
    if q.shape[:-2] != k.shape[:-2] or cos.dim() < 2 or list(cos.shape[:-1]) != tokens[-(cos.dim() - 1) :]:
        received = f"q {list(q.shape)}, k {list(k.shape)}, tables {list(cos.shape)}"
        raise ValueError(f"rope: received {received}, expected a table row per token; index the tables by position")
    devices = {str(x.device) for x in (q, k, cos, sin, q_norm_weight, k_norm_weight) if x is not None}
    if q.device.type not in ("cpu", "cuda") or len(devices) > 1:
        received = ", ".join(sorted(devices))
        raise ValueError(f"rope: received tensors on {received}, expected one device, cpu or cuda; move the tensors")
    for name, weight in (("q_norm_weight", q_norm_weight), ("k_norm_weight", k_norm_weight)):
        if weight is not None and weight.shape != q.shape[-1:]:
            raise ValueError(f"rope: received {name} {list(weight.shape)}, expected [{q.shape[-1]}]; give one per channel")
    turn = _rope_op if torch.compiler.is_compiling() else _Rope.apply
    return turn(q, cos, sin, q_norm_weight, eps, zero_centred), turn(k, cos, sin, k_norm_weight, eps, zero_centred)
