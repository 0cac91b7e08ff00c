"""A trace of one call of each candidate of a case, for ui.perfetto.dev, and on CUDA a snapshot of its memory.

Run     warpline bench NAME --profile TEXT: the rows whose operation, sizes or candidate contain TEXT
Writes  DIR/<machine>/profile/<row>.trace.json.gz, and on CUDA <row>.memory.snapshot for pytorch.org/memory_viz
Expect  three calls after two, each under its number; nothing is timed
"""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, record_function

from .measure import Case, Report, synchronise
from .rows import slug

CALLS = 3


def profile(case: Case, report: Report, words: str) -> None:
    device, folder = report.device, report.path.parent / "profile"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    for name, (call, prepare) in {**case.candidates, **case.limits}.items():
        row = f"{report.bench} {case.name} {name}"
        if words not in row:
            continue
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
