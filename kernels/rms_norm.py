"""Root-mean-square normalisation, alone or after adding a residual.

Math      x̂ = x·r, r = (mean_D(x²) + eps)^−½;  y = weight·x̂; zero-centred (Gemma): y = (1 + weight)·x̂.
          Backward: g = dy·weight;  dx = r·(g − x̂·mean_D(g·x̂));  d_weight = Σ_tokens dy·x̂.
          With a residual, z = x + residual stands for x, is returned too, and dz adds to both inputs' gradient.
Shapes    x, residual and the outputs [..., D]; weight [D].
Dtypes    in: fp64, fp32, bf16, fp16; statistics, products and the sum of d_weight in fp64 for fp64, else fp32;
          y: weight·(x̂ rounded to x's dtype), in the wider of the two, as in Hugging Face's Llama; zero-centred, as in its
          Gemma: (1 + weight)·x̂ in fp32, rounded once to x's; z: x's; d_weight: weight's.
Traffic   forward 2 elements per element of x (4 with a residual), backward 3 (read x, dy; write dx).
Source    Root Mean Square Layer Normalization, arXiv:1910.07467.
Limits    Saves x and r. First-order gradients only.
"""

from typing import overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm_reference(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None, zero_centred: bool = False
):
    """The definition; statistics in fp32 unless x is fp64."""
    z = x if residual is None else x + residual
    wide = _wide(z)
    x_hat = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = ((1 + _wide(weight)) * x_hat).to(z.dtype) if zero_centred else weight * x_hat.to(z.dtype)
    return y if residual is None else (y, z)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, zero_centred):
        wide = _wide(x)
        inverse_rms = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.zero_centred = zero_centred
        if zero_centred:
            return (wide * inverse_rms).mul_(1 + _wide(weight)).to(x.dtype)
        x_hat = (wide * inverse_rms).to(x.dtype)
        return x_hat.mul_(weight) if weight.dtype == x.dtype else weight * x_hat

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        x, weight, inverse_rms = ctx.saved_tensors
        d_y, x_hat = _wide(d_y), _wide(x) * inverse_rms
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (d_y * x_hat).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None, None
        g = d_y * (1 + _wide(weight) if ctx.zero_centred else _wide(weight))
        mean = (g * x_hat).mean(-1, keepdim=True)
        return g.addcmul_(x_hat, mean, value=-1).mul_(inverse_rms).to(x.dtype), d_weight, None, None


# Dispatch by device: the Triton kernel will replace the entry of "cuda".
_IMPLEMENTATIONS = {"cpu": _RMSNorm.apply, "cuda": _RMSNorm.apply}


@overload
def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: None = None, zero_centred: bool = False) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor, zero_centred: bool = False
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None, zero_centred: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """norm(x), or (norm(x + residual), x + residual). On CPU, and on CUDA until the Triton kernel, torch operations."""
    if weight.shape != x.shape[-1:]:
        received = f"weight {list(weight.shape)} for x {list(x.shape)}"
        raise ValueError(f"rms_norm: received {received}, expected [{x.shape[-1]}]; give one weight per channel")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        received = f"residual {list(residual.shape)} {residual.dtype}"
        raise ValueError(f"rms_norm: received {received}, expected {list(x.shape)} {x.dtype}; cast it to x's")
    if x.device.type not in _IMPLEMENTATIONS:
        expected = ", ".join(_IMPLEMENTATIONS)
        raise ValueError(f"rms_norm: received device {x.device.type}, expected one of {expected}; move the tensors")
    z = x if residual is None else x + residual
    y = _IMPLEMENTATIONS[x.device.type](z, weight, eps, zero_centred)
    return y if residual is None else (y, z)
