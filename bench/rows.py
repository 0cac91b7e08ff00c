"""What a run of the suite leaves on disk: one JSON file with the machine, the benches and a row per candidate and shape.

Run     by `measure` and `suite`; docs/benchmarks.md says what every field means
Writes  DIR/<machine>/<date>-<commit>.json, rewritten after every row, so that a run that is cut off leaves complete rows
Expect  a second run of the same day and commit replaces the rows of the benches it runs and keeps the others; `load` refuses a
        file that is not of this schema with the row and the field
"""

from __future__ import annotations

import json
import re
import types
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

SCHEMA = 2
RESULTS = Path(__file__).resolve().parent / "results"


class BadResults(ValueError):
    """A file that is not a results file, in one line."""


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
        return _checked(Results, json.loads(path.read_text()), path.name)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadResults(f"received {path}: {error}; expected a file that `warpline bench` wrote") from error


def save(results: Results, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(results), indent=1) + "\n")
    temporary.replace(path)


def path_of(folder: Path, machine: dict[str, str | int]) -> Path:
    return folder / slug(str(machine["name"])) / f"{str(machine['date'])[:10]}-{machine['commit']}.json"


def slug(words: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")


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
    return kind(**{name: _checked(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def _fits(kind: Any, value: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (int, str, bool):
        return type(value) is kind
    if kind is type(None):
        return value is None
    return isinstance(value, get_origin(kind) or dict)


def _refused(where: str, value: Any, kind: Any) -> BadResults:
    name = getattr(kind, "__name__", str(kind))
    return BadResults(f"{where}: received {value!r:.60}; expected {name}: measure again, or mend the file")
