"""Whole layers of a decoder that lies over ranks, one at a time: for generation, which needs a cache and few tokens.

No rank ever holds a second model: it holds its own parts, and the embedding, the output matrix and one layer whole. Each rank
generates for prompts of its own, and all make every forward pass together: one that is done takes part until the last one is.

| collective, per forward pass                       | ranks                         | bytes a rank                   |
|----------------------------------------------------|-------------------------------|--------------------------------|
| who is still generating: all-reduce                | all = n                       | 2·(n−1)/n·8                    |
| a layer of P numbers: all-gather of its parts      | shard × context × tensor = n  | (n−1)/n·(P+(m−1)·R)·b          |
| the same, to the other stages: broadcast           | pipeline                      | P·b                            |
| once: who has each of W tensors: all-gather        | pipeline = n                  | (n−1)·W·4                      |

R of a layer's numbers are replicated over the m ranks of `tensor`, and come from each. The rest of the model comes once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from .model import ParallelModel, local


class WholeDecoder:
    """Stands where generation expects a decoder. `template`: a decoder of the same configuration on the meta device.

    Enter it to gather what is not in a layer; leaving it waits for the other ranks.
    """

    def __init__(self, model: ParallelModel, template: Any):
        self.model, self.template, self.config = model, template, model.config
        self.mine, mesh = dict(model.named_parameters()), model.mesh
        self.owners = self._owners()
        axes = ("shard", "context", "tensor") if model.is_sharded else ("tensor",)
        self.part_group, self.part_ranks = mesh.group(*axes), mesh.ranks(*axes)
        self.outer: dict[str, Tensor] = {}

    def __enter__(self) -> WholeDecoder:
        names = [name for name in self.model.whole_shapes if not name.startswith("layers.")]
        self.outer = {name: x for name in names for x in self._gathered([name]).values()}
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            while self._someone_goes_on(False):
                for layer in range(self.config.num_layers):
                    self._layer(layer)
        self.outer = {}

    @property
    def output_weight(self) -> Tensor:
        return self.outer["embed_tokens.weight" if self.config.tie_embeddings else "lm_head.weight"]

    def __call__(self, tokens_BS: Tensor, *, cache: Any = None) -> Tensor:
        """[B, S] to the final hidden states [B, S, D], as a decoder's forward."""
        self._someone_goes_on(True)
        context = self.template.context(tokens_BS, None, cache)
        embedding = {"embed_tokens.weight": self.outer["embed_tokens.weight"]}
        branch, residual = None, functional_call(_Call(self.template, "embed"), _under("module", embedding), (tokens_BS,))
        for index, layer in enumerate(self.template.layers):
            branch, residual = functional_call(layer, self._layer(index), (branch, residual, context))
        hidden, _ = functional_call(self.template.norm, {"weight": self.outer["norm.weight"]}, (branch, residual))
        return hidden

    def _someone_goes_on(self, is_working: bool) -> bool:
        return self.model.mesh.sum([float(is_working)])[0] > 0

    def _layer(self, index: int) -> dict[str, Tensor]:
        prefix = f"layers.{index}."
        names = [name for name in self.model.whole_shapes if name.startswith(prefix)]
        return {name.removeprefix(prefix): x for name, x in self._gathered(names).items()}

    def _owners(self) -> dict[str, int]:
        """Which pipeline rank has each parameter (the first, of a tied embedding)."""
        model = self.model
        if model.pipeline_group is None:
            return dict.fromkeys(model.whole_shapes, 0)
        here = torch.tensor([float(name in self.mine) for name in model.whole_shapes], device=model.mesh.device)
        parts = [torch.empty_like(here) for _ in range(model.pipeline_group.size())]
        dist.all_gather(parts, here, group=model.pipeline_group)
        return dict(zip(model.whole_shapes, torch.stack(parts).argmax(0).tolist(), strict=True))

    @torch.no_grad()
    def _gathered(self, names: Sequence[str]) -> dict[str, Tensor]:
        """These parameters whole, in one exchange; all belong to one stage."""
        model = self.model
        owner, dtype = self.owners[names[0]], model.hidden_dtype
        is_here = model.mesh.place.pipeline == owner
        whole = {name: torch.empty(model.whole_shapes[name], dtype=dtype, device=model.mesh.device) for name in names}
        if is_here:
            flat = torch.cat([local(self.mine[name].detach()).to(model.mesh.device, dtype).flatten() for name in names])
            for place, part in zip(self._places(), self._parts(flat, names), strict=True):
                start = 0
                for name in names:
                    offset, shape = model.rectangle(name, *place)
                    count = torch.Size(shape).numel()
                    target = whole[name]
                    for dim, (begin, size) in enumerate(zip(offset, shape, strict=True)):
                        target = target.narrow(dim, begin, size)
                    target.copy_(part[start : start + count].view(shape))
                    start += count
        if model.pipeline_group is not None:
            flat = torch.cat([x.flatten() for x in whole.values()])
            dist.broadcast(flat, group=model.pipeline_group, group_src=owner)
            for x, part in zip(whole.values(), flat.split([x.numel() for x in whole.values()]), strict=True):
                x.copy_(part.view_as(x))
        return whole

    def _places(self) -> list[tuple[int, int]]:
        """(tensor rank, shard rank) of each rank that has a part, in the group's order."""
        sizes = self.model.mesh.sizes
        return [(rank % sizes.tensor, rank // sizes.tensor) for rank in range(len(self.part_ranks))]

    def _parts(self, flat: Tensor, names: Sequence[str]) -> list[Tensor]:
        if self.part_group is None:
            return [flat]
        sizes = [sum(torch.Size(self.model.rectangle(name, *place)[1]).numel() for name in names) for place in self._places()]
        padded = nn.functional.pad(flat, (0, max(sizes) - len(flat)))
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.part_group)
        return parts


class _Call(nn.Module):
    """A method of a module as a module's forward, so that it can be called with other parameters."""

    def __init__(self, module: Any, method: str):
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *arguments: Any) -> Any:
        return getattr(self.module, self.method)(*arguments)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": x for name, x in tensors.items()}
