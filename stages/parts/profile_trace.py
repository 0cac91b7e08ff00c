"""What one rank's trace says: compute, collectives and what of them is exposed, operators, memory, pipeline windows.

A trace is torch.profiler's; times are microseconds since the epoch (in float64: to a quarter of one). On a GPU compute is
kernels and copies, and collectives are NCCL's kernels, which name their group. On a CPU compute is time inside `aten::`
operators, and a collective lasts from its call to the end of gloo's work; gloo's events name no group, so `profile_record.py`
writes the group's name inside each call. Exposed is what no compute of the rank overlaps.
"""

from __future__ import annotations

import gzip
import itertools
import json
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...parallel.mesh import Sizes

Span = tuple[float, float]  # microseconds: start, end

STEP, GROUP = "warpline.step ", "warpline.group "
ALL_RANKS = "all ranks"
KERNEL_ROWS, MEMORY_POINTS = 40, 300
BACKWARD = "autograd::engine::evaluate_function"
# c10d's operators → (the name shown, gloo's event)
CALLS = {
    "allreduce_": ("all_reduce", "all_reduce"), "allreduce_coalesced_": ("all_reduce", "all_reduce"),
    "allgather_": ("all_gather", "all_gather"), "allgather_coalesced_": ("all_gather", "all_gather"),
    "allgather_into_tensor_coalesced_": ("all_gather", "all_gather"), "_allgather_base_": ("all_gather", "all_gather"),
    # gloo sums everything and keeps a part
    "reduce_scatter_": ("reduce_scatter", "all_reduce"), "_reduce_scatter_base_": ("reduce_scatter", "all_reduce"),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", "all_reduce"),
    "alltoall_": ("all_to_all", "all_to_all"), "alltoall_base_": ("all_to_all", "all_to_all"),
    "broadcast_": ("broadcast", "broadcast"), "reduce_": ("reduce", "reduce"), "gather_": ("gather", "gather"),
    "scatter_": ("scatter", "scatter"), "barrier": ("barrier", "barrier"), "send": ("send", "send"), "recv_": ("recv", "recv"),
}  # fmt: skip
POINT_TO_POINT = ("send", "recv")
BYTES = {
    "double": 8, "long": 8, "long int": 8, "float": 4, "int": 4, "half": 2, "c10::half": 2, "bfloat16": 2,
    "c10::bfloat16": 2, "byte": 1, "char": 1, "unsigned char": 1, "signed char": 1, "bool": 1,
}  # fmt: skip


# ---- Sets of spans ----


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time in spans that are apart and in order."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        elif end > start:
            merged.append((start, end))
    return merged


def subtract(spans: Iterable[Span], others: Iterable[Span]) -> list[Span]:
    """The time of `spans` that is in none of `others`."""
    left, cuts, first = [], union(others), 0
    for begin, end in union(spans):
        start = begin
        while first < len(cuts) and cuts[first][1] <= start:
            first += 1
        index = first
        while index < len(cuts) and cuts[index][0] < end:
            if cuts[index][0] > start:
                left.append((start, cuts[index][0]))
            start = max(start, cuts[index][1])
            index += 1
        if start < end:
            left.append((start, end))
    return left


def clip(spans: Iterable[Span], window: Span) -> list[Span]:
    return [(max(a, window[0]), min(b, window[1])) for a, b in spans if a < window[1] and b > window[0]]


def length(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)


# ---- A trace ----


class Event(NamedTuple):
    name: str
    kind: str  # the trace's category
    thread: int
    start: float
    end: float
    arguments: dict[str, Any]


class Trace(NamedTuple):
    """The events with a length, in order of their start; (time, bytes allocated, reserved) of the device that computes; the
    ranks of each process group, by its name."""

    events: list[Event]
    memory: list[tuple[float, int, int]]
    groups: dict[str, list[int]]
    default_group: str | None = None

    @property
    def on_gpu(self) -> bool:
        return any(event.kind == "kernel" for event in self.events)


def read_json_trace(path: Path) -> dict[str, Any]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def read_trace(raw: dict[str, Any]) -> Trace:
    """From torch's JSON."""
    base = raw.get("baseTimeNanoseconds", 0) / 1e3
    events, memory = [], []
    for event in raw["traceEvents"]:
        start, arguments = base + float(event.get("ts", 0.0)), event.get("args", {})
        if event.get("ph") == "X":
            thread = event["tid"] if isinstance(event["tid"], int) else -1
            end = start + event.get("dur", 0.0)
            events.append(Event(event["name"], event.get("cat", ""), thread, start, end, arguments))
        elif event.get("name") == "[memory]":
            found = arguments.get("Device Type"), start, arguments.get("Total Allocated", 0), arguments.get("Total Reserved", 0)
            memory.append(found)
    events.sort(key=lambda event: (event.start, -event.end))
    device_type = int(any(event.kind == "kernel" for event in events))  # c10's numbers: 0 CPU, 1 CUDA
    mine = sorted((time, allocated, reserved) for device, time, allocated, reserved in memory if device == device_type)
    configs = raw.get("distributedInfo", {}).get("pg_config", [])
    groups = {str(config["pg_name"]): list(config["ranks"]) for config in configs}
    default = next((str(config["pg_name"]) for config in configs if config.get("pg_desc") == "default_pg"), None)
    return Trace(events, mine, groups, default)


def steps(trace: Trace) -> list[Span]:
    """The recorded steps: on the host's clock, whose end waits for the device."""
    found = [event for event in trace.events if event.name.startswith(STEP) and event.kind == "user_annotation"]
    return [(event.start, event.end) for event in found]


# ---- Compute ----


def compute(trace: Trace) -> list[Span]:
    if trace.on_gpu:
        kinds = ("kernel", "gpu_memcpy", "gpu_memset")
        return union((e.start, e.end) for e in trace.events if e.kind in kinds and not _is_nccl(e))
    workers = {e.thread for e in trace.events if _gloo(e) and _gloo(e) not in POINT_TO_POINT}
    operators, calls = defaultdict(list), defaultdict(list)
    for event in trace.events:
        if event.kind == "cpu_op" and event.thread not in workers:
            if event.name.startswith("aten::"):
                operators[event.thread].append((event.start, event.end))
            elif event.name.startswith(("c10d::", "_c10d_functional::")):
                calls[event.thread].append((event.start, event.end))
    return union(span for thread, spans in operators.items() for span in subtract(spans, calls[thread]))


def operators(trace: Trace) -> list[tuple[str, int, float]]:
    """(name, calls, microseconds) in the recorded steps, dearest first: kernels on a GPU; on a CPU operators, each without
    those it calls."""
    window = _whole(trace)
    calls: dict[str, int] = defaultdict(int)
    times: dict[str, float] = defaultdict(float)
    for event, own in _own_times(trace):
        if window[0] <= event.start < window[1]:
            calls[event.name] += 1
            times[event.name] += own
    return sorted(((name, calls[name], times[name]) for name in calls), key=lambda row: (-row[2], row[0]))


def _own_times(trace: Trace) -> Iterator[tuple[Event, float]]:
    if trace.on_gpu:
        yield from ((event, event.end - event.start) for event in trace.events if event.kind == "kernel")
        return
    open_: dict[int, list[tuple[Event, list[float]]]] = defaultdict(list)  # by thread: what is being run, and its callees' time
    for event in (event for event in trace.events if event.kind == "cpu_op"):
        stack = open_[event.thread]
        while stack and stack[-1][0].end <= event.start:
            done, inner = stack.pop()
            yield done, done.end - done.start - inner[0]
        if stack:
            stack[-1][1][0] += event.end - event.start
        stack.append((event, [0.0]))
    for stack in open_.values():
        yield from ((event, event.end - event.start - inner[0]) for event, inner in stack)


def backward(trace: Trace) -> list[Span]:
    """When gradients are computed: on a GPU, the kernels that the backward's nodes launched."""
    nodes = [event for event in trace.events if event.name.startswith(BACKWARD)]
    if not trace.on_gpu:
        return union((event.start, event.end) for event in nodes)
    spans = {t: union((e.start, e.end) for e in nodes if e.thread == t) for t in {e.thread for e in nodes}}
    launched = {
        event.arguments.get("correlation")
        for event in trace.events
        if event.kind in ("cuda_runtime", "cuda_driver") and _is_inside(event.start, spans.get(event.thread, []))
    }
    kernels = (e for e in trace.events if e.kind == "kernel" and not _is_nccl(e))
    return union((e.start, e.end) for e in kernels if e.arguments.get("correlation") in launched)


def _is_inside(time: float, spans: Sequence[Span]) -> bool:
    index = bisect_right(spans, (time, float("inf"))) - 1
    return index >= 0 and spans[index][0] <= time < spans[index][1]


# ---- Collectives ----


class Collective(NamedTuple):
    operation: str
    group: str | None  # the process group's name, None where the trace does not tell
    num_bytes: int  # of this rank's input
    start: float
    end: float


def collectives(trace: Trace) -> list[Collective]:
    return _nccl_collectives(trace) if trace.on_gpu else _gloo_collectives(trace)


def _nccl_collectives(trace: Trace) -> list[Collective]:
    found = []
    for event in trace.events:
        if event.kind == "kernel" and _is_nccl(event):
            arguments = event.arguments
            name = str(arguments.get("Collective name", event.name)).strip("_")
            name = CALLS.get(f"{name}_", CALLS.get(f"_{name}_", (name, "")))[0]
            size = int(arguments.get("In msg nelems", 0)) * BYTES.get(str(arguments.get("dtype", "")).lower(), 0)
            group = arguments.get("Process Group Name")
            found.append(Collective(name, None if group is None else str(group), size, event.start, event.end))
    return found


def _gloo_collectives(trace: Trace) -> list[Collective]:
    """Each of gloo's events with the call that asked for it: a message starts inside its call; the rest is done by a group's
    own threads, in the order of the calls."""
    names = [(e.thread, e.start, e.name.removeprefix(GROUP)) for e in trace.events if e.name.startswith(GROUP)]
    names.sort()
    calls: dict[str, deque[tuple[Event, str, str | None]]] = defaultdict(deque)
    for event in trace.events:
        operation = event.name.removeprefix("c10d::")
        if event.kind == "cpu_op" and event.name.startswith("c10d::") and operation in CALLS:
            index = bisect_right(names, (event.thread, event.start))
            is_named = index < len(names) and names[index][0] == event.thread and names[index][1] < event.end
            shown, asked = CALLS[operation]
            calls[asked].append((event, shown, names[index][2] if is_named else None))
    found = []
    for event in trace.events:
        kind = _gloo(event)
        if not kind:
            continue
        waiting, begin, shown, group = calls[kind], event.start, kind, None
        if kind in POINT_TO_POINT:
            while waiting and waiting[0][0].end < event.start:
                waiting.popleft()
        if waiting and waiting[0][0].start <= event.start:
            call, shown, group = waiting.popleft()
            begin = call.start
        found.append(Collective(shown, group, _gloo_bytes(event), begin, event.end))
    return found


def _gloo(event: Event) -> str:
    """Which of gloo's events this is; empty for any other."""
    return event.name.removeprefix("gloo:") if event.name.startswith("gloo:") else ""


def _gloo_bytes(event: Event) -> int:
    shapes, types = event.arguments.get("Input Dims", []), event.arguments.get("Input type", [])
    pairs = zip(shapes, types, strict=False)
    return sum(int(np.prod(shape)) * BYTES.get(str(kind).lower(), 0) for shape, kind in pairs if _is_shape(shape))


def _is_shape(shape: Any) -> bool:
    return bool(shape) and all(isinstance(size, int) for size in shape)


def _is_nccl(event: Event) -> bool:
    return event.name.lower().startswith("nccl")


def axis_of(group: str | None, trace: Trace, sizes: Sizes) -> str:
    """The mesh axes that a group's ranks differ on ("shard×context"); "all ranks" for the group of all."""
    if group is not None and group == trace.default_group:
        return ALL_RANKS
    ranks = trace.groups.get(group) if group is not None else None
    if ranks is None:
        return "group unknown"
    places = np.stack(np.unravel_index(np.array(ranks), sizes))
    differing = [axis for axis, row in zip(Sizes._fields, places, strict=True) if len(set(row.tolist())) > 1]
    return "×".join(differing) or "one rank"


# ---- One rank ----


class Window(NamedTuple):
    """A pipeline's schedule on one rank: when it began, when its last backward ended, and the time in between in which it
    waited for its neighbours (microseconds)."""

    start: float
    end: float
    waited: float


def pipeline_windows(backward: Sequence[Span], fences: Sequence[Span], waits: Sequence[Span]) -> list[Window]:
    """`fences`: the collectives of all ranks, which lie before and after each schedule."""
    found, edge = [], float("-inf")
    for fence in [*union(fences), (float("inf"), float("inf"))]:
        inside = [span for span in backward if span[0] >= edge and span[1] <= fence[0]]
        if inside and edge > float("-inf"):
            end = max(span[1] for span in inside)
            found.append(Window(edge, end, length(clip(waits, (edge, end)))))
        edge = fence[1]
    return found


def summarise(trace: Trace, rank: int, sizes: Sizes) -> dict[str, Any]:
    """Of the recorded steps, everything the page shows of one rank: JSON, times in microseconds, sums over the steps."""
    recorded, window = steps(trace), _whole(trace)
    busy = clip(compute(trace), window)
    spans: dict[tuple[str, str], list[tuple[Span, int]]] = defaultdict(list)
    for found in collectives(trace):
        if found.end > window[0] and found.start < window[1]:
            axis = axis_of(found.group, trace, sizes)
            spans[axis, found.operation].append(((found.start, found.end), found.num_bytes))
    rows = []
    for (axis, operation), parts in sorted(spans.items()):
        mine = clip(union(span for span, _ in parts), window)
        exposed = length(subtract(mine, busy))
        rows.append([axis, operation, len(parts), sum(size for _, size in parts), length(mine), exposed])
    everything = clip((span for parts in spans.values() for span, _ in parts), window)
    windows: list[Window] = []
    if sizes.pipeline > 1:
        fences = [span for (axis, _), parts in spans.items() if axis == ALL_RANKS for span, _ in parts]
        messages = [span for (axis, _), parts in spans.items() if axis == "pipeline" for span, _ in parts]
        windows = pipeline_windows(clip(backward(trace), window), fences, subtract(messages, busy))
    return {
        "rank": rank, "on_gpu": trace.on_gpu, "steps": [list(step) for step in recorded], "time": length(recorded),
        "compute": length(busy), "exposed": length(subtract(everything, busy)), "collectives": rows,
        "operators": [list(row) for row in operators(trace)[:KERNEL_ROWS]],
        "memory": [list(point) for point in thinned(trace.memory)],
        "peak_bytes": max((allocated for _, allocated, _ in trace.memory), default=0),
        "windows": [list(found) for found in windows],
    }  # fmt: skip


def thinned(points: Sequence[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    """At most MEMORY_POINTS: of each equal share of them the one with the most allocated."""
    edges = np.linspace(0, len(points), min(len(points), MEMORY_POINTS) + 1).astype(int).tolist()
    return [max(points[a:b], key=lambda point: point[1]) for a, b in itertools.pairwise(edges)]


def _whole(trace: Trace) -> Span:
    recorded = steps(trace)
    return (recorded[0][0], recorded[-1][1])
