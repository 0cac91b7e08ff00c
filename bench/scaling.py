"""What benches of several ranks share: starting the ranks, and the bandwidth between two.

Run     by `context_parallel` and `pipeline`, which start their own ranks
Writes  DIR/<machine>/<date>-<commit>.json, where the suite's rows are
Expect  on a CPU all ranks share its cores, one thread each: with more ranks than cores a time can at best be that of the cores,
        and shows the shape of scaling, not the speed of a cluster
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from ..parallel.mesh import Mesh, num_processes
from .measure import Report, interquartile_range, synchronise
from .rows import RESULTS, BadResults, Row
from .table import table, terminal_columns


def device_of() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rank_counts(device: torch.device) -> list[int]:
    """Two and four ranks: on GPUs as many of these as there are cards for."""
    return [n for n in (2, 4) if device.type == "cpu" or torch.cuda.device_count() >= n]


def run(
    name: str, description: str | None, worker: Callable[[bool], None], alone: Callable[[bool], Sequence[Row]],
    absent: dict[str, str],
) -> int:  # fmt: skip
    """The command line of a bench. In a process that torchrun started, `worker(is_quick)`; otherwise `alone(is_quick)` gives
    the rows of one process, and ranks are started for the others. `absent`: what takes no part, and why."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default bench/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if num_processes() > 1:
        worker(arguments.quick)
        return 0
    device, started = device_of(), time.monotonic()
    counts = rank_counts(device)
    if not counts:
        print(f"{name}: received one GPU; expected two or more: nothing is measured", file=sys.stderr)
        return 1
    try:
        report = Report(arguments.out, device)
    except BadResults as error:
        parser.error(str(error))
    report.start(name, arguments.quick)
    report.absent(absent)
    for row in alone(arguments.quick):
        report.add(row)
    for num_ranks in counts:
        for row in _ranks(name, num_ranks, ["--quick"] * arguments.quick):
            report.add(row)
    report.results.machine["load_after"] = f"{os.getloadavg()[0]:.2f}"
    is_right = all(row.check in ("", "passed") for row in report.results.rows if row.bench == name)
    report.end("complete" if is_right else "failed: a check", time.monotonic() - started)
    print(table(report.results, [name], terminal_columns()), report.path, sep="\n")
    return int(not is_right)


def _ranks(name: str, num_ranks: int, arguments: Sequence[str]) -> list[Row]:
    """What the first of these ranks of a bench printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command += ["--module", f"{__package__}.{name}", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [Row(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def emit(mesh: Mesh, row: Row) -> None:
    """From a rank to the process that started it."""
    if mesh.is_first:
        print(json.dumps(asdict(row)), flush=True)
        print(f"{row.operation:<28} {row.shape} {row.candidate:<24} {row.milliseconds:9.1f} ms  {row.note}", file=sys.stderr)


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
        num_runs=len(milliseconds), note=note, check=check,
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
