"""The decoder: Llama 3, Qwen 3, Mistral, Gemma 2 and 3, and gpt-oss's attention, in one module on the functions of `kernels/`.

Families differ in the fields of `DecoderShape` alone; `huggingface_config.py` has the table.

Parameters carry the Hugging Face names without the prefix `model.` (`layers.0.self_attn.q_proj.weight`, …, and
`lm_head.weight` where embeddings are not tied), so import and export move tensors and convert nothing.

Shapes: tokens [B, S]; packed documents are one row (B = 1) with `cu_seqlens` int32 [num_documents + 1].
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from ..kernels.attention import attention
from ..kernels.rms_norm import rms_norm
from ..kernels.rope import rope, rope_tables
from ..kernels.swiglu import swiglu
from ..parallel.context import ContextBatch
from .rope_scaling import AnyRopeScaling, scaled_rope_tables

INITIAL_NUMBERS = 2**20  # that one generator gives: part of what a seed means


class DecoderShape(BaseModel):
    """Sizes and switches but the vocabulary.

    Attention: `windows` repeats over the layers; a window counts the keys that a query sees, itself included, and 0 sees all
    before it. Layers with a window rotate by `local_rope_theta`, unscaled, where it is given. Scores are multiplied by
    `query_scalar`^−½ (default: head_width), then capped at ±`attention_softcap`. `attention_sinks` adds a learned score per
    head that takes a share and gives nothing (gpt-oss), `attention_bias` a bias to q, k, v and o, `query_key_norm` Qwen 3's
    norms. Norms: `zero_centred_norms` multiply by 1 + weight; `post_norms` norm each branch again before it is added (Gemma).
    `scale_embeddings` multiplies them by width^½, rounded to their dtype. `logit_softcap` is not applied here: whoever makes
    logits passes it to the kernels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    width: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_width: PositiveInt
    mlp_width: PositiveInt
    max_positions: PositiveInt = 4096
    windows: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: AnyRopeScaling | None = None
    local_rope_theta: PositiveFloat | None = None
    query_scalar: PositiveInt | None = None
    attention_softcap: PositiveFloat | None = None
    attention_sinks: bool = False
    attention_bias: bool = False
    query_key_norm: bool = False
    norm_eps: PositiveFloat = 1e-6
    zero_centred_norms: bool = False
    post_norms: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    mlp_bias: bool = False
    scale_embeddings: bool = False
    tie_embeddings: bool = True
    logit_softcap: PositiveFloat | None = None
    init_std: PositiveFloat = 0.02

    def window(self, layer: int) -> int | None:
        """How many keys a query of this layer sees; None: all before it."""
        return self.windows[layer % len(self.windows)] or None

    @model_validator(mode="after")
    def _heads_divide(self) -> "DecoderShape":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "choose num_kv_heads among its divisors"
            )
        if self.head_width % 2:
            raise ValueError(f"head_width={self.head_width} is odd; rotary embeddings rotate pairs, choose an even width")
        return self


class DecoderConfig(DecoderShape):
    """A decoder: its shape and its vocabulary."""

    vocab_size: PositiveInt


class KeyValueCache:
    """Keys and values of B sequences, right-padded to `max_positions`: per layer [B, max_positions, K, H]; `length_B` int32
    counts what is valid.
    """

    def __init__(self, config: DecoderConfig, num_sequences: int, max_positions: int, device: torch.device, dtype: torch.dtype):
        shape = (num_sequences, max_positions, config.num_kv_heads, config.head_width)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.length_B = torch.zeros(num_sequences, dtype=torch.int32, device=device)
        self.longest = 0  # an upper bound of length_B kept on the host, so that attention reads no further

    def check_room(self, num_sequences: int, num_new: int) -> None:
        """Refuse a batch of another size, and tokens past the end, on the host's numbers alone."""
        if num_sequences != self.length_B.shape[0]:
            raise ValueError(
                f"the cache holds {self.length_B.shape[0]} sequences, received {num_sequences}; make one per batch"
            )
        max_positions = self.keys[0].shape[1]
        if self.longest + num_new > max_positions:
            raise ValueError(
                f"the cache holds {max_positions} positions, {self.longest} are taken and {num_new} more were received; "
                "make a longer cache"
            )

    def append(
        self, layer: int, position_BS: Tensor, key_BSKH: Tensor, value_BSKH: Tensor, longest: int
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values at their positions; return the views [B, longest, K, H] that hold all so far."""
        row_B1 = torch.arange(position_BS.shape[0], device=position_BS.device)[:, None]
        self.keys[layer][row_B1, position_BS] = key_BSKH.to(self.keys[layer].dtype)
        self.values[layer][row_B1, position_BS] = value_BSKH.to(self.values[layer].dtype)
        return self.keys[layer][:, :longest], self.values[layer][:, :longest]

    def select(self, row_R: Tensor) -> None:
        """Keep only these rows (sequences that ended are dropped from the batch)."""
        self.keys = [key.index_select(0, row_R) for key in self.keys]
        self.values = [value.index_select(0, row_R) for value in self.values]
        self.length_B = self.length_B.index_select(0, row_R)


@dataclass(frozen=True)
class _Context:
    """What every layer of one forward pass shares."""

    rotary: dict[bool, tuple[Tensor, Tensor]]  # cos and sin of layers with a window (True) and without
    cu_seqlens: Tensor | None
    shared: ContextBatch | None  # the row lies over a context group, and these are this rank's tokens
    cache: KeyValueCache | None
    position_BS: Tensor
    longest: int


class _Norm(nn.Module):
    def __init__(self, width: int, config: DecoderConfig):
        super().__init__()
        self.zero_centred, self.eps = config.zero_centred_norms, config.norm_eps
        self.weight = nn.Parameter(torch.full((width,), _neutral(config)))

    def forward(self, hidden: Tensor, residual: Tensor | None = None):
        if residual is not None:
            hidden = hidden.to(residual.dtype)  # under autocast a branch is bf16 and the residual stream fp32
        return rms_norm(hidden, self.weight, eps=self.eps, residual=residual, zero_centred=self.zero_centred)


class _Attention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        scale = (config.query_scalar or config.head_width) ** -0.5
        self.rule = {"window": config.window(layer), "softcap": config.attention_softcap, "scale": scale}
        query_width, key_width = config.num_heads * config.head_width, config.num_kv_heads * config.head_width
        self.q_proj = nn.Linear(config.width, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.width, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.width, key_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_width, config.width, bias=config.attention_bias)
        self.sinks = nn.Parameter(torch.zeros(config.num_heads)) if config.attention_sinks else None
        if config.query_key_norm:
            self.q_norm = _Norm(config.head_width, config)
            self.k_norm = _Norm(config.head_width, config)

    def forward(self, hidden_BSD: Tensor, context: _Context) -> Tensor:
        config = self.config
        heads = (-1, config.head_width)
        query, key, value = (project(hidden_BSD).unflatten(-1, heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        q_norm, k_norm = (self.q_norm.weight, self.k_norm.weight) if config.query_key_norm else (None, None)
        query, key = rope(
            query, key, *context.rotary[self.rule["window"] is not None], q_norm_weight=q_norm, k_norm_weight=k_norm,
            eps=config.norm_eps, zero_centred=config.zero_centred_norms,
        )  # fmt: skip
        if context.cache is not None:
            offset_B = context.cache.length_B
            key, value = context.cache.append(self.layer, context.position_BS, key, value, context.longest)
            mixed = self._attend(query, key.to(query.dtype), value.to(query.dtype), query_offset=offset_B)
        elif context.shared is not None:
            mixed = context.shared.attend(query[0], key[0], value[0], sinks_N=self.sinks, **self.rule)[None]
        elif context.cu_seqlens is not None:
            mixed = self._attend(query[0], key[0], value[0], cu_seqlens=context.cu_seqlens)[None]
        else:
            mixed = self._attend(query, key, value)
        return self.o_proj(mixed.flatten(2))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Attention without its log-sum-exp, hence one tensor."""
        return cast(Tensor, attention(query, key, value, sinks_N=self.sinks, **self.rule, **options))


def _gelu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate)·up by the tanh formula, rounded between the two as in Hugging Face's Gemma."""
    return F.gelu(gate, approximate="tanh") * up


_GATES = {"silu": swiglu, "gelu_tanh": _gelu_gate}


class _Mlp(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=config.mlp_bias)
        self.gate = _GATES[config.activation]

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        return self.down_proj(self.gate(self.gate_proj(hidden_BSD), self.up_proj(hidden_BSD)))


class _Layer(nn.Module):
    """The norms' names are Hugging Face's: `post_attention_layernorm` stands before the MLP or, with `post_norms`, behind the
    attention.
    """

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.has_post_norms = config.post_norms
        self.self_attn = _Attention(config, layer)
        self.mlp = _Mlp(config)
        self.input_layernorm = _Norm(config.width, config)
        self.post_attention_layernorm = _Norm(config.width, config)
        if config.post_norms:
            self.pre_feedforward_layernorm = _Norm(config.width, config)
            self.post_feedforward_layernorm = _Norm(config.width, config)

    def forward(self, branch_BSD: Tensor | None, residual_BSD: Tensor, context: _Context) -> tuple[Tensor, Tensor]:
        """Takes the last layer's branch, not yet added to the residual stream, so that the addition fuses with the norm."""
        if branch_BSD is None:
            normed = self.input_layernorm(residual_BSD)
        else:
            normed, residual_BSD = self.input_layernorm(branch_BSD, residual_BSD)
        branch_BSD = self.self_attn(normed, context)
        if not self.has_post_norms:
            normed, residual_BSD = self.post_attention_layernorm(branch_BSD, residual_BSD)
            return self.mlp(normed), residual_BSD
        branch_BSD = self.post_attention_layernorm(branch_BSD)
        normed, residual_BSD = self.pre_feedforward_layernorm(branch_BSD, residual_BSD)
        return self.post_feedforward_layernorm(self.mlp(normed)), residual_BSD


class Decoder(nn.Module):
    """A decoder of the shape that its config describes.

    `decoder(tokens_BS, *, cu_seqlens=None, head=None, cache=None, shared=None)` returns the final normed hidden states
    [B, S, D], or, with `head`, what `head(hidden_BSD, output_weight_VD)` returns. `cu_seqlens` (int32 [num_documents + 1],
    from 0 to S) packs documents into one row (B = 1): positions restart and attention ends at each boundary. With `cache`,
    row b's tokens continue after its `length_B[b]` cached positions; the caller then adds to `length_B` how many of the S
    tokens were real. With `shared` (context parallelism), the row's documents are its, and tokens and results are this rank's.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(_Layer(config, layer) for layer in range(config.num_layers))
        self.norm = _Norm(config.width, config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)

    @property
    def output_weight(self) -> Tensor:
        """The output matrix [V, D]: the embedding itself when tied."""
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> "Decoder":
        """Fresh weights by `initial_values`, from a seed that the generator gives."""
        seed = int(torch.randint(2**62, (), generator=generator))
        for name, parameter in self.named_parameters():
            shape = tuple(parameter.shape)
            parameter.copy_(initial_values(self.config, name, seed, shape, (0,) * len(shape), shape))
        return self

    def forward(
        self,
        tokens_BS: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        head: Callable | None = None,
        cache: KeyValueCache | None = None,
        shared: ContextBatch | None = None,
    ):
        context = self.context(tokens_BS, cu_seqlens, cache, shared)
        branch, residual = None, self.embed(tokens_BS)
        for layer in self.layers:
            branch, residual = layer(branch, residual, context)
        hidden_BSD, _ = self.norm(branch, residual)
        return hidden_BSD if head is None else head(hidden_BSD, self.output_weight)

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """[B, S, D]: where the residual stream begins."""
        embedded_BSD = self.embed_tokens(tokens_BS)
        if not self.config.scale_embeddings:
            return embedded_BSD
        return embedded_BSD * torch.tensor(self.config.width**0.5, dtype=self.embed_tokens.weight.dtype)

    def context(
        self,
        tokens_BS: Tensor,
        cu_seqlens: Tensor | None,
        cache: KeyValueCache | None = None,
        shared: ContextBatch | None = None,
    ) -> _Context:
        """What every layer of a forward pass shares."""
        if tokens_BS.ndim != 2:
            raise ValueError(f"tokens have shape {tuple(tokens_BS.shape)}; pass [B, S] (packed documents: [1, T])")
        num_sequences, num_positions = tokens_BS.shape
        if cu_seqlens is not None and (num_sequences != 1 or cache is not None):
            raise ValueError(
                f"cu_seqlens packs documents into one row without a cache; received {num_sequences} row(s) and "
                f"{'no cache' if cache is None else 'a cache'}"
            )
        if shared is not None and (num_sequences != 1 or cache is not None or cu_seqlens is not None):
            raise ValueError(f"shared is one row without a cache or cu_seqlens of its own; received {num_sequences} row(s)")
        position_S = torch.arange(num_positions, device=tokens_BS.device)
        longest = num_positions
        if shared is not None:
            position_BS = shared.position_T()[None]
        elif cu_seqlens is not None:
            document_S = torch.searchsorted(cu_seqlens[1:].long(), position_S, right=True)
            start_S = cu_seqlens.long()[document_S.clamp(max=cu_seqlens.numel() - 1)]
            position_BS = (position_S - start_S)[None]
        elif cache is not None:
            cache.check_room(num_sequences, num_positions)
            position_BS = cache.length_B[:, None].long() + position_S
            longest = cache.longest + num_positions
        else:
            position_BS = position_S[None].expand(num_sequences, -1)
        return _Context(self._rotary(position_BS), cu_seqlens, shared, cache, position_BS, longest)

    def _rotary(self, position_BS: Tensor) -> dict[bool, tuple[Tensor, Tensor]]:
        config, is_fp64 = self.config, next(self.parameters()).dtype == torch.float64
        dtype = torch.float64 if is_fp64 else torch.float32
        tables = scaled_rope_tables(config.rope_scaling, position_BS, config.head_width, config.rope_theta, dtype)
        if config.local_rope_theta is None:
            return {False: tables, True: tables}
        return {False: tables, True: rope_tables(position_BS, config.head_width, config.local_rope_theta, dtype=dtype)}


def initial_values(
    config: DecoderShape, name: str, seed: int, whole: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...]
) -> Tensor:
    """fp32 of this shape: the part at `offset` of a fresh parameter of shape `whole`. Normal(0, init_std) for every matrix,
    residual outputs divided by sqrt(2·num_layers) (GPT-2's rule), biases and sinks 0, norms neutral. Blocks of rows have
    generators of their own, so that no rank draws what it does not hold.
    """
    if len(shape) == 1:
        return torch.full(shape, _neutral(config) if name.endswith("norm.weight") else 0.0)
    is_residual_output = name.endswith(("o_proj.weight", "down_proj.weight"))
    std = config.init_std / (2 * config.num_layers) ** 0.5 if is_residual_output else config.init_std
    rows_per_block = max(1, INITIAL_NUMBERS // whole[1])
    drawn = torch.empty(shape)
    for first in range(offset[0] // rows_per_block * rows_per_block, offset[0] + shape[0], rows_per_block):
        digest = hashlib.blake2b(f"{seed} {name} {first}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        rows = torch.empty(min(rows_per_block, whole[0] - first), whole[1]).normal_(0.0, std, generator=generator)
        start, stop = max(first, offset[0]), min(first + rows_per_block, offset[0] + shape[0])
        drawn[start - offset[0] : stop - offset[0]] = rows[start - first : stop - first, offset[1] : offset[1] + shape[1]]
    return drawn


def _neutral(config: DecoderShape) -> float:
    """A norm's weight that multiplies by 1."""
    return 0.0 if config.zero_centred_norms else 1.0


def num_parameters(decoder: Decoder) -> int:
    """Parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in decoder.parameters())
