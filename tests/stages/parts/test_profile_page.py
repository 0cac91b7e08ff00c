"""The page and the summary say what the ranks' numbers say."""

import re

import pytest

from warpline.stages.parts.profile_page import collective_rows, operator_rows, page, shares, terminal_summary
from warpline.stages.parts.profile_schedule import order, place, predicted_bubble


def rank(number, compute, exposed, collectives, peak=2**20):
    return {
        "rank": number, "on_gpu": False, "steps": [[0.0, 50e3], [50e3, 100e3]], "time": 100e3, "compute": compute,
        "exposed": exposed, "collectives": collectives, "operators": [["aten::mm", 4, compute]],
        "memory": [[1.0, peak, 0], [2e3, peak // 2, 0]], "peak_bytes": peak, "windows": [],
    }  # fmt: skip


PLACED = place(order("1f1b", 2, 4, 1))
FOUND = {
    "stage": "sft", "config": "a<b>.toml", "overrides": ["parallel.pipeline=2"], "layout": "pipeline=2", "steps": [11, 12],
    "environment": {"torch": "2.13.0", "device": "cpu"}, "merged_ranks": [0, 1], "clock_offsets_us": [0.0, 0.0],
    "schedule": "1f1b", "predicted_bubble": predicted_bubble(PLACED), "measured_bubble": 0.25,
    "ranks": [
        rank(0, 60e3, 20e3, [["pipeline", "recv", 8, 2**20, 30e3, 20e3]]),
        rank(1, 80e3, 10e3, [["all ranks", "all_reduce", 2, 16, 12e3, 10e3]], peak=3 * 2**20),
    ],
}  # fmt: skip


def test_means_are_over_ranks_and_steps():
    assert [(x.step, x.compute, x.exposed, x.rest) for x in shares(FOUND)] == [(50, 30, 10, 10), (50, 40, 5, 5)]
    # 8 calls over 2 steps on one of two ranks: 2 a step and rank; the most exposed rank is not a mean.
    assert collective_rows(FOUND)[0] == ("pipeline", "recv", 2.0, 0.25, 7.5, 5.0, 10.0)
    assert operator_rows(FOUND) == [("aten::mm", 2.0, 35.0)]


def test_the_summary_fits_80_columns_and_names_what_matters():
    told = terminal_summary(FOUND)
    assert max(map(len, told.splitlines())) <= 80
    assert "a step 50.0 ms: compute 70%, exposed communication 15%, the rest 15%" in told
    assert "most compute: rank 1, 40.0 ms; the mean is 35.0 ms" in told
    assert "bubble of 1f1b: 20.0% predicted, 25.0% measured" in told and "3.0 MiB at most, on rank 1" in told


def test_the_page_is_self_contained_and_whole():
    html = page(FOUND, PLACED)
    assert "a&lt;b&gt;.toml" in html and "<b>.toml" not in html
    assert not re.findall(r"(?:src|href)=|url\(|@import|<script", html)
    assert html.count("<svg") == html.count("</svg>") == 3  # ranks, schedule, memory
    for title in ("Where each rank", "Communication", "schedule", "Operators", "Memory", "Time lines"):
        assert re.search(f"<h2>[^<]*{title}", html)
    assert "rank 1: exposed communication 5.00 ms" in html


@pytest.mark.parametrize("measured", [None, 0.25])
def test_a_bubble_that_was_not_seen_is_said_to_be_so(measured):
    told = terminal_summary({**FOUND, "measured_bubble": measured})
    assert ("not seen in the trace" in told) == (measured is None)


def test_one_rank_has_no_communication_and_no_schedule():
    alone = {**FOUND, "ranks": [rank(0, 60e3, 0.0, [])], "schedule": None, "predicted_bubble": None, "measured_bubble": None}
    html = page(alone, None)
    assert "One rank, or none recorded" in html and html.count("<svg") == 2
    assert "most compute" not in terminal_summary(alone)
