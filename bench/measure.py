"""How benches measure: candidates interleaved in one process on rotated inputs, medians with their spread, errors against fp64.

Run     by the benches of this folder, through `suite`
Writes  the rows of `results`, on disk as they come
Expect  A, B, C, A', A, B, C, A' …: A' is ours once more, and the difference of its median from A's, or of the two halves of any
        candidate's own runs, is the spread below which no difference is called one. Inputs are random, and as many copies
        take turns as do not fit into three times the last cache. On a GPU times come from events, behind a spin that lets the
        host run ahead.
"""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .machine import cache_bytes, held_bytes, machine_of, memory_watch
from .rows import BadResults, Bench, Results, Row, check_writable, load, path_of, save
from .table import folded, stage_words, terminal_columns
from .telemetry import Telemetry

ITSELF = "itself"
MIN_ROUNDS, MAX_ROUNDS = 5, 200
# What a peer that is installed can raise on a shape it does not do; torch.OutOfMemoryError is a RuntimeError.
REFUSALS = (ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError, NotImplementedError)
Inputs = dict[str, Any]


class LeftOut(RuntimeError):
    """Why a bench cannot run on this machine, in one line; that is no failure."""


class Candidate(NamedTuple):
    """`call` is timed, of what `prepare` made of the inputs beforehand; what it returns is compared with the reference's."""

    call: Callable[[Any], Any]
    prepare: Callable[[Inputs], Any] | None = None


@dataclass
class Case:
    """One operation at one shape. Ours is the first candidate.

    `reference(inputs, dtype)` computes in that dtype what `part` takes of a candidate's result: a list of tensors. `flops` and
    `bytes_moved` are what the operation needs. `limits` are calls beside it, such as its bare products.
    """

    operation: str
    shape: dict[str, int]
    dtype: torch.dtype
    inputs: Callable[[torch.Generator], Inputs]
    candidates: dict[str, Candidate]
    reference: Callable[[Inputs, torch.dtype], Sequence[Tensor]] | None = None
    part: Callable[[Any, Inputs], Sequence[Tensor]] | None = None
    flops: float = 0.0
    bytes_moved: float = 0.0
    tokens: int | None = None
    limits: dict[str, Candidate] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        sizes = ",".join(f"{name}={size}" for name, size in self.shape.items())
        return f"{self.operation} [{sizes}]"


class Rounds(Protocol):
    """pytest-benchmark's fixture, as far as it is used: it calls one round at a time."""

    def pedantic(self, target: Callable[..., Any], *, setup: Callable[[], Any], rounds: int) -> Any: ...


class Report:
    """The rows of a run, on disk after every one; an earlier file of the same day and commit is continued. BadResults where
    none can be written."""

    def __init__(self, folder: Path, device: torch.device):
        self.device = device
        machine = machine_of(device)
        self.path = path_of(folder, machine)
        check_writable(self.path)
        try:
            self.results = load(self.path) if self.path.exists() else Results(machine)
        except BadResults as error:
            print(f"begun anew: {error}")
            self.results = Results(machine)
        self.results.machine = machine
        self.bench = ""

    def start(self, bench: str, is_quick: bool) -> None:
        self.bench = bench
        self.results.rows = [row for row in self.results.rows if row.bench != bench]
        self.results.benches[bench] = Bench("running", is_quick)

    def add(self, row: Row) -> None:
        row.bench = row.bench or self.bench
        self.results.rows.append(row)
        save(self.results, self.path)
        print(line_of(row, terminal_columns()), flush=True)

    def absent(self, reasons: Mapping[str, str]) -> None:
        known = self.results.benches[self.bench].absent
        for name, reason in reasons.items():
            if name not in known:
                known[name] = reason
                print(f"absent: {name}: {reason}", flush=True)

    def end(self, ended: str, seconds: float) -> None:
        bench = self.results.benches[self.bench]
        bench.ended, bench.seconds = ended, round(seconds, 1)
        save(self.results, self.path)


def line_of(row: Row, columns: int | None = None) -> str:
    """Of any length, or where that is more than `columns`, several lines with the numbers below the names."""
    shape = " ".join(f"{name}={size}" for name, size in row.shape.items())
    names = f"{row.operation:<34} {shape:<28} {row.dtype:<5} {row.candidate:<22}"
    parts = [f"{row.milliseconds:9.3f} ms ±{row.spread:.3f}"]
    is_streaming = row.tflops is not None and row.gbytes_per_second and row.tflops * 1e3 < 20 * row.gbytes_per_second
    figures = (
        ("{:6.3g} TFLOP/s", None if is_streaming else row.tflops),
        ("{:7.1f} GB/s", row.gbytes_per_second if is_streaming else None),
        ("{:.0%} of the ceiling", row.of_ceiling),
        ("host {:5.0f} µs", row.host_microseconds), ("{:8.1f} MiB", row.peak_mib), ("{:.3g} J", row.joules),
        ("error {:.1e}", row.error), ("(eager {:.1e})", row.eager_error),
    )  # fmt: skip
    parts += [words.format(number) for words, number in figures if number is not None]
    if row.check not in ("", "passed"):
        parts.append(row.check)
    if "throttled" in row.telemetry:
        parts.append(f"THROTTLED: {row.telemetry['throttled']}")
    parts += [*stage_words(row), row.note] if row.note else stage_words(row)
    line = f"{names} {'  '.join(parts)}"
    if columns is None or len(line) <= columns:
        return line
    titles = folded([row.operation, shape, row.dtype, row.candidate], columns, "")
    return f"{titles}\n{folded([part.strip() for part in parts], columns, '    ')}"


def absent(module: str) -> str | None:
    """Why a peer cannot take part, or None: only a real import tells."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return f"{module} is not there: {str(error).splitlines()[0]}"
    return None


# ---- One case ----


def measure(case: Case, rounds: Rounds, report: Report, telemetry: Telemetry, seconds: float) -> list[Row]:
    """Checks, times and reports every candidate of a case; `seconds` is what each may take."""
    device = report.device
    copies = _copies(case, device)
    report.absent(case.absent)
    results, calls = _prepared(case, copies, report)
    errors = _errors(case, copies[0], results)
    del results
    times = _timed(calls, rounds, device, seconds)
    ours = next(iter(case.candidates))
    itself = times.pop(ITSELF, None)
    rows = []
    for name, taken in times.items():
        row = _row(case, name, taken, report)
        row.self_spread = self_spread(taken)
        if itself is not None:
            row.self_spread = max(row.self_spread, _difference(times[ours], itself))
        if name in errors:
            row.error, row.eager_error, row.check = errors[name]
        call = partial(calls[name], 0)
        row.peak_mib, row.host_microseconds = peak_mib(call, device), host_microseconds(call, device)
        row.telemetry, row.joules = telemetry.watch(call, partial(synchronise, device), min(seconds, 0.5))
        report.add(row)
        rows.append(row)
    return rows


def _copies(case: Case, device: torch.device) -> list[Inputs]:
    """As many inputs, each from a seed of its own, as three caches hold; at least one, at most 64."""
    first = case.inputs(torch.Generator(device).manual_seed(0))
    size = sum(x.numel() * x.element_size() for x in first.values() if isinstance(x, Tensor))
    count = min(64, max(1, math.ceil(3 * cache_bytes(device) / max(size, 1))))
    return [first, *(case.inputs(torch.Generator(device).manual_seed(seed)) for seed in range(1, count))]


def _prepared(case: Case, copies: list[Inputs], report: Report) -> tuple[dict[str, Any], dict[str, Callable[[int], Any]]]:
    """(each candidate's result on the first inputs, calls by name of a copy's number); a peer that refuses is left out."""
    results: dict[str, Any] = {}
    calls: dict[str, Callable[[int], Any]] = {}
    everything = {**case.candidates, **case.limits}
    for name, (call, prepare) in everything.items():
        try:
            states: list[Any] = copies if prepare is None else _states(prepare, copies, report.device)
            result = call(states[0])
            synchronise(report.device)
        except REFUSALS as error:
            if name == next(iter(everything)):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            report.absent({f"{name}, {case.name}": reason})
            continue
        if name in case.candidates:
            results[name] = result
        calls[name] = partial(_call_of, call, states)
    return results, calls


def _call_of(call: Callable[[Any], Any], states: list[Any], number: int) -> Any:
    return call(states[number % len(states)])


def _states(prepare: Callable[[Inputs], Any], copies: list[Inputs], device: torch.device) -> list[Any]:
    """What is made of the inputs, of as many of them as three caches hold: a graph can be far larger than its inputs."""
    before = held_bytes(device)
    states = [prepare(copies[0])]
    size = max(1, held_bytes(device) - before)
    count = min(len(copies), max(1, math.ceil(3 * cache_bytes(device) / size)))
    return states + [prepare(copy) for copy in copies[1:count]]


def _errors(case: Case, inputs: Inputs, results: Mapping[str, Any]) -> dict[str, tuple[float, float, str]]:
    """Candidate → (its largest relative error, plain torch's in the inputs' dtype, the verdict)."""
    if case.reference is None:
        return {}
    part = case.part or (lambda result, _: _tensors(result))
    truth = case.reference(inputs, torch.float64)
    eager_error = largest_error(case.reference(inputs, case.dtype), truth)
    # Ours may round each input and the output once more than the oracle: twice eager's error, and two roundings.
    allowed = 2 * eager_error + 2 * torch.finfo(case.dtype).eps
    found = {}
    for name, result in results.items():
        error = largest_error(part(result, inputs), truth)
        verdict = "passed" if error <= allowed else f"failed: error {error:.1e}, allowed {allowed:.1e}"
        found[name] = error, eager_error, verdict
    return found


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [x for x in result if isinstance(x, Tensor)]


def _timed(
    calls: Mapping[str, Callable[[int], Any]], rounds: Rounds, device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of every round by candidate; ours runs once more as ITSELF."""
    ours = next(iter(calls))
    order = {**calls, ITSELF: calls[ours]}
    timer = _timer(device)
    warm = sum(timer(partial(call, 0)) for call in order.values()) / 1e3
    count = min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds * len(order) / max(warm, 1e-6))))
    taken: dict[str, list[float]] = {name: [] for name in order}
    numbers = iter(range(count + 1))

    def one_round(number: int) -> None:
        for name, call in order.items():
            taken[name].append(timer(partial(call, number)))

    rounds.pedantic(one_round, setup=lambda: ((next(numbers),), {}), rounds=count)
    return taken


def _row(case: Case, name: str, taken: list[float], report: Report) -> Row:
    median, dtype = statistics.median(taken), name_of(case.dtype)
    row = Row(case.operation, name, case.shape, dtype, median, interquartile_range(taken), num_runs=len(taken))
    row.tokens = case.tokens
    row.tflops = case.flops / median / 1e9 if case.flops else None
    row.gbytes_per_second = case.bytes_moved / median / 1e6 if case.bytes_moved else None
    ceilings = report.results.ceilings
    if ceilings is not None and (case.flops or case.bytes_moved) and dtype in ceilings.product_tflops:
        row.of_ceiling = ceilings.milliseconds(case.flops, case.bytes_moved, dtype) / median
    return row


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- Numbers ----


def self_spread(taken: Sequence[float]) -> float:
    """Relative difference of the medians of the two halves of one candidate's runs."""
    return _difference(taken[: len(taken) // 2], taken[len(taken) // 2 :]) if len(taken) > 1 else 0.0


def _difference(one: Sequence[float], other: Sequence[float]) -> float:
    first, second = statistics.median(one), statistics.median(other)
    return abs(first - second) / min(first, second)


def interquartile_range(times: Sequence[float]) -> float:
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return high - low


def largest_error(actual: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    return max(relative_error(a, t) for a, t in zip(actual, truth, strict=True))


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Largest error over the truth's largest number; NaN counts as infinite."""
    error = ((actual.double() - truth.double()).abs().max() / truth.double().abs().max()).item()
    return math.inf if math.isnan(error) else error


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float = 1.0
) -> dict[str, tuple[float, float]]:
    """Median and interquartile range, in milliseconds, of each candidate: A, B, C, A, B, C … after a warm-up of each."""
    timer = _timer(device)
    for function in candidates.values():
        function()
        function()
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    started = time.monotonic()
    while (
        min(len(times) for times in taken.values()) < 3
        or (time.monotonic() - started < seconds * len(candidates) and len(next(iter(taken.values()))) < MAX_ROUNDS)
    ):  # fmt: skip
        for name, function in candidates.items():
            taken[name].append(timer(function))
    return {name: (statistics.median(times), interquartile_range(times)) for name, times in taken.items()}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _timer(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    return _gpu_milliseconds if device.type == "cuda" else _cpu_milliseconds


def _cpu_milliseconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - started)


SPIN_CYCLES = 1_000_000  # about 0.5 ms, in which the host issues what follows: else an event waits for the host's launches


def _gpu_milliseconds(function: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(SPIN_CYCLES)
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def peak_mib(function: Callable[[], Any], device: torch.device) -> float | None:
    """The most memory a call holds beyond what is held before it; of its first call, what it keeps from then on counts."""
    with memory_watch(device) as watch:
        function()
    return watch.peak_mib


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
