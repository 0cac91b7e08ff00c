"""Which implementation of attention serves a request: a table that can be printed, and one adapter per entry.

**Math**, **Shapes** as in `attention`. **Source** each adapter calls the public function of the package of its name.
**Limits** flash-attn and Transformer Engine have not been run from here: their adapters are tested against stand-ins that check
  what they are called with. So "auto" never takes them; nor SDPA, whose lead over our kernel is to be measured first.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention_torch import Rule, attention_torch
from .backend import Backend, cuda_package_absent, first_reason, triton_absent
from .backend import choose as choose_from

_HALF = (torch.float16, torch.bfloat16)


class Request(NamedTuple):
    """One call of `attention`, checked; `offset` is an int or int32 [num_sequences]."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor | None
    cu_seqlens_k: Tensor | None
    sinks_N: Tensor | None
    rule: Rule
    offset: int | Tensor
    max_seqlen: int | None = None
    deterministic: bool = True

    def call(self) -> Any:
        """As the Triton kernels take it."""
        from .attention_triton import Call

        rule, cu = self.rule, (self.cu_seqlens, self.cu_seqlens_k)
        return Call(rule.causal, rule.window, rule.softcap, rule.scale, *cu, self.offset)

    def torch_arguments(self) -> tuple:
        offset = self.offset if isinstance(self.offset, int) else self.offset.long()
        return self.q, self.k, self.v, self.cu_seqlens, self.cu_seqlens_k, self.sinks_N, self.rule, offset


Result = tuple[Tensor, Tensor | None]


def _wants_same_bits(request: Request) -> bool:
    is_trained = torch.is_grad_enabled() and any(x.requires_grad for x in (request.q, request.k, request.v))
    return request.deterministic and is_trained


# ---- Ours ----


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks_N, call, out_dtype):
        from .attention_triton import forward

        out, lse = forward(q, k, v, sinks_N, call, out_dtype)
        ctx.save_for_backward(q, k, v, sinks_N, out, lse)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_lse):
        from .attention_triton_backward import backward

        saved = ctx.saved_tensors
        d_out = torch.zeros_like(saved[4]) if d_out is None else d_out
        return *backward(saved, d_out, d_lse, ctx.call), None, None


def _run_triton(request: Request) -> Result:
    return _TritonAttention.apply(request.q, request.k, request.v, request.sinks_N, request.call(), request.rule.out_dtype)


# ---- torch's fused kernels ----


def _sdpa_cannot(request: Request) -> str | None:
    rule, offset = request.rule, request.offset
    is_square = request.q.shape[1] == request.k.shape[1] and isinstance(offset, int) and offset == 0
    return first_reason({
        "packed documents": request.cu_seqlens is not None, "a window": rule.window is not None,
        "softcap": rule.softcap is not None, "sinks": request.sinks_N is not None, "the log-sum-exp": rule.return_lse,
        "another output dtype": rule.out_dtype != request.q.dtype,
        "a causal mask on queries that are not the keys' own": rule.causal and not is_square,
        "values narrower than keys": request.q.shape[-1] != request.v.shape[-1],
        "dtypes other than bf16 and fp16 on CUDA": request.q.is_cuda and request.q.dtype not in _HALF,
        "a deterministic backward without torch.use_deterministic_algorithms(True) (deterministic=False lets it)":
            request.q.is_cuda and _wants_same_bits(request) and not torch.are_deterministic_algorithms_enabled(),
    })  # fmt: skip


def _sdpa(which: SDPBackend) -> Backend:
    def absent(device: torch.device) -> str | None:
        here = (
            (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) if device.type == "cuda" else (SDPBackend.FLASH_ATTENTION,)
        )
        return None if which in here else f"torch has no {which.name} kernel for {device.type}"

    def run(request: Request) -> Result:
        q, k, v = (x.transpose(1, 2) for x in (request.q, request.k, request.v))
        rule, is_grouped = request.rule, q.shape[1] != k.shape[1]
        with sdpa_kernel(which):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=rule.causal, scale=rule.scale, enable_gqa=is_grouped)
        return out.transpose(1, 2), None

    return Backend(absent, _sdpa_cannot, run)


# ---- Other packages ----


def _flash_cannot(request: Request) -> str | None:
    """It aligns a causal mask to the last key: the offset it knows is S' − S, and packed, equal boundaries."""
    rule, q, k = request.rule, request.q, request.k
    is_packed, offset = request.cu_seqlens is not None, request.offset
    own = (
        request.cu_seqlens is request.cu_seqlens_k
        if is_packed
        else isinstance(offset, int) and offset == k.shape[1] - q.shape[1]
    )
    return first_reason({
        "sinks": request.sinks_N is not None, "a differentiable log-sum-exp": rule.return_lse,
        "another output dtype": rule.out_dtype != q.dtype, "dtypes other than bf16 and fp16": q.dtype not in _HALF,
        "values narrower than keys": q.shape[-1] != request.v.shape[-1], "heads wider than 256": q.shape[-1] > 256,
        "a query offset of its own": not own or (is_packed and not (isinstance(offset, int) and offset == 0)),
        "packed documents without max_seqlen": is_packed and request.max_seqlen is None,
    })  # fmt: skip


def _run_flash(request: Request) -> Result:
    package: Any = importlib.import_module("flash_attn")
    rule = request.rule
    behind = -1 if rule.window is None else rule.window - 1
    keywords = {
        "softmax_scale": rule.scale, "causal": rule.causal, "window_size": (behind, 0 if rule.causal else behind),
        "softcap": rule.softcap or 0.0, "deterministic": request.deterministic,
    }  # fmt: skip
    if rule.window is None:
        keywords["window_size"] = (-1, -1)
    if request.cu_seqlens is None:
        return package.flash_attn_func(request.q, request.k, request.v, **keywords), None
    bounds = (request.cu_seqlens, request.cu_seqlens_k, request.max_seqlen, request.max_seqlen)
    return package.flash_attn_varlen_func(request.q, request.k, request.v, *bounds, **keywords), None


def _engine_cannot(request: Request) -> str | None:
    rule, q, k = request.rule, request.q, request.k
    is_packed, offset = request.cu_seqlens is not None, request.offset
    is_own = (request.cu_seqlens is request.cu_seqlens_k) if is_packed else q.shape[1] == k.shape[1]
    return first_reason({
        "softcap": rule.softcap is not None, "sinks": request.sinks_N is not None,
        "the log-sum-exp": rule.return_lse, "another output dtype": rule.out_dtype != q.dtype,
        "dtypes other than bf16 and fp16": q.dtype not in _HALF,
        "a query offset": not is_own or not isinstance(offset, int) or offset != 0,
        "packed documents without max_seqlen": is_packed and request.max_seqlen is None,
        "a deterministic backward but by its environment (deterministic=False lets it)": _wants_same_bits(request),
    })  # fmt: skip


def _run_engine(request: Request) -> Result:
    package: Any = importlib.import_module("transformer_engine.pytorch")
    rule, q, k, v = request.rule, request.q, request.k, request.v
    is_packed = request.cu_seqlens is not None
    mask = ("padding_" if is_packed else "") + "causal" if rule.causal else "padding" if is_packed else "no_mask"
    behind = -1 if rule.window is None else rule.window - 1
    module = package.DotProductAttention(
        q.shape[-2], (q.shape[-1], v.shape[-1]), num_gqa_groups=k.shape[-2], attention_dropout=0.0, attn_mask_type=mask,
        window_size=(behind, 0 if rule.causal else behind), softmax_scale=rule.scale, qkv_format="thd" if is_packed else "bshd",
    )  # fmt: skip
    bounds: dict[str, Any] = {}
    if is_packed:
        bounds |= {"cu_seqlens_q": request.cu_seqlens, "cu_seqlens_kv": request.cu_seqlens_k}
        bounds |= {"max_seqlen_q": request.max_seqlen, "max_seqlen_kv": request.max_seqlen}
    out = module(q, k, v, **bounds)
    return out.view(*q.shape[:-1], v.shape[-1]), None


# ---- The table ----

TABLE: dict[str, Backend] = {
    "triton": Backend(
        triton_absent, lambda r: "fp64: the torch path has it" if r.q.dtype == torch.float64 else None, _run_triton
    ),
    "torch": Backend(lambda device: None, lambda request: None, lambda r: attention_torch(*r.torch_arguments())),
    "sdpa-cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa-flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "flash-attn": Backend(cuda_package_absent("flash-attn", "flash_attn"), _flash_cannot, _run_flash),
    "transformer-engine": Backend(
        cuda_package_absent("transformer-engine", "transformer_engine.pytorch"), _engine_cannot, _run_engine
    ),
}
AUTO = ("triton", "torch")


def choose(name: str, request: Request) -> Backend:
    """The entry that serves the request, or a ValueError with the reason."""
    return choose_from("attention", TABLE, AUTO, name, request, request.q.device)
