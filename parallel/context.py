"""Context parallelism: the tokens of one packed row over ranks, with ring attention or Ulysses.

Axis: `context`, of n ranks. Sharded: T. The row is cut into 2n chunks of equal length, to a token; rank r holds chunks r and
2n − 1 − r (zigzag), so that causal work is balanced. Documents may cross every border, and no length divides anything.

| bytes, per layer and rank; b a number, t = T/n     | ring                                | Ulysses                    |
|----------------------------------------------------|-------------------------------------|----------------------------|
| forward                                            | (n−1)·t·K·(H+H')·b                  | (n−1)/n·t·(N+K')·(H+H')·b  |
| backward                                           | (n−1)·t·K·(H+H')·b + n·t·K·(H+H')·4 | (n−1)/n·t·(N+K')·(H+H')·b  |
| sums over sequences: all-reduce of B, once a row   | 2·(n−1)/n·B·4                       | 2·(n−1)/n·B·4              |

The ring sends K and V n − 1 times, and backwards again, with dK and dV in fp32 n times. Ulysses exchanges q, k, v and the
output by all-to-alls, and their gradients. K' is K, or lcm(K, n) where n does not divide K: key heads are repeated, and their
gradients summed. Ring partials and gradients are merged in fp32 (fp64 for fp64), sinks once, behind the merge. Beside its own,
a rank holds the keys and values of two ranks at most, those it computes with and the next, which arrive meanwhile; in a
backward their gradients too. Both are functions of this rank's tokens; the rest of the model needs positions alone.

**Source** Ring Attention, arXiv 2310.01889; zigzag: zhuzilin/ring-flash-attention; DeepSpeed-Ulysses, arXiv 2309.14509.
**Limits** The boundaries are host numbers: they plan which pairs of chunks see each other. One packed row, causal or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.attention import attention, attention_part_backward


class Pair(NamedTuple):
    """A chunk of queries and a chunk of keys that share a document.

    Both as slices of their rank's tokens, the boundaries of every document in each, where a document's first query stands
    among its keys there, and for each document that is in both the smallest and largest distance of a query from a key.
    """

    queries: slice
    keys: slice
    cu_seqlens: Tensor
    cu_seqlens_k: Tensor
    query_offset: Tensor
    distances: tuple[tuple[int, int], ...]

    def on(self, device: torch.device) -> Pair:
        bounds, bounds_k, offset = (x.to(device) for x in (self.cu_seqlens, self.cu_seqlens_k, self.query_offset))
        return self._replace(cu_seqlens=bounds, cu_seqlens_k=bounds_k, query_offset=offset)

    def is_seen(self, causal: bool, window: int | None) -> bool:
        """Whether any query sees any key under this rule."""
        reach = math.inf if window is None else window
        return any(most >= 0 if causal else most > -reach for least, most in self.distances if least < reach)


@dataclass(frozen=True)
class Zigzag:
    """How a packed row of `num_tokens`, its documents bounded by `bounds`, lies over `size` ranks: a pure function."""

    bounds: tuple[int, ...]
    num_tokens: int
    size: int

    def __post_init__(self) -> None:
        is_ordered = all(a <= b for a, b in pairwise(self.bounds))
        if not self.bounds or self.bounds[0] != 0 or not is_ordered or self.bounds[-1] > self.num_tokens or self.size < 1:
            received = f"bounds {list(self.bounds[:16])} of {self.num_tokens} tokens over {self.size} ranks"
            raise ValueError(f"received {received}; expected cumulative lengths from 0 to at most the tokens: pass cu_seqlens")

    def chunk(self, index: int) -> tuple[int, int]:
        """Tokens of the row in one of the 2·size chunks."""
        count = 2 * self.size
        return index * self.num_tokens // count, (index + 1) * self.num_tokens // count

    def chunks(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return self.chunk(rank), self.chunk(2 * self.size - 1 - rank)

    def tokens(self, rank: int) -> int:
        """How many tokens a rank holds."""
        return sum(stop - start for start, stop in self.chunks(rank))

    def index(self, rank: int) -> Tensor:
        """int64 [tokens(rank)]: where this rank's tokens stand in the row."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.chunks(rank)])

    def position(self, rank: int) -> Tensor:
        """int64 [tokens(rank)]: the position of each token in its document; tokens past the last boundary count on."""
        index_T, bounds = self.index(rank), torch.tensor(self.bounds)
        return index_T - bounds[torch.searchsorted(bounds, index_T, right=True) - 1]

    def pairs(self, rank: int, other: int) -> list[Pair]:
        """The chunks of `rank`'s queries and `other`'s keys that share a document."""
        found = []
        for queries, key_chunk in ((q, k) for q in _places(self.chunks(rank)) for k in _places(self.chunks(other))):
            (query_slice, (a, b)), (key_slice, (c, d)) = queries, key_chunk
            documents = [(start, stop) for start, stop in pairwise(self.bounds) if stop > min(a, c) and start < max(b, d)]
            parts = [(_inside(*document, a, b), _inside(*document, c, d)) for document in documents]
            both = [(q, k) for q, k in parts if q[1] > q[0] and k[1] > k[0]]
            if both:
                offsets = [q[0] - k[0] if q[1] > q[0] and k[1] > k[0] else 0 for q, k in parts]
                distances = tuple((q[0] - (k[1] - 1), q[1] - 1 - k[0]) for q, k in both)
                bounds, bounds_k = (_cumulated([stop - start for start, stop in side]) for side in zip(*parts, strict=True))
                offset = torch.tensor(offsets, dtype=torch.int32)
                found.append(Pair(query_slice, key_slice, bounds, bounds_k, offset, distances))
        return found


def _places(chunks: Sequence[tuple[int, int]]) -> list[tuple[slice, tuple[int, int]]]:
    """(where among the rank's tokens, where in the row) of each of its chunks."""
    first = chunks[0][1] - chunks[0][0]
    return [(slice(0, first), chunks[0]), (slice(first, first + chunks[1][1] - chunks[1][0]), chunks[1])]


def _inside(start: int, stop: int, low: int, high: int) -> tuple[int, int]:
    start = min(max(start, low), high)
    return start, max(start, min(stop, high))


def _cumulated(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@dataclass(frozen=True)
class ContextBatch:
    """One packed batch as this rank of a context group sees it; made once a batch, and shared by all layers."""

    layout: Zigzag
    rank: int
    group: dist.ProcessGroup | None
    device: torch.device
    kind: Literal["ring", "ulysses"] = "ring"
    plans: dict[int, list[Pair]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        bounds: Sequence[int],
        num_tokens: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
        kind: Literal["ring", "ulysses"] = "ring",
    ) -> ContextBatch:
        """`bounds` is cu_seqlens of the whole row, on the host; `group` None is one rank."""
        rank, size = (0, 1) if group is None else (group.rank(), group.size())
        return cls(Zigzag(tuple(bounds), num_tokens, size), rank, group, device, kind)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **rule: Any) -> Tensor:
        """Attention of this rank's queries to the whole row, by the batch's kind."""
        return {"ring": ring_attention, "ulysses": ulysses_attention}[self.kind](q, k, v, self, **rule)

    def local(self, x_T: Tensor) -> Tensor:
        """This rank's tokens of a row's [T, …], in the rank's order."""
        return x_T[self.layout.index(self.rank).to(x_T.device)]

    def position_T(self) -> Tensor:
        """int64 [this rank's tokens]: positions for the rotary embedding."""
        return self.layout.position(self.rank).to(self.device)

    @cached_property
    def order(self) -> Tensor:
        """int64 [T]: where in the row every rank's tokens stand, rank after rank."""
        return torch.cat([self.layout.index(rank) for rank in range(self.layout.size)]).to(self.device)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """The whole row's boundaries, as attention takes them."""
        return torch.tensor(self.layout.bounds, dtype=torch.int32).to(self.device)

    def pairs(self, other: int) -> list[Pair]:
        """This rank's queries with another's keys, boundaries on the device."""
        if other not in self.plans:
            self.plans[other] = [pair.on(self.device) for pair in self.layout.pairs(self.rank, other)]
        return self.plans[other]


# ---- Ring ----


class _Exchange:
    """Sends a tensor to the next rank of the ring while the previous one's arrives; `wait` gives that, and lets go of both."""

    def __init__(self, x: Tensor, size: int, batch: ContextBatch):
        self.tensors = [x.contiguous(), x.new_empty(size)]
        self.works: list[Any] = []
        next_rank, previous = ((batch.rank + step) % batch.layout.size for step in (1, -1))
        operations = [
            dist.P2POp(operation, tensor, group=batch.group, group_peer=peer)
            for operation, tensor, peer in zip((dist.isend, dist.irecv), self.tensors, (next_rank, previous), strict=True)
            if tensor.numel()
        ]
        if operations:
            self.works = dist.batch_isend_irecv(operations)

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        self.works, (_, received), self.tensors = [], self.tensors, []
        return received


class _Sizes(NamedTuple):
    """Of keys and values: heads, and the width of each."""

    heads: int
    key_width: int
    value_width: int

    @property
    def per_token(self) -> int:
        return self.heads * (self.key_width + self.value_width)

    def packed(self, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([k.reshape(-1), v.reshape(-1)])

    def unpacked(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        num_tokens = flat.numel() // self.per_token
        keys, values = flat.split([num_tokens * self.heads * self.key_width, num_tokens * self.heads * self.value_width])
        return keys.view(num_tokens, self.heads, self.key_width), values.view(num_tokens, self.heads, self.value_width)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Adds a part's [T, N, H'] and [N, T] to the whole's, in place."""
    whole = torch.logaddexp(lse, part_lse)
    weights = (torch.where(whole == -torch.inf, 0.0, torch.exp(x - whole)).t()[..., None] for x in (lse, part_lse))
    out.mul_(next(weights)).add_(part * next(weights))
    lse.copy_(whole)


class _RingAttention(torch.autograd.Function):
    """Saves this rank's q, k, v, and the merged output and log-sum-exp in the statistics' dtype."""

    @staticmethod
    def forward(ctx, q, k, v, sinks_N, batch: ContextBatch, rule: dict[str, Any]):
        causal, window = rule["causal"], rule["window"]
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        out, lse = q.new_zeros(*q.shape[:2], v.shape[2], dtype=dtype), q.new_full(q.shape[1::-1], -torch.inf, dtype=dtype)
        sizes, size = _Sizes(k.shape[1], k.shape[2], v.shape[2]), batch.layout.size
        flat = sizes.packed(k, v)
        for step in range(size):
            source = (batch.rank - step) % size
            coming = None
            if step + 1 < size:
                coming = _Exchange(flat, batch.layout.tokens((source - 1) % size) * sizes.per_token, batch)
            keys, values = sizes.unpacked(flat)
            for pair in batch.pairs(source):
                if pair.is_seen(causal, window):
                    part, part_lse = attention(
                        q[pair.queries], keys[pair.keys], values[pair.keys], cu_seqlens=pair.cu_seqlens,
                        cu_seqlens_k=pair.cu_seqlens_k, query_offset=pair.query_offset, return_lse=True, out_dtype=dtype,
                        **rule,
                    )  # fmt: skip
                    _merge(out[pair.queries], lse[:, pair.queries], part, part_lse)
            flat = flat if coming is None else coming.wait()
        if sinks_N is not None:
            # Tokens that no document holds have a log-sum-exp of −inf, sinks or not.
            sink_NT = torch.where(lse == -torch.inf, -torch.inf, sinks_N.to(dtype)[:, None].expand_as(lse))
            _merge(out, lse, torch.zeros_like(out), sink_NT)
        ctx.save_for_backward(q, k, v, sinks_N, out, lse)
        ctx.batch, ctx.rule = batch, rule
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, sinks_N, out, lse = ctx.saved_tensors
        batch, rule = ctx.batch, ctx.rule
        sizes, size = _Sizes(k.shape[1], k.shape[2], v.shape[2]), batch.layout.size
        d_q, flat = torch.zeros_like(q, dtype=out.dtype), sizes.packed(k, v)
        d_coming = None
        for step in range(size):
            source = (batch.rank - step) % size
            following = batch.layout.tokens((source - 1) % size) * sizes.per_token
            coming = _Exchange(flat, following, batch) if step + 1 < size else None
            keys, values = sizes.unpacked(flat)
            d_flat = flat.new_zeros(flat.shape, dtype=out.dtype)
            d_keys, d_values = sizes.unpacked(d_flat)
            for pair in batch.pairs(source):
                if pair.is_seen(rule["causal"], rule["window"]):
                    parts = attention_part_backward(
                        q[pair.queries], keys[pair.keys], values[pair.keys], out[pair.queries],
                        lse[:, pair.queries].contiguous(), d_out[pair.queries], cu_seqlens=pair.cu_seqlens,
                        cu_seqlens_k=pair.cu_seqlens_k, query_offset=pair.query_offset, **rule,
                    )  # fmt: skip
                    for total, part in zip((d_q[pair.queries], d_keys[pair.keys], d_values[pair.keys]), parts, strict=True):
                        total += part
            # What the ranks before this one added to these keys' gradients has come meanwhile; all of it goes on.
            if d_coming is not None:
                d_flat += d_coming.wait()
            if size > 1:
                d_coming = _Exchange(d_flat, following, batch)
            flat = flat if coming is None else coming.wait()
        d_k, d_v = sizes.unpacked(d_flat if d_coming is None else d_coming.wait())
        d_sinks = None
        if sinks_N is not None:
            share_NT = torch.where(lse == -torch.inf, 0.0, torch.exp(sinks_N.to(lse.dtype)[:, None] - lse))
            d_sinks = -(share_NT * (d_out.to(out.dtype) * out).sum(-1).t()).sum(1).to(sinks_N.dtype)
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), d_sinks, None, None


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, batch: ContextBatch, *, causal: bool = True, window: int | None = None,
    softcap: float | None = None, sinks_N: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """`attention` of a packed row whose tokens lie over the ranks of the batch's group.

    q [t, N, H], k [t, K, H], v [t, K, H'] of this rank's tokens, in its order, to the output [t, N, H']. The gradient of
    `sinks_N` is the share of this rank's tokens.
    """
    rule = {"causal": causal, "window": window, "softcap": softcap, "scale": q.shape[-1] ** -0.5 if scale is None else scale}
    _check(q, k, v, batch)
    return _RingAttention.apply(q, k, v, sinks_N, batch, rule)


def _check(q: Tensor, k: Tensor, v: Tensor, batch: ContextBatch) -> None:
    expected = batch.layout.tokens(batch.rank)
    if not q.dim() == k.dim() == v.dim() == 3 or not len(q) == len(k) == len(v) == expected:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"received {shapes}; expected {expected} tokens of rank {batch.rank} each: split with batch.local")


# ---- Ulysses ----


class _AllToAll(torch.autograd.Function):
    """[t, N, H] of this rank's tokens to [T, N/n, H] of this rank's heads, tokens in the row's order; or back."""

    @staticmethod
    def forward(ctx, x, batch: ContextBatch, to_heads: bool):
        ctx.batch, ctx.to_heads = batch, to_heads
        return _heads_of(x, batch) if to_heads else _tokens_of(x, batch)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        return (_tokens_of if ctx.to_heads else _heads_of)(d_y, ctx.batch), None, None


def _heads_of(x: Tensor, batch: ContextBatch) -> Tensor:
    layout, size = batch.layout, batch.layout.size
    num_tokens, num_heads, width = x.shape
    sent = x.view(num_tokens, size, num_heads // size, width).transpose(0, 1).contiguous()
    counts = [layout.tokens(rank) for rank in range(size)]
    received = x.new_empty(sum(counts), num_heads // size, width)
    dist.all_to_all_single(received, sent.view(-1, *received.shape[1:]), counts, [num_tokens] * size, group=batch.group)
    row = torch.empty_like(received)
    row[batch.order] = received
    return row


def _tokens_of(y: Tensor, batch: ContextBatch) -> Tensor:
    layout, size = batch.layout, batch.layout.size
    counts, num_tokens = [layout.tokens(rank) for rank in range(size)], layout.tokens(batch.rank)
    received = y.new_empty(size, num_tokens, *y.shape[1:])
    sent = y[batch.order]
    dist.all_to_all_single(received.view(-1, *y.shape[1:]), sent, [num_tokens] * size, counts, group=batch.group)
    return received.transpose(0, 1).flatten(1, 2)


def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, batch: ContextBatch, *, causal: bool = True, window: int | None = None,
    softcap: float | None = None, sinks_N: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """As `ring_attention`, by exchanging tokens for heads: every rank attends over the whole row with N/n of the heads. The
    gradient of `sinks_N` is that of this rank's heads, and 0 for the others."""
    _check(q, k, v, batch)
    num_heads, num_key_heads, size = q.shape[1], k.shape[1], batch.layout.size
    if num_heads % size:
        raise ValueError(f"received {num_heads} query heads over {size} ranks; expected a multiple: use the ring")
    repeats = math.lcm(num_key_heads, size) // num_key_heads
    k, v = (x if repeats == 1 else x.repeat_interleave(repeats, 1) for x in (k, v))
    if size > 1:
        q, k, v = (_AllToAll.apply(x.contiguous(), batch, True) for x in (q, k, v))
    heads = slice(batch.rank * num_heads // size, (batch.rank + 1) * num_heads // size)
    longest = max((b - a for a, b in pairwise(batch.layout.bounds)), default=0)
    out = attention(
        q, k, v, causal=causal, cu_seqlens=batch.cu_seqlens, max_seqlen=longest, window=window, softcap=softcap, scale=scale,
        sinks_N=None if sinks_N is None else sinks_N[heads],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out if size == 1 else _AllToAll.apply(out.contiguous(), batch, False)
