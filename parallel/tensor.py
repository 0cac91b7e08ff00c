"""Tensor and sequence parallelism: matrices over heads, MLP width and vocabulary, hidden states between them over tokens.

Axis: `tensor`, of n ranks. Sharded: N and K (q, k, v by rows, o by columns), F (gate and up by rows, down by columns), V
(embedding and output matrix by rows, uneven where n does not divide it), and between the blocks S, padded to a multiple of n.
Where n does not divide K, every rank keeps all key heads, repeats them to lcm(K, n) and takes its own. Norms, and the biases of
o and down, are replicated.

| collective, per layer and rank                                              | bytes, b a number, s = S/n  |
|-----------------------------------------------------------------------------|-----------------------------|
| forward: 2 all-gathers of hidden                                            | 2·(n−1)·s·D·b               |
| forward: 2 reduce-scatters                                                  | 2·(n−1)·s·D·b               |
| backward: their conjugates                                                  | 4·(n−1)·s·D·b               |
| once a row: behind the embedding, before the output matrix, and backwards   | 4·(n−1)·s·D·b               |
| the losses' own, once a row: 7 numbers for each of X tokens that count      | (n−1)·7·X·4                 |
| once an update: all-reduce of the gradients of R replicated numbers         | 2·(n−1)/n·R·b               |

Losses leave the hidden states' gradient partial (`reduce_d_hidden=False`): the last all-gather's conjugate sums it.

**Source** Megatron-LM, arXiv 1909.08053; sequence parallelism, arXiv 2205.05198.
**Limits** No key/value cache. N must be a multiple of n, and F too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels.vocabulary_sweep import all_gather

# ---- The conjugate pair: gather tokens, and sum and scatter them ----


def _all_gather(x: Tensor, group: dist.ProcessGroup, num_tokens: int) -> Tensor:
    """[B, s, …] of every rank to [B, num_tokens, …]."""
    return all_gather(x, group).transpose(0, 1).reshape(x.shape[0], -1, *x.shape[2:])[:, :num_tokens]


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, S, …], a part of a sum on every rank, to this rank's [B, s, …] of the sum; padded with zeros."""
    share = -(-x.shape[1] // group.size())
    padded = x.new_zeros(x.shape[0], share * group.size(), *x.shape[2:])
    padded[:, : x.shape[1]] = x
    parts = padded.view(x.shape[0], group.size(), share, *x.shape[2:]).transpose(0, 1).contiguous()
    out = x.new_empty(x.shape[0], share, *x.shape[2:])
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(out, parts.view(-1, *out.shape[1:]), group=group)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, num_tokens):
        ctx.group = group
        return _all_gather(x, group, num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        return _reduce_scatter(d_y, ctx.group), None, None


class _SumAndScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.num_tokens = group, x.shape[1]
        return _reduce_scatter(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        return _all_gather(d_y, ctx.group, ctx.num_tokens), None


# ---- Modules that stand where whole ones stood ----


class _RowLinear(nn.Linear):
    """Some columns of a matrix: its product is a part of a sum, to which one rank adds the bias."""

    adds_bias = True

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias if self.adds_bias else None)


class _OwnHeads(nn.Linear):
    """All heads of a matrix, repeated, of which this rank takes its own."""

    def __init__(self, whole: nn.Linear, num_heads: int, repeats: int, own: slice):
        super().__init__(whole.in_features, whole.out_features, bias=whole.bias is not None, device="meta")
        self.weight, self.bias = whole.weight, whole.bias
        self.num_heads, self.repeats, self.own = num_heads, repeats, own

    def forward(self, x: Tensor) -> Tensor:
        heads = super().forward(x).unflatten(-1, (self.num_heads, -1))
        return heads.repeat_interleave(self.repeats, -2)[..., self.own, :].flatten(-2)


class _VocabularyEmbedding(nn.Embedding):
    """Some rows of an embedding: ids of other rows give zeros. Summed over ranks, and scattered over tokens."""

    start = 0
    group: dist.ProcessGroup

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens - self.start
        is_here = (local >= 0) & (local < self.num_embeddings)
        found = super().forward(local.masked_fill(~is_here, 0))
        return _SumAndScatter.apply(found.masked_fill(~is_here[..., None], 0.0), self.group)


@dataclass(frozen=True)
class TensorShards:
    """What `apply` did: for every parameter the dim that it is cut along and where every rank's part begins and ends there
    (None: replicated); `head` is what the losses take."""

    group: dist.ProcessGroup
    parts: dict[str, tuple[int, list[tuple[int, int]]] | None]
    head: dict[str, Any]


def _bounds(total: int, size: int) -> list[tuple[int, int]]:
    return [(total * rank // size, total * (rank + 1) // size) for rank in range(size)]


def _cut(x: nn.Parameter, dim: int, bounds: list[tuple[int, int]], rank: int) -> nn.Parameter:
    start, stop = bounds[rank]
    return nn.Parameter(x.detach().narrow(dim, start, stop - start).clone(), requires_grad=x.requires_grad)


def apply(model: Any, group: dist.ProcessGroup) -> TensorShards:
    """Cuts a decoder in place to this rank's part; it then takes whole batches of tokens on every rank, and gives whole hidden
    states and this rank's rows of the output matrix to its head."""
    rank, size, config = group.rank(), group.size(), model.config
    if config.num_heads % size or config.mlp_width % size:
        received = f"{config.num_heads} heads and an MLP of {config.mlp_width} over {size} ranks"
        raise ValueError(f"received {received}; expected multiples: choose a tensor axis that divides both")
    parts: dict[str, tuple[int, list[tuple[int, int]]] | None] = {name: None for name, _ in model.named_parameters()}

    def cut_rows(prefix: str, module: nn.Module) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            bounds = _bounds(parameter.shape[0], size)
            setattr(module, name, _cut(parameter, 0, bounds, rank))
            parts[f"{prefix}.{name}"] = (0, bounds)

    for index, layer in enumerate(model.layers):
        prefix, attention, mlp = f"layers.{index}", layer.self_attn, layer.mlp
        for name in ("q_proj", "k_proj", "v_proj"):
            if name == "q_proj" or config.num_kv_heads % size == 0:
                cut_rows(f"{prefix}.self_attn.{name}", getattr(attention, name))
            else:
                total = math.lcm(config.num_kv_heads, size)
                own = slice(rank * total // size, (rank + 1) * total // size)
                whole = getattr(attention, name)
                setattr(attention, name, _OwnHeads(whole, config.num_kv_heads, total // config.num_kv_heads, own))
        for name in ("gate_proj", "up_proj"):
            cut_rows(f"{prefix}.mlp.{name}", getattr(mlp, name))
        for owner, place, name in ((attention, "self_attn", "o_proj"), (mlp, "mlp", "down_proj")):
            parts[f"{prefix}.{place}.{name}.weight"] = _replace_by_columns(owner, name, rank, size)
        if attention.sinks is not None:
            bounds = _bounds(config.num_heads, size)
            attention.sinks, parts[f"{prefix}.self_attn.sinks"] = _cut(attention.sinks, 0, bounds, rank), (0, bounds)
    bounds = _bounds(config.vocab_size, size)
    embedding = _VocabularyEmbedding(bounds[rank][1] - bounds[rank][0], config.width, device="meta")
    embedding.weight = _cut(model.embed_tokens.weight, 0, bounds, rank)
    embedding.start, embedding.group = bounds[rank][0], group
    model.embed_tokens, parts["embed_tokens.weight"] = embedding, (0, bounds)
    if not config.tie_embeddings:
        model.lm_head.weight, parts["lm_head.weight"] = _cut(model.lm_head.weight, 0, bounds, rank), (0, bounds)
    _hook(model, group)
    head = {"group": group, "vocab_start": bounds[rank][0], "vocab_size": config.vocab_size, "reduce_d_hidden": False}
    return TensorShards(group, parts, head)


def _replace_by_columns(owner: nn.Module, name: str, rank: int, size: int) -> tuple[int, list[tuple[int, int]]]:
    whole = getattr(owner, name)
    bounds = _bounds(whole.in_features, size)
    part = _RowLinear(bounds[rank][1] - bounds[rank][0], whole.out_features, bias=whole.bias is not None, device="meta")
    part.weight, part.bias, part.adds_bias = _cut(whole.weight, 1, bounds, rank), whole.bias, rank == 0
    setattr(owner, name, part)
    return 1, bounds


def _hook(model: Any, group: dist.ProcessGroup) -> None:
    """Tokens are gathered before every block and before the head, and summed and scattered behind every block."""
    num_tokens = [0]

    def remember(module: nn.Module, arguments: tuple) -> None:
        num_tokens[0] = arguments[2].position_BS.shape[1]

    def gather(module: nn.Module, arguments: tuple) -> tuple:
        return _Gather.apply(arguments[0], group, num_tokens[0]), *arguments[1:]

    def scatter(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        return _SumAndScatter.apply(output, group)

    def gather_normed(module: nn.Module, arguments: tuple, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return _Gather.apply(outputs[0], group, num_tokens[0]), outputs[1]

    for layer in model.layers:
        layer.register_forward_pre_hook(remember)
    for block in _blocks(model):
        block.register_forward_pre_hook(gather)
        block.register_forward_hook(scatter)
    model.norm.register_forward_hook(gather_normed)


def _blocks(model: Any) -> Iterator[nn.Module]:
    for layer in model.layers:
        yield from (layer.self_attn, layer.mlp)
