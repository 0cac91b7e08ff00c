"""Comparing two files: what is beyond the spread is named, ours slower is a regression, and equal code is not."""

import dataclasses

import pytest

from warpline.bench.compare import compare
from warpline.bench.rows import Bench, Results, Row, save
from warpline.bench.suite import main

MACHINE = {"name": "cpu", "date": "2026-11-25", "commit": "abc", "card": "cpu", "processor": "two cores", "threads": 2,
           "torch": "2.13"}  # fmt: skip


def results(**milliseconds: float) -> Results:
    rows = [
        Row("norm", name, {"R": 4}, "float32", time, 0.02, bench="rms_norm", check="passed", self_spread=0.03)
        for name, time in milliseconds.items()
    ]
    return Results(dict(MACHINE), rows=rows)


def test_equal_files_have_no_change():
    words, has_regressed = compare(results(warpline=1.0, eager=2.0), results(warpline=1.05, eager=2.0))
    assert not has_regressed and "1 of ours within the spread" in words


def test_ours_slower_beyond_the_spreads_is_a_regression():
    words, has_regressed = compare(results(warpline=1.0), results(warpline=1.07))
    assert has_regressed and "REGRESSION slower 1.07× (1 → 1.07 ms, drift 1.00×, spread 6.0%)" in words
    assert not compare(results(warpline=1.0), results(warpline=1.05))[1]


def test_what_happened_to_everyone_in_a_case_is_the_machine():
    words, has_regressed = compare(results(warpline=1.0, eager=1.0, copy=0.5), results(warpline=4.2, eager=4.1, copy=2.0))
    assert not has_regressed and "median drift 4.05×" in words
    words, has_regressed = compare(results(warpline=1.0, eager=1.0, copy=0.5), results(warpline=6.0, eager=4.1, copy=2.0))
    assert has_regressed and "slower 1.48×" in words
    assert compare(results(warpline=1.0, eager=1.0), results(warpline=1.0, eager=0.5))[1], (
        "slower, as the machine became faster"
    )


def test_others_that_disagree_widen_the_spread():
    before = results(warpline=1.0, eager=1.0, liger=1.0, copy=1.0)
    assert not compare(before, results(warpline=1.4, eager=0.7, liger=1.0, copy=1.6))[1]
    assert compare(before, results(warpline=1.4, eager=1.0, liger=1.0, copy=1.0))[1]


def test_faster_is_said_and_is_no_regression():
    words, has_regressed = compare(results(warpline=1.0, eager=1.0), results(warpline=0.5, eager=1.0))
    assert not has_regressed and "faster 0.50×" in words


def test_a_check_that_fails_now_is_a_regression_at_any_speed():
    after = results(warpline=0.5)
    after.rows[0] = dataclasses.replace(after.rows[0], check="failed: error 1.0e-01, allowed 1.0e-06")
    words, has_regressed = compare(results(warpline=1.0), after)
    assert has_regressed and "check failed: error 1.0e-01" in words


def test_rows_of_one_file_only_are_counted():
    words, _ = compare(results(warpline=1.0, eager=1.0), results(warpline=1.0, liger=1.0))
    assert "1 rows in both" in words and "1 rows only in the first, 1 only in the second" in words


@pytest.mark.parametrize("ended", ["failed", "failed: 4 of 4: bench_case[rope]: boom", "interrupted", "running"])
def test_a_bench_that_was_complete_and_is_not_now_is_a_regression(ended):
    before, after = results(warpline=1.0), results(warpline=1.0)
    before.benches, after.benches = {"rope": Bench("complete", True)}, {"rope": Bench(ended, True)}
    words, has_regressed = compare(before, after)
    assert has_regressed and f"REGRESSION rope: complete → {ended}" in words
    assert not compare(after, before)[1] and not compare(after, after)[1] and not compare(before, before)[1]


def test_a_bench_that_did_not_run_is_named_and_is_no_regression():
    before, after = results(warpline=1.0), results(warpline=1.0)
    before.benches = {name: Bench("complete", True) for name in ("rope", "sft")}
    after.benches = {"sft": Bench("left out: No module named 'pydantic'; install the package", True)}
    words, has_regressed = compare(before, after)
    assert not has_regressed and "not in the second: rope" in words and "sft: complete → left out: No module" in words


@pytest.mark.parametrize(("after", "code"), [(1.0, 0), (2.0, 1)])
def test_the_command_exits_1_on_a_regression(tmp_path, capsys, after, code):
    for name, time in (("a", 1.0), ("b", after)):
        save(results(warpline=time), tmp_path / f"{name}.json")
    assert main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == code
    assert ("REGRESSION" in capsys.readouterr().out) == bool(code)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"milliseconds": 1.0', '"milliseconds": 0'), ('"name"', '"names"'), ("{", "[" * 100_000)],
    ids=["no time", "no machine", "deep"],
)
def test_an_edited_file_is_bad_input_in_one_line_and_no_regression(tmp_path, capsys, old, new):
    save(results(warpline=1.0), tmp_path / "a.json")
    (tmp_path / "b.json").write_text((tmp_path / "a.json").read_text().replace(old, new))
    assert main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("warpline bench: ") and output.err.count("\n") == 1


def test_a_file_that_is_not_there_is_bad_input(tmp_path, capsys):
    assert main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert "No such file" in capsys.readouterr().err
