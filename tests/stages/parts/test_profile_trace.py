"""What a trace says, against events written and worked out by hand."""

import pytest

from warpline.parallel.mesh import Sizes
from warpline.stages.parts.profile_trace import (
    ALL_RANKS,
    MEMORY_POINTS,
    Collective,
    axis_of,
    backward,
    clip,
    collectives,
    compute,
    length,
    operators,
    pipeline_windows,
    read_trace,
    steps,
    subtract,
    summarise,
    thinned,
    union,
)


def event(name, start, duration, kind="cpu_op", thread=1, **arguments):
    return {"ph": "X", "name": name, "cat": kind, "ts": start, "dur": duration, "tid": thread, "pid": 9, "args": arguments}


def memory(time, allocated, device=0):
    arguments = {"Total Allocated": allocated, "Total Reserved": 0, "Device Type": device}
    return {"ph": "i", "name": "[memory]", "ts": time, "tid": 1, "pid": 9, "args": arguments}


GROUPS = [
    {"pg_name": "0", "pg_desc": "default_pg", "ranks": [0, 1, 2, 3]},
    {"pg_name": "1", "pg_desc": "undefined", "ranks": [0, 2]},
    {"pg_name": "2", "pg_desc": "undefined", "ranks": [0, 1]},
]


def trace(*events, base=0):
    return read_trace({"baseTimeNanoseconds": base, "distributedInfo": {"pg_config": GROUPS}, "traceEvents": list(events)})


def test_spans_join_where_they_touch_and_lose_what_others_cover():
    assert union([(5, 7), (0, 2), (2, 3), (6, 9), (4, 4)]) == [(0, 3), (5, 9)]
    assert subtract([(0, 10), (12, 20)], [(2, 3), (5, 13), (19, 30)]) == [(0, 2), (3, 5), (13, 19)]
    assert subtract([(0, 4)], []) == [(0, 4)] and subtract([(1, 2)], [(0, 3)]) == []
    assert clip([(0, 4), (6, 9), (20, 21)], (2, 8)) == [(2, 4), (6, 8)]
    assert length([(0, 3), (5, 9)]) == 7


def test_times_are_microseconds_since_the_epoch_in_order():
    found = trace(event("b", 7.5, 1), event("a", 2, 4), {"ph": "M", "name": "x", "pid": 1}, base=3_000_000)
    assert [(e.name, e.start, e.end) for e in found.events] == [("a", 3002, 3006), ("b", 3007.5, 3008.5)]


def test_steps_are_the_recorders_own_annotations_in_order():
    marks = [event(f"warpline.step {n}", 10 * n, 9, "user_annotation") for n in (12, 11)]
    assert steps(trace(*marks, event("warpline.step 11", 110, 3, "gpu_user_annotation"))) == [(110, 119), (120, 129)]


def test_compute_on_a_cpu_is_operators_without_the_calls_and_the_threads_of_communication():
    found = trace(
        event("aten::mm", 0, 10),
        event("aten::copy_", 5, 2),  # inside another
        event("aten::cat", 20, 10),
        event("c10d::allreduce_", 22, 3),  # blocks inside an operator
        event("aten::add", 24, 8, thread=2),  # another thread computes
        event("aten::copy_", 40, 5, thread=7),  # gloo's own thread
        event("gloo:all_reduce", 22, 25, "user_annotation", thread=7),
        event("gloo:recv", 50, 25, "user_annotation"),  # outlives its call on a thread that computes
        event("aten::mul", 60, 1),
        event("MulBackward0", 0, 100),
    )
    assert compute(found) == [(0, 10), (20, 22), (24, 32), (60, 61)]


def test_compute_on_a_gpu_is_kernels_and_copies_but_ncclss():
    found = trace(
        event("gemm", 0, 10, "kernel", 7),
        event("Memcpy", 8, 4, "gpu_memcpy", 8),
        event("ncclDevKernel_AllReduce_Sum", 12, 9, "kernel", 20),
        event("aten::mm", 0, 100),
    )
    assert found.on_gpu and compute(found) == [(0, 12)]


def test_an_operator_is_charged_what_its_callees_are_not_and_only_in_the_steps():
    found = trace(
        event("warpline.step 2", 0, 50, "user_annotation"),
        event("aten::linear", 0, 20),
        event("aten::mm", 2, 10),
        event("aten::fill_", 3, 1),
        event("aten::add", 13, 4),
        event("aten::mm", 30, 6),
        event("aten::mm", 60, 99),
    )
    assert operators(found) == [("aten::mm", 2, 15.0), ("aten::linear", 1, 6.0), ("aten::add", 1, 4.0), ("aten::fill_", 1, 1.0)]


def test_gloos_work_is_matched_with_its_call_group_and_bytes():
    floats = {"Input Dims": [[8, 4]], "Input type": ["float"]}
    found = trace(
        event("c10d::_reduce_scatter_base_", 0, 3),
        event("warpline.group 1", 1, 2, "user_annotation"),
        event("c10d::allreduce_", 4, 3),
        event("warpline.group 0", 5, 1, "user_annotation"),
        event("gloo:all_reduce", 2, 8, "user_annotation", 7, **floats),
        event("gloo:all_reduce", 6, 2, "user_annotation", 8, **{"Input Dims": [[3]], "Input type": ["double"]}),
        event("c10d::send", 20, 5),
        event("warpline.group 1", 21, 4, "user_annotation"),
        event("gloo:send", 22, 9, "user_annotation", **floats),
        event("c10d::recv_", 40, 5),  # without a name: the trace does not tell
        event("gloo:recv", 42, 9, "user_annotation", **floats),
    )
    assert collectives(found) == [
        Collective("reduce_scatter", "1", 128, 0, 10),
        Collective("all_reduce", "0", 24, 4, 8),
        Collective("send", "1", 128, 20, 31),
        Collective("recv", None, 128, 40, 51),
    ]


def test_nccls_kernels_name_their_group_collective_and_bytes():
    told = {"Collective name": "_allgather_base", "In msg nelems": 100, "dtype": "BFloat16", "Process Group Name": "2"}
    found = trace(event("ncclDevKernel_AllGather", 3, 4, "kernel", 20, **told), event("ncclKernel_X", 9, 1, "kernel", 20))
    assert collectives(found) == [Collective("all_gather", "2", 200, 3, 7), Collective("ncclKernel_X", None, 0, 9, 10)]


def test_a_groups_axes_are_those_its_ranks_differ_on():
    found = trace()
    sizes = Sizes(pipeline=2, tensor=2)  # ranks 0 1 | 2 3
    assert axis_of("0", found, sizes) == ALL_RANKS
    assert axis_of("1", found, sizes) == "pipeline" and axis_of("2", found, sizes) == "tensor"
    assert axis_of("2", found, Sizes(shard=2, context=2)) == "context"
    found.groups["3"] = [0, 1, 2, 3]
    assert axis_of("3", found, Sizes(shard=2, context=2)) == "shard×context"
    assert axis_of(None, found, sizes) == axis_of("unheard of", found, sizes) == "group unknown"


def test_the_backward_on_a_gpu_is_the_kernels_that_its_nodes_launched():
    node = "autograd::engine::evaluate_function: MmBackward0"
    found = trace(
        event(node, 0, 10, thread=2),
        event("cudaLaunchKernel", 3, 1, "cuda_runtime", 2, correlation=5),
        event("cudaLaunchKernel", 4, 1, "cuda_runtime", 3, correlation=6),  # another thread
        event("cudaLaunchKernel", 10, 1, "cuda_runtime", 2, correlation=7),  # after the node
        *(event("gemm", 100 + n, 5, "kernel", 7, correlation=n) for n in (5, 6, 7)),
    )
    assert backward(found) == [(105, 110)]
    assert backward(trace(event(node, 0, 10), event(node, 8, 4, thread=2), event("aten::mm", 20, 5))) == [(0, 12)]


def test_a_pipelines_window_goes_from_a_collective_of_all_to_its_last_backward():
    fences, waits = [(0, 10), (50, 55), (60, 62), (99, 100)], [(5, 20), (40, 60), (70, 72)]
    found = pipeline_windows([(25, 30), (35, 45), (70, 90)], fences, waits)
    assert found == [(10, 45, 15), (62, 90, 2)]
    assert pipeline_windows([(25, 30)], [(40, 50)], []) == []  # its beginning was not recorded


def test_a_ranks_summary_adds_up():
    found = trace(
        event("warpline.step 3", 100, 100, "user_annotation"),
        event("warpline.step 4", 200, 100, "user_annotation"),
        event("aten::mm", 90, 30),  # 20 of it in the steps
        event("c10d::allreduce_", 120, 1),
        event("warpline.group 2", 120, 1, "user_annotation"),
        event("gloo:all_reduce", 121, 39, "user_annotation", 7, **{"Input Dims": [[5]], "Input type": ["float"]}),
        event("aten::mm", 150, 30),
        memory(110, 7), memory(150, 40), memory(160, 3), memory(150, 999, device=1),
    )  # fmt: skip
    summary = summarise(found, 2, Sizes(pipeline=2, tensor=2))
    assert summary["time"] == 200 and summary["compute"] == 50
    assert summary["collectives"] == [["tensor", "all_reduce", 1, 20, 40, 30]] and summary["exposed"] == 30
    assert summary["peak_bytes"] == 40 and [point[1] for point in summary["memory"]] == [7, 40, 3]
    assert summary["operators"][0] == ["aten::mm", 1, 30.0] and summary["windows"] == []


@pytest.mark.parametrize("count", [0, 1, MEMORY_POINTS, 10 * MEMORY_POINTS + 7])
def test_thinning_memory_keeps_the_peak(count):
    points = [(float(n), n * 7919 % 104729, 0) for n in range(count)]
    kept = thinned(points)
    assert len(kept) == min(count, MEMORY_POINTS) and set(kept) <= set(points)
    assert max((x for _, x, _ in kept), default=0) == max((x for _, x, _ in points), default=0)
