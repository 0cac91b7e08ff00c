"""Pipeline parallelism: layers over ranks, by PyTorch's schedules; microbatches of packed rows flow through.

Axis: `pipeline`, of n ranks. Sharded: the layers, cut by cost; the embedding on the first stage, the final norm, the output
matrix and the loss on the last. A tied embedding is on both, and its gradients are added up after a step.

| communication, M microbatches of T tokens, D wide, b a number | bytes a rank and stage                     |
|---------------------------------------------------------------|--------------------------------------------|
| forward: the branch and the residual stream to the next stage | 2·M·T·D·b                                  |
| backward: their gradients to the previous one                 | 2·M·T·D·b                                  |
| tied embeddings: one all-reduce a step, first and last stage  | V·D·b                                      |

| schedule      | stages a rank | bubble of M microbatches over n ranks, predicted |
|---------------|---------------|--------------------------------------------------|
| gpipe, 1f1b   | 1             | (n−1)/(M+n−1)                                    |
| interleaved   | v             | (n−1)/(v·M+n−1)                                  |
| zero_bubble   | v             | a third of 1f1b's and less (weights' gradients fill it) |
| zbv           | 2             | none where forward and both gradients cost alike |

**Source** GPipe, arXiv 1811.06965; PipeDream, arXiv 1806.03377; Megatron-LM, arXiv 2104.04473; zero bubble, arXiv 2401.10241.
**Limits** Microbatches of one step have one shape: pack them to the same number of tokens, the rest past the last boundary.
zero_bubble and zbv need torch 2.13 (2.11 fails, 2.12 was not tried). Every rank builds the whole decoder, and keeps it: what is
saved is the other layers' gradients and moments. No bubble has been measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

# name → (class, stages of a rank; None: as many as asked for)
SCHEDULES: dict[str, tuple[Any, int | None]] = {
    "gpipe": (ScheduleGPipe, 1),
    "1f1b": (Schedule1F1B, 1),
    "interleaved": (ScheduleInterleaved1F1B, None),
    "zero_bubble": (ScheduleInterleavedZeroBubble, None),
    "zbv": (ScheduleZBVZeroBubble, 2),
}

# These make a stage's two gradients apart, which torch 2.11 cannot do for an autograd.Function ("_input_metadata is invalid").
SPLIT = ("zero_bubble", "zbv")


def split_layers(layer_costs: Sequence[float], first_cost: float, last_cost: float, num_stages: int) -> list[tuple[int, int]]:
    """(first layer, end) of each stage, none empty, so that the dearest stage is as cheap as can be: the first stage also pays
    for the embedding, the last for the output matrix. Among equals, earlier stages are the shorter."""
    num_layers = len(layer_costs)
    if not 1 <= num_stages <= num_layers:
        raise ValueError(f"received {num_layers} layers for {num_stages} stages; expected a layer a stage: use fewer stages")
    sums = [0.0, *accumulate(layer_costs)]

    def cost(stage: int, start: int, end: int) -> float:
        extra = (first_cost if stage == 0 else 0.0) + (last_cost if stage == num_stages - 1 else 0.0)
        return sums[end] - sums[start] + extra

    # best[stage][end]: the dearest of the stages up to this one, which ends there; and where it began.
    best: list[dict[int, tuple[float, int]]] = [{end: (cost(0, 0, end), 0) for end in range(1, num_layers + 1)}]
    for stage in range(1, num_stages):
        row = {}
        for end in range(stage + 1, num_layers + 1):
            starts = range(stage, end)
            row[end] = min((max(best[-1][start][0], cost(stage, start, end)), start) for start in starts)
        best.append(row)
    ends, end = [], num_layers
    for stage in reversed(range(num_stages)):
        start = best[stage][end][1]
        ends.append((start, end))
        end = start
    return ends[::-1]


def stages_of(schedule: str, rank: int, num_ranks: int, stages_per_rank: int) -> list[int]:
    """Which stages a rank holds: round after round; in a V for zbv, so that the first and the last are on one rank."""
    if schedule == "zbv":
        return [rank, 2 * num_ranks - 1 - rank]
    return [rank + turn * num_ranks for turn in range(stages_per_rank)]


class Stage(nn.Module):
    """Some of a decoder's layers, under their names in it. The last one's head gives the loss of a microbatch."""

    decoder: Any

    def __init__(self, decoder: Any, start: int, end: int, index: int, num_stages: int, head: Callable[..., Tensor]):
        super().__init__()
        self.is_first, self.is_last, self.head = index == 0, index == num_stages - 1, head
        # A guide, not a part: the decoder's other layers are no parameters of this stage.
        object.__setattr__(self, "decoder", decoder)
        self.layers = nn.ModuleDict({str(layer): decoder.layers[layer] for layer in range(start, end)})
        if self.is_first or (self.is_last and decoder.config.tie_embeddings):
            self.embed_tokens = decoder.embed_tokens
        if self.is_last:
            self.norm = decoder.norm
            if not decoder.config.tie_embeddings:
                self.lm_head = decoder.lm_head

    def forward(self, *hidden: Tensor, tokens: Tensor, cu_seqlens: Tensor, labels: Tensor) -> Any:
        """`hidden`: the branch and the residual stream of the stage before; on the first, nothing. Rows are [1, …]."""
        context = self.decoder.context(tokens, cu_seqlens[0])
        branch: Any
        branch, residual = hidden if hidden else (None, self.decoder.embed(tokens))
        for layer in self.layers.values():
            branch, residual = layer(branch, residual, context)
        if not self.is_last:
            # The schedules detach in place what a stage gives, which a view refuses.
            return tuple(x.clone() if x._is_view() else x for x in (branch, residual))
        hidden_BSD, _ = self.norm(branch, residual)
        return self.head(hidden_BSD[0], self.decoder.output_weight, labels[0])[None]


class Batch(NamedTuple):
    """M microbatches of a step, on every rank: tokens and targets [M, T], boundaries int32 [M, num_documents + 1], padded by
    repeating the last one."""

    tokens: Tensor
    target: Tensor
    cu_seqlens: Tensor


class Pipeline:
    """A decoder's stages on this rank, and their schedule.

    `step(batch)` leaves gradients, and gives the sum of the microbatches' losses on the rank of the last stage, 0 on others.
    """

    def __init__(
        self,
        decoder: Any,
        group: dist.ProcessGroup,
        head: Callable[[Tensor, Tensor, Tensor], Tensor],
        *,
        schedule: str,
        num_microbatches: int,
        stages_per_rank: int = 1,
    ):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule is {schedule!r}; expected one of {list(SCHEDULES)}")
        if schedule in SPLIT and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
            raise ValueError(f"schedule is {schedule!r} on torch {torch.__version__}; expected torch >= 2.13: use interleaved")
        kind, fixed = SCHEDULES[schedule]
        stages_per_rank = stages_per_rank if fixed is None else fixed
        rank, num_ranks = group.rank(), group.size()
        num_stages = num_ranks * stages_per_rank
        config = decoder.config
        # In products a token: a layer's matrices, and the output matrix; looking up an embedding costs none.
        layer_cost = config.width * (2 * config.head_width * (config.num_heads + config.num_kv_heads) + 3 * config.mlp_width)
        ranges = split_layers([layer_cost] * config.num_layers, 0.0, config.width * config.vocab_size, num_stages)
        # In a V the first and the last stage are on one rank, and share the parameter itself.
        self.group, self.sums_tied = group, config.tie_embeddings and num_ranks > 1 and schedule != "zbv"
        device = decoder.embed_tokens.weight.device
        self.stages, self.modules = [], []
        for index in stages_of(schedule, rank, num_ranks, stages_per_rank):
            module = Stage(decoder, *ranges[index], index, num_stages, head)
            self.modules.append(module)
            self.stages.append(PipelineStage(module, index, num_stages, device, group=group))
        given = self.stages[0] if fixed == 1 else self.stages
        self.schedule = kind(given, num_microbatches, loss_fn=_loss, scale_grads=False)
        self.holds_first = any(module.is_first for module in self.modules)
        self.holds_last = any(module.is_last for module in self.modules)
        self.embedding = decoder.embed_tokens.weight

    def step(self, batch: Batch) -> Tensor:
        losses: list[Tensor] = []
        keywords = {"tokens": batch.tokens, "cu_seqlens": batch.cu_seqlens, "labels": batch.target}
        if self.holds_last:
            self.schedule.step(target=batch.target, losses=losses, return_outputs=False, **keywords)
        else:
            self.schedule.step(return_outputs=False, **keywords)
        if self.sums_tied:
            self._add_tied_gradients()
        total = torch.zeros((), device=batch.tokens.device, dtype=self.embedding.dtype)
        return torch.stack([loss.detach() for loss in losses]).sum() if losses else total

    def _add_tied_gradients(self) -> None:
        """Of the embedding on the first stage and the output matrix on the last; the others take part with zeros."""
        is_here = self.holds_first or self.holds_last
        gradient = self.embedding.grad if is_here and self.embedding.grad is not None else torch.zeros_like(self.embedding)
        dist.all_reduce(gradient, group=self.group)
        if is_here:
            self.embedding.grad = gradient


def _loss(output: Tensor, target: Tensor) -> Tensor:
    """The stage's head has made it already."""
    return output.sum()
