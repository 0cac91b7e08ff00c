"""The gated activation of the MLP: silu(gate)·up.

Math      y = g·σ(g)·u;  du = dy·g·σ(g);  dg = dy·u·σ(g)·(1 + g·(1 − σ(g))).
Shapes    gate, up and the output: one shape [..., F].
Dtypes    in: fp64, fp32, bf16, fp16 (both alike); computed in fp64 for fp64, else fp32; output: gate's.
Traffic   forward 3 elements per element of F (read 2, write 1), backward 5 (read 3, write 2).
Source    GLU Variants Improve Transformer, arXiv:2002.05202.
Limits    Saves gate and up, not the activation: the backward recomputes it. First-order gradients only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition, in the inputs' own dtype."""
    return gate * torch.sigmoid(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(_wide(gate)).mul_(_wide(up)).to(gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        gate, up = ctx.saved_tensors
        wide_gate, wide_d_out = _wide(gate), _wide(d_out)
        d_up = F.silu(wide_gate).mul_(wide_d_out).to(up.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, d_up
        return torch.ops.aten.silu_backward(wide_d_out * _wide(up), wide_gate).to(gate.dtype), d_up


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# Dispatch by device: the Triton kernel will replace the entry of "cuda".
_IMPLEMENTATIONS = {"cpu": _SwiGLU.apply, "cuda": _SwiGLU.apply}


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up. On CPU, and on CUDA until the Triton kernel, torch's elementwise operations."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        received = f"{list(gate.shape)} {gate.dtype} and {list(up.shape)} {up.dtype}"
        raise ValueError(f"swiglu: received {received}, expected one shape and dtype; cast or reshape up to gate's")
    if gate.device.type not in _IMPLEMENTATIONS:
        expected = ", ".join(_IMPLEMENTATIONS)
        raise ValueError(f"swiglu: received device {gate.device.type}, expected one of {expected}; move the tensors")
    return _IMPLEMENTATIONS[gate.device.type](gate, up)
