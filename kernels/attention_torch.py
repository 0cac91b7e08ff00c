"""`attention` in torch operations, on any device: documents padded to groups of similar length, torch's fused kernel for plain
ones, blocks of scores otherwise.

Math, Shapes, Dtypes, Source as in `attention`; packing of grouped heads as in multi-query decoding, arXiv:1911.02150.
Traffic   never a score block larger than MAX_BLOCK_ELEMENTS, or one query row of one document if that is larger.
Limits    Reads cu_seqlens and query_offset on the host: a device sync on CUDA, none on the CPU.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of the largest score block of the torch path (N·S·S' of the documents taken together): 2 MiB in fp32.
# AMD EPYC (Zen 3), one thread, fp32, N=4 K=2 H=32, torch 2.13, best of 7, forward + backward of 16 documents of 512 at
# 2^17 / 2^19 / 2^21: 187 / 177 / 256 ms; of 100 of 64: 36 / 32 / 34 ms. torch's fused kernel, used wherever it can be:
# 146 and 24 ms; of 133 documents of 30-60 tokens: 21 ms, against 26 ms in blocks (2026-11-23).
MAX_BLOCK_ELEMENTS = 2**19
# Documents are padded to the longest of their group: less than 1/4 longer than themselves, or than 8 positions.
GROUPS_PER_OCTAVE = 4
MIN_GROUP_STEP = 8


class Rule(NamedTuple):
    """Which keys a query sees, and what happens to its scores."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    return_lse: bool
    out_dtype: torch.dtype


def stat_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def visible_keys(rule: Rule, query_position: Tensor, key_position: Tensor) -> Tensor:
    """Bool mask from positions that broadcast against each other."""
    distance = query_position - key_position
    visible = distance >= 0 if rule.causal else torch.ones_like(distance, dtype=torch.bool)
    if rule.window is not None:
        visible = visible & (distance < rule.window) & (distance > -rule.window)
    return visible


# ---- Part 1: packed documents to padded groups of similar length, and back ----


class _Layout(NamedTuple):
    """Where packed tokens lie in the padded buffer of P slots, groups one after the other."""

    token_P: Tensor  # the token in each slot; 0 in padding
    padding: Tensor  # the slots that hold none
    slot_T: Tensor  # the slot of each token before the last boundary
    num_tokens: int  # with those past it
    sizes: list[int]  # slots of each group
    widths: list[int]  # positions of a document in each group


def _group_width(length_B: Tensor) -> Tensor:
    """Lengths rounded up to a quarter of their octave: the key by which documents are grouped."""
    octave_B = torch.log2(length_B.clamp(min=1).double()).floor().long()
    step_B = (2**octave_B).div(GROUPS_PER_OCTAVE, rounding_mode="floor").clamp(min=MIN_GROUP_STEP)
    return (length_B + step_B - 1).div(step_B, rounding_mode="floor") * step_B


def _layout(start_B: Tensor, length_B: Tensor, group_B: Tensor, count_G: Tensor, num_tokens: int) -> _Layout:
    """Documents of one group_B keep their order."""
    width_G = start_B.new_ones(count_G.numel()).scatter_reduce(0, group_B, length_B, "amax")
    order_B = torch.argsort(group_B, stable=True)
    width_sorted_B = width_G[group_B[order_B]]
    first_slot_B = torch.empty_like(start_B)
    first_slot_B[order_B] = width_sorted_B.cumsum(0) - width_sorted_B
    sizes = (width_G * count_G).tolist()
    token_T = torch.arange(int(length_B.sum()), device=start_B.device)
    slot_T = token_T + (first_slot_B - start_B).repeat_interleave(length_B)
    token_P = torch.full((sum(sizes),), -1, dtype=torch.long, device=start_B.device)
    token_P[slot_T] = token_T
    padding = (token_P < 0).nonzero()[:, 0]
    return _Layout(token_P.clamp_(min=0), padding, slot_T, num_tokens, sizes, width_G.tolist())


def _pad_tokens(x_T: Tensor, layout: _Layout) -> Tensor:
    if x_T.shape[0] == 0:
        return x_T.new_zeros(layout.token_P.numel(), *x_T.shape[1:])
    return x_T.index_select(0, layout.token_P).index_fill_(0, layout.padding, 0)


def _unpad_tokens(x_P: Tensor, layout: _Layout, fill: float = 0.0) -> Tensor:
    num_used = layout.slot_T.numel()
    x_T = x_P.new_empty(layout.num_tokens, *x_P.shape[1:])
    x_T[num_used:] = fill
    torch.index_select(x_P, 0, layout.slot_T, out=x_T[:num_used])
    return x_T


class _Move(torch.autograd.Function):
    """Both directions are gathers: a scatter costs seven of them on the CPU (8192 x 128 fp32, 2 cores)."""

    @staticmethod
    def forward(ctx, x, layout, move, inverse):
        ctx.inverse = layout, inverse
        return move(x, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        layout, inverse = ctx.inverse
        return inverse(d_y, layout), None, None, None


# ---- Part 2: blocks of scores ----


class _Tile(NamedTuple):
    documents: slice
    queries: slice
    keys: slice  # those that any of the queries may see


def _tiles(rule: Rule, shape: tuple[int, int, int, int], offset: int | Tensor):
    """Tiles of at most MAX_BLOCK_ELEMENTS scores over [documents, queries, keys] of N heads."""
    num_documents, num_queries, num_keys, num_heads = shape
    documents = min(max(1, MAX_BLOCK_ELEMENTS // max(1, num_heads * num_queries * num_keys)), max(1, num_documents))
    rows = max(1, min(num_queries, MAX_BLOCK_ELEMENTS // (documents * num_heads * num_keys)))
    lowest, highest = _offset_range(offset)
    for first in range(0, num_documents, documents):
        for row in range(0, num_queries, rows):
            last_row = min(row + rows, num_queries)
            begin, end = 0, num_keys
            if rule.window is not None:
                begin = min(max(0, row + lowest - rule.window + 1), num_keys - 1)
                end = max(begin + 1, min(end, last_row + highest + rule.window - 1))
            if rule.causal:
                end = max(begin + 1, min(end, last_row + highest))
            yield _Tile(slice(first, first + documents), slice(row, last_row), slice(begin, end))


def _offset_range(offset: int | Tensor) -> tuple[int, int]:
    if isinstance(offset, int):
        return offset, offset
    return (int(offset.min()), int(offset.max())) if offset.numel() else (0, 0)


def _bias(rule: Rule, tile: _Tile, offset: int | Tensor, key_length_B: Tensor | None, like: Tensor) -> Tensor | None:
    """0 where a query sees a key, −inf elsewhere, [B or 1, 1, S, S'] of the tile; None where it sees all."""
    if not rule.causal and rule.window is None and key_length_B is None:
        return None
    query_S1 = torch.arange(tile.queries.start, tile.queries.stop, device=like.device)[:, None]
    key_1R = torch.arange(tile.keys.start, tile.keys.stop, device=like.device)[None, :]
    shift = offset if isinstance(offset, int) else offset[tile.documents, None, None]
    visible = visible_keys(rule, query_S1 + shift, key_1R)
    visible = visible if visible.dim() == 3 else visible[None]
    if key_length_B is not None:
        visible = visible & (key_1R < key_length_B[tile.documents, None, None])
    zero = torch.zeros((), dtype=stat_dtype(like), device=like.device)
    return torch.where(visible, zero, -torch.inf)[:, None]


def _fold(x_BSNH: Tensor, num_kv_heads: int) -> Tensor:
    """[B, S, N, H] to [B·K, (N/K)·S, H]: the query heads of one key head become rows of one product."""
    x = x_BSNH.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4).to(stat_dtype(x_BSNH))
    return x.reshape(x.shape[0] * num_kv_heads, -1, x.shape[-1])


def _unfold(x: Tensor, num_documents: int, num_kv_heads: int, num_rows: int) -> Tensor:
    """The inverse of `_fold`, as a view [B, S, K, N/K, H]."""
    return x.view(num_documents, num_kv_heads, -1, num_rows, x.shape[-1]).permute(0, 3, 1, 2, 4)


class _Problem(NamedTuple):
    rule: Rule
    offset: int | Tensor
    key_length_B: Tensor | None
    is_plain: bool  # every query sees a key, and neither lse nor sinks are asked for


class _TileState(NamedTuple):
    """What forward and backward both need of a tile; the folded tensors are [B·K, (N/K)·S, ...]."""

    q: Tensor  # times scale
    k: Tensor
    v: Tensor
    prob: Tensor
    lse_BNS: Tensor | None
    tanh: Tensor | None  # of the softcapped scores
    size: tuple[int, int, int]  # documents, key heads, queries


def _tile_state(tile: _Tile, q, k, v, sinks_N, problem: _Problem) -> _TileState:
    rule, num_heads, num_kv_heads = problem.rule, q.shape[2], k.shape[2]
    q_tile = _fold(q[tile.documents, tile.queries], num_kv_heads).mul(rule.scale)
    k_tile, v_tile = (_fold(x[tile.documents, tile.keys], num_kv_heads) for x in (k, v))
    size = q_tile.shape[0] // num_kv_heads, num_kv_heads, tile.queries.stop - tile.queries.start
    grid = size[0], num_heads, size[2]
    score, tanh = torch.bmm(q_tile, k_tile.transpose(1, 2)), None
    if rule.softcap is not None:
        tanh = score.div_(rule.softcap).tanh_()
        score = tanh * rule.softcap
    bias = _bias(rule, tile, problem.offset, problem.key_length_B, q)
    if bias is not None:
        score.view(*grid, -1).add_(bias)
    if problem.is_plain:
        return _TileState(q_tile, k_tile, v_tile, torch.softmax(score, -1), None, tanh, size)
    lse_BNS = torch.logsumexp(score, -1).view(grid)
    if sinks_N is not None:
        lse_BNS = torch.logaddexp(lse_BNS, sinks_N.to(lse_BNS.dtype)[None, :, None].expand(grid))
    finite_lse = lse_BNS.masked_fill(lse_BNS == -torch.inf, 0.0).view(*score.shape[:2], 1)
    return _TileState(q_tile, k_tile, v_tile, score.sub_(finite_lse).exp_(), lse_BNS, tanh, size)


def _block_gradients(saved, problem: _Problem, d_out: Tensor | None, d_lse: Tensor | None):
    """Gradients of q, k, v and the sinks."""
    q, k, v, sinks_N, out = saved
    b, s, n, _ = q.shape
    num_kv_heads, dtype = k.shape[2], stat_dtype(q)
    d_out = torch.zeros_like(out) if d_out is None else d_out
    # do·o − dlse: what is taken from do·v before the product with p.
    shift_BSN = torch.linalg.vecdot(d_out.to(dtype), out.to(dtype))
    shift_BSN = shift_BSN if d_lse is None else shift_BSN - d_lse
    d_q = q.new_empty(b, s, num_kv_heads, n // num_kv_heads, q.shape[-1])
    d_k, d_v = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    d_sinks_N = None if sinks_N is None else torch.zeros(n, dtype=dtype, device=q.device)
    for tile in _tiles(problem.rule, (b, s, k.shape[1], n), problem.offset):
        state = _tile_state(tile, q, k, v, sinks_N, problem)
        d_out_tile = _fold(d_out[tile.documents, tile.queries].to(state.prob.dtype), num_kv_heads)
        shift_BNS = shift_BSN[tile.documents, tile.queries].transpose(1, 2)
        if state.lse_BNS is not None:  # the gradient of a log-sum-exp of −inf may be NaN: a merge of two makes it so
            shift_BNS = shift_BNS.masked_fill(state.lse_BNS == -torch.inf, 0.0)
        d_score = torch.bmm(d_out_tile, state.v.transpose(1, 2))
        d_score.sub_(shift_BNS.reshape(*d_score.shape[:2], 1)).mul_(state.prob)
        if state.tanh is not None:
            d_score.mul_(1 - state.tanh.square_())
        if d_sinks_N is not None:
            # A sink of −inf on a row that sees nothing: exp(−inf + inf) is NaN and counts for 0.
            weight_BNS = torch.exp(sinks_N.to(dtype)[None, :, None] - state.lse_BNS).nan_to_num(0.0)
            d_sinks_N -= (weight_BNS * shift_BNS).sum((0, 2))
        d_q_tile = torch.bmm(d_score, state.k).mul_(problem.rule.scale)
        d_q[tile.documents, tile.queries] = _unfold(d_q_tile, *state.size)
        size_k = state.size[0], num_kv_heads, tile.keys.stop - tile.keys.start
        for total, left, right in ((d_k, d_score, state.q), (d_v, state.prob, d_out_tile)):
            product = _unfold(torch.bmm(left.transpose(1, 2), right), *size_k)
            total[tile.documents, tile.keys] += product[:, :, :, 0]
    d_sinks_N = None if d_sinks_N is None else d_sinks_N.to(sinks_N.dtype)
    return d_q.view_as(q), d_k.to(k.dtype), d_v.to(v.dtype), d_sinks_N


class _BlockAttention(torch.autograd.Function):
    """Attention of padded documents, tile by tile; the backward recomputes each tile's probabilities."""

    @staticmethod
    def forward(ctx, q, k, v, sinks_N, rule, offset, key_length_B):
        b, s, n, _ = q.shape
        is_plain = not rule.return_lse and sinks_N is None and key_length_B is None
        is_plain = is_plain and s <= k.shape[1] and isinstance(offset, int) and offset == 0
        problem = _Problem(rule, offset, key_length_B, is_plain)
        out = q.new_empty(b, s, k.shape[2], n // k.shape[2], v.shape[-1], dtype=rule.out_dtype)
        lse = q.new_empty(b, s, n, dtype=stat_dtype(q)) if rule.return_lse else None
        for tile in _tiles(rule, (b, s, k.shape[1], n), offset):
            state = _tile_state(tile, q, k, v, sinks_N, problem)
            out[tile.documents, tile.queries] = _unfold(torch.bmm(state.prob, state.v), *state.size)
            if lse is not None and state.lse_BNS is not None:
                lse[tile.documents, tile.queries] = state.lse_BNS.transpose(1, 2)
        out = out.view(b, s, n, v.shape[-1])
        ctx.save_for_backward(q, k, v, sinks_N, out)
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_lse):
        tensors = ctx.saved_tensors  # read once: a non-reentrant checkpoint allows no more
        with torch.autocast(tensors[0].device.type, enabled=False):
            return *_block_gradients(tensors, ctx.problem, d_out, d_lse), None, None, None


# ---- Part 3: which of the two computes a padded group ----


def _padded_attention(q, k, v, sinks_N, rule: Rule, offset: int | Tensor, key_length_B: Tensor | None):
    """(output [B, S, N, H'], lse [B, S, N] or None) of documents that share one padded shape."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    if num_keys == 0:
        k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
        key_length_B = torch.zeros(q.shape[0], dtype=torch.long, device=q.device)
    is_square = isinstance(offset, int) and offset == 0 and num_queries == num_keys and num_keys > 0
    if is_square and rule.window is not None and rule.window >= num_keys:
        rule = rule._replace(window=None)
    is_simple = rule.window is None and rule.softcap is None and sinks_N is None and not rule.return_lse
    is_simple = is_simple and rule.out_dtype == q.dtype and q.shape[-1] == v.shape[-1] and key_length_B is None
    if is_simple and is_square:
        return _fused(q, k, v, rule, None), None
    has_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if is_simple and rule.causal and not is_square and not has_gradient:
        lowest, highest = _offset_range(offset)
        end = min(num_keys, num_queries + highest)
        if lowest >= 0 and q.shape[0] * num_queries * end <= MAX_BLOCK_ELEMENTS:
            tile = _Tile(slice(0, q.shape[0]), slice(0, num_queries), slice(0, end))
            return _fused(q, k[:, :end], v[:, :end], rule, _bias(rule, tile, offset, None, q)), None
    return _BlockAttention.apply(q, k, v, sinks_N, rule, offset, key_length_B)


def _fused(q, k, v, rule: Rule, bias: Tensor | None) -> Tensor:
    """torch's flash kernel. Right padding needs no mask: no real query sees it, and what padding sees is dropped."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    bias = None if bias is None else bias.to(q.dtype)
    keywords = {"is_causal": bias is None and rule.causal, "scale": rule.scale, "enable_gqa": q.shape[1] != k.shape[1]}
    return F.scaled_dot_product_attention(q, k, v, bias, **keywords).transpose(1, 2)


def _packed_attention(q, k, v, cu_seqlens, cu_seqlens_k, sinks_N, rule: Rule, offset: int | Tensor):
    """(output [T, N, H'], lse [T, N] or None): documents of similar lengths are computed together."""
    cu, cu_k = cu_seqlens.long(), cu_seqlens_k.long()
    length_B, key_length_B = cu.diff(), cu_k.diff()
    is_shared = cu_seqlens is cu_seqlens_k
    key_B = _group_width(length_B)
    if not is_shared:
        key_B = key_B * 2**32 + _group_width(key_length_B)
    _, group_B, count_G = torch.unique(key_B, return_inverse=True, return_counts=True)
    layout = _layout(cu[:-1], length_B, group_B, count_G, q.shape[0])
    layout_k = layout if is_shared else _layout(cu_k[:-1], key_length_B, group_B, count_G, k.shape[0])
    q_groups = _Move.apply(q, layout, _pad_tokens, _unpad_tokens).split(layout.sizes)
    k_groups, v_groups = (_Move.apply(x, layout_k, _pad_tokens, _unpad_tokens).split(layout_k.sizes) for x in (k, v))
    needs_length = not (is_shared and rule.causal and isinstance(offset, int) and offset <= 0)
    members = torch.argsort(group_B, stable=True).split(count_G.tolist())
    outs, lses = [], []
    for group, documents in enumerate(members):
        q_group = q_groups[group].unflatten(0, (-1, layout.widths[group]))
        k_group, v_group = (x[group].unflatten(0, (-1, layout_k.widths[group])) for x in (k_groups, v_groups))
        group_offset = offset if isinstance(offset, int) else offset[documents]
        group_length = key_length_B[documents] if needs_length else None
        out, lse = _padded_attention(q_group, k_group, v_group, sinks_N, rule, group_offset, group_length)
        outs.append(out.flatten(0, 1))
        if lse is not None:
            lses.append(lse.flatten(0, 1))
    out = _Move.apply(torch.cat(outs), layout, _unpad_tokens, _pad_tokens)
    unpad_lse = partial(_unpad_tokens, fill=-torch.inf)
    return out, _Move.apply(torch.cat(lses), layout, unpad_lse, _pad_tokens) if rule.return_lse else None


def attention_torch(q, k, v, cu_seqlens, cu_seqlens_k, sinks_N, rule: Rule, offset: int | Tensor):
    with torch.autocast(q.device.type, enabled=False):
        if cu_seqlens is None:
            out, lse = _padded_attention(q, k, v, sinks_N, rule, offset, None)
            return out, None if lse is None else lse.transpose(1, 2)
        if cu_seqlens.numel() == 1:
            lse = q.new_full(q.shape[1::-1], -torch.inf, dtype=stat_dtype(q)) if rule.return_lse else None
            return (q[..., :1] * 0).expand(*q.shape[:2], v.shape[-1]).nan_to_num(0.0).to(rule.out_dtype), lse
        out, lse = _packed_attention(q, k, v, cu_seqlens, cu_seqlens_k, sinks_N, rule, offset)
        return out, None if lse is None else lse.transpose(0, 1)
