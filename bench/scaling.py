"""What benches of several ranks share: starting the ranks, and the bandwidth between two.

Run     by `context_parallel` and `pipeline`, which start their own ranks
Expect  on a CPU all ranks share its cores, one thread each: with more ranks than cores a time can at best be that of the cores,
        and shows the shape of scaling, not the speed of a cluster
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch
import torch.distributed as dist

from ..parallel.mesh import Mesh, num_processes
from .measure import LeftOut, Report, interquartile_range, self_spread, synchronise
from .rows import Row


def device_of() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rank_counts(device: torch.device) -> list[int]:
    """Two and four ranks: on GPUs as many of these as there are cards for."""
    return [n for n in (2, 4) if device.type == "cpu" or torch.cuda.device_count() >= n]


def fill_with_ranks(report: Report, is_quick: bool, alone: Callable[[bool], Sequence[Row]], absent: dict[str, str]) -> None:
    """The rows of the bench that the report is at: `alone(is_quick)` gives those of one process, the ranks started here the
    others. `absent`: what takes no part, and why. LeftOut with one GPU; CalledProcessError where a rank fails."""
    counts = rank_counts(report.device)
    if not counts:
        raise LeftOut("it needs two GPUs or more, and there is one")
    report.absent(absent)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as every rank has
    try:
        for row in alone(is_quick):
            report.add(row)
    finally:
        torch.set_num_threads(threads)
    for num_ranks in counts:
        for row in _ranks(report.bench, num_ranks, ["--quick"] * is_quick):
            report.add(row)


def _ranks(name: str, num_ranks: int, arguments: Sequence[str]) -> Iterator[Row]:
    """What the first of these ranks of a bench prints, as it comes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command += ["--module", f"{__package__}.{name}", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from (Row(**json.loads(line)) for line in process.stdout if line.startswith("{"))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, f"{name} on {num_ranks} ranks")


def work(worker: Callable[[bool], None]) -> None:
    """What such a bench's module does as a program, in each of the processes that torchrun starts for it."""
    if num_processes() == 1:
        sys.exit("one process has nobody to work with: `warpline bench` with this bench's name starts the ranks")
    torch.set_num_threads(1)
    worker("--quick" in sys.argv[1:])


def emit(mesh: Mesh, row: Row) -> None:
    """From a rank to the process that started it."""
    if mesh.is_first:
        print(json.dumps(asdict(row)), flush=True)


def timed(call: Callable[[], object], mesh: Mesh | None, device: torch.device) -> float:
    """Milliseconds of a call, all ranks together: of the slowest rank."""
    if mesh is not None:
        mesh.barrier()
    synchronise(device)
    started = time.perf_counter()
    call()
    synchronise(device)
    seconds = time.perf_counter() - started
    return 1e3 * (seconds if mesh is None else mesh.max([seconds])[0])


def rounds(call: Callable[[], object], mesh: Mesh | None, device: torch.device, count: int) -> list[float]:
    """Milliseconds of `count` calls after one that warms up."""
    return [timed(call, mesh, device) for _ in range(count + 1)][1:]


def cpu_milliseconds(call: Callable[[], object], mesh: Mesh | None) -> float:
    """A call's time on a core, of the rank that spends the most: ranks that share cores do not lengthen it."""
    spent = time.process_time()
    call()
    spent = 1e3 * (time.process_time() - spent)
    return spent if mesh is None else mesh.max([spent])[0]


def row_of(
    operation: str, candidate: str, shape: dict[str, int], milliseconds: Sequence[float], note: str = "", check: str = ""
) -> Row:
    return Row(
        operation, candidate, shape, "float32", statistics.median(milliseconds), interquartile_range(milliseconds),
        num_runs=len(milliseconds), self_spread=self_spread(milliseconds), note=note, check=check,
    )  # fmt: skip


def bandwidth(mesh: Mesh, group: dist.ProcessGroup, megabytes: int = 16) -> float:
    """Bytes a second that one rank passes to the next while it receives as many, all ranks at once: the best of five."""
    out = torch.ones(megabytes * 2**20 // 4, device=mesh.device)
    coming, rank, size = torch.empty_like(out), group.rank(), group.size()

    def exchange() -> None:
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, out, group=group, group_peer=(rank + 1) % size),
                dist.P2POp(dist.irecv, coming, group=group, group_peer=(rank - 1) % size),
            ]
        )
        for work in works:
            work.wait()

    return out.nbytes / (min(rounds(exchange, mesh, mesh.device, 5)) / 1e3)


def cores() -> int:
    return os.cpu_count() or 1
