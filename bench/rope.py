"""rope alone and with the norm of queries and keys before it, in bytes a second beside a plain copy.

Run     python -m warpline.bench.rope [--quick] [--out DIR]      (PYTHONPATH=src from a checkout)
Writes  DIR/<machine>/rope.json (default bench/results)
Expect  a row per candidate, direction and shape of T tokens, N query heads, K key heads of H channels. Bytes are those the
        operation needs: forward 2 elements an element of q and k, backward 2, and 3 with the norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..kernels.rope import rope, rope_reference, rope_tables
from .measure import absent
from .streaming import Streaming, run


def shapes(is_gpu: bool, is_quick: bool) -> list[tuple[int, int, int, int]]:
    if not is_gpu:
        return [(2048, 8, 2, 64)] if is_quick else [(1024, 8, 2, 64), (4096, 16, 4, 64)]
    return [(2048, 32, 8, 128), (16384, 32, 8, 128)] + ([] if is_quick else [(16384, 64, 8, 128), (65536, 32, 8, 128)])


def problems(tokens: int, heads: int, key_heads: int, width: int, device: torch.device) -> list[Streaming]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    sizes = ((tokens, heads, width), (tokens, key_heads, width), (width,), (width,))
    q, k, q_weight, k_weight = (torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes)
    tables = rope_tables(torch.arange(tokens, device=device), width, 1e6)

    def plain(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda q, k: function(q, k, *tables)

    def normed(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda q, k, q_weight, k_weight: function(q, k, *tables, q_norm_weight=q_weight, k_norm_weight=k_weight)

    candidates: dict[str, Callable[..., Any]] = {
        f"warpline {'triton' if device.type == 'cuda' else 'torch'}": rope,
        "eager": rope_reference,
    }
    if device.type == "cuda":
        candidates["torch.compile"] = torch.compile(rope_reference, dynamic=False)
    turned = {name: plain(function) for name, function in candidates.items()}
    reason = absent("liger_kernel") if device.type == "cuda" else "liger_kernel runs on CUDA"
    if reason is None:
        turned["liger"] = liger(*tables)
    else:
        print(f"absent: {reason}")
    size, shape = (q.numel() + k.numel()) * q.element_size(), {"T": tokens, "N": heads, "K": key_heads, "H": width}
    return [
        Streaming("rope", shape, [q, k], turned, plain(rope_reference), 2 * size, 2 * size),
        Streaming(
            "norm + rope", shape, [q, k, q_weight, k_weight], {name: normed(f) for name, f in candidates.items()},
            normed(rope_reference), 2 * size, 3 * size,
        ),
    ]  # fmt: skip


def liger(cos: torch.Tensor, sin: torch.Tensor) -> Callable[..., Any]:
    """Takes [B, heads, S, H] and full-width tables, and writes over its inputs: it gets copies, as a user must make them."""
    from liger_kernel.ops.rope import LigerRopeFunction

    wide = [torch.cat([table, table], -1)[None] for table in (cos, sin)]

    def call(q: torch.Tensor, k: torch.Tensor) -> Any:
        turned = LigerRopeFunction.apply(*(x[None].transpose(1, 2).clone() for x in (q, k)), *wide)
        return tuple(x.transpose(1, 2)[0] for x in turned)

    return call


if __name__ == "__main__":
    run("rope", __doc__, shapes, problems)
