"""Attention: every implementation that serves a shape, time against the attended area, and what the features cost.

Run     python -m warpline.bench.attention [--quick] [--out DIR]      (PYTHONPATH=src from a checkout)
Writes  DIR/<machine>/attention.json (default bench/results)
Expect  a row per candidate, operation and shape; docs is the number of documents that the tokens are packed in, 0 for a dense
        batch. TFLOP/s count the pairs that a mask leaves, 4·N·H forward and 14·N·H with the backward, whatever a candidate
        computes: ours makes the scores three times for a backward without atomics, 18·N·H. The error is that of the first
        256 tokens' output and gradient of q against fp64, beside the eager reference's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.attention import attention, attention_reference
from ..kernels.attention_backend import TABLE
from .measure import Report, Row, begin, interleaved, peak_mib, relative_error

CHECKED_TOKENS = 256
Function = Callable[..., Any]


class Shape(NamedTuple):
    """B sequences of S tokens, or with `documents` S tokens packed in that many of equal length."""

    batch: int
    tokens: int
    heads: int
    key_heads: int
    width: int
    documents: int = 0
    options: dict[str, Any] = {}

    @property
    def sizes(self) -> dict[str, int]:
        sizes = {"B": self.batch, "S": self.tokens, "N": self.heads, "K": self.key_heads, "H": self.width}
        return {**sizes, "docs": self.documents, **({"window": self.options["window"]} if "window" in self.options else {})}

    @property
    def pairs(self) -> int:
        """Query-key pairs of one head that the mask leaves."""
        length = self.tokens // (self.documents or 1)
        window = min(self.options.get("window", length), length)
        per_sequence = window * (window + 1) // 2 + (length - window) * window
        return self.batch * max(1, self.documents) * per_sequence


def shapes(is_gpu: bool, is_quick: bool) -> list[tuple[str, Shape]]:
    """(what the rows are about, shape): 16k tokens in all, as the targets are stated; a laptop's, on the CPU."""
    heads = (16, 4, 128) if is_gpu else (8, 2, 64)
    total = 16384 if is_gpu else 1024 if is_quick else 4096
    lengths = (4096, 8192, 16384) if is_gpu else (total,)
    found = [("causal", Shape(total // length, length, *heads)) for length in (lengths[-1:] if is_quick else lengths)]
    counts = (1, 16, 128) if is_quick else (1, 4, 16, 64, 128)
    found += [("packed", Shape(1, total, *heads, count)) for count in counts]
    windows = (total // 16,) if is_quick else (total // 64, total // 16, total // 4)
    found += [("window", Shape(1, total, *heads, 0, {"window": window})) for window in windows]
    found += [
        ("softcap", Shape(1, total, *heads, 0, {"softcap": 50.0})),
        ("sinks", Shape(1, total, *heads, 0, {"sinks": True})),
    ]
    if not is_quick:
        widths = ((64, 16), (96, 16), (256, 8)) if is_gpu else ((128, 4),)
        found += [("causal", Shape(1, total, count, max(1, count // 4), width)) for width, count in widths]
    return found


class Problem:
    """Random inputs and an upstream gradient for one shape."""

    def __init__(self, shape: Shape, device: torch.device):
        self.shape, self.device = shape, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        lead = (shape.tokens,) if shape.documents else (shape.batch, shape.tokens)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device).to(self.dtype)

        heads = (shape.heads, shape.key_heads, shape.key_heads)
        self.qkv = [random(*lead, count, shape.width).requires_grad_() for count in heads]
        self.d_out = random(*lead, shape.heads, shape.width)
        options = dict(shape.options)
        self.keywords: dict[str, Any] = options
        if options.pop("sinks", False):
            options["sinks_N"] = torch.randn(shape.heads, generator=generator, device=device)
        if shape.documents:
            length = shape.tokens // shape.documents
            bounds = torch.arange(0, shape.tokens + 1, length, device=device, dtype=torch.int32)
            options |= {"cu_seqlens": bounds, "max_seqlen": length}

    def forward(self, function: Function) -> Tensor:
        with torch.no_grad():
            return function(*self.qkv, **self.keywords)

    def both(self, function: Function) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*self.qkv, **self.keywords), self.qkv, self.d_out)

    def candidates(self) -> tuple[dict[str, Function], list[str]]:
        """(functions by name, why the others are absent)."""
        name = "triton" if self.device.type == "cuda" else "torch"
        found: dict[str, Function] = {f"warpline {name}": partial(attention, backend=name)}
        missing = []
        for name in ("sdpa-cudnn", "sdpa-flash", "flash-attn", "transformer-engine"):
            function = partial(attention, backend=name, deterministic=False)
            reason = TABLE[name].absent(self.device)
            try:
                if reason is None:
                    self.forward(function)
                    found[name] = function
            except (ValueError, RuntimeError) as error:  # it cannot do this shape, or has no engine for it
                reason = str(error).splitlines()[0]
            if reason is not None:
                missing.append(f"{name}: {reason}")
        if self.device.type == "cuda":
            found["flex (compiled)"] = self.flex()
        return found, missing

    def flex(self) -> Function:
        """torch's compiled block-sparse attention with the same mask; its block mask is made outside the measured time."""
        from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

        shape = self.shape
        softcap: float = self.keywords.get("softcap") or 0.0
        length = shape.tokens // (shape.documents or 1)
        window, sinks_N = self.keywords.get("window", shape.tokens), self.keywords.get("sinks_N")

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (i - j < window) & (i // length == j // length)

        def cap(score: Tensor, *_: Tensor) -> Tensor:
            return softcap * torch.tanh(score / softcap)

        block_mask = create_block_mask(mask, None, None, shape.tokens, shape.tokens, device=self.device.type)
        compiled = torch.compile(flex_attention, dynamic=False)

        def function(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
            q, k, v = ((x[None] if shape.documents else x).transpose(1, 2) for x in (q, k, v))
            keywords: dict[str, Any] = {"score_mod": cap if softcap else None, "block_mask": block_mask, "enable_gqa": True}
            if sinks_N is None:
                out = compiled(q, k, v, **keywords)
            else:
                out, aux = compiled(q, k, v, **keywords | {"return_aux": AuxRequest(lse=True)})
                out = out * torch.sigmoid(aux.lse - sinks_N[:, None])[..., None].to(out.dtype)
            out = out.transpose(1, 2)
            return out[0] if shape.documents else out

        return function


def errors(p: Problem, function: Function) -> tuple[float, float]:
    """(its error, the eager reference's) of the first tokens' output and d_q: the mask is causal, so they need no others."""
    count = min(CHECKED_TOKENS, p.shape.tokens // (p.shape.documents or 1))
    keywords = {name: value for name, value in p.keywords.items() if name not in ("cu_seqlens", "max_seqlen")}

    def of(chosen: Function, dtype: torch.dtype) -> list[Tensor]:
        qkv = [(x[None, :count] if p.shape.documents else x[:1, :count]).detach().to(dtype).requires_grad_() for x in p.qkv]
        out = chosen(*qkv, **{name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in keywords.items()})
        return [out, torch.autograd.grad(out.sum(), qkv[0])[0]]

    truth, eager = of(attention_reference, torch.float64), of(attention_reference, p.dtype)
    ours = of(function, p.dtype)
    pairs = zip((ours, eager), (truth, truth), strict=True)
    mine, plain = (max(relative_error(a, t) for a, t in zip(*pair, strict=True)) for pair in pairs)
    return mine, plain


def run(operation: str, shape: Shape, device: torch.device, report: Report, seconds: float) -> None:
    p = Problem(shape, device)
    candidates, missing = p.candidates()
    for reason in missing:
        print(f"absent: {reason}")
    checked = next(iter(candidates))
    error, eager_error = errors(p, candidates[checked])
    dtype = str(p.dtype).removeprefix("torch.")
    for suffix, method, products in (("forward", p.forward, 4), ("forward + backward", p.both, 14)):
        calls = {name: partial(method, function) for name, function in candidates.items()}
        for name, (median, spread) in interleaved(calls, device, seconds).items():
            flops = products * shape.heads * shape.width * shape.pairs
            report.add(Row(
                f"{operation}, {suffix}", name, shape.sizes, dtype, median, spread, tflops=flops / median / 1e9,
                peak_mib=peak_mib(calls[name], device), error=error if name == checked else None,
                eager_error=eager_error if name == checked else None,
            ))  # fmt: skip


def main() -> None:
    device, report, is_quick = begin("attention", __doc__, "fewer shapes, a third of a second a candidate")
    for operation, shape in shapes(device.type == "cuda", is_quick):
        run(operation, shape, device, report, 0.3 if is_quick else 1.5)


if __name__ == "__main__":
    main()
