"""Recording: torch.profiler over some steps of a stage, on every rank, into RUN/profile/rank_N.json.gz.

A step ends where its line goes into metrics.jsonl, so a run folder that watches this line begins and ends the recording; it
ends the stage there, without a checkpoint. Recording begins behind a few barriers whose ends tell the ranks' clocks apart.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.library import Library
from torch.profiler import ProfilerActivity, profile, record_function

from ...parallel.mesh import Mesh
from .profile_trace import CALLS, GROUP, STEP
from .run import RunFolder

NUM_MARKS = 5


class Recorded(Exception):
    """The last step to record has ended."""


class RecordedRun(RunFolder):
    """A run of `num_before` steps, then `num_recorded` that are recorded; then `Recorded` is raised on every rank."""

    def __init__(self, path: Path, mesh: Mesh, num_before: int, num_recorded: int):
        super().__init__(path, writes=mesh.is_first)
        self.mesh, self.first, self.last = mesh, num_before, num_before + num_recorded
        self.marks: list[float] = []  # seconds since the epoch at which this rank left each barrier
        self.stack = ExitStack()
        self.profiler: profile | None = None
        self.step: Any = None

    def trace_path(self, rank: int) -> Path:
        return self.path / "profile" / f"rank_{rank}.json.gz"

    def append(self, name: str, record: dict[str, Any]) -> None:
        super().append(name, record)
        if name == "metrics.jsonl" and "loss" in record:
            self._step_ended(record["step"])

    def _step_ended(self, step: int) -> None:
        if self.step is not None:
            self._wait()
            self.step.__exit__(None, None, None)
        if step == self.first:
            self._begin()
        if step == self.last:
            self._end()
        if step >= self.first:
            self.step = record_function(f"{STEP}{step + 1}")
            self.step.__enter__()

    def _begin(self) -> None:
        is_cuda = self.mesh.device.type == "cuda"
        if not is_cuda and self.mesh.size > 1:
            self.stack.enter_context(named_groups())
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
        self.profiler = profile(activities=activities, record_shapes=True, profile_memory=True, acc_events=True)
        self.profiler.start()
        for _ in range(NUM_MARKS):
            self.mesh.barrier()
            self.marks.append(time.time())
        self._wait()

    def _end(self) -> None:
        assert self.profiler is not None
        self.profiler.stop()
        self.stack.close()
        path = self.trace_path(self.mesh.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(path))
        raise Recorded

    def _wait(self) -> None:
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)


@contextmanager
def named_groups() -> Iterator[None]:
    """Inside, every c10d call on CPU tensors writes its process group's name into the trace, as NCCL's kernels do by
    themselves."""
    library = Library("c10d", "IMPL")
    for name in CALLS:
        operator = getattr(torch.ops.c10d, name).default
        places = [index for index, argument in enumerate(operator._schema.arguments) if argument.name == "process_group"]

        def named(keys: Any, *arguments: Any, operator: Any = operator, place: int = places[0]) -> Any:
            group = dist.ProcessGroup.unbox(arguments[place])
            with record_function(f"{GROUP}{group.group_name}"):
                return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

        library.impl(name, named, "AutogradCPU", with_keyset=True)
    try:
        yield
    finally:
        library._destroy()


def clock_offsets(hosts: Sequence[str], marks: Sequence[Sequence[float]]) -> list[float]:
    """Of each rank, how far its clock is ahead of rank 0's: the median, over barriers and the ranks of its host (which share a
    clock), of how much later it left a barrier. In the marks' unit."""
    ahead = {
        host: median(mine - first for other, row in zip(hosts, marks, strict=True) if other == host
                     for mine, first in zip(row, marks[0], strict=True))
        for host in dict.fromkeys(hosts) if host != hosts[0]
    }  # fmt: skip
    return [ahead.get(host, 0.0) for host in hosts]
