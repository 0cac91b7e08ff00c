"""A trace of one call of each candidate of a case, for ui.perfetto.dev, and on CUDA a snapshot of its memory.

Run     warpline bench NAME --profile TEXT: the rows whose bench, operation, sizes, dtype or candidate contain TEXT, as the
        table has them, or as "operation [R=4096,F=512]"
Writes  DIR/<machine>/profile/<row>.trace.json.gz, and on CUDA <row>.memory.snapshot for pytorch.org/memory_viz
Expect  three calls after two, each under its number; nothing is timed. A TEXT that no row contains is refused, exit code 2
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field

import torch
from torch.profiler import ProfilerActivity, record_function

from .measure import Case, Report, name_of, synchronise
from .rows import slug

CALLS = 3


@dataclass
class Traced:
    """What was asked for, every row there was, and how many were traced."""

    words: str
    rows: list[str] = field(default_factory=list)
    num_traced: int = 0

    def refusal(self) -> str:
        """In one line, with the rows that are most like what was asked for."""
        nearest = "; ".join(difflib.get_close_matches(self.words, self.rows, n=4, cutoff=0.0))
        return f"received --profile {self.words!r}, and no row contains it; rows are {nearest or 'none, in the benches named'}"


def has_words(row: str, words: str) -> bool:
    """Whether a row contains the words, whatever spaces, commas and brackets stand between them."""
    return _spaced(words) in _spaced(row)


def _spaced(words: str) -> str:
    return re.sub(r"[\s,\[\]]+", " ", words).strip()


def profile(case: Case, report: Report, traced: Traced) -> None:
    device, folder = report.device, report.path.parent / "profile"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    for name, (call, prepare) in {**case.candidates, **case.limits}.items():
        row = f"{report.bench} {case.name} {name}"
        traced.rows.append(row)
        if not any(
            has_words(known, traced.words) for known in (row, f"{report.bench} {case.name} {name_of(case.dtype)} {name}")
        ):
            continue
        traced.num_traced += 1
        folder.mkdir(parents=True, exist_ok=True)
        inputs = case.inputs(torch.Generator(device).manual_seed(0))
        state = inputs if prepare is None else prepare(inputs)
        call(state)
        call(state)
        synchronise(device)
        path = folder / f"{slug(row)}.trace.json.gz"
        if device.type == "cuda":
            torch.cuda.memory._record_memory_history()
        with torch.profiler.profile(activities=activities, record_shapes=True, with_stack=False) as recorded:
            for number in range(CALLS):
                with record_function(f"call {number}"):
                    call(state)
            synchronise(device)
        recorded.export_chrome_trace(str(path))
        print(path)
        if device.type == "cuda":
            snapshot = folder / f"{slug(row)}.memory.snapshot"
            torch.cuda.memory._dump_snapshot(str(snapshot))
            torch.cuda.memory._record_memory_history(enabled=None)
            print(snapshot)
