"""Schedules: their order as the papers draw it, their bubble against the formulas, measured ones against windows by hand."""

import re
from itertools import pairwise

import pytest

from warpline.parallel.pipeline import stages_of
from warpline.stages.parts.profile_schedule import (
    Action,
    Placed,
    draw_svg,
    draw_text,
    measured_bubble,
    order,
    place,
    predicted_bubble,
)
from warpline.stages.parts.profile_trace import Window

CASES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zero_bubble", 1), ("zero_bubble", 2), ("zbv", 2)]


def told(actions):
    return " ".join(f"{action.kind}{action.microbatch}" for action in actions)


def test_orders_are_those_of_the_papers():
    first, last = order("1f1b", 2, 4, 1)
    assert told(first) == "F0 F1 B0 F2 B1 F3 B2 B3" and told(last) == "F0 B0 F1 B1 F2 B2 F3 B3"
    assert told(order("gpipe", 2, 2, 1)[1]) == "F0 F1 B0 B1"
    assert told(order("1f1b", 4, 2, 1)[0]) == "F0 F1 B0 B1"  # fewer microbatches than ranks


@pytest.mark.parametrize(("schedule", "held"), CASES)
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 4), (4, 8)])
def test_every_stage_does_every_microbatch_once_on_its_rank_and_in_time(schedule, held, num_ranks, num_microbatches):
    placed = place(order(schedule, num_ranks, num_microbatches, held))
    ends = {item.action: item.end for row in placed for item in row}
    for rank, row in enumerate(placed):
        mine = stages_of(schedule, rank, num_ranks, held)
        for kind in ("F", "B"):
            done = [(x.action.stage, x.action.microbatch) for x in row if x.action.kind in {"F": "F", "B": "BI"}[kind]]
            assert sorted(done) == [(stage, m) for stage in sorted(mine) for m in range(num_microbatches)]
        assert all(a.end <= b.start for a, b in pairwise(row))
        for (stage, kind, m), start, _ in row:
            if kind == "F" and stage:
                assert ends[Action(stage - 1, "F", m)] <= start
            if kind == "W":
                assert ends[Action(stage, "I", m)] <= start
            if kind in "BI":
                assert ends[Action(stage, "F", m)] <= start
                later = [ends[Action(stage + 1, x, m)] for x in "BI" if Action(stage + 1, x, m) in ends]
                assert stage == num_ranks * held - 1 or later[0] <= start


def bubble(schedule, num_ranks, num_microbatches, held=1):
    return predicted_bubble(place(order(schedule, num_ranks, num_microbatches, held)))


@pytest.mark.parametrize(("n", "m"), [(2, 2), (2, 8), (4, 4), (4, 16)])
def test_predicted_bubbles_are_the_formulas(n, m):
    assert bubble("gpipe", n, m) == bubble("1f1b", n, m) == pytest.approx((n - 1) / (m + n - 1))
    assert bubble("interleaved", n, m, 2) == pytest.approx((n - 1) / (2 * m + n - 1))
    assert bubble("zero_bubble", n, 2 * n) < bubble("1f1b", n, 2 * n)


def test_an_order_that_waits_for_itself_is_refused():
    with pytest.raises(ValueError, match="wait for each other in a circle"):
        place([[Action(0, "B", 0), Action(0, "F", 0)]])


def test_a_measured_bubble_is_waiting_and_the_ends():
    # 100 long on two ranks: 20 waited on the first, 10 + 5 before and after on the second; then 50 long without idling.
    first = [Window(0, 100, 20), Window(200, 250, 0)]
    second = [Window(10, 95, 0), Window(200, 250, 0)]
    assert measured_bubble([first, second]) == pytest.approx((20 + 10 + 5) / (2 * 100 + 2 * 50))
    assert measured_bubble([first, second[:1]]) is None and measured_bubble([[], []]) is None and measured_bubble([]) is None


def test_a_perfectly_timed_trace_measures_what_is_predicted():
    """Windows made from the placed schedule itself, messages for free: waiting is what lies between a rank's actions."""
    placed = place(order("1f1b", 4, 8, 1))
    windows = [[Window(0, row[-1].end, row[-1].end - sum(item.end - item.start for item in row))] for row in placed]
    assert measured_bubble(windows) == pytest.approx(predicted_bubble(placed)) == pytest.approx(3 / 11)


def test_the_text_is_a_line_a_rank_within_80_columns():
    lines = draw_text(place(order("1f1b", 2, 2, 1))).splitlines()
    assert lines[0] == "rank 0  00001111········" + "aaaaaaaa" + "····" + "bbbbbbbb"
    assert lines[1] == "rank 1  ····0000aaaaaaaa1111bbbbbbbb········"[: len(lines[1])]
    for schedule, held in CASES:
        lines = draw_text(place(order(schedule, 4, 24, held))).splitlines()
        assert len(lines) == 6 and max(map(len, lines)) <= 80 and lines[5].startswith("the first 72 of ")


def test_the_picture_has_every_action():
    placed = place(order("zbv", 2, 4, 2))
    svg = draw_svg(placed, "zbv <2>")
    assert len(re.findall("<title>", svg)) == sum(map(len, placed)) and "zbv &lt;2&gt;" in svg
    assert "backward, weights, stage 3, microbatch 0" in svg
    assert isinstance(placed[0][0], Placed)
