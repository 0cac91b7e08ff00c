"""The command: names, what a failing case does to its bench and the exit code, and a trace for any row."""

import gzip
import json
import subprocess
import sys
import types

import pytest
import torch

from warpline.bench import suite
from warpline.bench.machine import machine_of
from warpline.bench.measure import Candidate, Case, LeftOut
from warpline.bench.profile import has_words
from warpline.bench.rows import Results, Row, load, path_of, save
from warpline.bench.suite import KERNELS, STAGES, compile_once, main


def square_case(error: float = 0.0, operation: str = "square", size: int = 64) -> Case:
    return Case(
        operation, {"R": size}, torch.float32, lambda generator: {"x": torch.randn(size, generator=generator)},
        {"warpline": Candidate(lambda x: x["x"].square() + error), "eager": Candidate(lambda x: x["x"] * x["x"])},
        lambda x, dtype: [x["x"].to(dtype).square()],
    )  # fmt: skip


@pytest.fixture
def with_bench(monkeypatch):
    """Puts cases in the place of the bench `rope`, and takes no time."""

    def use(*cases: Case) -> None:
        module = types.SimpleNamespace(cases=lambda device, is_quick: iter(cases))
        monkeypatch.setattr(suite, "module_of", lambda name: module)
        monkeypatch.setattr(suite, "SECONDS", dict.fromkeys(suite.SECONDS, 0.001))
        monkeypatch.setattr(suite, "ceilings", lambda device: None)

    return use


def test_a_bench_that_passes_is_complete_and_exits_0(tmp_path, capsys, with_bench):
    with_bench(square_case())
    assert main(["rope", "--no-pictures", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/*.json")
    results = load(path)
    assert results.benches["rope"].ended == "complete" and [row.check for row in results.rows] == ["passed", "passed"]
    assert "square   R=64   float32" in capsys.readouterr().out


def test_a_check_of_ours_that_fails_fails_the_bench_and_keeps_the_other_cases(tmp_path, capsys, with_bench):
    with_bench(square_case(0.1, "wrong"), square_case())
    assert main(["rope", "--no-pictures", "--out", str(tmp_path)]) == 1
    results = load(next(tmp_path.glob("*/*.json")))
    assert results.benches["rope"].ended.startswith("failed: 1 of 2: bench_case[wrong [R=64]]: AssertionError: wrong [R=64]:")
    assert len(results.rows) == 4 and "refused" in capsys.readouterr().out


def test_every_row_and_every_failure_begins_a_line(tmp_path, capsys, monkeypatch, with_bench):
    monkeypatch.delenv("COLUMNS", raising=False)
    with_bench(square_case(operation="first"), square_case(0.1, "wrong"), square_case(operation="last"))
    main(["rope", "--no-pictures", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if " ms ±" in line] == ["first", "first", "wrong", "wrong", "last", "last"]
    assert any(line.startswith("failed: bench_case[wrong [R=64]]: AssertionError: wrong [R=64]: warpline") for line in lines)
    assert any(line.startswith("E ") and "AssertionError" in line for line in lines), "the failure is shown where it was"
    assert any(line.startswith("1 failed, 2 passed") for line in lines)


def test_cases_that_cannot_be_made_fail_the_bench(tmp_path, monkeypatch, with_bench):
    with_bench()
    broken = types.SimpleNamespace(cases=lambda device, is_quick: [][0])
    monkeypatch.setattr(suite, "module_of", lambda name: broken)
    assert main(["rope", "--no-pictures", "--out", str(tmp_path)]) == 1
    assert "IndexError" in load(next(tmp_path.glob("*/*.json"))).benches["rope"].ended


def test_what_needs_a_package_that_is_not_there_is_left_out(tmp_path, capsys, monkeypatch, with_bench):
    with_bench()

    def refuse(name):
        raise ModuleNotFoundError("No module named 'pydantic'")

    monkeypatch.setattr(suite, "module_of", refuse)
    assert main(["sft", "--no-pictures", "--out", str(tmp_path)]) == 0
    assert "left out: sft: No module named 'pydantic'" in capsys.readouterr().out


def fill_with(monkeypatch, fill) -> None:
    monkeypatch.setattr(suite, "module_of", lambda name: types.SimpleNamespace(fill=fill))
    monkeypatch.setattr(suite, "ceilings", lambda device: None)


@pytest.mark.parametrize(
    ("check", "ended"), [("passed", "complete"), ("failed: loss 2", "failed: 1 of 2: step: warpline: failed")]
)
def test_a_bench_with_processes_of_its_own_runs_by_name(tmp_path, monkeypatch, capsys, check, ended):
    def fill(report, is_quick):
        for candidate in ("warpline", "untouched"):
            report.add(Row("step", candidate, {"n": 2}, "float32", 1.0, 0.1, check=check if candidate == "warpline" else ""))

    fill_with(monkeypatch, fill)
    assert main(["pipeline", "--no-pictures", "--out", str(tmp_path)]) == (check != "passed")
    results = load(next(tmp_path.glob("*/*.json")))
    assert results.benches["pipeline"].ended.startswith(ended) and [row.bench for row in results.rows] == ["pipeline"] * 2
    assert ended in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "ended", "code"),
    [
        (LeftOut("it needs two GPUs"), "left out: it needs two GPUs", 0),
        (ModuleNotFoundError("No module named 'trl'"), "left out: No module named 'trl'; install the extra `trainers`", 0),
        (subprocess.CalledProcessError(1, "pipeline on 2 ranks"), "failed: Command 'pipeline on 2 ranks' returned", 1),
        (KeyboardInterrupt(), "interrupted", 1),
    ],
)
def test_how_such_a_bench_ends_is_said_and_its_rows_stay(tmp_path, monkeypatch, error, ended, code):
    def fill(report, is_quick):
        report.add(Row("step", "warpline", {"n": 2}, "float32", 1.0, 0.1))
        raise error

    fill_with(monkeypatch, fill)
    assert main(["context_parallel", "--no-pictures", "--out", str(tmp_path)]) == code
    results = load(next(tmp_path.glob("*/*.json")))
    assert results.benches["context_parallel"].ended.startswith(ended) and len(results.rows) == 1


def test_without_names_the_suite_says_what_runs_by_name_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "ceilings", lambda device: None)
    seen = []
    monkeypatch.setattr(suite, "run", lambda name, *_: seen.append(name) or "complete")
    assert main(["--no-pictures", "--out", str(tmp_path)]) == 0
    assert tuple(seen) == KERNELS + STAGES
    assert (
        "left out: use_in_your_trainer, context_parallel, pipeline: about two minutes each, by name" in capsys.readouterr().out
    )


def test_a_trace_writes_nothing_into_results(tmp_path, monkeypatch, with_bench):
    with_bench(square_case())
    for name in ("rope", "sft"):
        assert main([name, "--no-pictures", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/*.json")
    before = path.read_bytes()
    main(["rope", "sft", "pipeline", "--profile", "no such row", "--out", str(tmp_path)])
    assert path.read_bytes() == before, "a stage is left out of a trace, and a bench is not timed"

    def refuse(name):
        raise ModuleNotFoundError("No module named 'pydantic'")

    monkeypatch.setattr(suite, "module_of", refuse)
    main(["rope", "--profile", "square", "--out", str(tmp_path)])
    assert path.read_bytes() == before


def test_results_that_cannot_be_written_are_refused_before_anything_is_measured(tmp_path, capsys, monkeypatch, with_bench):
    with_bench(square_case())

    def measured(device):
        raise AssertionError("the ceilings are measured")

    monkeypatch.setattr(suite, "ceilings", measured)
    (tmp_path / "file").touch()
    folder = tmp_path / "out"
    path_of(folder, machine_of(torch.device("cpu"))).mkdir(parents=True)
    for out, reason in ((tmp_path / "file" / "below", "Not a directory"), (folder, "Is a directory")):
        assert main(["rope", "--out", str(out)]) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.count("\n") == 1
        assert output.err.startswith(f"warpline bench: received --out for {out}") and reason in output.err


@pytest.mark.parametrize("absent", ["pytest", "pytest_benchmark"])
def test_without_pytest_a_bench_says_what_to_install_and_a_comparison_runs(absent, tmp_path):
    machine = machine_of(torch.device("cpu"))
    save(Results(machine, rows=[Row("norm", "warpline", {"R": 4}, "float32", 1.0, 0.1)]), tmp_path / "a.json")
    code = f"import sys\nsys.modules[{absent!r}] = None\nfrom warpline.bench.suite import main\nsys.exit(main(sys.argv[1:]))\n"

    def bench(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)

    done = bench("rope", "--out", str(tmp_path))
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert absent in done.stderr and "pip install 'warpline[bench]'" in done.stderr
    done = bench("--compare", str(tmp_path / "a.json"), str(tmp_path / "a.json"))
    assert done.returncode == 0 and "1 rows in both" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["rope", "sft"])
def test_a_trace_of_no_row_is_refused_with_the_rows(tmp_path, capsys, with_bench, name):
    with_bench(*(square_case(size=size) for size in range(64, 74)))
    assert main([name, "--profile", "square R=72 peer", "--out", str(tmp_path)]) == 2
    words = capsys.readouterr().err
    assert words.count("\n") == 1 and "received --profile 'square R=72 peer', and no row contains it; rows are" in words
    if name == "rope":
        assert "rope square [R=72] eager" in words and words.count("rope square") == 4
    else:
        assert "rows are none" in words, "a stage is left out"


@pytest.mark.parametrize(
    "words",
    ["swiglu, forward   R=4096 F=512", "swiglu, forward [R=4096,F=512]", "forward R=4096,  F=512 eager", " swiglu swiglu ", ""],
)
def test_a_row_is_found_as_the_table_prints_it(words):
    row = "swiglu swiglu, forward [R=4096,F=512] eager"
    assert has_words(row, words) and not has_words(
        row.replace("4096", "2048").replace("swiglu swiglu", "glu"), words or "R=4096"
    )


@pytest.mark.slow
@pytest.mark.parametrize("words", ["square [R=64] eager", "square   R=64   float32 eager"])
def test_a_row_is_traced_and_the_others_are_not(tmp_path, with_bench, words):
    with_bench(square_case(), square_case(operation="other"))
    assert main(["rope", "--profile", words, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/profile/*")
    assert path.name == "rope-square-r-64-eager.trace.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert {"call 0", "call 2", "aten::mul"} <= {event.get("name") for event in events}


def test_a_cpu_compiles_one_case_of_a_bench():
    cases = [square_case(size=size) for size in (8, 16)] + [square_case(operation="other")]
    for case in cases[:2]:
        case.candidates["torch.compile"] = Candidate(torch.square)
    compile_once(cases)
    assert ["torch.compile" in case.candidates for case in cases] == [False, True, False]
    assert "one case" in cases[0].absent["torch.compile at other cases"] and not cases[1].absent and not cases[2].absent


def test_an_unknown_bench_is_refused_with_the_choice(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["ropes"])
    assert ended.value.code == 2
    words = capsys.readouterr().err
    assert "received bench 'ropes'; expected" in words and all(name in words for name in (*KERNELS, *STAGES))


def test_the_verb_hands_everything_on_and_its_exit_code_back():
    done = subprocess.run(
        [sys.executable, "-m", "warpline.stages.command", "bench", "--compare", "a.json", "b.json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "No such file" in done.stderr
