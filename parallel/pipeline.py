"""Pipeline parallelism: layers over ranks, by PyTorch's schedules; microbatches of packed rows flow through.

Axis: `pipeline`, of n ranks. Sharded: the layers, cut by cost; the embedding on the first stage, the final norm, the output
matrix and the loss on the last. A tied embedding is on both, and its gradients are added up after a step.

| communication, M microbatches of T tokens, D wide, b a number | bytes, each border between ranks           |
|---------------------------------------------------------------|--------------------------------------------|
| forward: the residual stream to the next stage                | M·T·D·b                                    |
| backward: its gradient to the previous one                    | M·T·D·b                                    |
| tied embeddings: one all-reduce a step, first and last stage  | V·D·b                                      |

| schedule      | stages a rank | bubble of M microbatches over n ranks, where a forward and both gradients cost alike |
|---------------|---------------|--------------------------------------------------------------------------------------|
| gpipe, 1f1b   | 1             | (n−1)/(M+n−1)                                                                        |
| interleaved   | v             | (n−1)/(v·M+n−1)                                                                      |
| zero_bubble   | v             | (n−1)/(3·v·M+n−1)                                                                    |
| zbv           | 2             | (n−1)/(6·M+n−1), from M = 2n on                                                      |

**Source** GPipe, arXiv 1811.06965; PipeDream, arXiv 1806.03377; Megatron-LM, arXiv 2104.04473; zero bubble, arXiv 2401.10241.
**Limits** Rows of one step have one number of tokens: the rest lies past the last boundary. zero_bubble and zbv need torch 2.13
(2.11 fails, 2.12 was not tried), and parameters that are not sharded: with FSDP2 below them, torch 2.13 gives wrong gradients
without a word (seen: a norm 17 % off).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Protocol

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


class Row(Protocol):
    """One microbatch, a packed row, as this rank sees it. Every row of a step has as many tokens here."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def cu_seqlens(self) -> Tensor | None: ...
    @property
    def shared(self) -> Any: ...


Head = Callable[[int, Tensor, Tensor], Tensor]


class Stage(nn.Module):
    """Some of a decoder's layers, under their names in it; the first has the embedding too, the last the final norm and the
    output matrix."""

    decoder: Any
    rows: Sequence[Row] = ()
    head: Head

    def __init__(self, decoder: Any, start: int, end: int, index: int, num_stages: int):
        super().__init__()
        self.index, self.is_first, self.is_last = index, index == 0, index == num_stages - 1
        # A guide, not a part: the decoder's other layers are no parameters of this stage.
        object.__setattr__(self, "decoder", decoder)
        self.layers = nn.ModuleDict({str(layer): decoder.layers[layer] for layer in range(start, end)})
        if self.is_first or (self.is_last and decoder.config.tie_embeddings):
            self.embed_tokens = decoder.embed_tokens
        if self.is_last:
            self.norm = decoder.norm
            if not decoder.config.tie_embeddings:
                self.lm_head = decoder.lm_head

    def forward(self, *hidden: Tensor, index: Tensor) -> Any:
        """[1, …, D] of the stage before (on the first stage, nothing) to this one's, of row `index` of `rows`; on the last
        stage to what `head(index, hidden_TD, output_weight_VD)` gives, as [1] where that is a scalar."""
        number = int(index)  # schedules cut tensors alone
        row = self.rows[number]
        context = self.decoder.context(row.tokens[None], row.cu_seqlens, shared=row.shared)
        branch: Any = None
        residual = hidden[0] if hidden else self.decoder.embed(row.tokens[None])
        for layer in self.layers.values():
            branch, residual = layer(branch, residual, context)
        if not self.is_last:
            # The sum that the next norm begins with: one tensor travels, not two.
            return residual + branch.to(residual.dtype)
        hidden_BSD, _ = self.norm(branch, residual)
        found = self.head(number, hidden_BSD[0], self.decoder.output_weight)
        return found.reshape(1).clone() if isinstance(found, Tensor) and found.dim() == 0 else found  # schedules refuse views


def split(decoder: Any, group: dist.ProcessGroup, schedule: str, stages_per_rank: int = 1) -> list[Stage]:
    """This rank's stages of a decoder, which then lets go of every other layer."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}; expected one of {list(SCHEDULES)}")
    if schedule in SPLIT and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        raise ValueError(f"schedule is {schedule!r} on torch {torch.__version__}; expected torch >= 2.13: use interleaved")
    fixed = SCHEDULES[schedule][1]
    stages_per_rank = stages_per_rank if fixed is None else fixed
    num_stages = group.size() * stages_per_rank
    config = decoder.config
    # In products a token: a layer's matrices, and the output matrix; looking up an embedding costs none.
    layer_cost = config.width * (2 * config.head_width * (config.num_heads + config.num_kv_heads) + 3 * config.mlp_width)
    ranges = split_layers([layer_cost] * config.num_layers, 0.0, config.width * config.vocab_size, num_stages)
    indices = stages_of(schedule, group.rank(), group.size(), stages_per_rank)
    stages = [Stage(decoder, *ranges[index], index, num_stages) for index in indices]
    # What no stage of this rank holds is a name without tensors.
    del decoder.layers
    decoder.layers = nn.ModuleDict({name: layer for stage in stages for name, layer in stage.layers.items()})
    if not any(stage.is_last for stage in stages):
        del decoder.norm
        if not config.tie_embeddings:
            del decoder.lm_head
    if not any(hasattr(stage, "embed_tokens") for stage in stages):
        del decoder.embed_tokens
    return stages


class Pipeline:
    """A decoder's stages on this rank, and the schedule of a step of `num_rows` rows, whose hidden states between stages are
    `hidden` (its shape, dtype and device)."""

    def __init__(self, stages: Sequence[Stage], group: dist.ProcessGroup, schedule: str, num_rows: int, hidden: Tensor):
        self.stages, self.num_rows = stages, num_rows
        num_stages = group.size() * len(stages)
        between = hidden.detach().requires_grad_()
        loss = torch.zeros(1, dtype=statistics_dtype(hidden), device=hidden.device, requires_grad=True)
        parts = [
            PipelineStage(
                stage, stage.index, num_stages, hidden.device, group=group,
                input_args=() if stage.is_first else (between,), output_args=(loss if stage.is_last else between,),
            )
            for stage in stages
        ]  # fmt: skip
        kind, fixed = SCHEDULES[schedule]
        self.schedule = kind(parts[0] if fixed == 1 else parts, num_rows, loss_fn=_loss, scale_grads=False)
        self.holds_last = any(stage.is_last for stage in stages)

    def step(self, rows: Sequence[Row], head: Head) -> None:
        """Leaves gradients of the sum over rows of `head(index, hidden_TD, output_weight_VD)`, a scalar made on the last
        stage."""
        index = torch.arange(self.num_rows)
        for stage in self.stages:
            stage.rows, stage.head = rows, head
        if self.holds_last:
            self.schedule.step(index=index, target=index, losses=[], return_outputs=False)
        else:
            self.schedule.step(index=index, return_outputs=False)


def statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _loss(output: Tensor, target: Tensor) -> Tensor:
    """The stage's head has made it already."""
    return output.sum()


def forward(
    stages: Sequence[Stage], group: dist.ProcessGroup, rows: Sequence[Row], head: Head, hidden: Tensor, places: Sequence[int]
) -> list[Any]:
    """What `head(index, hidden_TD, output_weight_VD)` gives for each row, on the rank of the last stage; elsewhere nothing.

    All rows pass a stage before any passes the rank's next one. `places`: which rank of the group holds each stage.
    """
    mine = {stage.index: stage for stage in stages}
    for stage in stages:
        stage.rows, stage.head = rows, head
    found: list[Any] = []
    waiting: list[Any] = []
    passed: list[Tensor] = []
    rank = group.rank()
    for index, owner in enumerate(places):
        if owner != rank:
            continue
        given, passed = passed, []
        for number in range(len(rows)):
            inputs: tuple[Tensor, ...] = ()
            if index > 0 and places[index - 1] == rank:
                inputs = (given[number],)
            elif index > 0:
                received = torch.empty_like(hidden)
                dist.recv(received, group=group, group_src=places[index - 1])
                inputs = (received,)
            output = mine[index](*inputs, index=torch.tensor(number))
            if mine[index].is_last:
                found.append(output)
            elif places[index + 1] == rank:
                passed.append(output)
            else:
                waiting.append((dist.isend(output, group=group, group_dst=places[index + 1]), output))
    for work, _ in waiting:
        work.wait()
    return found
