"""`attention` as an attention implementation of transformers, through its two registries.

Use       register(); model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="warpline")
Shapes    transformers hands over q [B, N, S, H], k and v [B, K, S', H], takes [B, S, N, H'] back; grouped heads stay grouped.
Masks     transformers describes a mask by functions of (query, key), and has it built once per forward and kind of layer. Ours
          holds no [S, S'] matrix. It is None where the last query sees the last key and no row is padded or packed; else int32
          [1, 1, rows, num_sequences + 1] (four dimensions: transformers hands those on as they are): one row, the boundaries of
          queries and keys in [B·S]; three rows, those of queries, those of keys in [B·S'], and each sequence's query offset;
          two rows, without the offsets, where nothing is causal. A padded row of a batch is three sequences, what precedes its
          tokens, the tokens, and what follows, so that nothing is gathered.
Reads     on a GPU a padding mask is read once per mask, as transformers reads it for its own, to refuse holes; packed
          position_ids are read once, to count the documents. Compiled, a padding mask is not read, and holes pass unseen;
          without one, or with a window, the graph breaks where the mask is made.
Limits    The window is what the layer passes, as for flash attention. No dropout, no additive or 4-dimensional masks, no
          attention weights, no windows that are not causal, no chunked or blockwise masks: each is refused in one line.
Source    transformers 5.18: AttentionInterface, AttentionMaskInterface, masking_utils, modeling_flash_attention_utils.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import CodeType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.attention import attention

NAME = "warpline"


def register(name: str = NAME) -> str:
    """Makes `attn_implementation=name` known to transformers, and returns the name; a second call does no harm."""
    modeling: Any = importlib.import_module("transformers.modeling_utils")
    masking: Any = importlib.import_module("transformers.masking_utils")
    modeling.AttentionInterface.register(name, attention_forward)
    masking.AttentionMaskInterface.register(name, partial(attention_bounds, _known_masks(masking)))
    return name


def _refuse(received: str, expected: str, remedy: str):
    raise ValueError(f"warpline's attention in transformers: received {received}; expected {expected}: {remedy}")


# ---- The mask, once per forward ----


class _Known(NamedTuple):
    """How transformers' mask functions are told apart: two by themselves, those made anew for a call by their code."""

    causal: Callable
    bidirectional: Callable
    conjunction: CodeType
    window: CodeType
    packing: CodeType


def _known_masks(masking: Any) -> _Known:
    causal, bidirectional = masking.causal_mask_function, masking.bidirectional_mask_function
    made = (masking.and_masks(causal), masking.sliding_window_overlay(1), masking.packed_sequence_mask_function(torch.empty(0)))
    return _Known(causal, bidirectional, *(function.__code__ for function in made))


def _parts(mask_function: Callable, known: _Known) -> list[Callable]:
    """The functions that a mask is the conjunction of."""
    if getattr(mask_function, "__code__", None) is not known.conjunction:
        return [mask_function]
    return [part for function in _captured(mask_function) for part in _parts(function, known)]


def _captured(function: Any) -> Any:
    """What a function made by another remembers, of one thing."""
    return function.__closure__[0].cell_contents


def _read(mask_function: Callable, known: _Known) -> tuple[bool, Tensor | None]:
    """(causal, the document [B, S] of each token or None); a part that is not known is refused, never dropped."""
    causal, document_BS = False, None
    for part in _parts(mask_function, known):
        code = getattr(part, "__code__", None)
        if part is known.causal:
            causal = True
        elif code is known.packing:
            document_BS = _captured(part)
        elif code is not known.window and part is not known.bidirectional:
            name = getattr(part, "__qualname__", repr(part))
            _refuse(f"a mask made with {name}", "causal, windowed, padded or packed rows", "use attn_implementation='sdpa'")
    return causal, document_BS


def attention_bounds(
    known: _Known, batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0, *,
    mask_function: Callable, attention_mask: Tensor | None = None, device: Any = "cpu", **kwargs: Any,
) -> Tensor | None:  # fmt: skip
    """What transformers calls to make a mask: the header's bounds, or None.

    `attention_mask` is the padding mask, bool [B, keys seen so far], True at tokens; query i of a row stands at key slot
    i + q_offset − kv_offset of it.
    """
    causal, document_BS = _read(mask_function, known)
    if document_BS is not None:
        return _packed_bounds(document_BS)
    offset = q_offset - kv_offset
    is_token_BR = None
    if attention_mask is not None:
        missing = max(0, kv_length + kv_offset - attention_mask.shape[-1])
        is_token_BR = F.pad(attention_mask.bool(), (0, missing))[:, kv_offset : kv_offset + kv_length]
        if not torch.compiler.is_compiling() and not _has_padding(is_token_BR):
            is_token_BR = None
    if is_token_BR is None and causal and isinstance(offset, int) and offset == kv_length - q_length:
        return None
    if is_token_BR is None:
        is_token_BR = torch.ones(1, kv_length, dtype=torch.bool, device=device).expand(batch_size, -1)
    return _padded_bounds(is_token_BR, q_length, offset, causal)


def _has_padding(is_token_BR: Tensor) -> bool:
    num_runs_B = is_token_BR[:, :1].sum(1) + (is_token_BR[:, 1:] & ~is_token_BR[:, :-1]).sum(1)
    has_holes, has_padding = torch.stack([(num_runs_B > 1).any(), ~is_token_BR.all()]).tolist()
    if has_holes:
        _refuse(
            "an attention_mask with zeros between ones",
            "padding before and after a row's tokens",
            "pass the rows packed (position_ids or cu_seq_lens_q), or use attn_implementation='sdpa'",
        )
    return has_padding


def _padded_bounds(is_token_BR: Tensor, num_queries: int, offset: int | Tensor, causal: bool) -> Tensor:
    """Three sequences a row, by arithmetic alone; `offset` is the key slot of query 0."""
    batch, num_keys = is_token_BR.shape
    first_B = torch.where(is_token_BR.any(1), is_token_BR.int().argmax(1), num_keys)
    key_B3 = torch.stack([torch.zeros_like(first_B), first_B, first_B + is_token_BR.sum(1)], 1)
    query_B3 = (key_B3 - offset).clamp(0, num_queries)
    query_B3[:, 0] = 0
    row_B1 = torch.arange(batch, device=first_B.device)[:, None]
    starts = [query_B3 + row_B1 * num_queries]
    if not causal or not isinstance(offset, int) or offset != 0 or num_queries != num_keys:
        starts.append(key_B3 + row_B1 * num_keys)
        starts += [query_B3 + offset - key_B3] if causal else []
    ends = torch.tensor([batch * num_queries, batch * num_keys, 0], device=first_B.device)
    return torch.cat([torch.stack([x.flatten() for x in starts]), ends[: len(starts), None]], 1).int()[None, None]


def _packed_bounds(document_BS: Tensor) -> Tensor:
    """A sequence wherever the document's number changes, and at every row's beginning."""
    is_first_T = F.pad(document_BS[:, 1:] != document_BS[:, :-1], (1, 0), value=True).flatten()
    return F.pad(is_first_T.nonzero()[:, 0], (0, 1), value=is_first_T.numel()).int()[None, None, None]


# ---- The attention of a layer ----


def _packed_arguments(bounds: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What `attention` needs of packed rows, from the mask, else from the varlen keywords of transformers."""
    if bounds is not None:
        queries, *rest = bounds[0, 0]
        if not rest:
            return {"cu_seqlens": queries, "causal": True}
        offset = torch.zeros_like(queries[:-1]) if len(rest) == 1 else rest[1][:-1]
        return {"cu_seqlens": queries, "cu_seqlens_k": rest[0], "query_offset": offset, "causal": len(rest) == 2}
    queries, keys = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if queries is None:
        return {}
    if keys is None or keys is queries:
        return {"cu_seqlens": queries.int()}
    # The last query of a sequence sees its last key.
    return {"cu_seqlens": queries.int(), "cu_seqlens_k": keys.int(), "query_offset": (keys.diff() - queries.diff()).int()}


def attention_forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    is_causal: bool | None = None, s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What a layer of transformers calls: (output [B, S, N, H'], None for the weights, which are never made).

    Without a mask the last query sees the last key. `s_aux` [N] are attention sinks. Under autocast q, k and v are cast to its
    dtype first, as torch's own attention does.
    """
    if dropout:
        _refuse(f"attention dropout of {dropout}", "0", "set config.attention_dropout = 0.0")
    for name in ("position_bias", "output_attentions"):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            _refuse(name, "none", "use attn_implementation='eager'")
    if attention_mask is not None and attention_mask.dtype != torch.int32:
        received = f"an attention mask of {attention_mask.dtype} {list(attention_mask.shape)}"
        _refuse(received, "None or a padding mask [B, keys], given to the model", "use attn_implementation='sdpa'")
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    packed = _packed_arguments(attention_mask, kwargs)
    causal = packed.pop("causal", getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if sliding_window is not None and not causal:
        _refuse(f"sliding_window {sliding_window} without causal", "a causal layer", "use attn_implementation='sdpa'")
    options = {"causal": causal, "window": sliding_window, "softcap": softcap, "sinks_N": s_aux, "scale": scaling, **packed}
    qkv = [x.transpose(1, 2) for x in (query, key, value)]
    if packed:
        out = attention(*(x.flatten(0, 1) for x in qkv), **options)
        return out.unflatten(0, qkv[0].shape[:2]), None  # type: ignore[union-attr]
    out = attention(*qkv, query_offset=key.shape[2] - query.shape[2], **options)
    return out, None  # type: ignore[return-value]
