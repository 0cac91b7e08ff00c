"""Attention, forward and backward: every implementation that serves a shape, dense, windowed, packed, capped, with sinks.

Run     warpline bench attention [--quick] [--out DIR]
Expect  a row per candidate, operation and shape; docs is the number of documents that the tokens are packed in, with lengths
        as text has them (`lengths`), 0 for a dense batch. FLOPs count the pairs that a mask leaves, 4·N·H forward and 10·N·H
        backward, whatever a candidate computes: ours makes the scores once more for a backward without atomics, 14·N·H. Errors
        are those of the last 64 tokens of the longest sequence, over all their keys: output, and gradients of q, k and v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels.attention import attention, attention_reference
from ..kernels.attention_backend import TABLE
from .lengths import boundaries, document_lengths
from .measure import Candidate, Case, Inputs, absent
from .streaming import gradients

CHECKED_TOKENS = 64
MAX_SCORE_BYTES = {"cpu": 2**25, "cuda": 2**33}  # of the eager reference's fp32 scores; beyond, it stays out
Function = Callable[..., Any]


class Shape(NamedTuple):
    """B sequences of S tokens, or with `documents` S tokens packed in that many."""

    batch: int
    tokens: int
    heads: int
    key_heads: int
    width: int
    documents: int = 0
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        sizes = {"B": self.batch, "S": self.tokens, "N": self.heads, "K": self.key_heads, "H": self.width}
        return {**sizes, "docs": self.documents, **({} if self.window is None else {"window": self.window})}

    @property
    def lengths(self) -> list[int]:
        return document_lengths(self.tokens, self.documents) if self.documents else [self.tokens]

    @property
    def longest(self) -> slice:
        """Tokens of the longest document, or of a whole sequence."""
        lengths = self.lengths
        which = lengths.index(max(lengths))
        return slice(sum(lengths[:which]), sum(lengths[: which + 1]))

    @property
    def pairs(self) -> int:
        """Query-key pairs of one head that the mask leaves."""
        found = 0
        for length in self.lengths:
            window = min(self.window or length, length)
            found += window * (window + 1) // 2 + (length - window) * window
        return self.batch * found


def shapes(device: torch.device, is_quick: bool) -> Iterator[tuple[str, Shape]]:
    """(what the rows are about, shape)."""
    is_gpu = device.type == "cuda"
    heads, total = ((16, 4, 128), 16384) if is_gpu else ((8, 2, 64), 512)
    other_width = (32, 8, 64) if is_gpu else (4, 1, 128)
    lengths, counts, windows = [256, 512, 1024], [1, 32], [128]
    if is_gpu:
        lengths = [1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072]
        counts, windows = [1, 4, 16, 64, 256], [256, 1024, 4096]
    if is_quick:
        lengths, counts, windows = ([4096, 16384] if is_gpu else [total]), [16], [total // 16]
    for length in lengths:
        yield "causal", Shape(max(1, total // length), length, *heads)
    for length in lengths[::2] if is_gpu and not is_quick else [total]:
        yield f"causal, width {other_width[2]}", Shape(max(1, total // length), length, *other_width)
    for count in counts:
        yield "packed", Shape(1, total, *heads, documents=count)
    for window in windows:
        yield "window", Shape(1, total, *heads, window=window)
    yield "softcap", Shape(1, total, *heads, softcap=50.0)
    yield "sinks", Shape(1, total, *heads, has_sinks=True)


def inputs_of(shape: Shape, generator: torch.Generator) -> Inputs:
    """q, k, v, an upstream gradient, and what the call names."""
    device = generator.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lead = (shape.tokens,) if shape.documents else (shape.batch, shape.tokens)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    heads = {"q": shape.heads, "k": shape.key_heads, "v": shape.key_heads}
    x: Inputs = {name: random(*lead, count, shape.width).requires_grad_() for name, count in heads.items()}
    x["d_out"] = random(*lead, shape.heads, shape.width)
    named: dict[str, Any] = {"window": shape.window, "softcap": shape.softcap}
    if shape.has_sinks:
        named["sinks_N"] = torch.randn(shape.heads, generator=generator, device=device)
    if shape.documents:
        named["cu_seqlens"], named["max_seqlen"] = boundaries(shape.tokens, shape.documents, device), max(shape.lengths)
    x["named"] = {name: value for name, value in named.items() if value is not None}
    return x


def _call(function: Function, x: Inputs) -> Tensor:
    return function(x["q"], x["k"], x["v"], **x["named"])


def forward(function: Function) -> Candidate:
    return Candidate(torch.no_grad()(partial(_call, function)))


def backward(function: Function) -> Candidate:
    def prepare(x: Inputs) -> tuple[Tensor, list[Tensor], Tensor]:
        leaves = {name: x[name].detach().requires_grad_() for name in "qkv"}
        return _call(function, {**x, **leaves}), list(leaves.values()), x["d_out"]

    return Candidate(gradients, prepare)


def last_tokens(shape: Shape, values: Tensor, count: int = CHECKED_TOKENS) -> Tensor:
    """[1, count, heads, H]: the last ones of the longest document, or of the last sequence; all of them if those are fewer."""
    tokens = shape.longest
    part = slice(max(tokens.start, tokens.stop - count), tokens.stop)
    return values[None, part] if shape.documents else values[-1:, part]


def reference(shape: Shape, which: str, x: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """The last tokens' output, or gradients: under a causal mask no later token adds to them."""
    length = shape.longest.stop - shape.longest.start
    q = last_tokens(shape, x["q"]).detach().to(dtype).requires_grad_()
    k, v = (last_tokens(shape, x[name], length).detach().to(dtype).requires_grad_() for name in "kv")
    named = {name: value for name, value in x["named"].items() if name not in ("cu_seqlens", "max_seqlen")}
    if "sinks_N" in named:
        named["sinks_N"] = named["sinks_N"].to(dtype)
    count = q.shape[1]
    out = attention_reference(q, k, v, query_offset=length - count, **named)
    if which == "forward":
        return [out.detach()]
    d_q, d_k, d_v = torch.autograd.grad(out, (q, k, v), last_tokens(shape, x["d_out"]).to(dtype))
    return [d_q, d_k[:, -count:], d_v[:, -count:]]


def candidates(shape: Shape, device: torch.device) -> tuple[dict[str, Function], dict[str, str]]:
    """(functions by name, why others are absent whatever the shape)."""
    name = "triton" if device.type == "cuda" else "torch"
    found: dict[str, Function] = {f"warpline {name}": partial(attention, backend=name)}
    missing = {}
    scores = 4 * shape.batch * shape.heads * shape.tokens**2
    if scores <= MAX_SCORE_BYTES[device.type]:
        found["eager"] = _eager
    for name, which in (("sdpa-math", SDPBackend.MATH), ("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION)):
        if which == SDPBackend.EFFICIENT_ATTENTION and device.type == "cpu":
            missing[name] = "torch has no such kernel for cpu"
        elif which != SDPBackend.MATH or scores <= MAX_SCORE_BYTES[device.type]:
            found[name] = partial(_sdpa, which=which)
    for name in ("sdpa-flash", "sdpa-cudnn", "flash-attn", "transformer-engine"):
        reason = TABLE[name].absent(device)
        if reason is None:
            found[name] = partial(attention, backend=name, deterministic=False)
        else:
            missing[name] = reason
    reason = absent("flash_attn.cute") if device.type == "cuda" else "runs on CUDA"
    if reason is None:
        found["flash-attn-4"] = _flash4
    else:
        missing["flash-attn-4"] = reason
    if device.type == "cuda":
        found["flex (compiled)"] = Flex(shape)
    else:
        missing["flex (compiled)"] = "its compiled backward runs on CUDA"
    return found, missing


def _eager(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int = 0, **named: Any) -> Tensor:
    """The full matrix of scores of every sequence."""
    if cu_seqlens is None:
        return attention_reference(q, k, v, **named)
    return attention_reference(q, k, v, cu_seqlens=cu_seqlens, **named)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, which: SDPBackend, **named: Any) -> Tensor:
    if named:
        raise ValueError(f"it has no {', '.join(named)}")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(which):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _flash4(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func  # type: ignore[import-not-found, unused-ignore]

    window, softcap, sinks = named.get("window"), named.get("softcap"), named.get("sinks_N")
    keywords: dict[str, Any] = {"causal": True, "window_size": (None, None) if window is None else (window - 1, 0)}
    keywords |= {"softcap": softcap or 0.0, "learnable_sink": None if sinks is None else sinks.to(q.dtype)}
    if "cu_seqlens" in named:
        bounds = {f"cu_seqlens_{side}": named["cu_seqlens"] for side in "qk"}
        bounds |= {f"max_seqlen_{side}": named["max_seqlen"] for side in "qk"}
        out = flash_attn_varlen_func(q, k, v, **bounds, **keywords)
    else:
        out = flash_attn_func(q, k, v, **keywords)
    return out[0] if isinstance(out, tuple) else out


class Flex:
    """torch's compiled block-sparse attention with the same mask; its block mask is made once, outside the measured time."""

    def __init__(self, shape: Shape):
        self.shape = shape
        self.block_mask: Any = None
        self.compiled: Function | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
        from torch.nn.attention.flex_attention import AuxRequest

        shape = self.shape
        if self.compiled is None:
            self._compile(q.device, named.get("cu_seqlens"))
        assert self.compiled is not None
        softcap, sinks_N = shape.softcap or 0.0, named.get("sinks_N")

        def cap(score: Tensor, *_: Tensor) -> Tensor:
            return softcap * torch.tanh(score / softcap)

        q, k, v = ((x[None] if shape.documents else x).transpose(1, 2) for x in (q, k, v))
        keywords: dict[str, Any] = {"score_mod": cap if softcap else None, "block_mask": self.block_mask, "enable_gqa": True}
        if sinks_N is None:
            out = self.compiled(q, k, v, **keywords)
        else:
            out, aux = self.compiled(q, k, v, **keywords | {"return_aux": AuxRequest(lse=True)})
            out = out * torch.sigmoid(aux.lse - sinks_N[:, None])[..., None].to(out.dtype)
        out = out.transpose(1, 2)
        return out[0] if shape.documents else out

    def _compile(self, device: torch.device, cu_seqlens: Tensor | None) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        shape = self.shape
        window = shape.window or shape.tokens
        positions = torch.arange(shape.tokens, device=device)
        document = positions * 0 if cu_seqlens is None else torch.searchsorted(cu_seqlens[1:], positions, right=True)

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (i - j < window) & (document[i] == document[j])

        self.block_mask = create_block_mask(mask, None, None, shape.tokens, shape.tokens, device=device.type)
        self.compiled = torch.compile(flex_attention, dynamic=False)


def cases(device: torch.device, is_quick: bool) -> Iterator[Case]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for operation, shape in shapes(device, is_quick):
        found, missing = candidates(shape, device)
        for which, make, products in (("forward", forward, 4), ("backward", backward, 10)):

            def part(result: Any, _: Inputs, shape: Shape = shape) -> list[Tensor]:
                return [last_tokens(shape, x) for x in ([result] if isinstance(result, Tensor) else result)]

            yield Case(
                f"{operation}, {which}", shape.sizes, dtype, partial(inputs_of, shape),
                {name: make(function) for name, function in found.items()}, partial(reference, shape, which), part,
                flops=float(products * shape.heads * shape.width * shape.pairs),
                bytes_moved=float(_bytes(shape, dtype, which)), tokens=shape.batch * shape.tokens, absent=missing,
            )  # fmt: skip


def _bytes(shape: Shape, dtype: torch.dtype, which: str) -> int:
    """Forward reads q, k, v and writes out; backward reads those, out and its gradient, and writes three gradients."""
    queries, keys = (shape.batch * shape.tokens * count * shape.width for count in (shape.heads, shape.key_heads))
    return (2 * queries + 2 * keys if which == "forward" else 4 * queries + 4 * keys) * dtype.itemsize
