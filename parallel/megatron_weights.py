"""Weights between a decoder's names and Megatron-core's: fused, interleaved, and cut over tensor ranks.

| Megatron's parameter        | made of                      | its rows                                          | ranks cut |
|-----------------------------|------------------------------|---------------------------------------------------|-----------|
| `linear_qkv`                | `q_proj`, `k_proj`, `v_proj` | per key head: its query heads, the key, the value | rows      |
| `linear_fc1`                | `gate_proj`, `up_proj`       | per tensor rank: its gate rows, its up rows       | rows      |
| `linear_proj`, `linear_fc2` | `o_proj`, `down_proj`        | as they are; their biases whole                   | columns   |
| embedding, output matrix    | `embed_tokens`, `lm_head`    | padded with zeros to a multiple of the ranks      | rows      |
| sinks                       | `sinks`                      | as they are                                       | rows      |
| norms                       | the same                     | as they are                                       | nothing   |

Nothing here imports Megatron. `config` is a `DecoderConfig`, or has its fields.

**Source** megatron-core 0.16.1: `transformer/attention.py`, `transformer/mlp.py`, `tensor_parallel/layers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """One of Megatron's parameters: the decoder's that it is made of, the form that puts them together, and the dim that
    tensor ranks cut (None: every rank has it whole)."""

    names: tuple[str, ...]
    form: str
    dim: int | None


def parts(config: Any) -> dict[str, Part]:
    """Of a whole model, by Megatron's name, layers counted from the model's first."""
    found = {"embedding.word_embeddings.weight": Part(("embed_tokens.weight",), "vocabulary", 0)}
    for layer in range(config.num_layers):
        for name, part in _layer_parts(config).items():
            names = tuple(f"layers.{layer}.{own}" for own in part.names)
            found[f"decoder.layers.{layer}.{name}"] = part._replace(names=names)
    found["decoder.final_layernorm.weight"] = Part(("norm.weight",), "same", None)
    output = "embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    found["output_layer.weight"] = Part((output,), "vocabulary", 0)
    return found


def _layer_parts(config: Any) -> dict[str, Part]:
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    found = {}
    for kind, in_attention, in_mlp in (("weight", True, True), ("bias", config.attention_bias, config.mlp_bias)):
        column = 1 if kind == "weight" else None
        if in_attention:
            found[f"self_attention.linear_qkv.{kind}"] = Part(tuple(f"{name}.{kind}" for name in projections), "qkv", 0)
            found[f"self_attention.linear_proj.{kind}"] = Part((f"self_attn.o_proj.{kind}",), "same", column)
        if in_mlp:
            found[f"mlp.linear_fc1.{kind}"] = Part((f"mlp.gate_proj.{kind}", f"mlp.up_proj.{kind}"), "gate_up", 0)
            found[f"mlp.linear_fc2.{kind}"] = Part((f"mlp.down_proj.{kind}",), "same", column)
    if config.attention_sinks:
        found["self_attention.core_attention.sinks"] = Part(("self_attn.sinks",), "same", 0)
    norms = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
    if config.query_key_norm:
        norms |= {"self_attention.q_layernorm": "self_attn.q_norm", "self_attention.k_layernorm": "self_attn.k_norm"}
    if config.post_norms:
        norms |= {"self_attn_bda.norm": "post_attention_layernorm", "pre_mlp_layernorm": "pre_feedforward_layernorm"}
        norms |= {"mlp_bda.norm": "post_feedforward_layernorm"}
    return found | {f"{name}.weight": Part((f"{own}.weight",), "same", None) for name, own in norms.items()}


# ---- Forms: from the decoder's tensors to one whose chunks are the tensor ranks', and back ----


def _fuse_qkv(tensors: Sequence[Tensor], config: Any, num_ranks: int) -> Tensor:
    heads = [x.unflatten(0, (config.num_kv_heads, -1, config.head_width)) for x in tensors]
    return torch.cat(heads, 1).flatten(0, 2)


def _split_qkv(whole: Tensor, config: Any, num_ranks: int) -> list[Tensor]:
    per_key = config.num_heads // config.num_kv_heads
    heads = whole.unflatten(0, (config.num_kv_heads, per_key + 2, config.head_width))
    return [x.flatten(0, 2) for x in heads.split([per_key, 1, 1], 1)]


def _fuse_gate_up(tensors: Sequence[Tensor], config: Any, num_ranks: int) -> Tensor:
    return torch.cat([x.chunk(num_ranks)[rank] for rank in range(num_ranks) for x in tensors])


def _split_gate_up(whole: Tensor, config: Any, num_ranks: int) -> list[Tensor]:
    pieces = whole.chunk(2 * num_ranks)
    return [torch.cat(pieces[::2]), torch.cat(pieces[1::2])]


def padded_vocabulary(config: Any, num_ranks: int) -> int:
    """The vocabulary's rows with those that make it a multiple of the tensor ranks."""
    return -(-config.vocab_size // num_ranks) * num_ranks


def _pad_rows(tensors: Sequence[Tensor], config: Any, num_ranks: int) -> Tensor:
    padding = padded_vocabulary(config, num_ranks) - config.vocab_size
    return torch.nn.functional.pad(tensors[0], (0, 0, 0, padding))


def _same(tensors: Sequence[Tensor], config: Any, num_ranks: int) -> Tensor:
    return tensors[0]


FORMS: dict[str, tuple[Any, Any]] = {
    "qkv": (_fuse_qkv, _split_qkv),
    "gate_up": (_fuse_gate_up, _split_gate_up),
    "vocabulary": (_pad_rows, lambda whole, config, num_ranks: [whole[: config.vocab_size]]),
    "same": (_same, lambda whole, config, num_ranks: [whole]),
}


def shard(part: Part, weights: Mapping[str, Tensor], config: Any, rank: int, num_ranks: int) -> Tensor:
    """One tensor rank's piece of one of Megatron's parameters, from the decoder's whole weights."""
    missing = [name for name in part.names if name not in weights]
    if missing:
        raise ValueError(f"received weights without {missing[0]!r}; expected a state dict of this config's decoder: pass all")
    whole = FORMS[part.form][0]([weights[name] for name in part.names], config, num_ranks)
    return whole if part.dim is None else whole.chunk(num_ranks, part.dim)[rank]


def unshard(part: Part, shards: Sequence[Tensor], config: Any) -> dict[str, Tensor]:
    """The decoder's weights that one of Megatron's parameters is made of, from every tensor rank's piece."""
    whole = shards[0] if part.dim is None else torch.cat(list(shards), part.dim)
    return dict(zip(part.names, FORMS[part.form][1](whole, config, len(shards)), strict=True))
