"""The merged time line: one trace of all ranks, a process each, on rank 0's clock, with memory as a counter.

For ui.perfetto.dev or chrome://tracing. Of many ranks, evenly spread ones.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .profile_trace import read_json_trace, read_trace, thinned

MAX_RANKS = 16  # in one file, which a browser has to hold
DEVICE_THREADS = 10_000_000  # streams are threads from here on, apart from the host's


def chosen_ranks(num_ranks: int) -> list[int]:
    count = min(num_ranks, MAX_RANKS)
    return [index * num_ranks // count for index in range(count)]


def merge(traces: Sequence[dict[str, Any]], names: Sequence[str], offsets: Sequence[float]) -> dict[str, Any]:
    """Of traces in torch's JSON: `names` their processes', `offsets` how far each clock is ahead (microseconds)."""
    base = traces[0].get("baseTimeNanoseconds", 0)
    events: list[dict[str, Any]] = []
    for process, (raw, name, offset) in enumerate(zip(traces, names, offsets, strict=True)):
        shift = (raw.get("baseTimeNanoseconds", 0) - base) / 1e3 - offset
        events += _heads(process, name)
        streams: set[int] = set()
        for event in raw["traceEvents"]:
            if event.get("ph") in ("M", "i", "I") or not isinstance(event.get("tid"), int):
                continue  # torch's names of threads and processes, memory (below), and its frame around all
            moved = {**event, "pid": process, "ts": event["ts"] + shift}
            if _is_on_device(event):
                moved["tid"] = DEVICE_THREADS + event["tid"]
                streams.add(event["tid"])
            if "id" in event:
                moved["id"] = f"{process}.{event['id']}"
            events.append(moved)
        events += [_named("thread_name", process, DEVICE_THREADS + stream, f"stream {stream}") for stream in sorted(streams)]
        start = base / 1e3 + offset
        for time, allocated, _ in thinned(read_trace(raw).memory):
            events.append({
                "ph": "C", "name": "memory", "pid": process, "tid": 0, "ts": time - start, "args": {"MiB": allocated / 2**20},
            })  # fmt: skip
    return {"displayTimeUnit": "ms", "baseTimeNanoseconds": base, "traceEvents": events}


def _heads(process: int, name: str) -> list[dict[str, Any]]:
    order = {"ph": "M", "name": "process_sort_index", "pid": process, "tid": 0, "args": {"sort_index": process}}
    return [_named("process_name", process, 0, name), order]


def _named(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _is_on_device(event: dict[str, Any]) -> bool:
    return str(event.get("cat", "")).startswith("gpu_") or event.get("cat") == "kernel" or "stream" in event.get("args", {})


def write_merged(path: Path, traces: Sequence[Path], names: Sequence[str], offsets: Sequence[float]) -> None:
    merged = merge([read_json_trace(trace) for trace in traces], names, offsets)
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=3) as file:
        json.dump(merged, file)
