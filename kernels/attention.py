"""Softmax attention over dense batches and packed documents, with every feature in one function.

Math      s_ij = cap·tanh(scale·q_i·k_j / cap), or scale·q_i·k_j without softcap, over the keys j that query i sees;
          lse_i = log(Σ_j exp s_ij + exp sink);  p_ij = exp(s_ij − lse_i);  o_i = Σ_j p_ij v_j.
          Backward: ds_ij = p_ij·(do_i·v_j − do_i·o_i + dlse_i), times 1 − tanh² under softcap;
          dq_i = scale·Σ_j ds_ij k_j;  dk_j = scale·Σ_i ds_ij q_i;  dv_j = Σ_i p_ij do_i;
          d_sink = Σ_i exp(sink − lse_i)·(dlse_i − do_i·o_i).
          Query i stands at key position i + query_offset. Causal: it sees j ≤ i + offset. `window` counts the keys
          seen, itself included. A row that sees nothing has o = 0, lse = −inf (its sink, if any) and no gradient.
Shapes    dense: q [B, S, N, H], k [B, S', K, H], v [B, S', K, H'], output [B, S, N, H'], lse [B, N, S].
          packed: q [T, N, H], k [T', K, H], v [T', K, H'], cu_seqlens int32 [B+1], output [T, N, H'], lse [N, T].
          K divides N; query head n reads key head n // (N/K). Tokens past the last boundary: output and gradient 0,
          lse −inf, whatever they hold.
Dtypes    in: fp64, fp32, bf16, fp16 (q, k, v alike); statistics, sums and lse: fp64 for fp64, else fp32; output:
          q's, or `out_dtype`. Autocast is disabled inside.
Traffic   forward 2·N·(H + H')·pairs FLOPs, backward 2.5 times that for H = H'; q, k, v, o read or written once.
Source    FlashAttention-2, arXiv:2307.08691; sinks, arXiv:2309.17453 and gpt-oss.
Limits    Contents of cu_seqlens and query_offset are checked on the CPU only: reading them would stop a GPU. No dropout, no
          ALiBi. First-order gradients only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention_backend import Request, choose
from .attention_torch import Rule, attention_torch, visible_keys
from .backend import runs_triton


def attention_reference(
    q, k, v, *, causal=True, cu_seqlens=None, cu_seqlens_k=None, max_seqlen=None, query_offset=None, window=None,
    softcap=None, sinks_N=None, scale=None, return_lse=False, out_dtype=None,
):  # fmt: skip
    """The oracle: full masks, the inputs' own dtype, autograd. Quadratic in all the tokens of the call."""
    is_packed = cu_seqlens is not None
    offset_B = torch.as_tensor(0 if query_offset is None else query_offset, device=q.device).reshape(-1)
    if is_packed:
        document_S, position_S = _document_and_position(cu_seqlens, q.shape[0])
        cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        document_R, position_R = _document_and_position(cu_seqlens_k, k.shape[0])
        is_query_S, is_key_R = document_S >= 0, document_R >= 0
        q = q.where(is_query_S[:, None, None], 0)[None]
        k, v = (x.where(is_key_R[:, None, None], 0)[None] for x in (k, v))
        position_S = position_S + offset_B.expand(max(1, cu_seqlens.numel() - 1))[document_S]
        position_BS1 = position_S[None, :, None]
        same_SR = (document_S[:, None] == document_R) & is_query_S[:, None] & is_key_R
    else:
        position_BS1 = torch.arange(q.shape[1], device=q.device)[:, None] + offset_B[:, None, None]
        position_R = torch.arange(k.shape[1], device=q.device)
        is_query_S = torch.ones(q.shape[1], dtype=torch.bool, device=q.device)
        same_SR = is_query_S[:, None]
    rule = Rule(causal, window, softcap, q.shape[-1] ** -0.5 if scale is None else scale, return_lse, q.dtype)
    visible_BNSR = (visible_keys(rule, position_BS1, position_R) & same_SR)[:, None]
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    score_BNSR = torch.einsum("bsnh,brnh->bnsr", q, k) * rule.scale
    if softcap is not None:
        score_BNSR = softcap * torch.tanh(score_BNSR / softcap)
    sink_N = q.new_full((q.shape[2],), -torch.inf) if sinks_N is None else sinks_N.to(q.dtype)
    sink_BNS1 = sink_N[:, None, None].where(is_query_S[:, None], -torch.inf).expand(*score_BNSR.shape[:3], 1)
    all_BNSR = torch.cat([score_BNSR.masked_fill(~visible_BNSR, -torch.inf), sink_BNS1], -1)
    is_empty = (all_BNSR == -torch.inf).all(-1, keepdim=True)
    lse_BNS1 = all_BNSR.masked_fill(is_empty, 0.0).logsumexp(-1, keepdim=True).masked_fill(is_empty, 0.0)
    out = torch.einsum("bnsr,brnh->bsnh", torch.exp(all_BNSR - lse_BNS1)[..., :-1], v).to(out_dtype or q.dtype)
    lse_BNS = lse_BNS1.masked_fill(is_empty, -torch.inf)[..., 0]
    if is_packed:
        out, lse_BNS = out[0], lse_BNS[0]
    return (out, lse_BNS) if return_lse else out


def _document_and_position(cu_seqlens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """For every token its document (-1 past the last boundary) and its position there."""
    token_T = torch.arange(num_tokens, device=cu_seqlens.device)
    document_T = torch.searchsorted(cu_seqlens, token_T, right=True) - 1
    document_T = document_T.masked_fill(token_T >= cu_seqlens[-1], -1)
    return document_T, token_T - cu_seqlens[document_T]


# ---- The registered operators, for compiled callers: Triton's kernels on CUDA, the torch path elsewhere ----


def _request(q, k, v, cu_seqlens, cu_seqlens_k, sinks_N, offsets, offset, options, out_dtype) -> Request:
    causal, window, softcap, scale = options
    rule = Rule(causal, window, softcap, scale, True, out_dtype)
    return Request(q, k, v, cu_seqlens, cu_seqlens_k, sinks_N, rule, offset if offsets is None else offsets)


@torch.library.custom_op("warpline::attention", mutates_args=())
def _attention_op(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, sinks_N: Tensor | None,
    offsets: Tensor | None, offset: int, causal: bool, window: int | None, softcap: float | None, scale: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options = (causal, window, softcap, scale)
    request = _request(q, k, v, cu_seqlens, cu_seqlens_k, sinks_N, offsets, offset, options, out_dtype)
    if runs_triton(q):
        from .attention_triton import forward

        return forward(q, k, v, sinks_N, request.call(), out_dtype)
    out, lse = attention_torch(*request.torch_arguments())
    return out.contiguous(), lse.contiguous()


@_attention_op.register_fake
def _(q, k, v, cu_seqlens, cu_seqlens_k, sinks_N, offsets, offset, causal, window, softcap, scale, out_dtype):
    out = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=out_dtype)
    shape = (q.shape[1], q.shape[0]) if cu_seqlens is not None else (q.shape[0], q.shape[2], q.shape[1])
    return out, q.new_empty(shape, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


@torch.library.custom_op("warpline::attention_backward", mutates_args=())
def _attention_backward_op(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, sinks_N: Tensor | None,
    offsets: Tensor | None, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor, offset: int, causal: bool,
    window: int | None, softcap: float | None, scale: float, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    options = (causal, window, softcap, scale)
    request = _request(q, k, v, cu_seqlens, cu_seqlens_k, sinks_N, offsets, offset, options, out_dtype)
    if runs_triton(q):
        from .attention_triton_backward import backward

        gradients: tuple[Any, ...] = backward((q, k, v, sinks_N, out, lse), d_out, d_lse, request.call())
    else:
        gradients = _torch_gradients(request, d_out, d_lse)
    d_q, d_k, d_v, d_sinks = gradients
    return d_q, d_k, d_v, q.new_empty(0) if d_sinks is None else d_sinks


def _torch_gradients(request: Request, d_out: Tensor, d_lse: Tensor) -> tuple[Any, ...]:
    """The torch path has its backward in autograd's graph, so its forward runs again."""
    inputs = [None if x is None else x.detach().requires_grad_() for x in (request.q, request.k, request.v, request.sinks_N)]
    again = request._replace(q=inputs[0], k=inputs[1], v=inputs[2], sinks_N=inputs[3])  # type: ignore[arg-type]
    # Inside an operator torch excludes autograd from dispatch: enable_grad alone records nothing.
    is_recorded = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with torch.enable_grad(), is_recorded:
        outputs = attention_torch(*again.torch_arguments())
    reached = [(x, d) for x, d in zip(outputs, (d_out, d_lse), strict=True) if x.requires_grad]
    present = [x for x in inputs if x is not None]
    outputs, upstream = zip(*reached, strict=True)
    gradients = iter(torch.autograd.grad(outputs, present, upstream, allow_unused=True, materialize_grads=True))
    return tuple(None if x is None else next(gradients).contiguous() for x in inputs)


@_attention_backward_op.register_fake
def _(q, k, v, cu_seqlens, cu_seqlens_k, sinks_N, *rest):
    return *(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(0) if sinks_N is None else torch.empty_like(sinks_N)


def _save_for_op(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.options, ctx.has_sinks = inputs[7:], inputs[5] is not None


def _backward_of_op(ctx, d_out, d_lse):
    d_q, d_k, d_v, d_sinks = _attention_backward_op(*ctx.saved_tensors, d_out.contiguous(), d_lse.contiguous(), *ctx.options)
    return d_q, d_k, d_v, None, None, d_sinks if ctx.has_sinks else None, None, *[None] * len(ctx.options)


_attention_op.register_autograd(_backward_of_op, setup_context=_save_for_op)


# ---- The public function ----


def _refuse(what: str, received, expected: str, remedy: str):
    raise ValueError(f"attention: {what}: received {received}, expected {expected}; {remedy}")


def _check_tensors(q, k, v, is_packed: bool, sinks_N) -> None:
    rank = 3 if is_packed else 4
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == rank:
        _refuse("shapes", shapes, f"{rank} dimensions each", "cu_seqlens makes them packed, [T, heads, H]")
    is_matched = q.shape[-1] == k.shape[-1] and k.shape[:-1] == v.shape[:-1] and (is_packed or q.shape[0] == k.shape[0])
    if not is_matched or k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        expected = "one batch size, q and k of one width, k and v of one length, K dividing N"
        _refuse("shapes", shapes, expected, "expand or reshape them")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        _refuse("dtypes", f"{q.dtype}, {k.dtype}, {v.dtype}", "one floating dtype", "cast q, k and v alike")
    if not (q.device == k.device == v.device and (sinks_N is None or sinks_N.device == q.device)):
        devices = sorted({str(x.device) for x in (q, k, v, sinks_N) if x is not None})
        _refuse("devices", ", ".join(devices), "one", "move q, k, v and sinks_N to one device")
    if sinks_N is not None and sinks_N.shape != (q.shape[-2],):
        _refuse("sinks_N", list(sinks_N.shape), f"[{q.shape[-2]}]", "give one sink per query head")


def _check_boundaries(name: str, cu_seqlens: Tensor, num_tokens: int, device: torch.device) -> None:
    if cu_seqlens.device != device:
        _refuse(name, cu_seqlens.device, str(device), "move it to q's device once, with the batch")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        received = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        _refuse(name, received, "int32 [num_sequences + 1]", "cast it with .to(torch.int32)")
    is_readable = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    if is_readable and (cu_seqlens[0] != 0 or (cu_seqlens.diff() < 0).any() or cu_seqlens[-1] > num_tokens):
        expected = f"a non-decreasing sequence from 0 to at most {num_tokens}"
        _refuse(name, cu_seqlens.tolist()[:16], expected, "pass cumulative lengths, not lengths")


def _checked_offset(q, k, cu_seqlens, cu_seqlens_k, query_offset) -> int | Tensor:
    if query_offset is None:
        if cu_seqlens is None:
            is_equal = q.shape[1] == k.shape[1]
        else:  # boundaries on a GPU are not read: only the same tensor is known to be equal
            is_readable = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
            is_equal = cu_seqlens is cu_seqlens_k or (is_readable and torch.equal(cu_seqlens, cu_seqlens_k))
        if not is_equal:
            remedy = "pass the key position of query 0, for instance num_keys - num_queries"
            _refuse("query_offset", "None", "queries and keys of equal lengths", remedy)
        return 0
    if isinstance(query_offset, int):
        return query_offset
    num_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if query_offset.dtype != torch.int32 or query_offset.shape != (num_sequences,):
        received = f"{query_offset.dtype} {list(query_offset.shape)}"
        _refuse("query_offset", received, f"an int or int32 [{num_sequences}]", "give one per sequence")
    if query_offset.device != q.device:
        _refuse("query_offset", query_offset.device, str(q.device), "move it to q's device")
    return query_offset


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, max_seqlen: int | None = None, query_offset: int | Tensor | None = None,
    window: int | None = None, softcap: float | None = None, sinks_N: Tensor | None = None,
    scale: float | None = None, return_lse: bool = False, out_dtype: torch.dtype | None = None,
    deterministic: bool = True, backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention as the header says; returns the output, and its log-sum-exp (differentiable) with `return_lse`.

    `backend`: "auto" takes the first of `attention_backend.TABLE` that serves the request on its device: Triton on CUDA,
    torch operations on the CPU (and for fp64). A name obeys, or raises with what it cannot do. Both of those are always
    deterministic; `deterministic` asks it of the others. `max_seqlen` is a hint that only flash-attn needs.
    """
    if (window is not None and window < 1) or (softcap is not None and softcap <= 0):
        _refuse("window, softcap", f"{window}, {softcap}", "window of at least 1, softcap above 0", "None is off")
    if cu_seqlens is None and cu_seqlens_k is not None:
        _refuse("cu_seqlens", "None with cu_seqlens_k", "both", "pass cu_seqlens")
    _check_tensors(q, k, v, cu_seqlens is not None, sinks_N)
    if cu_seqlens is not None:
        _check_boundaries("cu_seqlens", cu_seqlens, q.shape[0], q.device)
        cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        _check_boundaries("cu_seqlens_k", cu_seqlens_k, k.shape[0], q.device)
        if cu_seqlens.shape != cu_seqlens_k.shape:
            _refuse("cu_seqlens_k", list(cu_seqlens_k.shape), str(list(cu_seqlens.shape)), "give the same sequences")
    offset = _checked_offset(q, k, cu_seqlens, cu_seqlens_k, query_offset)
    rule = Rule(causal, window, softcap, q.shape[-1] ** -0.5 if scale is None else scale, return_lse, out_dtype or q.dtype)
    # What the operator takes; only in Triton's interpreter does it take Triton on the CPU.
    own = "triton" if q.is_cuda and q.dtype != torch.float64 else "torch"
    if torch.compiler.is_compiling() and backend in ("auto", own):
        is_one = isinstance(offset, int)
        options: tuple[Any, ...] = (causal, window, softcap, rule.scale, rule.out_dtype)
        tensors = (q, k, v, cu_seqlens, cu_seqlens_k, sinks_N, None if is_one else offset)
        out, lse = _attention_op(*tensors, offset if is_one else 0, *options)
    else:
        request = Request(q, k, v, cu_seqlens, cu_seqlens_k, sinks_N, rule, offset, max_seqlen, deterministic)
        out, lse = choose(backend, request).run(request)
    return (out, lse) if return_lse else out


def attention_part_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None = None, *,
    causal: bool = True, cu_seqlens: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    query_offset: int | Tensor | None = None, window: int | None = None, softcap: float | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(d_q, d_k, d_v) through some of the keys of an attention, in lse's dtype: sums over the parts are the whole gradients.

    k, v and the keywords are one part's, as its `attention(..., return_lse=True, out_dtype=lse.dtype)` took them; out and lse
    are the merged ones, sinks included, and d_out, d_lse their upstream gradients. No gradient of its own.
    """
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    offset = _checked_offset(q, k, cu_seqlens, cu_seqlens_k, query_offset)
    rule = Rule(causal, window, softcap, q.shape[-1] ** -0.5 if scale is None else scale, True, lse.dtype)
    request = Request(q, k, v, cu_seqlens, cu_seqlens_k, None, rule, offset)
    if runs_triton(q):
        from .attention_triton_backward import backward

        return backward((q, k, v, None, out, lse), d_out, d_lse, request.call(), lse.dtype)[:3]
    inputs = [x.detach().to(lse.dtype).requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        part, part_lse = attention_torch(*request._replace(q=inputs[0], k=inputs[1], v=inputs[2]).torch_arguments())
    d_out = d_out.to(lse.dtype)

    def dot_with_d_out(x: Tensor) -> Tensor:
        return (d_out * x).sum(-1).transpose(-1, -2)

    # The part has the weight exp(part_lse − lse) in the whole, and its gradient is the whole's, seen through that.
    weight = torch.where(lse == -torch.inf, 0.0, torch.exp(part_lse.detach() - lse))
    d_part_lse = weight * (dot_with_d_out(part.detach() - out) + (0.0 if d_lse is None else d_lse))
    d_part = weight.transpose(-1, -2)[..., None] * d_out
    gradients = torch.autograd.grad((part, part_lse), inputs, (d_part, d_part_lse))
    return gradients[0], gradients[1], gradients[2]
