"""Attention in Triton, for every feature of `attention`: the forward, what the backward shares with it, and the launches.

**Math** and **Shapes** as in `attention`. Forward: a program owns BM queries of one head and walks over the key tiles that any
  of them sees, with the running maximum m and sum l of online softmax in powers of two; a sink starts them (m = sink,
  l = 1). Backward: delta = do·o − dlse per query; a program owns BN keys of one key head and walks over the queries of its
  whole group of query heads that see them (dk, dv); a third kernel owns queries again (dq). Nothing is added
  atomically: equal inputs give equal bits, at the price of making the scores twice, 7 products instead of 5.
**Dtypes** fp32, bf16, fp16 in; products accumulate in fp32 (fp32 inputs: full precision, no tensor cores); probabilities are
  rounded to v's dtype before their product, score gradients to q's.
**Traffic** forward 2·(H + H')·pairs FLOPs a head; backward 2·(4H + 3H')·pairs. Tiles outside a document or window are never
  visited: a row of walks is planned per document (`plan`), on the device, without reading it.
**Source** FlashAttention-2, arXiv 2307.08691; the order of a tile's keys as in arXiv 2205.14135.
**Limits** Head widths are padded to a power of two (80 and 96 to 128, 192 to 256). Tokens past the last boundary are a last
  document of their own, whose outputs and gradients are zero. Unmeasured on a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .triton_jit import constant, jit, tanh, tl, triton

_LOG2E = constant(1.4426950408889634)
_LN2 = constant(0.6931471805599453)


class Tile(NamedTuple):
    """Queries and keys of a tile, warps, and stages of the compiler's software pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


# By padded head width, for 16-bit inputs. Chosen by compiling, not by measuring: no forward spills on sm_90, and every tile
# fits in the 163 KiB of shared memory of sm_80. tests/kernels/resources.json has what each becomes.
FORWARD = {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)}
# fp32 products are made without tensor cores, in registers: larger tiles spill by kilobytes.
WIDE = {64: Tile(32, 16, 4, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)}


@jit
def _place(
    plan, cu, tile, length, num_documents, HAS_CU: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """(document, first row, rows, tile within the document) of a walk; documents past the last one are `num_documents` (the
    tokens behind the last boundary) and more (nothing). The last tile of a document comes first: it sees most keys."""
    if HAS_CU:
        document = tl.load(plan + 2 * tile)
        index = tl.load(plan + 2 * tile + 1)
        start = tl.load(cu + tl.minimum(document, num_documents))
        stop = tl.load(cu + tl.minimum(document + 1, num_documents))
        stop = tl.where(document == num_documents, length, stop)
        rows = stop - start
    else:
        document = tile % num_documents
        index = tl.cdiv(length, TILE) - 1 - tile // num_documents
        start = document * 0
        rows = length
    return document, start, rows, index


@jit
def _offset_of(offsets, offset, document, HAS_OFFSETS: tl.constexpr):
    shift = offset
    if HAS_OFFSETS:
        shift = tl.load(offsets + document)
    return shift


@jit
def _sees(query, key, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether a query's position sees a key's; blocks that broadcast."""
    distance = query - key
    seen = distance > -(2**30)
    if CAUSAL:
        seen = distance >= 0
    if WINDOW:
        seen = seen & (distance < window) & (distance > -window)
    return seen


@jit
def _scores(product, scale, softcap, HAS_CAP: tl.constexpr):
    """(scores times log2 e, tanh of the softcap or the product itself)."""
    t = product
    if HAS_CAP:
        t = tanh(product * (scale / softcap))
        scores = t * (softcap * _LOG2E)
    else:
        scores = product * (scale * _LOG2E)
    return scores, t


@jit
def _load_rows(base, rows, stride, columns, limit, WIDTH: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr):
    """[rows, PADDED] of a matrix; rows at or past `limit` are zero where MASKED, columns past WIDTH always."""
    pointers = base + rows[:, None].to(tl.int64) * stride + columns[None, :]
    if MASKED:
        if PADDED > WIDTH:
            block = tl.load(pointers, mask=(rows < limit)[:, None] & (columns < WIDTH)[None, :], other=0.0)
        else:
            block = tl.load(pointers, mask=(rows < limit)[:, None], other=0.0)
    elif PADDED > WIDTH:
        block = tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        block = tl.load(pointers)
    return block


@jit
def _key_range(first, last, num_keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BN: tl.constexpr):
    """For queries at positions first … last: (begin, whole_begin, whole_end, end) of the keys any of them sees, multiples of BN
    but for `end`; between whole_begin and whole_end every query sees every key."""
    begin, end = num_keys * 0, num_keys
    whole_begin, whole_end = begin, num_keys
    if CAUSAL:
        end = tl.minimum(end, last + 1)
        whole_end = tl.minimum(whole_end, first + 1)
    if WINDOW:
        begin = tl.maximum(begin, first - window + 1)
        whole_begin = tl.maximum(whole_begin, last - window + 1)
        end = tl.minimum(end, last + window)
        whole_end = tl.minimum(whole_end, first + window)
    end = tl.maximum(end, 0)
    begin = begin // BN * BN
    whole_begin = tl.cdiv(tl.maximum(whole_begin, 0), BN) * BN
    whole_end = tl.maximum(whole_end, 0) // BN * BN
    whole_begin = tl.maximum(begin, whole_begin)
    is_whole = whole_end > whole_begin
    # Without a whole part everything is masked, in the first of the three loops.
    whole_begin = tl.where(is_whole, whole_begin, end)
    whole_end = tl.where(is_whole, whole_end, end)
    return begin, whole_begin, whole_end, end


@jit
def _forward_range(
    acc, m, l, q, query, k, v, k_stride, v_stride, begin, end, num_keys, scale, softcap, window,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr, HV: tl.constexpr, HVP: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in range(begin, end, BN):
        key = start + tl.arange(0, BN)
        k_block = _load_rows(k, key, k_stride, tl.arange(0, HP), num_keys, H, HP, MASKED)
        product = tl.dot(q, tl.trans(k_block), input_precision=PRECISION)
        scores, _ = _scores(product, scale, softcap, HAS_CAP)
        if MASKED:
            seen = _sees(query[:, None], key[None, :], window, CAUSAL, WINDOW) & (key < num_keys)[None, :]
            scores = tl.where(seen, scores, -float("inf"))
        new_m = tl.maximum(m, tl.max(scores, 1))
        shift = new_m
        if MASKED:
            shift = tl.where(new_m == -float("inf"), 0.0, new_m)
        p = tl.exp2(scores - shift[:, None])
        factor = tl.exp2(m - shift)
        l = l * factor + tl.sum(p, 1)
        v_block = _load_rows(v, key, v_stride, tl.arange(0, HVP), num_keys, HV, HVP, MASKED)
        acc = acc * factor[:, None]
        acc = tl.dot(p.to(v_block.dtype), v_block, acc, input_precision=PRECISION)
        m = new_m
    return acc, m, l


@jit
def forward_kernel(
    q, q_stride_b, q_stride_t, q_stride_n, k, k_stride_b, k_stride_t, k_stride_n, v, v_stride_b, v_stride_t, v_stride_n,
    out, out_stride_b, out_stride_t, out_stride_n, lse, lse_stride_b, lse_stride_n, sinks,
    plan, cu_q, cu_k, offsets, offset, num_queries, num_keys, num_documents, num_heads, group_size, scale, softcap, window,
    HAS_CU: tl.constexpr, HAS_OFFSETS: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_CAP: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, HV: tl.constexpr, HVP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of BM queries of one head."""
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    document, start, rows, index = _place(plan, cu_q, tl.program_id(0) // num_heads, num_queries, num_documents, HAS_CU, BM)
    row = index * BM + tl.arange(0, BM)
    columns = tl.arange(0, HVP)
    batch = document
    if HAS_CU:
        batch = document * 0
    out += batch.to(tl.int64) * out_stride_b + head * out_stride_n + start.to(tl.int64) * out_stride_t
    lse += batch.to(tl.int64) * lse_stride_b + head * lse_stride_n + start
    out_pointers = out + row[:, None].to(tl.int64) * out_stride_t + columns[None, :]
    out_mask = (row < rows)[:, None] & (columns < HV)[None, :]
    if document < num_documents:
        key_start, keys = start, num_keys
        if HAS_CU:
            key_start = tl.load(cu_k + document)
            keys = tl.load(cu_k + document + 1) - key_start
        shift = _offset_of(offsets, offset, document, HAS_OFFSETS)
        q += batch.to(tl.int64) * q_stride_b + head * q_stride_n + start.to(tl.int64) * q_stride_t
        kv_head = head // group_size
        k += batch.to(tl.int64) * k_stride_b + kv_head * k_stride_n + key_start.to(tl.int64) * k_stride_t
        v += batch.to(tl.int64) * v_stride_b + kv_head * v_stride_n + key_start.to(tl.int64) * v_stride_t
        q_block = _load_rows(q, row, q_stride_t, tl.arange(0, HP), rows, H, HP, True)
        query = row + shift
        last = tl.minimum(index * BM + BM, rows) - 1 + shift
        begin, whole_begin, whole_end, end = _key_range(index * BM + shift, last, keys, window, CAUSAL, WINDOW, BN)
        m = tl.full([BM], -float("inf"), tl.float32)
        l = tl.zeros([BM], tl.float32)
        if HAS_SINKS:
            m = tl.zeros([BM], tl.float32) + tl.load(sinks + head).to(tl.float32) * _LOG2E
            l = tl.where(m == -float("inf"), 0.0, 1.0)
        acc = tl.zeros([BM, HVP], tl.float32)
        acc, m, l = _forward_range(
            acc, m, l, q_block, query, k, v, k_stride_t, v_stride_t, begin, whole_begin, keys, scale, softcap, window,
            True, CAUSAL, WINDOW, HAS_CAP, H, HP, HV, HVP, BN, PRECISION,
        )  # fmt: skip
        acc, m, l = _forward_range(
            acc, m, l, q_block, query, k, v, k_stride_t, v_stride_t, whole_begin, whole_end, keys, scale, softcap, window,
            False, CAUSAL, WINDOW, HAS_CAP, H, HP, HV, HVP, BN, PRECISION,
        )  # fmt: skip
        acc, m, l = _forward_range(
            acc, m, l, q_block, query, k, v, k_stride_t, v_stride_t, whole_end, end, keys, scale, softcap, window,
            True, CAUSAL, WINDOW, HAS_CAP, H, HP, HV, HVP, BN, PRECISION,
        )  # fmt: skip
        is_empty = l == 0.0
        acc = acc / tl.where(is_empty, 1.0, l)[:, None]
        log_sum = tl.where(is_empty, -float("inf"), m * _LN2 + tl.log(tl.where(is_empty, 1.0, l)))
        tl.store(out_pointers, acc.to(out.dtype.element_ty), mask=out_mask)
        tl.store(lse + row, log_sum, mask=row < rows)
    elif document == num_documents:
        tl.store(out_pointers, tl.zeros([BM, HVP], out.dtype.element_ty), mask=out_mask)
        tl.store(lse + row, tl.full([BM], -float("inf"), tl.float32), mask=row < rows)


# ---- The host's side ----


class Call(NamedTuple):
    """The options of one call. `offset` is an int, or int32 [num_documents]; `cu_q` and `cu_k` are None for dense batches."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    cu_q: Tensor | None
    cu_k: Tensor | None
    offset: int | Tensor


def plan(cu_seqlens: Tensor, num_tokens: int, tile: int) -> Tensor:
    """int32 [tiles, 2]: the document of each tile, and which of its tiles it is, the last first.

    The tokens past the last boundary are a document more, and as many tiles as could be needed are planned, since the lengths
    are on the device: those that are not belong to no document.
    """
    num_documents = cu_seqlens.numel() - 1
    bounds = torch.cat([cu_seqlens, cu_seqlens.new_full((1,), num_tokens)]).long()
    tiles = (bounds.diff() + (tile - 1)) // tile
    ends = tiles.cumsum(0)
    number = torch.arange(-(-num_tokens // tile) + num_documents + 1, device=cu_seqlens.device)
    document = torch.searchsorted(ends, number, right=True)
    index = ends[document.clamp(max=num_documents)] - 1 - number
    return torch.stack([document, index], 1).to(torch.int32)


def padded(width: int) -> int:
    """A head's width as the kernels hold it: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(width))


def tile_for(table: dict[int, Tile], width: int, dtype: torch.dtype, num_rows: int | None = None) -> Tile:
    """The table's tile for a padded width; `num_rows` queries that fit in fewer rows (decoding) take fewer."""
    chosen = (WIDE if dtype == torch.float32 else table)[max(64, width)]
    if num_rows is not None and num_rows <= chosen.queries // 2:
        chosen = chosen._replace(queries=max(16, triton.next_power_of_2(num_rows)), warps=4)
    return chosen


def with_unit_stride(x: Tensor) -> Tensor:
    """The kernels take any strides but the last dimension's."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, token, head) of [B, S, N, H], or of [T, N, H] with batch 0."""
    return (0, x.stride(0), x.stride(1)) if x.dim() == 3 else (x.stride(0), x.stride(1), x.stride(2))


def walk(call: Call, length: int, batch: int, cu: Tensor | None, tile: int) -> tuple[Tensor | None, int, int]:
    """(plan, number of walks per head, documents) over the rows of one side."""
    if cu is None:
        return None, batch * -(-length // tile), batch
    planned = plan(cu, length, tile)
    return planned, len(planned), cu.numel() - 1


def options(call: Call) -> tuple:
    """(offsets, offset), as every kernel takes them."""
    return (None, call.offset) if isinstance(call.offset, int) else (call.offset, 0)


def constants(call: Call, q: Tensor, v: Tensor) -> dict:
    width, value_width = q.shape[-1], v.shape[-1]
    return {
        "HAS_CU": call.cu_q is not None, "HAS_OFFSETS": not isinstance(call.offset, int), "HAS_CAP": call.softcap is not None,
        "CAUSAL": call.causal, "WINDOW": call.window is not None, "H": width, "HP": padded(width), "HV": value_width,
        "HVP": padded(value_width), "PRECISION": "ieee",
    }  # fmt: skip


def launch(kernel, num_programs: int, like: Tensor, *arguments, tile: Tile, **chosen) -> None:
    if num_programs == 0:
        return
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        kernel[(num_programs,)](*arguments, **chosen, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks_N: Tensor | None, call: Call, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp [B, N, S] or [N, T])."""
    q, k, v = (with_unit_stride(x) for x in (q, k, v))
    is_packed, num_heads = call.cu_q is not None, q.shape[-2]
    batch, num_queries = (1, q.shape[0]) if is_packed else (q.shape[0], q.shape[1])
    num_keys = k.shape[0] if is_packed else k.shape[1]
    out = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=out_dtype)
    lse = q.new_empty((num_heads, num_queries) if is_packed else (batch, num_heads, num_queries), dtype=torch.float32)
    lse_strides = (0, num_queries) if is_packed else (num_heads * num_queries, num_queries)
    tile = tile_for(FORWARD, padded(max(q.shape[-1], v.shape[-1])), q.dtype, None if is_packed else num_queries)
    planned, num_walks, num_documents = walk(call, num_queries, batch, call.cu_q, tile.queries)
    launch(
        forward_kernel, num_walks * num_heads, q,
        q, *strides(q), k, *strides(k), v, *strides(v), out, *strides(out), lse, *lse_strides, sinks_N,
        planned, call.cu_q, call.cu_k, *options(call), num_queries, num_keys, num_documents, num_heads,
        num_heads // k.shape[-2], call.scale, call.softcap or 1.0, call.window or 0,
        tile=tile, HAS_SINKS=sinks_N is not None, BM=tile.queries, BN=tile.keys, **constants(call, q, v),
    )  # fmt: skip
    return out, lse
