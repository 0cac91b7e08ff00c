import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from warpline.data.tokenizer import ChatTokenizer
from warpline.models import huggingface
from warpline.stages import command
from warpline.stages.parts.run import RunFolder

ROOT = Path(__file__).parents[2]


def warpline_process(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "warpline.stages.command", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.fixture
def warpline(monkeypatch, capsys, tmp_path):
    """The command line in this process (importing torch anew costs seconds); (exit code, stdout, stderr)."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["warpline", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            command.main()
        return (ended.value.code or 0, *capsys.readouterr())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_help_lists_every_verb_that_exists_and_fits_80_columns():
    done = warpline_process("--help")
    verbs = re.findall(r"^  (\w+) ", done.stdout.partition("Commands:")[2], re.MULTILINE)
    assert " ".join(verbs) == "line data pretrain sft preference rl distill evaluate report import export doctor profile bench"
    assert max(map(len, done.stdout.splitlines())) <= 80


SFT = 'start = "{start}"\nfiles = ["{files}"]\nsteps = 2\ntokens_per_step = 128\noptimizer = {{ learning_rate = 1e-3 }}\n'


@pytest.fixture
def sft_config(tmp_path, start_folder, text_run) -> Path:
    path = tmp_path / "sft.toml"
    path.write_text(SFT.format(start=start_folder, files=text_run / "data" / "sft.jsonl"))
    return path


def test_a_stage_prints_its_checkpoint_and_writes_config_and_end(sft_config, tmp_path):
    done = warpline_process("sft", sft_config, "optimizer.learning_rate=0.5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "runs/sft/checkpoints/sft/step-2"
    run = tmp_path / "runs" / "sft"
    assert json.loads((run / "config.json").read_text())["optimizer"]["learning_rate"] == 0.5
    assert json.loads((run / "ended.json").read_text()) == {"reason": "done", "step": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stepz=3"], "unknown key 'stepz'; the nearest known key is 'steps'"),
        (["files=[]"], "files = []"),
        (['files=["missing.jsonl"]'], "missing.jsonl"),
        (['start="nowhere"'], "nowhere: no such folder"),
        (["parallel.replicate=2"], "replicate=2 is 2 rank(s) but 1 process(es)"),
        (["tokens_per_step=3"], "expected at most tokens_per_step = 3"),
        (["optimizer.learning_rate=inf"], "optimizer.learning_rate = inf"),
        (["max_tokens=5"], "sft.jsonl:1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(warpline, sft_config, arguments, message):
    code, _, stderr = warpline("sft", sft_config, *arguments)
    assert code == 2 and message in stderr and len(stderr.strip().splitlines()) == 1


def test_a_loss_that_is_never_finite_ends_with_code_4_and_the_old_weights(warpline, sft_config, tmp_path, start_folder):
    decoder = huggingface.load(start_folder)
    with torch.no_grad():
        decoder.norm.weight.fill_(float("nan"))
    huggingface.save(decoder, tmp_path / "sick", ChatTokenizer.load(start_folder))
    code, _, stderr = warpline("sft", sft_config, f'start="{tmp_path}/sick"', "steps=9", "max_skipped_steps_in_a_row=3")
    assert code == 4 and "3 updates in a row had a non-finite loss or gradient" in stderr
    assert json.loads((tmp_path / "runs" / "sft" / "ended.json").read_text())["reason"] == "non-finite"


def test_an_unforeseen_failure_keeps_its_traceback_and_ends_with_code_4(warpline, sft_config, tmp_path, monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr("warpline.stages.sft.start_from", broken)
    code, _, stderr = warpline("sft", sft_config)
    assert code == 4 and "ZeroDivisionError: unforeseen" in stderr and "Traceback" in stderr
    assert json.loads((tmp_path / "runs" / "sft" / "ended.json").read_text())["reason"] == "failed: ZeroDivisionError"


def test_import_and_export_keep_every_weight(warpline, tmp_path, start_folder):
    assert warpline("import", start_folder, "--run", tmp_path / "run")[0] == 0
    assert warpline("export", tmp_path / "run", tmp_path / "out")[0] == 0
    before, after = load_file(start_folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    code, _, stderr = warpline("export", tmp_path / "run", tmp_path / "out")
    assert code == 2 and "exists; give a folder that does not" in stderr


def test_a_torn_metrics_file_does_not_hide_what_was_wrong(warpline, sft_config, tmp_path):
    assert warpline("sft", sft_config)[0] == 0
    with (tmp_path / "runs" / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "sf')
    (tmp_path / "runs" / "sft" / "checkpoints").rename(tmp_path / "elsewhere")
    (tmp_path / "start" / "tokenizer.json").unlink()
    code, _, stderr = warpline("sft", sft_config)
    assert code == 2 and "no tokenizer.json" in stderr
    assert json.loads((tmp_path / "runs" / "sft" / "ended.json").read_text()) == {"reason": "bad input", "step": 2}


def test_a_damaged_config_and_a_run_as_start_are_named(warpline, sft_config, tmp_path):
    assert warpline("sft", sft_config)[0] == 0
    code, _, stderr = warpline("sft", sft_config, "start=runs/sft", "--run", tmp_path / "other")
    assert code == 2 and "is a run; give one of its checkpoints" in stderr
    (tmp_path / "runs" / "sft" / "config.json").write_text("{")
    code, _, stderr = warpline("sft", sft_config)
    assert code == 2 and "config.json: not valid JSON" in stderr


def test_a_report_of_no_run_is_refused(warpline, tmp_path):
    code, _, stderr = warpline("report", tmp_path)
    assert code == 2 and "is not a run folder" in stderr


@pytest.mark.slow
def test_the_readmes_session_runs_as_it_stands(tmp_path):
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", blocks[0]], cwd=tmp_path, env={"PATH": path, "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my" / "exported" / "model.safetensors").exists()
    assert (tmp_path / "my" / "runs" / "rl" / "report.html").exists()


def test_the_readmes_kernel_example_runs():
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["hidden"].grad.abs().sum() > 0 and names["stats"].logprob_T[-1] == 0


@pytest.fixture
def rank(tmp_path):
    """A rank of two, whose watch notes what it is told, in a run that has begun."""
    (tmp_path / "config.json").write_text("{}")
    told: list[tuple[str, str]] = []
    watch = SimpleNamespace(
        rank=1, where="rl step 3", lost=lambda: None, stop=lambda: None,
        fail=lambda reason, line: told.append((reason, line)) or len(told) == 1,
    )  # fmt: skip
    return SimpleNamespace(run=RunFolder(tmp_path), mesh=SimpleNamespace(watch=watch), told=told)


def ended(rank, error: BaseException | None) -> int:
    with pytest.raises(SystemExit) as end, command.Outcome(rank.run) as outcome:
        outcome.mesh = rank.mesh
        if error is not None:
            raise error
    return end.value.code


def test_bad_input_of_one_rank_is_told_to_the_others_and_once_to_the_user(rank, capsys):
    codes = [ended(rank, command.BadConfig("no such file")) for _ in range(2)]
    assert codes == [2, 2] and capsys.readouterr().err == "warpline: no such file\n"
    assert rank.told[0] == ("bad input", "warpline: no such file")
    assert rank.run.read_json("ended.json", None)["reason"] == "bad input"


def test_a_failure_of_one_rank_is_told_to_the_others_with_its_rank(rank, capsys):
    assert ended(rank, ZeroDivisionError("x")) == 4
    assert rank.told == [("rank 1 failed: ZeroDivisionError", "rank 1 failed in rl step 3")]
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("error", [None, OSError(28, "No space left on device", "metrics.jsonl")])
def test_a_disk_too_full_to_say_why_is_told_in_lines(rank, error, monkeypatch, capsys):
    def full(reason: str) -> None:
        raise OSError(28, "No space left on device", "ended.json")

    monkeypatch.setattr(rank.run, "end", full)
    assert ended(rank, error) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + (error is not None) and lines[-1].startswith("warpline: ended.json: No space left on device")


def test_a_bench_takes_the_place_of_this_process(monkeypatch):
    """A child would be killed a quarter of a second after Ctrl-C, before it says what it measured."""
    called = []
    monkeypatch.setattr("os.execv", lambda *arguments: called.append(arguments))
    monkeypatch.setattr("sys.argv", ["warpline", "bench", "rope", "--quick"])
    with pytest.raises(SystemExit):
        command.main()
    assert called == [(sys.executable, [sys.executable, "-m", "warpline.bench.suite", "rope", "--quick"])]
