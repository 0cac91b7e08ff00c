"""Rotary position embedding of queries and keys, with their optional RMS norm before it.

Math      the first R of a head's H channels, halves x = (a, b), turn by their position's angles:
          a' = a·cos − b·sin,  b' = b·cos + a·sin  ("rotate_half": channel i pairs with i + R/2, not with i + 1);
          the other H − R pass unchanged. Backward: the same with −sin.
Shapes    q [..., N, H], k [..., K, H]; cos, sin half width [T, R/2], [S, R/2] or [B, S, R/2] (R ≤ H: partial rotation);
          norm weights [H]; outputs as q and k. Tables: positions [...] to cos, sin [..., R/2].
Dtypes    in: fp64, fp32, bf16, fp16; computed in fp64 for fp64, else fp32; outputs: q's and k's. Norm: see rms_norm.
Traffic   forward and backward 2 elements per element of q and k, cos and sin once per token.
Source    RoFormer, arXiv:2104.09864; the Llama 3.1 frequencies, arXiv:2407.21783.
Limits    Saves only cos and sin (and what the norm saves). cos and sin get no gradient.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .rms_norm import rms_norm, rms_norm_reference


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


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        cos, sin = ctx.saved_tensors
        return _rotated(d_y, cos, sin, -1.0), None, None


def _rope_torch(q, k, cos, sin, norm_weights, eps, zero_centred):
    normed = (
        x if w is None else rms_norm(x, w, eps=eps, zero_centred=zero_centred).to(x.dtype)
        for x, w in zip((q, k), norm_weights, strict=True)
    )
    return tuple(_Rotate.apply(x, cos, sin) for x in normed)


# Dispatch by device: the Triton kernel will replace the entry of "cuda".
_IMPLEMENTATIONS = {"cpu": _rope_torch, "cuda": _rope_torch}


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
    """Rotated (q, k), each normed first where its weight is given, as `rms_norm` does. On CPU, and on CUDA until the Triton kernel, torch
    operations."""
    if cos.shape != sin.shape or 2 * cos.shape[-1] > q.shape[-1] or q.shape[-1] != k.shape[-1]:
        received = f"q {list(q.shape)}, k {list(k.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}"
        expected = "one head width, and equal tables at most half as wide"
        raise ValueError(f"rope: received {received}, expected {expected}; make the tables with rope_tables")
    tokens = list(q.shape[:-2])
    if q.shape[:-2] != k.shape[:-2] or cos.dim() < 2 or list(cos.shape[:-1]) != tokens[-(cos.dim() - 1) :]:
        received = f"q {list(q.shape)}, k {list(k.shape)}, tables {list(cos.shape)}"
        raise ValueError(f"rope: received {received}, expected a table row per token; index the tables by position")
    if q.device.type not in _IMPLEMENTATIONS:
        expected = ", ".join(_IMPLEMENTATIONS)
        raise ValueError(f"rope: received device {q.device.type}, expected one of {expected}; move the tensors")
    return _IMPLEMENTATIONS[q.device.type](q, k, cos, sin, (q_norm_weight, k_norm_weight), eps, zero_centred)
