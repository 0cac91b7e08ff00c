"""Measuring: the order of the runs, rotated inputs, the spread of a version against itself, errors and refusals."""

import math

import pytest
import torch

from warpline.bench import measure as module
from warpline.bench.machine import cache_bytes
from warpline.bench.measure import Candidate, Case, Report, interleaved, line_of, measure, peak_mib, relative_error, self_spread
from warpline.bench.rows import Ceilings, Row
from warpline.bench.telemetry import Telemetry

CPU = torch.device("cpu")


class Rounds:
    """pytest-benchmark's fixture, without its statistics."""

    def pedantic(self, target, *, setup, rounds):
        for _ in range(rounds):
            positional, keywords = setup()
            target(*positional, **keywords)


def squares(candidates, size=8, **options) -> Case:
    return Case(
        "square", {"R": size}, torch.float32, lambda generator: {"x": torch.randn(size, generator=generator)}, candidates,
        lambda x, dtype: [x["x"].to(dtype).square()], flops=8.0, bytes_moved=64.0, **options,
    )  # fmt: skip


def rows_of(case, tmp_path, seconds=0.001):
    report = Report(tmp_path, CPU)
    report.start("squares", True)
    return measure(case, Rounds(), report, Telemetry(CPU), seconds), report


def test_ours_runs_twice_in_every_round_and_the_inputs_take_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "cache_bytes", lambda device: 32)  # three caches hold three inputs of 32 bytes
    monkeypatch.setattr(module, "peak_mib", lambda call, device: None)
    seen = []

    def recording(name):
        return Candidate(lambda x: (seen.append((name, x["x"].data_ptr())), x["x"].square())[1])

    rows, _ = rows_of(squares({"ours": recording("ours"), "peer": recording("peer")}), tmp_path)
    runs = seen[2 + 3 :]  # after the check of each, and a round to learn how long one takes
    assert [name for name, _ in runs[:6]] == ["ours", "peer", "ours"] * 2
    rounds = [{pointer for _, pointer in runs[start : start + 3]} for start in range(0, len(runs), 3)]
    assert all(len(pointers) == 1 for pointers in rounds), "everyone gets the same inputs in a round"
    assert len(set.union(*rounds)) == 3
    assert [row.num_runs for row in rows] == [len(rounds)] * 2


def test_a_wrong_result_is_marked_and_the_right_one_passes(tmp_path):
    candidates = {"ours": Candidate(lambda x: x["x"].square()), "peer": Candidate(lambda x: x["x"].square() * 1.001)}
    rows, report = rows_of(squares(candidates), tmp_path)
    assert rows[0].check == "passed" and rows[0].error is not None and rows[0].error < 1e-6
    assert rows[1].check.startswith("failed: error 1.0e-03")
    assert report.results.rows == rows


def test_a_peer_that_refuses_is_absent_with_its_reason_and_ours_may_not_refuse(tmp_path):
    def refuses(x):
        raise RuntimeError("no kernel for R=8\nmore")

    good = Candidate(lambda x: x["x"].square())
    rows, report = rows_of(squares({"ours": good, "peer": Candidate(refuses)}), tmp_path)
    assert [row.candidate for row in rows] == ["ours"]
    assert report.results.benches["squares"].absent == {"peer, square [R=8]": "no kernel for R=8"}
    with pytest.raises(RuntimeError, match="no kernel"):
        rows_of(squares({"ours": Candidate(refuses), "peer": good}), tmp_path)


def test_a_limit_is_timed_and_not_checked(tmp_path):
    case = squares({"ours": Candidate(lambda x: x["x"].square())}, limits={"copy": Candidate(lambda x: x["x"].clone())})
    rows, _ = rows_of(case, tmp_path)
    assert [(row.candidate, row.check) for row in rows] == [("ours", "passed"), ("copy", "")]


def test_what_a_call_is_prepared_with_is_not_timed(tmp_path):
    import time

    def slow(x):
        time.sleep(0.02)
        return x["x"]

    rows, _ = rows_of(squares({"ours": Candidate(torch.square, slow)}), tmp_path)
    assert rows[0].milliseconds < 10 and rows[0].check == "passed"


def test_a_row_is_a_fraction_of_the_ceilings(tmp_path):
    report = Report(tmp_path, CPU)
    report.start("squares", True)
    report.results.ceilings = Ceilings(50.0, {"float32": 0.2})
    (row,) = measure(squares({"ours": Candidate(lambda x: x["x"].square())}), Rounds(), report, Telemetry(CPU), 0.001)
    least = report.results.ceilings.milliseconds(8.0, 64.0, "float32")
    assert row.of_ceiling == pytest.approx(least / row.milliseconds) and 0 < row.of_ceiling < 1
    assert row.tflops == pytest.approx(8e-9 / row.milliseconds)


def test_rows_of_another_bench_stay_and_those_of_the_same_are_replaced(tmp_path):
    case = squares({"ours": Candidate(lambda x: x["x"].square())})
    rows_of(case, tmp_path)
    _, report = rows_of(case, tmp_path)
    assert len(report.results.rows) == 1
    again = Report(tmp_path, CPU)
    again.start("cubes", True)
    again.end("complete", 1.0)
    assert [row.bench for row in again.results.rows] == ["squares"]
    assert set(Report(tmp_path, CPU).results.benches) == {"squares", "cubes"}


def test_self_spread_is_the_halves_difference():
    assert self_spread([1.0, 1.0, 1.0, 1.1, 1.1, 1.1]) == pytest.approx(0.1)
    assert self_spread([2.0]) == 0.0


def test_the_error_is_relative_to_the_largest_number_and_nan_is_infinite():
    truth = torch.tensor([4.0, 0.0])
    assert relative_error(torch.tensor([4.0, 0.1]), truth) == pytest.approx(0.025)
    assert relative_error(torch.tensor([math.nan, 0.0]), truth) == math.inf


def test_candidates_are_interleaved():
    order = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, 0.001)
    assert order[4:8] == ["a", "b", "a", "b"] and set(times) == {"a", "b"}


def test_resident_memory_of_a_call_is_its_own():
    size = 64 * 2**20
    found = peak_mib(lambda: torch.ones(size // 4).sum(), CPU)
    if found is None:
        pytest.skip("this system does not let a process ask")
    assert 60 < found < 80
    assert cache_bytes(CPU) >= 2**20


def test_a_row_is_one_line_or_as_many_as_fit_the_terminal():
    row = Row(
        "gradient, reverse KL", "warpline torch", {"T": 2048, "V": 131072}, "float32", 1.5, 0.25, error=1e-7, peak_mib=31.5
    )
    row.check, row.eager_error, row.of_ceiling, row.note = "failed: error 1.0e-07, allowed 1.0e-08", 2e-7, 0.5, "the last one"
    whole, narrow = line_of(row), line_of(row, 80).splitlines()
    assert "\n" not in whole and len(whole) > 150 and line_of(row, len(whole)) == whole
    assert max(map(len, narrow)) <= 80 and narrow[0].split("  ")[0] == "gradient, reverse KL"
    assert all(line.startswith("    ") and line == line.rstrip() for line in narrow[1:])
    assert " ".join(whole.split()) == " ".join(" ".join(narrow).split())
