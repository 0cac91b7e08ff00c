"""Profiles of real stages: which stage a config is, what one rank records, what two say of a layout, and a sweep."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from warpline.parallel.mesh import start_mesh
from warpline.stages import profile
from warpline.stages.parts.config import BadConfig, ParallelConfig

PRETRAIN = """
data = "{data}"
steps = 5
sequence_tokens = 32
sequences_per_step = 8
tokens_per_microbatch = 64
evaluate_every_steps = 1
checkpoint_every_steps = 1
optimizer = {{ learning_rate = 1e-2, warmup_steps = 4 }}
[model]
width = 16
num_layers = 2
num_heads = 2
num_kv_heads = 2
head_width = 8
mlp_width = 24
"""
CHAT = 'start = "here"\nfiles = ["a.jsonl"]\nsteps = 2\ntokens_per_step = 4096\noptimizer = { learning_rate = 1e-3 }\n'


@pytest.fixture
def pretrain_config(tmp_path, text_run) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(PRETRAIN.format(data=text_run))
    return path


def test_the_stage_is_named_or_its_folders_or_the_only_one_that_the_keys_fit(pretrain_config, tmp_path):
    assert profile.request(pretrain_config, [], None, "1:2").stage == "pretrain"
    chat = tmp_path / "chat.toml"
    chat.write_text(CHAT)
    with pytest.raises(BadConfig, match=r"chat.toml fits sft and preference; say which with --stage"):
        profile.request(chat, [], None, "1:2")
    assert profile.request(chat, [], "preference", "1:2").stage == "preference"
    (tmp_path / "sft").mkdir()
    chat = chat.rename(tmp_path / "sft" / "chat.toml")
    assert profile.request(chat, [], None, "1:2").stage == "sft"
    with pytest.raises(BadConfig, match="expected one of pretrain, sft, preference, rl, distill"):
        profile.request(chat, [], "evaluate", "1:2")


def test_a_config_of_no_stage_is_refused_in_one_line(tmp_path):
    path = tmp_path / "odd.toml"
    path.write_text("speed = 3\n")
    with pytest.raises(BadConfig, match=r"odd\.toml has speed; expected the keys of one of pretrain, sft, .* with --stage$"):
        profile.request(path, [], None, "1:2")
    with pytest.raises(BadConfig, match=r"nowhere\.toml: cannot be read"):
        profile.request(tmp_path / "nowhere.toml", [], None, "1:2")


@pytest.mark.parametrize("steps", ["10", "0:3", "3:3", "5:4", "a:b", "1:", "-1:2"])
def test_steps_that_record_nothing_are_refused(pretrain_config, steps):
    with pytest.raises(BadConfig, match="expected A:B with 1 <= A < B, such as 10:13: steps 11, 12 and 13"):
        profile.request(pretrain_config, [], None, steps)


def test_a_profile_records_the_steps_without_evaluations_and_checkpoints(pretrain_config, tmp_path, capsys):
    """Longer than the config's one step: a profile runs as many as it needs."""
    asked = profile.request(pretrain_config, ["steps=1"], None, "2:3")
    folder = tmp_path / "run"
    path = profile.main(asked, folder, start_mesh())
    found = json.loads((folder / "profile" / "summary.json").read_text())
    (rank,) = found["ranks"]
    assert found["steps"] == [3, 3] and len(rank["steps"]) == 1 and rank["collectives"] == []
    assert 0 < rank["compute"] < rank["time"] and rank["exposed"] == 0 and rank["peak_bytes"] > 0
    # A step multiplies, of 4 microbatches and 2 layers: 7 matrices (query, key, value, output; three of the MLP), forward once
    # and backward twice; the rest is the loss's.
    products = {name: calls for name, calls, _ in rank["operators"]}["aten::mm"]
    assert products >= 4 * 2 * 7 * 3
    assert path.read_text().startswith("<!doctype html>") and "pretrain, one process: steps 3 to 3" in capsys.readouterr().out
    assert not (folder / "checkpoints").exists() and len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    with gzip.open(path.with_name("merged.json.gz"), "rt") as file:
        assert {event["pid"] for event in json.load(file)["traceEvents"]} == {0}


def test_a_run_of_another_kind_is_not_profiled_over(pretrain_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"verb": "pretrain"}')
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(BadConfig, match="holds a run of another configuration"):
        profile.main(profile.request(pretrain_config, [], None, "1:2"), tmp_path / "run", start_mesh())


def asked_for(path: Path, *overrides: str, stage: str | None = None) -> profile.Request:
    return profile.request(path, list(overrides), stage, "1:2")


def test_microbatches_are_counted_as_the_model_counts_them(pretrain_config, tmp_path):
    # 8 windows of 32 tokens, 2 in a microbatch; on 2 data ranks 2 microbatches; at least one a stage, and a multiple of ranks.
    for overrides, count in (
        (["parallel.pipeline=2"], 4),
        (["parallel.pipeline=2", "parallel.replicate=2"], 2),
        (["parallel.pipeline=2", "parallel.shard=2", "tokens_per_microbatch=1"], 4),
        (["parallel.pipeline=3"], 6),
        (["parallel.pipeline=2", "parallel.schedule=interleaved", "parallel.stages_per_rank=3", "parallel.replicate=2"], 6),
    ):
        assert profile.microbatches_of(asked_for(pretrain_config, *overrides)) == count
    chat = tmp_path / "chat.toml"
    chat.write_text(CHAT)
    for stage in ("sft", "preference"):
        asked = asked_for(chat, "parallel.pipeline=2", "tokens_per_microbatch=1000", stage=stage)
        assert profile.microbatches_of(asked) == 6  # 4096 tokens are 5 microbatches


def test_a_schedule_is_drawn_with_its_bubble_and_needs_a_pipeline(pretrain_config):
    drawn = profile.draw(asked_for(pretrain_config, "parallel.pipeline=2"), 8)
    assert drawn.startswith("1f1b, 2 ranks, 8 microbatches: bubble 11.1% predicted") and "\nrank 1  ··00aaaa11" in drawn
    with pytest.raises(BadConfig, match=r"parallel.pipeline is 1: there is no schedule"):
        profile.draw(asked_for(pretrain_config), None)
    with pytest.raises(
        BadConfig, match=r"parallel\.schedule=zero_bubble with 5 microbatches: .*multiple of the number of rounds"
    ):
        profile.draw(asked_for(pretrain_config, "parallel.pipeline=2", "parallel.schedule=zero_bubble"), 5)


def test_a_bubble_is_the_mean_of_the_pipelines_on_one_clock():
    def rank(pipeline, tensor, *window):
        return {"place": {"pipeline": pipeline, "tensor": tensor}, "windows": [list(window)]}

    ranks = [rank(0, 0, 0, 10, 2), rank(1, 0, 100, 110, 4), rank(0, 1, 0, 10, 0), rank(1, 1, 100, 110, 0)]
    parallel = ParallelConfig(pipeline=2, tensor=2)
    assert profile.bubble(ranks, [0, 100, 0, 100], parallel) == pytest.approx((6 / 20 + 0) / 2)
    assert profile.bubble(ranks, [0] * 4, ParallelConfig(tensor=4)) is None


def warpline(*arguments: object, num_ranks: int = 1, cwd: Path) -> subprocess.CompletedProcess:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)] if num_ranks > 1 else []
    command = [sys.executable, *torchrun, "-m", "warpline.stages.command", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=400)


@pytest.mark.slow
def test_two_ranks_of_a_pipeline_show_its_messages_its_bubble_and_one_time_line(pretrain_config, tmp_path):
    done = warpline("profile", pretrain_config, "parallel.pipeline=2", "--steps", "2:3", num_ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    folder = tmp_path / "runs" / "profile_small" / "profile"
    assert done.stdout.splitlines()[-1] == "runs/profile_small/profile/profile.html" and "bubble of 1f1b: 20.0%" in done.stdout
    found = json.loads((folder / "summary.json").read_text())
    for rank in found["ranks"]:
        calls = {(axis, operation): (count, size) for axis, operation, count, size, _, _ in rank["collectives"]}
        # 4 microbatches of 64 tokens × 16 numbers of 4 bytes: the stream one way, its gradient the other.
        assert calls["pipeline", "send"] == calls["pipeline", "recv"] == (4, 4 * 64 * 16 * 4)
        assert {axis for axis, _ in calls} == {"pipeline", "all ranks"} and len(rank["windows"]) == 1
        assert 0 < rank["exposed"] < rank["time"] and rank["compute"] > 0
    assert found["predicted_bubble"] == pytest.approx(1 / 5) and 0 < found["measured_bubble"] < 1
    with gzip.open(folder / "merged.json.gz", "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event["name"] == "warpline.step 3"]
    first, second = sorted(events, key=lambda event: event["pid"])
    assert (first["pid"], second["pid"]) == (0, 1)
    # Behind one barrier on one machine: the recorded step begins together.
    assert abs(first["ts"] - second["ts"]) < 0.5 * first["dur"]


@pytest.mark.slow
def test_a_sweep_runs_every_point_and_draws_them_against_the_ideal(pretrain_config, tmp_path):
    pytest.importorskip("matplotlib")
    done = warpline("profile", pretrain_config, "--sweep", "parallel.tensor=1,2", "--steps", "3:4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    folder = tmp_path / "runs" / "profile_small"
    rows = json.loads((folder / "scaling.json").read_text())
    assert [(row["scaling"], row["ranks"]) for row in rows] == [("strong", 1), ("strong", 2)]
    assert rows[0]["efficiency"] == 1.0 and rows[1]["ideal"] == pytest.approx(2 * rows[0]["tokens_per_second"])
    assert (folder / "scaling.png").read_bytes().startswith(b"\x89PNG") and all(
        (folder / row["profile"]).exists() for row in rows
    )
    found = json.loads((folder / "parallel.tensor-2" / "profile" / "summary.json").read_text())
    for rank in found["ranks"]:
        assert {axis for axis, *_ in rank["collectives"]} == {"tensor", "all ranks"}
