"""What a run of the suite leaves on disk: one JSON file with the machine, the benches and a row per candidate and shape.

Run     by `measure` and `suite`; docs/benchmarks.md says what every field means
Writes  DIR/<machine>/<date>-<commit>.json, rewritten after every row, so that a run that is cut off leaves complete rows
Expect  a second run of the same day and commit replaces the rows of the benches it runs and keeps the others; `load` refuses a
        file that is not of this schema with the row and the field
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import tempfile
import types
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

SCHEMA = 2
RESULTS = Path(__file__).resolve().parent / "results"
MACHINE_KEYS = ("name", "processor", "card", "threads", "torch", "date", "commit")  # what comparisons, pictures and paths read
ABOVE_ZERO = ("milliseconds", "copy_gbytes_per_second", "product_tflops")  # others are over these
NOT_BELOW_ZERO = ("spread", "self_spread", "tflops", "gbytes_per_second", "of_ceiling", "tokens", "peak_mib", "split")
SMALLEST, LARGEST = 1e-12, 1e15  # of what is above zero, and of everything: ratios of such numbers stay finite and above zero
NOT_ALWAYS_FINITE = ("error", "eager_error")  # a NaN is found by the check, and the row is kept


class BadResults(ValueError):
    """A file that is not a results file, or cannot become one, in one line."""


@dataclass
class Row:
    """One candidate at one shape. Rates count what the operation needs, not what a candidate spends."""

    operation: str
    candidate: str
    shape: dict[str, int]
    dtype: str
    milliseconds: float  # median of a call
    spread: float  # interquartile range, milliseconds
    bench: str = ""
    num_runs: int = 0
    self_spread: float | None = None  # largest relative difference of the same code's medians; below it nothing differs
    tflops: float | None = None
    gbytes_per_second: float | None = None
    of_ceiling: float | None = None  # the time that the measured ceilings allow over the time taken
    tokens: int | None = None  # tokens of a call
    peak_mib: float | None = None
    host_microseconds: float | None = None  # from the call to its return, not waiting for the device
    joules: float | None = None  # of a call
    telemetry: dict[str, float | str] = field(default_factory=dict)
    error: float | None = None  # largest error against fp64, relative to the largest number
    eager_error: float | None = None  # that of the same formulas in plain torch, in the inputs' dtype
    check: str = ""  # "passed", or why not; empty where nothing was checked
    split: dict[str, float] = field(default_factory=dict)  # part of a stage's step → seconds a step
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """What makes two rows of two files the same measurement."""
        sizes = " ".join(f"{name}={size}" for name, size in self.shape.items())
        return self.bench, self.operation, sizes, self.dtype, self.candidate


@dataclass
class Bench:
    """How one bench ended: "running", "complete", "interrupted", "failed: …" or "left out: …"."""

    ended: str
    is_quick: bool
    seconds: float = 0.0
    absent: dict[str, str] = field(default_factory=dict)  # candidate → why it took no part


@dataclass
class Ceilings:
    """What this machine does with a large copy and a large matrix product, measured in the same run."""

    copy_gbytes_per_second: float
    product_tflops: dict[str, float]  # by dtype

    def __str__(self) -> str:
        products = [f"product {dtype} {rate:.3g} TFLOP/s" for dtype, rate in self.product_tflops.items()]
        return "; ".join([f"copy {self.copy_gbytes_per_second:.3g} GB/s", *products])

    def milliseconds(self, flops: float, bytes_moved: float, dtype: str) -> float:
        """The least time that the ceilings allow an operation of so many FLOPs and bytes."""
        return max(flops / self.product_tflops[dtype] / 1e9, bytes_moved / self.copy_gbytes_per_second / 1e6)


@dataclass
class Results:
    machine: dict[str, str | int]
    ceilings: Ceilings | None = None
    benches: dict[str, Bench] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    schema: int = SCHEMA


def load(path: Path) -> Results:
    """The file, checked field by field."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise BadResults(f"received {path}: {error}; expected a file that `warpline bench` wrote") from error
    results: Results = _checked(Results, content, path.name)
    _check_machine(results.machine, f"{path.name}.machine")
    firsts: dict[tuple[str, ...], int] = {}
    for number, key in enumerate(row.key for row in results.rows):
        if (first := firsts.setdefault(key, number)) != number:
            twice = f"{path.name}: received rows[{first}] and rows[{number}] of one key, {' / '.join(key)}"
            raise BadResults(f"{twice}; expected each measurement once: measure again, or take one out")
    return results


def save(results: Results, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(results), indent=1) + "\n")
    temporary.replace(path)


def check_writable(path: Path) -> None:
    """That `save` can write there, found out before anything is measured."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    except OSError as error:
        raise BadResults(f"received --out for {path}: {error.strerror}; expected a folder that can be written") from error


def path_of(folder: Path, machine: dict[str, str | int]) -> Path:
    return folder / slug(str(machine["name"])) / f"{str(machine['date'])[:10]}-{machine['commit']}.json"


def slug(words: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")


def _check_machine(machine: dict[str, str | int], where: str) -> None:
    missing = [name for name in MACHINE_KEYS if name not in machine]
    if missing:
        raise BadResults(f"{where}: received no {', '.join(missing)}; expected {', '.join(MACHINE_KEYS)}: measure again")
    load_before = machine.get("load_before", 0)
    try:
        float(load_before)
    except ValueError:
        raise _refused(f"{where}.load_before", load_before, float) from None


def _checked(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`: a dataclass, or what its fields are made of."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        for choice in get_args(kind):
            if _fits(choice, value):
                return _checked(choice, value, where)
        raise _refused(where, value, kind)
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__"):
        return _checked_fields(kind, value, where)
    if origin is list and isinstance(value, list):
        return [_checked(get_args(kind)[0], item, f"{where}[{number}]") for number, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {name: _checked(get_args(kind)[1], item, f"{where}.{name}") for name, item in value.items()}
    if not _fits(kind, value):
        raise _refused(where, value, kind)
    return value


def _checked_fields(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _refused(where, value, kind)
    if kind is Results and value.get("schema") != SCHEMA:
        raise BadResults(f"{where}: received schema {value.get('schema')!r}; expected {SCHEMA}: measure again")
    hints, known = get_type_hints(kind), {f.name: f for f in fields(kind)}
    needed = {name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    for name in [*sorted(set(value) - set(known)), *sorted(needed - set(value))]:
        verb = "unknown" if name in value else "missing"
        raise BadResults(f"{where}: received a {verb} field {name!r}; expected those of docs/benchmarks.md: measure again")
    checked = {name: _checked(hints[name], item, f"{where}.{name}") for name, item in value.items()}
    for name, item in checked.items():
        _check_range(name, item, f"{where}.{name}")
    return kind(**checked)


def _check_range(name: str, value: Any, where: str) -> None:
    """A number, or a dict of some, is finite, and where it must be above zero."""
    for part, number in value.items() if isinstance(value, dict) else [("", value)]:
        if isinstance(number, str | bool) or not isinstance(number, int | float):
            continue
        is_finite = (math.isfinite(number) and abs(number) <= LARGEST) or name in NOT_ALWAYS_FINITE
        is_low = (name in ABOVE_ZERO and number < SMALLEST) or (name in NOT_BELOW_ZERO and number < 0)
        if is_low or not is_finite:
            bound = f" of {SMALLEST:g} or more" if name in ABOVE_ZERO else " not below zero" if name in NOT_BELOW_ZERO else ""
            at = f"{where}.{part}" if part else where
            raise BadResults(
                f"{at}: received {number!r:.60}; expected a number{bound}, at most {LARGEST:g}: measure again, or mend the file"
            )


def _fits(kind: Any, value: Any) -> bool:
    if kind is float:
        return isinstance(value, float) or _fits(int, value)
    if kind is int:
        return type(value) is int and abs(value) < 2**63
    if kind in (str, bool):
        return type(value) is kind
    if kind is type(None):
        return value is None
    return isinstance(value, get_origin(kind) or dict)


def _refused(where: str, value: Any, kind: Any) -> BadResults:
    name = getattr(kind, "__name__", str(kind))
    return BadResults(f"{where}: received {value!r:.60}; expected {name}: measure again, or mend the file")
