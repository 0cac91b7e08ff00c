"""Root-mean-square normalisation, alone or after adding a residual.

Math      x̂ = z·r, r = (mean_D(z²) + eps)^−½, z = x + residual;  y = weight·x̂; zero-centred (Gemma): y = (1 + weight)·x̂.
          Backward: g = dy·weight;  dz = r·(g − x̂·mean_D(g·x̂)) + dz from outside, which is x's and residual's gradient alike;
          d_weight = Σ_tokens dy·x̂.
Shapes    x, residual and the outputs [..., D]; weight [D].
Dtypes    in: fp64, fp32, bf16, fp16; statistics, products and the sum of d_weight in fp64 for fp64, else fp32;
          z: x's, and the norm is of the rounded z; y: weight·(x̂ rounded to x's dtype), in the wider of the two, as in
          Hugging Face's Llama; zero-centred, as in its Gemma, in fp32 and rounded once to x's; d_weight: weight's.
Traffic   forward 2 elements per element of x (4 with a residual), backward 3 (read z, dy; write dx; one more with a residual).
Source    Root Mean Square Layer Normalization, arXiv:1910.07467.
Limits    Saves z and r. First-order gradients only. Equal inputs give equal bits; a row's outputs do not depend on others.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import Backend, check_floats, choose, cuda_package_absent, first_reason, triton_absent


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


# ---- torch, for the CPU ----


def forward_torch(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, zero_centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, z, r [..., 1])."""
    z = x if residual is None else x + residual
    wide = _wide(z)
    inverse_rms = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    if zero_centred:
        return (wide * inverse_rms).mul_(1 + _wide(weight)).to(x.dtype), z, inverse_rms
    x_hat = (wide * inverse_rms).to(x.dtype)
    return x_hat.mul_(weight) if weight.dtype == x.dtype else weight * x_hat, z, inverse_rms


def backward_torch(
    d_y: Tensor,
    d_z: Tensor | None,
    z: Tensor,
    weight: Tensor,
    inverse_rms: Tensor,
    zero_centred: bool,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of x and residual, d_weight), those that are needed."""
    d_y, x_hat = _wide(d_y), _wide(z) * inverse_rms
    d_weight = (d_y * x_hat).reshape(-1, z.shape[-1]).sum(0).to(weight.dtype) if needed[1] else None
    if not needed[0]:
        return None, d_weight
    g = d_y * (1 + _wide(weight) if zero_centred else _wide(weight))
    mean = (g * x_hat).mean(-1, keepdim=True)
    g.addcmul_(x_hat, mean, value=-1).mul_(inverse_rms)
    return (g if d_z is None else g.add_(d_z)).to(z.dtype), d_weight


def _steps(x: Tensor, weight: Tensor) -> tuple[Any, Any]:
    """Forward and backward of "auto"."""
    if triton_absent(x.device) is None and _triton_cannot(Request(x, weight)) is None:
        from . import rms_norm_triton as kernels

        return kernels.forward, kernels.backward
    return forward_torch, backward_torch


# ---- The registered operators, for compiled callers ----


@torch.library.custom_op("warpline::rms_norm", mutates_args=())
def _rms_norm_op(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, zero_centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, z, inverse_rms = _steps(x, weight)[0](x, weight, residual, eps, zero_centred)
    return y.contiguous(), x.new_empty(0) if residual is None else z.contiguous(), inverse_rms.contiguous()


@_rms_norm_op.register_fake
def _(x, weight, residual, eps, zero_centred):
    inverse_rms = x.new_empty(*x.shape[:-1], 1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    y = x.new_empty(x.shape, dtype=x.dtype if zero_centred else torch.promote_types(x.dtype, weight.dtype))
    return y, x.new_empty(0 if residual is None else x.shape), inverse_rms


@torch.library.custom_op("warpline::rms_norm_backward", mutates_args=())
def _rms_norm_backward_op(
    d_y: Tensor, d_z: Tensor | None, z: Tensor, weight: Tensor, inverse_rms: Tensor, zero_centred: bool, needed: list[bool]
) -> tuple[Tensor, Tensor]:
    gradients = _steps(z, weight)[1](d_y, d_z, z, weight, inverse_rms, zero_centred, tuple(needed))
    d_x, d_weight = (z.new_empty(0) if d is None else d.contiguous() for d in gradients)
    return d_x, d_weight


@_rms_norm_backward_op.register_fake
def _(d_y, d_z, z, weight, inverse_rms, zero_centred, needed):
    return z.new_empty(z.shape if needed[0] else 0), weight.new_empty(weight.shape if needed[1] else 0)


def _save_for_op(ctx, inputs, output):
    x, weight, residual, _, ctx.zero_centred = inputs
    _, z, inverse_rms = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(z if ctx.has_residual else x, weight, inverse_rms)
    ctx.mark_non_differentiable(inverse_rms)
    ctx.set_materialize_grads(False)


def _backward_of_op(ctx, d_y, d_z, _):
    z, weight, inverse_rms = ctx.saved_tensors
    d_z = d_z if ctx.has_residual else None
    needed = [ctx.needs_input_grad[0] or (ctx.has_residual and ctx.needs_input_grad[2]), ctx.needs_input_grad[1]]
    if d_y is None:
        return d_z, None, d_z, None, None
    d_x, d_weight = _rms_norm_backward_op(d_y, d_z, z, weight, inverse_rms, ctx.zero_centred, needed)
    d_x = d_x if needed[0] else None
    return d_x, d_weight if needed[1] else None, d_x if ctx.has_residual else None, None, None


_rms_norm_op.register_autograd(_backward_of_op, setup_context=_save_for_op)


# ---- Autograd, for eager callers ----


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, residual, eps, zero_centred, steps):
        y, z, inverse_rms = steps[0](x, weight, residual, eps, zero_centred)
        ctx.save_for_backward(z, weight, inverse_rms)
        ctx.options = zero_centred, steps[1]
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, z)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y, d_z=None):
        z, weight, inverse_rms = ctx.saved_tensors
        zero_centred, backward = ctx.options
        if d_y is None:
            return d_z, None, d_z, None, None, None
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[2], ctx.needs_input_grad[1]
        d_x, d_weight = backward(d_y, d_z, z, weight, inverse_rms, zero_centred, needed)
        return d_x, d_weight, d_x if ctx.needs_input_grad[2] else None, None, None, None


# ---- Who serves a call ----


class Request(NamedTuple):
    """One call of `rms_norm`, checked."""

    x: Tensor
    weight: Tensor
    residual: Tensor | None = None
    eps: float = 1e-6
    zero_centred: bool = False


def _package_cannot(request: Request) -> str | None:
    is_equal = request.x.dtype == request.weight.dtype
    return first_reason({
        "the addition of a residual": request.residual is not None, "fp64": request.x.dtype == torch.float64,
        "a weight of another dtype": not is_equal,
    })  # fmt: skip


def _apex_cannot(request: Request) -> str | None:
    return "a zero-centred weight" if request.zero_centred else _package_cannot(request)


def _run_apex(request: Request) -> Tensor:
    package: Any = importlib.import_module("apex.normalization.fused_layer_norm")
    return package.fused_rms_norm_affine(request.x, request.weight, request.weight.shape, request.eps)


def _run_engine(request: Request) -> Tensor:
    package: Any = importlib.import_module("transformer_engine.pytorch")
    width, weight = request.weight.numel(), request.weight
    options = {"eps": request.eps, "zero_centered_gamma": request.zero_centred, "device": weight.device, "dtype": weight.dtype}
    return torch.func.functional_call(package.RMSNorm(width, **options), {"weight": weight}, (request.x,))


def _triton_cannot(request: Request) -> str | None:
    from .rms_norm_triton import MAX_WIDTH

    return first_reason({
        "fp64: the torch path has it": torch.float64 in (request.x.dtype, request.weight.dtype),
        f"rows wider than {MAX_WIDTH}": request.x.shape[-1] > MAX_WIDTH,
    })  # fmt: skip


def _run_triton(request: Request) -> Any:
    from . import rms_norm_triton as kernels

    return _RMSNorm.apply(*request, (kernels.forward, kernels.backward))


TABLE: dict[str, Backend] = {
    "triton": Backend(triton_absent, _triton_cannot, _run_triton),
    "torch": Backend(lambda device: None, lambda request: None, lambda r: _RMSNorm.apply(*r, (forward_torch, backward_torch))),
    "transformer-engine": Backend(
        cuda_package_absent("transformer-engine", "transformer_engine.pytorch"), _package_cannot, _run_engine
    ),
    "apex": Backend(cuda_package_absent("apex", "apex.normalization.fused_layer_norm"), _apex_cannot, _run_apex),
}
AUTO = ("triton", "torch")


# ---- The public function ----


@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: None = None, zero_centred: bool = False, backend: str = "auto"
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor, zero_centred: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    zero_centred: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """norm(x), or (norm(x + residual), x + residual).

    `backend`: "auto" is Triton on CUDA, and torch operations on the CPU, for fp64 and for rows too wide; a name of `TABLE`
    obeys or raises with what it cannot do.
    """
    check_floats("rms_norm", x, weight)
    if x.dim() == 0 or weight.shape != x.shape[-1:] or weight.device != x.device:
        received = f"weight {list(weight.shape)} on {weight.device} for x {list(x.shape)} on {x.device}"
        raise ValueError(f"rms_norm: received {received}, expected {list(x.shape[-1:])} there; give one weight per channel")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        received = f"residual {list(residual.shape)} {residual.dtype} on {residual.device}"
        raise ValueError(f"rms_norm: received {received}, expected {list(x.shape)} {x.dtype} on {x.device}; cast it to x's")
    request = Request(x, weight, residual, eps, zero_centred)
    if torch.compiler.is_compiling() and backend == "auto":
        y, z, _ = _rms_norm_op(*request)
        return y if residual is None else (y, z)
    return choose("rms_norm", TABLE, AUTO, backend, request, x.device).run(request)
