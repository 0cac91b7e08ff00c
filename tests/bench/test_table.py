"""The table: a ratio only over a check that passed, "=" within the spread, and every absent peer with its reason."""

from warpline.bench.rows import Bench, Results, Row
from warpline.bench.table import ratio, stage_words, table, terminal_columns


def row(candidate: str, milliseconds: float, **options) -> Row:
    return Row("norm", candidate, {"R": 4}, "float32", milliseconds, 0.1, bench="rms_norm", **{"self_spread": 0.05, **options})


def test_a_ratio_is_a_candidates_time_over_ours():
    ours = row("warpline", 2.0, check="passed")
    assert ratio(ours, ours) == "ours"
    assert ratio(row("eager", 5.0), ours) == "2.50"


def test_a_difference_within_the_spread_of_the_same_code_is_no_difference():
    ours = row("warpline", 2.0, check="passed", self_spread=0.2)
    assert ratio(row("eager", 2.3), ours) == "= (1.15)"
    assert ratio(row("eager", 1.7), ours) == "= (0.85)"
    assert ratio(row("eager", 2.5), ours) == "1.25"


def test_no_ratio_over_a_check_that_failed():
    ours = row("warpline", 2.0, check="failed: error 1.0e-01, allowed 1.0e-06")
    assert ratio(row("eager", 5.0), ours) == "refused"


def test_the_table_says_who_is_absent_why_and_what_throttled():
    rows = [row("warpline", 2.0, check="passed", of_ceiling=0.5, error=1e-7), row("copy", 1.0)]
    rows[1].telemetry = {"throttled": "software power cap"}
    benches = {"rms_norm": Bench("complete", False, 3.0, {"liger": "runs on CUDA"})}
    words = table(Results({"name": "cpu"}, None, benches, rows), ["rms_norm", "not run"])
    assert "norm   R=4   float32" in words and "absent: liger: runs on CUDA" in words
    assert "throttled: software power cap" in words and "50%" in words and "1.0e-07" in words


def test_a_stage_says_its_tokens_a_second_and_where_the_time_goes():
    split = {"data and host": 0.01, "forward": 0.04, "backward": 0.15}
    step = row("warpline", 200.0, check="passed", tokens=1536, split=split)
    assert stage_words(step) == ["7,680 tokens/s", "backward 75%, forward 20%, data and host 5%"]
    assert stage_words(row("warpline", 200.0, tokens=1536)) == [], "an operation has tokens, and no parts"
    results = Results({"name": "cpu"}, None, {"rms_norm": Bench("complete", False, 3.0, {})}, [step])
    narrow = table(results, ["rms_norm"], 80).splitlines()
    assert any("7,680 tokens/s; backward 75%, forward 20%" in line for line in narrow) and max(map(len, narrow)) <= 80


LONG = "failed: error 1.0e-01, allowed 1.0e-06; and it says why in more words than there is room for in one line of a terminal"


def wide_and_narrow(**options) -> tuple[str, str]:
    ours = row("warpline (torch fused)", 12345.6, check=LONG, of_ceiling=0.5, peak_mib=7.5, error=1e-7, **options)
    benches = {"rms_norm": Bench("complete", False, 3.0, {"liger": "runs on CUDA, " * 20})}
    results = Results({"name": "cpu"}, None, benches, [ours, row("eager", 23456.7, peak_mib=11.0, error=3e-7)])
    return table(results, ["rms_norm"]), table(results, ["rms_norm"], 80)


def test_a_narrow_terminal_gets_lines_that_fit_and_is_told_what_they_leave_out():
    wide, narrow = wide_and_narrow(joules=4.25, eager_error=2e-7)
    assert max(map(len, wide.splitlines())) > 125 and max(map(len, narrow.splitlines())) <= 80
    for number in ("1.235e+04", "50%", "7.5", "1.0e-07", "11", "3.0e-07", "refused"):
        assert f" {number}" in wide and f" {number}" in narrow
    for number, heading in (("5.0%", "self"), ("4.25", "J"), ("2.0e-07", "eager's")):
        assert f" {number}" in wide and number not in narrow and heading in narrow.splitlines()[-1]
    assert " ".join(LONG.split()) in " ".join(narrow.split()), "a note is broken, not cut"
    assert " ".join(narrow.split()).count("runs on CUDA") == 20
    assert "without" not in wide


def test_headings_stand_over_their_numbers():
    for words in wide_and_narrow():
        heading, ours = (next(line for line in words.splitlines() if mark in line) for mark in ("candidate", "1.235e+04"))
        for name, number in (("ms", "1.235e+04"), ("ceiling", "50%"), ("MiB", "7.5"), ("error", "1.0e-07")):
            assert heading.index(f" {name}") + len(name) == ours.index(f" {number}") + len(number)


def test_the_terminal_says_its_columns_and_a_file_has_none(monkeypatch):
    monkeypatch.setenv("COLUMNS", "72")
    assert terminal_columns() == 72
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr("sys.__stdout__", None)
    assert terminal_columns() is None
