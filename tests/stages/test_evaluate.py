import json

import pytest

from warpline.parallel.mesh import start_mesh
from warpline.stages import evaluate
from warpline.stages.parts.config import BadConfig
from warpline.stages.parts.run import RunFolder


def run_evaluate(folder, start_folder, text_run, **changes):
    inputs = {
        "text": [str(text_run / "data" / "held_out.jsonl")],
        "tasks": [str(text_run / "data" / "held_out_tasks.jsonl")],
        "max_new_tokens": 6,
    }
    config = evaluate.EvaluateStageConfig(model=str(start_folder), **{**inputs, **changes})
    return evaluate.main(config, RunFolder(folder), start_mesh())


def test_equal_runs_give_equal_scores_and_samples(tmp_path, start_folder, text_run):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        run_evaluate(tmp_path / name, start_folder, text_run, stage="sft")
    for name in ("scores.json", "samples.jsonl"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    (score,) = json.loads((tmp_path / "first" / "scores.json").read_text())
    assert list(score) == ["stage", "bits_per_byte", "accuracy", "greedy_accuracy", "families", "completion_tokens", "ended"]
    assert set(score["families"]) == {"sorting", "reversal"} and score["stage"] == "sft"


def test_scoring_again_replaces_entry_and_samples(tmp_path, start_folder, text_run):
    for _ in range(2):
        run_evaluate(tmp_path, start_folder, text_run)
    assert len(json.loads((tmp_path / "scores.json").read_text())) == 1
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 6


def test_text_and_tasks_may_come_alone_but_not_neither(tmp_path, start_folder, text_run):
    assert set(run_evaluate(tmp_path, start_folder, text_run, tasks=[])) == {"stage", "bits_per_byte"}
    assert "bits_per_byte" not in run_evaluate(tmp_path, start_folder, text_run, text=[])
    with pytest.raises(BadConfig, match="nothing to evaluate on"):
        run_evaluate(tmp_path, start_folder, text_run, text=[], tasks=[])
