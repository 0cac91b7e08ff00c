"""Sweeps: their points, rates and ideals, worked by hand."""

import json
from types import SimpleNamespace

import pytest

from warpline.stages.parts.config import BadConfig, ParallelConfig
from warpline.stages.parts.profile_sweep import Point, check_machine, combinations, plot, points, rate, scaled, table


def test_a_sweep_is_every_combination():
    assert combinations(["parallel.tensor=1,2", "parallel.recompute=none,full"]) == [
        ["parallel.tensor=1", "parallel.recompute=none"], ["parallel.tensor=1", "parallel.recompute=full"],
        ["parallel.tensor=2", "parallel.recompute=none"], ["parallel.tensor=2", "parallel.recompute=full"],
    ]  # fmt: skip


@pytest.mark.parametrize("sweep", ["parallel.tensor", "parallel.tensor=", "=1,2", "parallel.tensor=1,,2"])
def test_a_sweep_that_is_none_is_refused(sweep):
    with pytest.raises(BadConfig, match=r"expected key=value,value, as parallel\.tensor=1,2,4"):
        combinations([sweep])


def config(batch=6, **sizes):
    return SimpleNamespace(tokens_per_step=batch, parallel=ParallelConfig(**sizes))


def test_weak_scaling_grows_the_batch_with_the_data_ranks():
    found = points(
        [(["a"], config(replicate=2)), (["b"], config(replicate=3)), (["c"], config(shard=2, replicate=2, tensor=2))]
    )
    assert [(point.scaling, point.num_ranks) for point in found] == [
        ("strong", 2), ("strong", 3), ("strong", 8), ("weak", 2), ("weak", 3), ("weak", 8),
    ]  # fmt: skip
    assert [point.overrides[-1] for point in found[3:]] == ["a", "tokens_per_step=9", "tokens_per_step=12"]
    assert found[3].name == found[0].name == "a"  # one run for both
    assert found[4].name == "b_tokens_per_step-9"
    with pytest.raises(BadConfig, match="is no whole number; change tokens_per_step"):
        points([(["a"], config(batch=5, replicate=2)), (["b"], config(batch=5, replicate=3))])


def test_without_data_ranks_that_differ_weak_scaling_is_strong_and_is_left_out():
    assert {point.scaling for point in points([(["a"], config()), (["b"], config(tensor=2))])} == {"strong"}


def test_more_ranks_than_gpus_are_refused_and_a_cpu_takes_any():
    found = [Point("strong", ["parallel.tensor=8"], 8), Point("strong", ["parallel.tensor=1"], 1)]
    with pytest.raises(BadConfig, match=r"parallel.tensor=8 is 8 ranks but this machine has 4 GPU"):
        check_machine(found, 4)
    check_machine(found, 8)
    check_machine(found, 0)


def test_a_rate_is_the_median_of_unrecorded_steps_but_the_first(tmp_path):
    rates = [1.0, 10.0, 30.0, 20.0, 500.0]
    lines = [{"step": step + 1, "loss": 0.0, "tokens_per_second": x} for step, x in enumerate(rates)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [{"step": 2, "bits": 1}, *lines]))
    assert rate(tmp_path, 4) == 20.0


ROWS = [
    {"scaling": "strong", "setting": "parallel.tensor=2", "ranks": 2, "tokens_per_second": 150.0},
    {"scaling": "strong", "setting": "parallel.tensor=1", "ranks": 1, "tokens_per_second": 100.0},
    {"scaling": "weak", "setting": "parallel.replicate=4", "ranks": 4, "tokens_per_second": 300.0},
    {"scaling": "weak", "setting": "parallel.replicate=2", "ranks": 2, "tokens_per_second": 200.0},
]


def test_the_ideal_is_the_fewest_ranks_rate_times_ranks():
    found = scaled(ROWS)
    assert [(row["ideal"], row["efficiency"]) for row in found] == [(200.0, 0.75), (100.0, 1.0), (400.0, 0.75), (200.0, 1.0)]
    lines = table(found).splitlines()
    assert len(lines) == 5 and lines[1].split() == ["strong", "2", "150", "200", "75%", "parallel.tensor=2"]


@pytest.mark.slow
def test_the_picture_has_a_panel_a_scaling(tmp_path):
    pytest.importorskip("matplotlib")
    plot(scaled(ROWS), tmp_path / "both.png")
    plot(scaled(ROWS[:2]), tmp_path / "one.png")
    widths = [int.from_bytes((tmp_path / name).read_bytes()[16:20], "big") for name in ("one.png", "both.png")]
    assert widths[1] == 2 * widths[0] > 0
