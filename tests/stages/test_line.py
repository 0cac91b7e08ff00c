"""The smoke line: every stage on real text, run once as a user would, then looked at from all sides."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from warpline.stages.line import ClaimConfig, claims

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "line" / "smoke.toml"
COMMAND = [sys.executable, "-m", "warpline.stages.command", "line", str(SMOKE), "--run"]
STAGES = ["pretrain", "sft", "preference", "rl", "distill", "distill_control"]


def run_line(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, str(folder)], capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    folder = tmp_path_factory.mktemp("smoke") / "run"
    return folder, run_line(folder)


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def test_the_line_ends_with_the_path_of_its_report_and_a_table(smoke):
    folder, done = smoke
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder / "report.html") and (folder / "report.html").stat().st_size > 20_000
    for stage in STAGES:
        assert stage in done.stderr
    assert read(folder, "ended.json")["reason"] == "done"
    assert "Ended: done" in (folder / "report.html").read_text()


def test_every_stage_is_scored_in_order_on_the_same_sets(smoke):
    scores = read(smoke[0], "scores.json")
    assert [score["stage"] for score in scores] == STAGES
    for score in scores:
        assert set(score) == {"stage", "bits_per_byte", "accuracy", "greedy_accuracy", "families", "completion_tokens", "ended"}
        assert set(score["families"]) == {"addition", "sorting", "counting"} and 0 < score["bits_per_byte"] < 9


def test_the_metrics_hold_every_step_of_every_stage_once(smoke):
    lines = [json.loads(line) for line in (smoke[0] / "metrics.jsonl").read_text().splitlines()]
    steps = {stage: [line["step"] for line in lines if line["stage"] == stage and "loss" in line] for stage in STAGES}
    config = read(smoke[0], "config.json")
    for stage in STAGES:
        assert steps[stage] == list(range(1, config[stage.removesuffix("_control")]["steps"] + 1))
    assert all("mismatch_mean" in line and "reward" in line for line in lines if line["stage"] == "rl")


def test_the_claims_are_measured_from_the_scores(smoke):
    scores = {score["stage"]: score for score in read(smoke[0], "scores.json")}
    assert read(smoke[0], "claims.json") == claims(scores, ClaimConfig())


def test_a_second_run_does_nothing_again(smoke):
    folder, _ = smoke
    kept = [*folder.rglob("*.safetensors"), *folder.rglob("*.bin"), folder / "scores.json", folder / "metrics.jsonl"]
    before = {path: path.stat().st_mtime_ns for path in kept}
    again = run_line(folder)
    assert again.returncode == 0 and "1/" not in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in kept}


def test_the_same_folder_with_another_configuration_is_refused(smoke):
    done = subprocess.run([*COMMAND, str(smoke[0]), "rl.steps=5"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "rl.steps is 4 there and 5 here" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_the_control_student_had_the_same_steps_data_and_start(smoke):
    lines = [json.loads(line) for line in (smoke[0] / "metrics.jsonl").read_text().splitlines()]
    student, control = ([line for line in lines if line["stage"] == stage] for stage in ("distill", "distill_control"))
    assert [line["tokens"] for line in student] == [line["tokens"] for line in control]
    assert student[0]["cross_entropy"] == 0 and control[0]["divergence"] == 0


def test_the_release_loads_in_transformers(smoke):
    release = read(smoke[0], "release.json")
    assert release["stage"] in STAGES and read(smoke[0], "release/config.json")["architectures"]
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer.apply_chat_template([{'role': 'user', 'content': 'Sort: b a'}], add_generation_prompt=True, "
        "return_tensors='pt', return_dict=True)\n"
        "print(model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] - ids['input_ids'].shape[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(smoke[0] / "release")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout) <= 4


@pytest.mark.slow
def test_a_line_killed_again_and_again_ends_with_the_scores_of_one_that_was_not(smoke, tmp_path):
    """kill -9 at seeded random moments; every restart goes on, and weights and scores are the uninterrupted run's bytes."""
    folder, rng, kills = tmp_path / "killed", random.Random(3), 0
    for _ in range(40):
        process = subprocess.Popen([*COMMAND, str(folder)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(7, 14))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0
        break
    assert kills >= 1 and read(folder, "ended.json")["reason"] == "done"
    assert (folder / "scores.json").read_bytes() == (smoke[0] / "scores.json").read_bytes()
    for stage in STAGES:
        newest = max((smoke[0] / "checkpoints" / stage).iterdir(), key=lambda path: int(path.name.partition("-")[2]))
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert (folder / newest.relative_to(smoke[0]) / name).read_bytes() == (newest / name).read_bytes(), stage


@pytest.mark.slow
def test_sigterm_ends_with_a_checkpoint_and_exit_code_3(tmp_path):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*COMMAND, str(tmp_path / "run"), "sft.steps=3000"], stderr=subprocess.PIPE, text=True, env=environment
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and '"sft"' in metrics.read_text():
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 3 and "stopped by SIGTERM after step" in stderr and "Traceback" not in stderr
    ended = read(tmp_path / "run", "ended.json")
    assert ended["reason"] == "signal" and (tmp_path / "run" / "checkpoints" / "sft" / f"step-{ended['step']}").is_dir()


def test_claims_fall_either_way():
    def score(accuracy: float, bits: float = 2.0) -> dict:
        return {"accuracy": accuracy, "bits_per_byte": bits}

    scores = {
        "pretrain": score(0, 2.7),
        "sft": score(0.5),
        "rl": score(0.59),
        "distill": score(0.53),
        "distill_control": score(0.6),
    }
    assert [claim["holds"] for claim in claims(scores, ClaimConfig())] == [False, False, False, False]
    scores |= {"pretrain": score(0, 2.6), "rl": score(0.601), "distill": score(0.55), "distill_control": score(0.5)}
    assert [claim["holds"] for claim in claims(scores, ClaimConfig())] == [True, True, True, True]
