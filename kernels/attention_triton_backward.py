"""The backward of `attention` in Triton: three kernels, none of which adds atomically.

**Math** delta = do·o − dlse;  p = exp(s − lse);  ds = p (do·v − delta), times 1 − tanh² under softcap;  dv = Σ_i p do,
  dk = scale Σ_i ds q over the queries of a key head's whole group, in order;  dq = scale Σ_j ds k;
  d_sink = −Σ_i exp(sink − lse) delta.
**Shapes**, **Dtypes**, **Traffic**, **Source**, **Limits** as in `attention_triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_triton import (
    _LOG2E,
    Call,
    Tile,
    _key_range,
    _load_rows,
    _offset_of,
    _place,
    _scores,
    _sees,
    constants,
    launch,
    options,
    padded,
    strides,
    tile_for,
    walk,
    with_unit_stride,
)
from .triton_jit import jit, tl

# As FORWARD in `attention_triton`. Keys of 256 in 64-row tiles compile to a kernel that only traps on sm_100.
BACKWARD_KEYS = {64: Tile(32, 128, 8, 2), 128: Tile(32, 128, 8, 2), 256: Tile(64, 32, 8, 1)}
BACKWARD_QUERIES = {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 2)}
ROWS_PER_DELTA = 32


@jit
def delta_kernel(
    out, out_stride_b, out_stride_t, out_stride_n, d_out, do_stride_b, do_stride_t, do_stride_n, d_lse, delta,
    num_queries, num_heads, HAS_D_LSE: tl.constexpr, HV: tl.constexpr, HVP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """delta [B, N, S] = do·o − dlse, of BM queries of one head; d_lse and delta are contiguous."""
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    tiles = tl.cdiv(num_queries, BM)
    batch = (tl.program_id(0) // num_heads // tiles).to(tl.int64)
    row = (tl.program_id(0) // num_heads % tiles) * BM + tl.arange(0, BM)
    columns = tl.arange(0, HVP)
    out += batch * out_stride_b + head * out_stride_n
    d_out += batch * do_stride_b + head * do_stride_n
    o_block = _load_rows(out, row, out_stride_t, columns, num_queries, HV, HVP, True).to(tl.float32)
    d_block = _load_rows(d_out, row, do_stride_t, columns, num_queries, HV, HVP, True).to(tl.float32)
    total = tl.sum(o_block * d_block, 1)
    place = (batch * num_heads + head) * num_queries + row
    if HAS_D_LSE:
        total -= tl.load(d_lse + place, mask=row < num_queries, other=0.0)
    tl.store(delta + place, total, mask=row < num_queries)


@jit
def _query_range(first, last, num_queries, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr):
    """For keys at query-relative positions first … last: (begin, whole_begin, whole_end, end) of the queries that see any of
    them; as `_key_range`, with the roles exchanged."""
    begin, end = num_queries * 0, num_queries
    whole_begin, whole_end = begin, num_queries
    if CAUSAL:
        begin = tl.maximum(begin, first)
        whole_begin = tl.maximum(whole_begin, last)
    if WINDOW:
        begin = tl.maximum(begin, first - window + 1)
        whole_begin = tl.maximum(whole_begin, last - window + 1)
        end = tl.minimum(end, last + window)
        whole_end = tl.minimum(whole_end, first + window)
    end = tl.maximum(end, 0)
    begin = begin // BM * BM
    whole_begin = tl.maximum(begin, tl.cdiv(tl.maximum(whole_begin, 0), BM) * BM)
    whole_end = tl.maximum(whole_end, 0) // BM * BM
    is_whole = whole_end > whole_begin
    whole_begin = tl.where(is_whole, whole_begin, end)
    whole_end = tl.where(is_whole, whole_end, end)
    return begin, whole_begin, whole_end, end


@jit
def _keys_range(
    d_k, d_v, k_block, v_block, key, q, d_out, lse, delta, q_stride, do_stride, begin, end, num_queries, shift,
    scale, softcap, window, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr, HV: tl.constexpr, HVP: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in range(begin, end, BM):
        row = start + tl.arange(0, BM)
        q_block = _load_rows(q, row, q_stride, tl.arange(0, HP), num_queries, H, HP, MASKED)
        product = tl.dot(k_block, tl.trans(q_block), input_precision=PRECISION)
        scores, t = _scores(product, scale, softcap, HAS_CAP)
        if MASKED:
            log_sum = tl.load(lse + row, mask=row < num_queries, other=-float("inf"))
            row_delta = tl.load(delta + row, mask=row < num_queries, other=0.0)
            seen = _sees((row + shift)[None, :], key[:, None], window, CAUSAL, WINDOW)
            scores = tl.where(seen, scores, -float("inf"))
            # A query that sees nothing, or is past the end, has no probability anywhere.
            log_sum = tl.where(log_sum == -float("inf"), float("inf"), log_sum)
        else:
            log_sum = tl.load(lse + row)
            row_delta = tl.load(delta + row)
        p = tl.exp2(scores - (log_sum * _LOG2E)[None, :])
        do_block = _load_rows(d_out, row, do_stride, tl.arange(0, HVP), num_queries, HV, HVP, MASKED)
        d_v = tl.dot(p.to(do_block.dtype), do_block, d_v, input_precision=PRECISION)
        d_p = tl.dot(v_block, tl.trans(do_block), input_precision=PRECISION)
        d_s = p * (d_p - row_delta[None, :])
        if HAS_CAP:
            d_s = d_s * (1.0 - t * t)
        d_k = tl.dot(d_s.to(q_block.dtype), q_block, d_k, input_precision=PRECISION)
    return d_k, d_v


@jit
def backward_keys_kernel(
    q, q_stride_b, q_stride_t, q_stride_n, k, k_stride_b, k_stride_t, k_stride_n, v, v_stride_b, v_stride_t, v_stride_n,
    d_out, do_stride_b, do_stride_t, do_stride_n, d_k, d_k_stride_b, d_k_stride_t, d_k_stride_n,
    d_v, d_v_stride_b, d_v_stride_t, d_v_stride_n, lse, delta, lse_stride_b, lse_stride_n,
    plan, cu_q, cu_k, offsets, offset, num_queries, num_keys, num_documents, num_kv_heads, group_size, scale, softcap, window,
    HAS_CU: tl.constexpr, HAS_OFFSETS: tl.constexpr, HAS_CAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr, HV: tl.constexpr, HVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """d_k and d_v of BN keys of one key head, summed over its group of query heads in order. Keys past the end are zeros here,
    and what is summed for them is not stored."""
    kv_head = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    document, start, keys, index = _place(plan, cu_k, tl.program_id(0) // num_kv_heads, num_keys, num_documents, HAS_CU, BN)
    key = index * BN + tl.arange(0, BN)
    batch = document
    if HAS_CU:
        batch = document * 0
    d_k += batch.to(tl.int64) * d_k_stride_b + kv_head * d_k_stride_n + start.to(tl.int64) * d_k_stride_t
    d_v += batch.to(tl.int64) * d_v_stride_b + kv_head * d_v_stride_n + start.to(tl.int64) * d_v_stride_t
    total_k = tl.zeros([BN, HP], tl.float32)
    total_v = tl.zeros([BN, HVP], tl.float32)
    if document < num_documents:
        query_start, rows = start, num_queries
        if HAS_CU:
            query_start = tl.load(cu_q + document)
            rows = tl.load(cu_q + document + 1) - query_start
        shift = _offset_of(offsets, offset, document, HAS_OFFSETS)
        k += batch.to(tl.int64) * k_stride_b + kv_head * k_stride_n + start.to(tl.int64) * k_stride_t
        v += batch.to(tl.int64) * v_stride_b + kv_head * v_stride_n + start.to(tl.int64) * v_stride_t
        k_block = _load_rows(k, key, k_stride_t, tl.arange(0, HP), keys, H, HP, True)
        v_block = _load_rows(v, key, v_stride_t, tl.arange(0, HVP), keys, HV, HVP, True)
        last = tl.minimum(index * BN + BN, keys) - 1 - shift
        begin, whole_begin, whole_end, end = _query_range(index * BN - shift, last, rows, window, CAUSAL, WINDOW, BM)
        for member in range(group_size):
            head = kv_head * group_size + member
            q_head = q + batch.to(tl.int64) * q_stride_b + head * q_stride_n + query_start.to(tl.int64) * q_stride_t
            do_head = d_out + batch.to(tl.int64) * do_stride_b + head * do_stride_n
            do_head += query_start.to(tl.int64) * do_stride_t
            place = batch.to(tl.int64) * lse_stride_b + head * lse_stride_n + query_start
            total_k, total_v = _keys_range(
                total_k, total_v, k_block, v_block, key, q_head, do_head, lse + place, delta + place, q_stride_t, do_stride_t,
                begin, whole_begin, rows, shift, scale, softcap, window,
                True, CAUSAL, WINDOW, HAS_CAP, H, HP, HV, HVP, BM, PRECISION,
            )  # fmt: skip
            total_k, total_v = _keys_range(
                total_k, total_v, k_block, v_block, key, q_head, do_head, lse + place, delta + place, q_stride_t, do_stride_t,
                whole_begin, whole_end, rows, shift, scale, softcap, window,
                False, CAUSAL, WINDOW, HAS_CAP, H, HP, HV, HVP, BM, PRECISION,
            )  # fmt: skip
            total_k, total_v = _keys_range(
                total_k, total_v, k_block, v_block, key, q_head, do_head, lse + place, delta + place, q_stride_t, do_stride_t,
                whole_end, end, rows, shift, scale, softcap, window,
                True, CAUSAL, WINDOW, HAS_CAP, H, HP, HV, HVP, BM, PRECISION,
            )  # fmt: skip
    if document <= num_documents:
        columns_k, columns_v = tl.arange(0, HP), tl.arange(0, HVP)
        pointers_k = d_k + key[:, None].to(tl.int64) * d_k_stride_t + columns_k[None, :]
        pointers_v = d_v + key[:, None].to(tl.int64) * d_v_stride_t + columns_v[None, :]
        mask_k = (key < keys)[:, None] & (columns_k < H)[None, :]
        mask_v = (key < keys)[:, None] & (columns_v < HV)[None, :]
        tl.store(pointers_k, (total_k * scale).to(d_k.dtype.element_ty), mask=mask_k)
        tl.store(pointers_v, total_v.to(d_v.dtype.element_ty), mask=mask_v)


@jit
def _queries_range(
    d_q, q_block, do_block, log_sum, row_delta, query, k, v, k_stride, v_stride, begin, end, num_keys, scale, softcap, window,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr, HV: tl.constexpr, HVP: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in range(begin, end, BN):
        key = start + tl.arange(0, BN)
        k_block = _load_rows(k, key, k_stride, tl.arange(0, HP), num_keys, H, HP, MASKED)
        product = tl.dot(q_block, tl.trans(k_block), input_precision=PRECISION)
        scores, t = _scores(product, scale, softcap, HAS_CAP)
        if MASKED:
            seen = _sees(query[:, None], key[None, :], window, CAUSAL, WINDOW) & (key < num_keys)[None, :]
            scores = tl.where(seen, scores, -float("inf"))
        p = tl.exp2(scores - log_sum[:, None])
        v_block = _load_rows(v, key, v_stride, tl.arange(0, HVP), num_keys, HV, HVP, MASKED)
        d_p = tl.dot(do_block, tl.trans(v_block), input_precision=PRECISION)
        d_s = p * (d_p - row_delta[:, None])
        if HAS_CAP:
            d_s = d_s * (1.0 - t * t)
        d_q = tl.dot(d_s.to(k_block.dtype), k_block, d_q, input_precision=PRECISION)
    return d_q


@jit
def backward_queries_kernel(
    q, q_stride_b, q_stride_t, q_stride_n, k, k_stride_b, k_stride_t, k_stride_n, v, v_stride_b, v_stride_t, v_stride_n,
    d_out, do_stride_b, do_stride_t, do_stride_n, d_q, d_q_stride_b, d_q_stride_t, d_q_stride_n,
    lse, delta, lse_stride_b, lse_stride_n,
    plan, cu_q, cu_k, offsets, offset, num_queries, num_keys, num_documents, num_heads, group_size, scale, softcap, window,
    HAS_CU: tl.constexpr, HAS_OFFSETS: tl.constexpr, HAS_CAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr, HV: tl.constexpr, HVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """d_q of BM queries of one head."""
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    document, start, rows, index = _place(plan, cu_q, tl.program_id(0) // num_heads, num_queries, num_documents, HAS_CU, BM)
    row = index * BM + tl.arange(0, BM)
    batch = document
    if HAS_CU:
        batch = document * 0
    d_q += batch.to(tl.int64) * d_q_stride_b + head * d_q_stride_n + start.to(tl.int64) * d_q_stride_t
    total = tl.zeros([BM, HP], tl.float32)
    if document < num_documents:
        key_start, keys = start, num_keys
        if HAS_CU:
            key_start = tl.load(cu_k + document)
            keys = tl.load(cu_k + document + 1) - key_start
        shift = _offset_of(offsets, offset, document, HAS_OFFSETS)
        q += batch.to(tl.int64) * q_stride_b + head * q_stride_n + start.to(tl.int64) * q_stride_t
        d_out += batch.to(tl.int64) * do_stride_b + head * do_stride_n + start.to(tl.int64) * do_stride_t
        kv_head = head // group_size
        k += batch.to(tl.int64) * k_stride_b + kv_head * k_stride_n + key_start.to(tl.int64) * k_stride_t
        v += batch.to(tl.int64) * v_stride_b + kv_head * v_stride_n + key_start.to(tl.int64) * v_stride_t
        q_block = _load_rows(q, row, q_stride_t, tl.arange(0, HP), rows, H, HP, True)
        do_block = _load_rows(d_out, row, do_stride_t, tl.arange(0, HVP), rows, HV, HVP, True)
        place = batch.to(tl.int64) * lse_stride_b + head * lse_stride_n + start
        log_sum = tl.load(lse + place + row, mask=row < rows, other=-float("inf"))
        log_sum = tl.where(log_sum == -float("inf"), float("inf"), log_sum * _LOG2E)
        row_delta = tl.load(delta + place + row, mask=row < rows, other=0.0)
        query = row + shift
        last = tl.minimum(index * BM + BM, rows) - 1 + shift
        begin, whole_begin, whole_end, end = _key_range(index * BM + shift, last, keys, window, CAUSAL, WINDOW, BN)
        total = _queries_range(
            total, q_block, do_block, log_sum, row_delta, query, k, v, k_stride_t, v_stride_t, begin, whole_begin, keys,
            scale, softcap, window, True, CAUSAL, WINDOW, HAS_CAP, H, HP, HV, HVP, BN, PRECISION,
        )  # fmt: skip
        total = _queries_range(
            total, q_block, do_block, log_sum, row_delta, query, k, v, k_stride_t, v_stride_t, whole_begin, whole_end, keys,
            scale, softcap, window, False, CAUSAL, WINDOW, HAS_CAP, H, HP, HV, HVP, BN, PRECISION,
        )  # fmt: skip
        total = _queries_range(
            total, q_block, do_block, log_sum, row_delta, query, k, v, k_stride_t, v_stride_t, whole_end, end, keys,
            scale, softcap, window, True, CAUSAL, WINDOW, HAS_CAP, H, HP, HV, HVP, BN, PRECISION,
        )  # fmt: skip
    if document <= num_documents:
        columns = tl.arange(0, HP)
        pointers = d_q + row[:, None].to(tl.int64) * d_q_stride_t + columns[None, :]
        mask = (row < rows)[:, None] & (columns < H)[None, :]
        tl.store(pointers, (total * scale).to(d_q.dtype.element_ty), mask=mask)


# ---- The host's side ----


def backward(
    saved: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor],
    d_out: Tensor,
    d_lse: Tensor | None,
    call: Call,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(d_q, d_k, d_v, d_sinks) from (q, k, v, sinks, out, lse) and the upstream gradients, in `dtype` (default: q's).

    Where k and v are some of the keys that out and lse are of, these are the gradients' parts through them.
    """
    q, k, v, sinks_N, out, lse = saved
    is_packed, num_heads, num_kv_heads = call.cu_q is not None, q.shape[-2], k.shape[-2]
    batch, num_queries = (1, q.shape[0]) if is_packed else (q.shape[0], q.shape[1])
    num_keys = k.shape[0] if is_packed else k.shape[1]
    q, k, v, d_out = (with_unit_stride(x) for x in (q, k, v, d_out.to(q.dtype)))
    if d_lse is not None:  # the gradient of a log-sum-exp of −inf may be NaN: a merge of two makes it so
        d_lse = torch.where(lse == -torch.inf, 0.0, d_lse)
    d_q, d_k, d_v = (torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta, shared = torch.empty_like(lse), constants(call, q, v)
    lse_strides = (0, num_queries) if is_packed else (num_heads * num_queries, num_queries)
    rows = Tile(ROWS_PER_DELTA, 0, 4, 1)
    launch(
        delta_kernel, batch * num_heads * -(-num_queries // ROWS_PER_DELTA), q,
        out, *strides(out), d_out, *strides(d_out), None if d_lse is None else d_lse.contiguous(), delta,
        num_queries, num_heads,
        tile=rows, HAS_D_LSE=d_lse is not None, HV=shared["HV"], HVP=shared["HVP"], BM=ROWS_PER_DELTA,
    )  # fmt: skip
    width = padded(max(q.shape[-1], v.shape[-1]))
    group_size, numbers = num_heads // num_kv_heads, (call.scale, call.softcap or 1.0, call.window or 0)
    inputs = (q, *strides(q), k, *strides(k), v, *strides(v), d_out, *strides(d_out))
    tile = tile_for(BACKWARD_KEYS, width, q.dtype)
    planned, num_walks, num_documents = walk(call, num_keys, batch, call.cu_k, tile.keys)
    launch(
        backward_keys_kernel, num_walks * num_kv_heads, q,
        *inputs, d_k, *strides(d_k), d_v, *strides(d_v), lse, delta, *lse_strides,
        planned, call.cu_q, call.cu_k, *options(call), num_queries, num_keys, num_documents, num_kv_heads, group_size, *numbers,
        tile=tile, BM=tile.queries, BN=tile.keys, **shared,
    )  # fmt: skip
    tile = tile_for(BACKWARD_QUERIES, width, q.dtype)
    planned, num_walks, num_documents = walk(call, num_queries, batch, call.cu_q, tile.queries)
    launch(
        backward_queries_kernel, num_walks * num_heads, q,
        *inputs, d_q, *strides(d_q), lse, delta, *lse_strides, planned, call.cu_q, call.cu_k, *options(call),
        num_queries, num_keys, num_documents, num_heads, group_size, *numbers,
        tile=tile, BM=tile.queries, BN=tile.keys, **shared,
    )  # fmt: skip
    return d_q, d_k, d_v, None if sinks_N is None else _d_sinks(sinks_N, lse, delta)


def _d_sinks(sinks_N: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """−Σ exp(sink − lse) delta; a query whose log-sum-exp is −inf has none, whatever its delta."""
    share = torch.exp(sinks_N.float()[:, None] - lse)
    d_sinks_XN = -torch.where(lse == -torch.inf, 0.0, share * delta).sum(-1)
    return d_sinks_XN.view(-1, len(sinks_N)).sum(0).to(sinks_N.dtype)
