"""Pipelines: a step by every schedule beside what is possible, and its bubble: of the table, of the order that ran, and seen.

Run     warpline bench pipeline [--quick] [--out DIR]; starts its own 2 and 4 ranks, and runs by name only
Expect  per schedule, ranks n and microbatches M, in milliseconds a step:
          measured            the step; its bubble is the share of it, over ranks, in which no forward or backward runs
          order, own costs    the order that each rank ran, replayed with the median cost of each forward and backward (on a CPU
                              its CPU seconds: cores that ranks share do not lengthen it), where nothing else takes time
          order, equal costs  the same where a forward and both gradients of every stage cost alike
          table               what parallel/pipeline.py predicts (of zbv: from M = 2n on)
          no bubble           the computation alone, spread over the ranks
          one process / n     the same step of a whole decoder in one process, divided by n, on a CPU by its cores if fewer
          bytes / bandwidth   a border's bytes over what one rank passes to the next, measured in the same run
        A step whose loss is not one process's is marked, and fails the run. With more ranks than cores only the two orders and
        the table say anything about a bubble.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.linear_logprob import linear_cross_entropy
from ..models.decoder import Decoder, DecoderConfig
from ..parallel import pipeline
from ..parallel.mesh import Mesh, Sizes, end_mesh, num_processes, start_mesh
from .measure import Report
from .rows import Row
from .scaling import bandwidth, cores, device_of, emit, fill_with_ranks, rounds, row_of, timed, work

STAGES_PER_RANK = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 2, "zbv": 2}
# Of a forward, both gradients, the input's and the weights'.
EQUAL = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


class Size(NamedTuple):
    """A decoder of equal layers, and a microbatch of one row."""

    width: int
    tokens: int
    layers: int = 8
    vocab: int = 64

    @property
    def config(self) -> DecoderConfig:
        heads = self.width // 32
        return DecoderConfig(
            vocab_size=self.vocab, width=self.width, num_layers=self.layers, num_heads=heads, num_kv_heads=heads, head_width=32,
            mlp_width=3 * self.width, tie_embeddings=False,
        )  # fmt: skip


def size_of(device: torch.device) -> Size:
    return Size(128, 128) if device.type == "cpu" else Size(2048, 4096)


def microbatches(is_quick: bool) -> tuple[int, ...]:
    return (4,) if is_quick else (4, 8, 16)


class Rows(NamedTuple):
    """One microbatch."""

    tokens: Tensor
    target: Tensor
    cu_seqlens: Tensor
    shared: None = None


def rows_of(size: Size, count: int, device: torch.device) -> list[Rows]:
    generator = torch.Generator().manual_seed(1)
    bounds = torch.tensor([0, size.tokens], dtype=torch.int32, device=device)
    drawn = torch.randint(size.vocab, (count, 2, size.tokens), generator=generator).to(device)
    return [Rows(tokens, target, bounds) for tokens, target in drawn]


def build(size: Size, device: torch.device) -> Decoder:
    with torch.no_grad():
        return Decoder(size.config).initialise(torch.Generator().manual_seed(0)).to(device)


def whole_loss(decoder: Decoder, row: Rows) -> Tensor:
    """Summed over the row's tokens, of a decoder that is whole."""

    def head(hidden_BSD: Tensor, weight_VD: Tensor) -> Tensor:
        return linear_cross_entropy(hidden_BSD[0], weight_VD, row.target, reduction="sum")

    return decoder(row.tokens[None], cu_seqlens=row.cu_seqlens, head=head)


# ---- Orders ----


class Action(NamedTuple):
    """One forward ("F"), backward ("B"), or half of one ("I", "W") of a stage on a microbatch."""

    kind: str
    stage: int
    microbatch: int


def replay(orders: Sequence[Sequence[Action]], cost: Callable[[Action], float]) -> tuple[float, float]:
    """(time of a step, its bubble) where each rank runs its order as soon as what it needs is there, and nothing else costs."""
    num_stages = 1 + max(action.stage for order in orders for action in order)
    ended: dict[Action, float] = {}
    clocks, places = [0.0] * len(orders), [0] * len(orders)
    busy = sum(cost(action) for order in orders for action in order)
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        before = list(places)
        for rank, order in enumerate(orders):
            while places[rank] < len(order):
                action = order[places[rank]]
                needed = [_end(ended, options) for options in _needed(action, num_stages)]
                if any(time is None for time in needed):
                    break
                clocks[rank] = max([clocks[rank], *(time for time in needed if time is not None)]) + cost(action)
                ended[action] = clocks[rank]
                places[rank] += 1
        if places == before:
            raise ValueError(
                f"received orders that wait for each other at {places}; expected those of one step: record them whole"
            )
    step = max(clocks)
    return step, 1 - busy / (len(orders) * step)


def _end(ended: dict[Action, float], options: Sequence[Action]) -> float | None:
    return next((ended[option] for option in options if option in ended), None)


def _needed(action: Action, num_stages: int) -> Iterator[list[Action]]:
    """What must have ended before, each as the actions that can stand for it."""
    kind, stage, microbatch = action
    if kind == "F" and stage > 0:
        yield [Action("F", stage - 1, microbatch)]
    if kind in "BI":
        yield [Action("F", stage, microbatch)]
        if stage + 1 < num_stages:
            yield [Action("B", stage + 1, microbatch), Action("I", stage + 1, microbatch)]
    if kind == "W":
        yield [Action("I", stage, microbatch)]


def predicted(schedule: str, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> float:
    """The bubble by the table of parallel/pipeline.py."""
    n, m = num_ranks, num_microbatches
    work = {"interleaved": stages_per_rank * m, "zero_bubble": 3 * stages_per_rank * m, "zbv": 6 * m}.get(schedule, m)
    return (n - 1) / (work + n - 1)


# ---- What a rank records ----


class Recorder:
    """The actions of a rank's stages in one step, with when they ran (seconds from a common start) and what they cost."""

    def __init__(self, parts: Sequence[Any], device: torch.device):
        self.device = device
        self.marks: list[tuple[Action, Any, Any, float]] = []
        for part in parts:
            stage = part.stage_index
            part.forward_one_chunk = self._timed(part.forward_one_chunk, stage, lambda _: "F")
            part.backward_one_chunk = self._timed(
                part.backward_one_chunk, stage, lambda named: "B" if named.get("full_backward", True) else "I"
            )
            part.backward_weight_one_chunk = self._timed(part.backward_weight_one_chunk, stage, lambda _: "W")

    def _timed(self, call: Callable[..., Any], stage: int, kind_of: Callable[[dict[str, Any]], str]) -> Callable[..., Any]:
        def timed(chunk: int, *arguments: Any, **named: Any) -> Any:
            began, spent = self._now(), time.thread_time()
            result = call(chunk, *arguments, **named)
            ended, spent = self._now(), time.thread_time() - spent
            self.marks.append((Action(kind_of(named), stage, chunk), began, ended, spent))
            return result

        return timed

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> list[tuple[Action, float, float]]:
        """(action, seconds that it ran, seconds that it cost) of the last step, in its order; begins anew."""
        found = []
        for action, began, ended, spent in self.marks:
            if self.device.type == "cuda":
                seconds = began.elapsed_time(ended) / 1e3
                found.append((action, seconds, seconds))
            else:
                found.append((action, ended - began, spent))
        self.marks = []
        return found


class Step(NamedTuple):
    """The steps of a schedule, of all ranks: milliseconds of each; the last one's orders; the median cost of an action by kind
    and stage, in seconds; in each step the share of it in which a rank computed, their mean; and the loss."""

    milliseconds: list[float]
    orders: list[list[Action]]
    costs: dict[tuple[str, int], float]
    computing: list[float]
    loss: float


def steps_of(schedule: str, num_rows: int, mesh: Mesh, size: Size, count: int) -> Step:
    group, device, rows = mesh.group("pipeline"), mesh.device, rows_of(size, num_rows, mesh.device)
    assert group is not None
    stages = pipeline.split(build(size, device), group, schedule, STAGES_PER_RANK[schedule])
    runner = pipeline.Pipeline(stages, group, schedule, num_rows, torch.empty(1, size.tokens, size.width, device=device))
    several = getattr(runner.schedule, "_stages", None)
    recorder = Recorder(several or [runner.schedule._stage], device)
    losses: list[Tensor] = []

    def head(index: int, hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        loss = linear_cross_entropy(hidden_TD, weight_VD, rows[index].target, reduction="sum")
        losses.append(loss.detach())
        return loss

    milliseconds, shares, ran, costs = [], [], [], {}
    for number in range(count + 1):
        losses.clear()
        taken = timed(partial(runner.step, rows, head), mesh, device)
        marks = recorder.take()
        if number:
            milliseconds.append(taken)
            shares.append(mesh.sum([1e3 * sum(seconds for _, seconds, _ in marks) / taken])[0] / mesh.size)
            ran.append(marks)
    for kind_and_stage in {(action.kind, action.stage) for action, _, _ in ran[-1]}:
        spent = [cost for marks in ran for action, _, cost in marks if (action.kind, action.stage) == kind_and_stage]
        costs[kind_and_stage] = statistics.median(spent)
    loss = mesh.sum([sum(x.item() for x in losses)])[0]
    mine = [[[*action] for action, _, _ in ran[-1]], [[*place, cost] for place, cost in costs.items()]]
    found = mesh.gather([mine], "pipeline")
    orders = [[Action(*action) for action in order] for order, _ in found]
    costs = {(kind, stage): cost for _, rank_costs in found for kind, stage, cost in rank_costs}
    return Step(milliseconds, orders, costs, shares, loss)


# ---- Rows ----


def alone(is_quick: bool) -> list[Row]:
    """One process: the whole decoder, a row at a time."""
    device = device_of()
    size = size_of(device)
    decoder, found = build(size, device), []
    for num_rows in microbatches(is_quick):
        rows = rows_of(size, num_rows, device)
        taken = rounds(partial(step_alone, decoder, rows), None, device, 3)
        found.append(row_of("one process", "measured", shape_of(1, num_rows, size), taken))
    return found


def step_alone(decoder: Decoder, rows: Sequence[Rows]) -> None:
    for row in rows:
        whole_loss(decoder, row).backward()


def shape_of(num_ranks: int, num_rows: int, size: Size) -> dict[str, int]:
    return {"n": num_ranks, "M": num_rows, "T": size.tokens, "D": size.width, "L": size.layers}


def worker(is_quick: bool) -> None:
    mesh = start_mesh(Sizes(pipeline=num_processes()))
    size, device = size_of(mesh.device), mesh.device
    group, decoder = mesh.group("pipeline"), build(size, device)
    assert group is not None
    rate, parallel = bandwidth(mesh, group), mesh.size if device.type == "cuda" else min(mesh.size, cores())
    for num_rows in microbatches(is_quick):
        rows = rows_of(size, num_rows, device)
        whole: list[float] = []

        def measure_alone(rows: list[Rows] = rows, taken: list[float] = whole) -> None:
            taken += rounds(partial(step_alone, decoder, rows), None, device, 3)

        mesh.on_first(measure_alone)
        with torch.no_grad():
            truth = sum(whole_loss(decoder, row).item() for row in rows)
        for schedule in STAGES_PER_RANK:
            step = steps_of(schedule, num_rows, mesh, size, 2 if is_quick else 3)
            for row in rows_of_step(schedule, step, shape_of(mesh.size, num_rows, size), truth):
                emit(mesh, row)
            operation, shape = f"pipeline, {schedule}", shape_of(mesh.size, num_rows, size)
            if mesh.is_first:
                spread = f"the step of one process over {parallel}"
                emit(mesh, row_of(operation, "one process / n", shape, [x / parallel for x in whole], spread))
            border = 2 * num_rows * size.tokens * size.width * 4
            words = f"{border / 2**20:.1f} MiB at {rate / 1e9:.2f} GB/s"
            emit(mesh, row_of(operation, "bytes / bandwidth", shape, [1e3 * border / rate], words))
    end_mesh(mesh)


def rows_of_step(schedule: str, step: Step, shape: dict[str, int], truth: float) -> Iterator[Row]:
    operation, num_ranks = f"pipeline, {schedule}", shape["n"]
    error = abs(step.loss - truth) / abs(truth)
    check = "passed" if error < 1e-4 else f"failed: loss {step.loss:.6g}, of one process {truth:.6g}"
    seen = 1 - statistics.median(step.computing)
    yield row_of(operation, "measured", shape, step.milliseconds, f"bubble {seen:.1%}", check)
    span, own = replay(step.orders, lambda action: step.costs[action.kind, action.stage])
    computation = 1e3 * span * (1 - own)
    bubbles = {
        "order, own costs": own, "order, equal costs": replay(step.orders, lambda action: EQUAL[action.kind])[1],
        "table": predicted(schedule, num_ranks, shape["M"], STAGES_PER_RANK[schedule]), "no bubble": 0.0,
    }  # fmt: skip
    for candidate, bubble in bubbles.items():
        yield row_of(operation, candidate, shape, [computation / (1 - bubble)], f"bubble {bubble:.1%}")


def fill(report: Report, is_quick: bool) -> None:
    """Its rows, of one process and of ranks, as `fill_with_ranks` says."""
    fill_with_ranks(report, is_quick, alone, {})


if __name__ == "__main__":
    work(worker)
