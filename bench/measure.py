"""How benches measure: candidates interleaved in one process, medians with their spread, peak memory, rows saved as they come.

Run     by the benches of this folder
Writes  RESULTS/<machine>/<bench>.json: what it ran on (card, driver, versions, commit), and one row per candidate and shape;
        rewritten after every row, so that a run that is cut off leaves complete rows
Expect  the spread is the interquartile range; a difference below it is no difference. On a GPU times come from events.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Row:
    """One candidate at one shape. `flops` and `bytes_moved` are what the operation needs, not what a candidate spends."""

    operation: str
    candidate: str
    shape: dict[str, int]
    dtype: str
    milliseconds: float
    spread: float
    tflops: float | None = None
    gbytes_per_second: float | None = None
    of_bare_products: float | None = None  # this row's time over that of the products the operation needs
    peak_mib: float | None = None
    error: float | None = None  # largest error against fp64, relative to the largest number
    eager_error: float | None = None
    of_copy: float | None = None  # bytes a second over those of a plain copy of as many bytes, in the same run
    host_microseconds: float | None = None  # from the call to its return, not waiting for the device
    note: str = ""


class Report:
    """The rows of one bench, on disk after every one."""

    def __init__(self, name: str, folder: Path, device: torch.device):
        self.machine = machine_of(device)
        self.rows: list[Row] = []
        self.path = folder / self.machine["card"].replace(" ", "-").lower() / f"{name}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        text = json.dumps({"machine": self.machine, "rows": [asdict(row) for row in self.rows]}, indent=1)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text + "\n")
        temporary.replace(self.path)
        print(line_of(row), flush=True)


def begin(name: str, description: str | None, quick: str) -> tuple[torch.device, Report, bool]:
    """A bench's command line: (device, report, whether it is quick); `quick` says what --quick leaves out."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, Report(name, arguments.out, device), arguments.quick


def line_of(row: Row) -> str:
    shape = " ".join(f"{name}={size}" for name, size in row.shape.items())
    parts = [f"{row.operation:<34} {shape:<28} {row.dtype:<5} {row.candidate:<22} {row.milliseconds:9.3f} ms ±{row.spread:.3f}"]
    figures = (
        ("{:6.3g} TFLOP/s", row.tflops), ("{:7.1f} GB/s", row.gbytes_per_second), ("{:.2f} × products", row.of_bare_products),
        ("{:.2f} of copy", row.of_copy), ("host {:5.0f} µs", row.host_microseconds),
        ("{:8.1f} MiB", row.peak_mib), ("error {:.1e}", row.error), ("(eager {:.1e})", row.eager_error),
    )  # fmt: skip
    parts += [words.format(number) for words, number in figures if number is not None]
    return "  ".join([*parts, row.note]).rstrip()


def machine_of(device: torch.device) -> dict[str, str]:
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for package in ("triton", "liger-kernel", "cut-cross-entropy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    card, driver = "cpu", "none"
    if device.type == "cuda":
        card, driver = torch.cuda.get_device_name(device), _driver()
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"card": card, "driver": driver, "date": date, "commit": _commit(), "processor": _processor(), **versions}


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except ImportError:
        return "unknown: nvidia-ml-py is absent"


def _commit() -> str:
    try:
        root = Path(__file__).resolve().parent
        done = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {torch.get_num_threads()} threads" if names else platform.machine()


def absent(module: str) -> str | None:
    """Why a peer cannot take part, or None: only a real import tells."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return f"{module} is not there: {str(error).splitlines()[0]}"
    return None


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float = 1.0
) -> dict[str, tuple[float, float]]:
    """Median and interquartile range, in milliseconds, of each candidate: A, B, C, A, B, C … after a warm-up of each."""
    timer = _gpu_milliseconds if device.type == "cuda" else _cpu_milliseconds
    for function in candidates.values():
        function()
        function()
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    started = time.monotonic()
    while (
        min(len(times) for times in taken.values()) < 3
        or (time.monotonic() - started < seconds * len(candidates) and len(next(iter(taken.values()))) < 200)
    ):  # fmt: skip
        for name, function in candidates.items():
            taken[name].append(timer(function))
    return {name: (statistics.median(times), _interquartile_range(times)) for name, times in taken.items()}


def _interquartile_range(times: list[float]) -> float:
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return high - low


def _cpu_milliseconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - started)


def _gpu_milliseconds(function: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def peak_mib(function: Callable[[], Any], device: torch.device) -> float | None:
    """The most memory a call held beyond what was held before it; GPU only."""
    if device.type != "cuda":
        return None
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def host_microseconds(function: Callable[[], Any], device: torch.device) -> float | None:
    """The host's median time for a call, with nothing waiting on the device; GPU only: on a CPU the call is the work."""
    if device.type != "cuda":
        return None
    taken = []
    for _ in range(20):
        torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        taken.append(1e6 * (time.perf_counter() - started))
    torch.cuda.synchronize()
    return statistics.median(taken)


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest error over the truth's largest number."""
    return ((actual.double() - truth.double()).abs().max() / truth.double().abs().max()).item()
