"""Recording begins and ends with the steps asked for, and clocks are compared host by host."""

import pytest
import torch

from warpline.parallel.mesh import start_mesh
from warpline.stages.parts.profile_record import Recorded, RecordedRun, clock_offsets
from warpline.stages.parts.profile_trace import operators, read_json_trace, read_trace, steps


def test_the_recorded_steps_are_those_asked_for_and_then_the_stage_ends(tmp_path):
    run = RecordedRun(tmp_path, start_mesh(), num_before=2, num_recorded=2)
    a = torch.ones(8, 8)
    with pytest.raises(Recorded):
        for step in range(1, 9):
            for _ in range(step):
                a @ a
            run.append("metrics.jsonl", {"stage": "sft", "step": step, "held_out_bits_per_byte": 1.0})  # no step's end
            run.append("metrics.jsonl", {"stage": "sft", "step": step, "loss": 1.0})
    assert step == 4
    trace = read_trace(read_json_trace(run.trace_path(0)))
    (start, middle), (after, end) = steps(trace)
    assert start < middle <= after < end
    assert {name: calls for name, calls, _ in operators(trace)}["aten::mm"] == 3 + 4
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 8


def test_a_host_whose_clock_is_ahead_is_ahead_by_the_median_and_ranks_of_a_host_share_a_clock():
    marks = [[0.0, 10.0, 20.0], [1.0, 10.0, 22.0], [105.0, 110.0, 121.0], [103.0, 114.0, 120.0]]
    # Rank 2: 105, 100, 101; rank 3: 103, 104, 100. Together their median is 102; rank 1 is on rank 0's host.
    assert clock_offsets(["a", "a", "b", "b"], marks) == [0.0, 0.0, 102.0, 102.0]
