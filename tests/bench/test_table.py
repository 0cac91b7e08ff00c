"""The table: a ratio only over a check that passed, "=" within the spread, and every absent peer with its reason."""

from warpline.bench.rows import Bench, Results, Row
from warpline.bench.table import ratio, table


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
