"""What stands inside Megatron-core's `TransformerLayer`: attention, norms and gate of ours, plugged in by its `ModuleSpec`.

| in Megatron's place               | stands          | for                                                                |
|-----------------------------------|-----------------|--------------------------------------------------------------------|
| `core_attention`                  | `CoreAttention` | packed documents, context parallelism: without Transformer Engine  |
| `input_layernorm`, … `layer_norm` | `Norm`          | a norm under sequence parallelism: without Transformer Engine      |
| `activation_func`                 | `Gate`          | the gate in one pass                                               |
| `self_attn_bda`, `mlp_bda`        | `PostNormAdd`   | a norm behind a branch (Gemma)                                     |

Each also serves in a model of your own: `CoreAttention` takes Megatron's dense [S, B, N, H] and its packed [T, N, H]
(`PackedSeqParams`), rotated by Megatron, as well as this package's `PackedRow`.

**Source** megatron-core 0.16.1. **Limits** No dropout, no attention bias, causal masks only. Megatron's own packed rows
cannot lie over context ranks: it pads and cuts every document, `PackedRow` cuts the row.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from ..kernels.attention import attention
from ..kernels.rms_norm import rms_norm
from ..kernels.rope import rope
from ..kernels.swiglu import swiglu
from .context import ContextBatch, ring_attention


def parameter_device(config: Any) -> torch.device:
    """Where Megatron makes the parameters of a `TransformerConfig`."""
    return torch.device("cpu" if config.use_cpu_initialization else "cuda")


@dataclass
class PackedRow(PackedSeqParams):
    """A packed row's documents, and the rotary tables of this rank's tokens: (cos, sin) [T, H/2] of layers with a window
    (True) and without."""

    shared: ContextBatch | None = None
    rotary: dict[bool, tuple[Tensor, Tensor]] | None = None


class Norm(MegatronModule):
    """`rms_norm` in the place of a `LayerNorm`; its gradient is summed over tensor ranks where tokens lie over them."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6):
        super().__init__(config=config)
        self.eps, self.zero_centred = eps, config.layernorm_zero_centered_gamma
        neutral = 0.0 if self.zero_centred else 1.0
        device = parameter_device(config)
        self.weight = nn.Parameter(torch.full((hidden_size,), neutral, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.weight, eps=self.eps, zero_centred=self.zero_centred)


class Gate(nn.Module):
    """The MLP's gate: [..., 2F] of a tensor rank, gate rows before up rows, to [..., F]."""

    def __init__(self, config: Any):
        super().__init__()
        self.is_silu = config.activation_func is F.silu

    def forward(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return swiglu(gate, up) if self.is_silu else F.gelu(gate, approximate="tanh") * up


class PostNormAdd(nn.Module):
    """A branch's norm between the branch and its addition, in the place of Megatron's bias-dropout-add."""

    def __init__(self, config: Any):
        super().__init__()
        self.norm = Norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool):
        def add(branch_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            branch, bias = branch_and_bias
            return residual + self.norm(branch if bias is None else branch + bias)

        return add


class CoreAttention(MegatronModule):
    """`attention`, or over context ranks `ring_attention`, in the place of Megatron's core attention.

    `windows` repeats over the layers, 0 is all before a query; `softcap` and `has_sinks` as in `attention`, a sink per query
    head of this tensor rank. Rotates queries and keys itself where it is given a `PackedRow`.
    """

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, attention_dropout: float | None = None,
        softmax_scale: float | None = None, cp_comm_type: str | None = None, pg_collection: Any = None,
        *, windows: tuple[int, ...] = (0,), softcap: float | None = None, has_sinks: bool = False,
    ):  # fmt: skip
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout or attn_mask_type is not AttnMaskType.causal or attention_type != "self":
            received = f"attention_dropout {dropout}, mask {attn_mask_type}, {attention_type} attention"
            raise ValueError(f"received {received}; expected causal self attention without dropout: set config and spec so")
        self.group = pg_collection.cp
        window = windows[(layer_number - 1) % len(windows)] or None
        self.rule: dict[str, Any] = {"window": window, "softcap": softcap, "scale": softmax_scale}
        self.sinks = None
        if has_sinks:
            num_heads = config.num_attention_heads // pg_collection.tp.size()
            self.sinks = nn.Parameter(torch.zeros(num_heads, dtype=config.params_dtype, device=parameter_device(config)))
            set_tensor_model_parallel_attributes(self.sinks, True, 0, 1)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, attn_mask_type: Any = None,
        attention_bias: Tensor | None = None, packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:  # fmt: skip
        """[T, N, H] to [T, N, H] with `packed_seq_params`, else [S, B, N, H] to [S, B, N·H]; N and K of this tensor rank."""
        if attention_bias is not None:
            raise ValueError("received an attention bias; expected none: use rotary positions, windows or sinks")
        if isinstance(packed_seq_params, PackedRow):
            return self._row(query, key, value, packed_seq_params)
        if packed_seq_params is not None:
            if self.group.size() > 1:
                received = f"PackedSeqParams over {self.group.size()} context ranks"
                raise ValueError(f"received {received}; expected PackedRow: pack rows as MegatronEngine does")
            cu_seqlens = packed_seq_params.cu_seqlens_q.to(torch.int32)
            longest = packed_seq_params.max_seqlen_q
            return self._plain(query, key, value, cu_seqlens=cu_seqlens, max_seqlen=longest)
        if self.group.size() == 1:
            out = self._plain(*(x.transpose(0, 1) for x in (query, key, value))).transpose(0, 1)
        else:  # Megatron cuts each sequence as `Zigzag` cuts a row of one document
            num_tokens = len(query) * self.group.size()
            batch = ContextBatch.of((0, num_tokens), num_tokens, self.group, query.device)
            rows = zip(query.unbind(1), key.unbind(1), value.unbind(1), strict=True)
            out = torch.stack([ring_attention(*row, batch, sinks_N=self.sinks, **self.rule) for row in rows], 1)
        return out.flatten(2)

    def _row(self, query: Tensor, key: Tensor, value: Tensor, row: PackedRow) -> Tensor:
        shared, rotary = row.shared, row.rotary
        assert shared is not None and rotary is not None
        query, key = rope(query, key, *rotary[self.rule["window"] is not None])
        if self.group.size() == 1:
            return self._plain(query, key, value, cu_seqlens=shared.cu_seqlens, max_seqlen=row.max_seqlen_q)
        return ring_attention(query, key, value, shared, sinks_N=self.sinks, **self.rule)

    def _plain(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return cast(Tensor, attention(query, key, value, sinks_N=self.sinks, **self.rule, **options))


def _megatron_linears() -> tuple[type, type]:
    return ColumnParallelLinear, RowParallelLinear


def _engine_linears() -> tuple[type, type]:
    """Raises ImportError where Transformer Engine is not installed."""
    importlib.import_module("transformer_engine.pytorch")  # Megatron's wrappers import without it, and fail when they are made
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    return TEColumnParallelLinear, TERowParallelLinear


# name → (linear cut by rows, linear cut by columns), imported when asked for
LINEARS = {"megatron": _megatron_linears, "transformer_engine": _engine_linears}


def layer_spec(shape: Any, config: Any, linears: str = "megatron") -> ModuleSpec:
    """The spec of one `TransformerLayer` of a decoder's shape (`DecoderConfig`) under Megatron's `TransformerConfig`, in which
    `use_te_activation_func` is what makes Megatron's MLP call the gate."""
    if linears not in LINEARS:
        raise ValueError(f"linears is {linears!r}; expected one of {list(LINEARS)}")
    column, row = LINEARS[linears]()
    core = {"windows": shape.windows, "softcap": shape.attention_softcap, "has_sinks": shape.attention_sinks}
    head_norm = Norm if shape.query_key_norm else None
    add: Any = ModuleSpec(PostNormAdd, params={"config": config}) if shape.post_norms else get_bias_dropout_add
    attend = SelfAttentionSubmodules(
        linear_qkv=column, core_attention=ModuleSpec(CoreAttention, params=core), linear_proj=row,
        q_layernorm=head_norm, k_layernorm=head_norm,
    )  # fmt: skip
    submodules = TransformerLayerSubmodules(
        input_layernorm=Norm,
        self_attention=ModuleSpec(SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attend),
        self_attn_bda=add,
        pre_mlp_layernorm=Norm,
        mlp=ModuleSpec(MLP, submodules=MLPSubmodules(linear_fc1=column, activation_func=Gate, linear_fc2=row)),
        mlp_bda=add,
    )
    return ModuleSpec(TransformerLayer, submodules=submodules)
