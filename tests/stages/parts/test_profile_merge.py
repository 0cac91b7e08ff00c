"""One time line of many: a process a rank, on one clock."""

import gzip
import json

from warpline.stages.parts.profile_merge import DEVICE_THREADS, MAX_RANKS, chosen_ranks, merge, write_merged


def raw(base, *events):
    return {"baseTimeNanoseconds": base, "traceEvents": list(events)}


def op(ts, **changes):
    return {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 777, "tid": 5, "ts": ts, "dur": 1, "args": {}, **changes}


MEMORY = {
    "ph": "i", "name": "[memory]", "ts": 4.0, "tid": 5, "pid": 777,
    "args": {"Total Allocated": 3 * 2**20, "Device Type": 0},
}  # fmt: skip


def test_every_rank_is_a_process_on_the_first_ones_clock():
    # The second trace's base is 2000 ns later and its clock 5 us ahead.
    merged = merge([raw(1000, op(10.0), MEMORY), raw(3000, op(10.0, id=4), MEMORY)], ["rank 0", "rank 1"], [0.0, 5.0])
    times = {event["pid"]: event["ts"] for event in merged["traceEvents"] if event["ph"] == "X"}
    assert merged["baseTimeNanoseconds"] == 1000 and times == {0: 10.0, 1: 10.0 + 2.0 - 5.0}
    names = {e["pid"]: e["args"]["name"] for e in merged["traceEvents"] if e["name"] == "process_name"}
    assert names == {0: "rank 0", 1: "rank 1"}
    counters = {event["pid"]: (event["ts"], event["args"]["MiB"]) for event in merged["traceEvents"] if event["ph"] == "C"}
    assert counters == {0: (4.0, 3.0), 1: (1.0, 3.0)}
    assert [event["id"] for event in merged["traceEvents"] if "id" in event] == ["1.4"]


def test_a_stream_is_a_thread_apart_from_the_hosts():
    kernel = op(1.0, cat="kernel", name="gemm", tid=5)
    frame = {"ph": "X", "cat": "Trace", "name": "PyTorch Profiler (0)", "pid": "Spans", "tid": "PyTorch Profiler", "ts": 0}
    merged = merge([raw(0, op(1.0), kernel, frame)], ["rank 0"], [0.0])
    threads = {event["name"]: event["tid"] for event in merged["traceEvents"] if event["ph"] == "X"}
    assert threads == {"aten::mm": 5, "gemm": DEVICE_THREADS + 5}
    assert [e["args"]["name"] for e in merged["traceEvents"] if e["name"] == "thread_name"] == ["stream 5"]


def test_of_many_ranks_evenly_spread_ones_are_chosen():
    assert chosen_ranks(3) == [0, 1, 2]
    chosen = chosen_ranks(1000)
    assert len(chosen) == MAX_RANKS == 16 and chosen[:3] == [0, 62, 125] and chosen[-1] == 937


def test_files_are_merged_into_one(tmp_path):
    for rank in range(2):
        with gzip.open(tmp_path / f"{rank}.json.gz", "wt") as file:
            json.dump(raw(0, op(1.0 + rank)), file)
    write_merged(tmp_path / "all.json.gz", [tmp_path / "0.json.gz", tmp_path / "1.json.gz"], ["a", "b"], [0.0, 0.0])
    with gzip.open(tmp_path / "all.json.gz", "rt") as file:
        found = json.load(file)["traceEvents"]
    assert [(event["pid"], event["ts"]) for event in found if event["ph"] == "X"] == [(0, 1.0), (1, 2.0)]
