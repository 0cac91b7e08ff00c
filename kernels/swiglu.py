"""The gated activation of the MLP: silu(gate)·up.

Math      y = g·σ(g)·u;  du = dy·g·σ(g);  dg = dy·u·σ(g)·(1 + g·(1 − σ(g))).
Shapes    gate, up and the output: one shape [..., F].
Dtypes    in: fp64, fp32, bf16, fp16 (both alike); computed in fp64 for fp64, else fp32; output: gate's.
Traffic   forward 3 elements per element of F (read 2, write 1), backward 5 (read 3, write 2).
Source    GLU Variants Improve Transformer, arXiv:2002.05202.
Limits    Saves gate and up, not the activation: the backward recomputes it. First-order gradients only. Transformer Engine
          takes gate and up in one tensor, so its entry copies both first; apex has no gated activation.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import Backend, check_floats, choose, cuda_package_absent, runs_triton, triton_absent


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition, in the inputs' own dtype."""
    return gate * torch.sigmoid(gate) * up


# ---- torch, for the CPU ----


def _forward_torch(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(_wide(gate)).mul_(_wide(up)).to(gate.dtype)


def _backward_torch(d_out: Tensor, gate: Tensor, up: Tensor, needed: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """(d_gate, d_up), those that are needed."""
    wide_gate, wide_d_out = _wide(gate), _wide(d_out)
    d_up = F.silu(wide_gate).mul_(wide_d_out).to(up.dtype) if needed[1] else None
    if not needed[0]:
        return None, d_up
    return torch.ops.aten.silu_backward(wide_d_out * _wide(up), wide_gate).to(gate.dtype), d_up


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _steps(x: Tensor) -> tuple[Any, Any]:
    """Forward and backward of "auto"."""
    if runs_triton(x):
        from . import swiglu_triton as kernels

        return kernels.forward, kernels.backward
    return _forward_torch, _backward_torch


# ---- The registered operators, for compiled callers ----


@torch.library.custom_op("warpline::swiglu", mutates_args=())
def _swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    return _steps(gate)[0](gate, up).contiguous()


@_swiglu_op.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.custom_op("warpline::swiglu_backward", mutates_args=())
def _swiglu_backward_op(d_out: Tensor, gate: Tensor, up: Tensor, needed: list[bool]) -> tuple[Tensor, Tensor]:
    gradients = _steps(gate)[1](d_out, gate, up, tuple(needed))
    d_gate, d_up = (gate.new_empty(0) if d is None else d.contiguous() for d in gradients)
    return d_gate, d_up


@_swiglu_backward_op.register_fake
def _(d_out, gate, up, needed):
    d_gate, d_up = (x.new_empty(x.shape if asked else 0) for x, asked in zip((gate, up), needed, strict=True))
    return d_gate, d_up


def _save_for_op(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_of_op(ctx, d_out):
    needed = list(ctx.needs_input_grad)
    gradients = _swiglu_backward_op(d_out, *ctx.saved_tensors, needed)
    return tuple(d if asked else None for d, asked in zip(gradients, needed, strict=True))


_swiglu_op.register_autograd(_backward_of_op, setup_context=_save_for_op)


# ---- Autograd, for eager callers ----


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, steps):
        ctx.save_for_backward(gate, up)
        ctx.backward = steps[1]
        return steps[0](gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        return *ctx.backward(d_out, *ctx.saved_tensors, ctx.needs_input_grad[:2]), None


# ---- Who serves a call ----


class Request(NamedTuple):
    """One call of `swiglu`, checked."""

    gate: Tensor
    up: Tensor


def _no_double(request: Request) -> str | None:
    return "fp64: the torch path has it" if request.gate.dtype == torch.float64 else None


def _run_engine(request: Request) -> Tensor:
    package: Any = importlib.import_module("transformer_engine.pytorch.ops")
    return package.SwiGLU()(torch.cat(request, -1))


def _run_triton(request: Request) -> Tensor:
    from . import swiglu_triton as kernels

    return _SwiGLU.apply(*request, (kernels.forward, kernels.backward))


TABLE: dict[str, Backend] = {
    "triton": Backend(triton_absent, _no_double, _run_triton),
    "torch": Backend(lambda device: None, lambda request: None, lambda r: _SwiGLU.apply(*r, (_forward_torch, _backward_torch))),
    "transformer-engine": Backend(
        cuda_package_absent("transformer-engine", "transformer_engine.pytorch.ops"), _no_double, _run_engine
    ),
}
AUTO = ("triton", "torch")


# ---- The public function ----


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate)·up.

    `backend`: "auto" is Triton on CUDA, and torch's elementwise operations on the CPU and for fp64; a name of `TABLE` obeys or
    raises with what it cannot do.
    """
    check_floats("swiglu", gate, up)
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        received = f"{list(gate.shape)} {gate.dtype} on {gate.device} and {list(up.shape)} {up.dtype} on {up.device}"
        raise ValueError(f"swiglu: received {received}, expected one shape, dtype and device; cast or reshape up to gate's")
    if torch.compiler.is_compiling() and backend == "auto":
        return _swiglu_op(gate, up)
    return choose("swiglu", TABLE, AUTO, backend, Request(gate, up), gate.device).run(Request(gate, up))
