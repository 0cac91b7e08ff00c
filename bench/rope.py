"""rope alone and with the norm of queries and keys before it, in bytes a second beside a plain copy.

Run     warpline bench rope [--quick] [--out DIR]
Expect  a row per candidate, direction and shape of T tokens, N query heads, K key heads of H channels. Bytes are those the
        operation needs: forward 2 elements an element of q and k, backward 2, and 3 with the norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.rope import rope, rope_reference, rope_tables
from .measure import Case
from .peers import Function, add_peers, on_cuda
from .streaming import Streaming, cases_of


def shapes(device: torch.device, is_quick: bool) -> list[tuple[int, int, int, int]]:
    if device.type == "cpu":
        return [(2048, 8, 2, 64)] if is_quick else [(1024, 8, 2, 64), (4096, 16, 4, 64)]
    if is_quick:
        return [(16384, 32, 8, 128)]
    return [(2048, 32, 8, 128), (16384, 32, 8, 128), (65536, 32, 8, 128), (16384, 64, 8, 128)]


def cases(device: torch.device, is_quick: bool) -> Iterator[Case]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for tokens, heads, key_heads, width in shapes(device, is_quick):
        tables = rope_tables(torch.arange(tokens, device=device), width, 1e6)
        q, k, weight = (tokens, heads, width), (tokens, key_heads, width), (width,)
        count = tokens * (heads + key_heads) * width
        size = count * dtype.itemsize
        shape = {"T": tokens, "N": heads, "K": key_heads, "H": width}
        functions: dict[str, Function] = {f"warpline {'triton' if device.type == 'cuda' else 'torch'}": rope}
        functions |= {"eager": rope_reference, "torch.compile": torch.compile(rope_reference, dynamic=False)}
        turned = {name: plain(function, *tables) for name, function in functions.items()}
        missing = add_peers(turned, {"liger": (on_cuda("liger_kernel", device), partial(liger, *tables))})
        reference = plain(rope_reference, *tables)
        work = (2 * size, 2 * size, 3 * count, 3 * count)
        yield from cases_of(Streaming("rope", shape, dtype, (q, k), turned, reference, *work, missing))
        both = {name: normed(function, *tables) for name, function in functions.items()}
        work = (2 * size, 3 * size, 7 * count, 13 * count)
        sizes, reference = (q, k, weight, weight), normed(rope_reference, *tables)
        yield from cases_of(Streaming("norm + rope", shape, dtype, sizes, both, reference, *work, {}))


def plain(function: Function, cos: Tensor, sin: Tensor) -> Function:
    return lambda q, k: function(q, k, cos, sin)


def normed(function: Function, cos: Tensor, sin: Tensor) -> Function:
    return lambda q, k, q_weight, k_weight: function(q, k, cos, sin, q_norm_weight=q_weight, k_norm_weight=k_weight)


def liger(cos: Tensor, sin: Tensor) -> Function:
    """Takes [B, heads, S, H] and full-width tables, and writes over its inputs: it gets copies, as a user must make them."""
    from liger_kernel.ops.rope import LigerRopeFunction

    wide = [torch.cat([table, table], -1)[None] for table in (cos, sin)]

    def call(q: Tensor, k: Tensor) -> Any:
        turned = LigerRopeFunction.apply(*(x[None].transpose(1, 2).clone() for x in (q, k)), *wide)
        return tuple(x.transpose(1, 2)[0] for x in turned)

    return call
