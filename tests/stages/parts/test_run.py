import errno
import json
import subprocess
import sys

import pytest

from warpline.stages.parts.config import BadConfig, Config
from warpline.stages.parts.run import RunFolder, environment


class Settings(Config):
    steps: int = 1
    rate: float = 0.5
    names: list[str] = []


def test_a_folder_of_another_configuration_is_refused_with_the_key(tmp_path):
    RunFolder(tmp_path / "run").open(Settings(), "sft")
    RunFolder(tmp_path / "run").append("metrics.jsonl", {"stage": "sft", "step": 1})
    RunFolder(tmp_path / "run").open(Settings(), "sft")
    with pytest.raises(BadConfig, match=r"steps is 1 there and 2 here.*--run"):
        RunFolder(tmp_path / "run").open(Settings(steps=2), "sft")
    with pytest.raises(BadConfig, match="verb is 'sft' there and 'rl' here"):
        RunFolder(tmp_path / "run").open(Settings(), "rl")


def test_a_run_refused_before_it_began_may_be_configured_anew(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.open(Settings(), "sft")
    run.end("bad input")
    run.open(Settings(steps=2), "sft")
    assert run.read_json("config.json", None)["steps"] == 2


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BadConfig, match=r"is not empty and has no config.json"):
        RunFolder(tmp_path).open(Settings(), "sft")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_rewind_drops_later_lines_of_one_stage_and_a_torn_line(tmp_path):
    run = RunFolder(tmp_path)
    for stage, step in [("sft", 1), ("sft", 2), ("rl", 1), ("rl", 2), ("rl", 3)]:
        run.append("metrics.jsonl", {"stage": stage, "step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "rl", "st')
    run.rewind("metrics.jsonl", "rl", 1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("sft", 1), ("sft", 2), ("rl", 1)]


def test_scores_keep_their_order_and_are_replaced_in_place(tmp_path):
    run = RunFolder(tmp_path)
    for stage, accuracy in [("sft", 0.1), ("rl", 0.2), ("sft", 0.3)]:
        run.replace_score({"stage": stage, "accuracy": accuracy})
    assert run.read_json("scores.json", None) == [{"stage": "sft", "accuracy": 0.3}, {"stage": "rl", "accuracy": 0.2}]


def test_seconds_add_up(tmp_path):
    run = RunFolder(tmp_path)
    for part, seconds in [("sft", 1.5), ("rl", 2.0), ("sft", 1.0)]:
        run.add_seconds(part, seconds)
    assert run.read_json("timing.json", None) == {"sft": 2.5, "rl": 2.0}


def test_other_ranks_write_nothing(tmp_path):
    run = RunFolder(tmp_path, writes=False)
    run.write_json("a.json", 1)
    run.append("metrics.jsonl", {"stage": "sft", "step": 1})
    run.rewind("metrics.jsonl", "sft", 0)
    assert not list(tmp_path.iterdir())


def test_the_environment_names_versions_and_hardware():
    found = environment()
    assert found["torch"].startswith("2.") and found["warpline"] and found["threads"] >= 1 and found["cpu"]


def test_a_folder_that_another_process_has_claimed_is_refused_until_that_ends(tmp_path):
    code = (
        "import sys; from pathlib import Path; from warpline.stages.parts.config import Config\n"
        "from warpline.stages.parts.run import RunFolder\n"
        "RunFolder(Path(sys.argv[1])).open(Config(), 'sft'); print('claimed', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(BadConfig, match=r"run is in use by another process; wait for it"):
            RunFolder(tmp_path / "run").open(Config(), "sft")
        RunFolder(tmp_path / "run", writes=False).open(Config(), "sft")
        other.kill()
    RunFolder(tmp_path / "run").open(Config(), "sft")


def test_a_full_disk_is_told_with_the_files_name_and_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = RunFolder(tmp_path)
    run.write_json("ended.json", {"reason": "done"})
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*ended\.json"):
        run.write_json("ended.json", {"reason": "signal"})
    assert {path.name for path in tmp_path.iterdir()} == {"ended.json"}
    assert run.read_json("ended.json", None) == {"reason": "done"}
