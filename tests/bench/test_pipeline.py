"""The replay of a pipeline's orders against bubbles worked by hand, and the table of predictions against it."""

import ast
from pathlib import Path

import pytest

from warpline.bench.pipeline import EQUAL, Action, predicted, replay


def gpipe(num_ranks, num_microbatches):
    """Every forward, then every backward, in the order of the microbatches."""
    return [
        [Action(kind, rank, m) for kind in "FB" for m in range(num_microbatches)] for rank in range(num_ranks)
    ]  # fmt: skip


def one_forward_one_backward(num_ranks, num_microbatches):
    orders = []
    for rank in range(num_ranks):
        ahead = num_ranks - 1 - rank
        order = [Action("F", rank, m) for m in range(min(ahead, num_microbatches))]
        for m in range(num_microbatches):
            order += [Action("F", rank, m + ahead)] * (m + ahead < num_microbatches) + [Action("B", rank, m)]
        orders.append(order)
    return orders


@pytest.mark.parametrize("order", [gpipe, one_forward_one_backward])
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 4), (4, 4), (4, 16), (3, 7)])
def test_orders_of_equal_stages_have_the_bubble_of_the_table(order, num_ranks, num_microbatches):
    step, bubble = replay(order(num_ranks, num_microbatches), lambda action: EQUAL[action.kind])
    assert step == 3 * (num_microbatches + num_ranks - 1)
    assert bubble == pytest.approx(predicted("1f1b", num_ranks, num_microbatches, 1), abs=1e-12)


def test_weights_gradients_fill_a_bubble():
    """Two ranks, one microbatch: F0 F1 I1, and then rank 0's I0 beside rank 1's W1; only W0 is left."""
    orders = [
        [Action("F", 0, 0), Action("I", 0, 0), Action("W", 0, 0)],
        [Action("F", 1, 0), Action("I", 1, 0), Action("W", 1, 0)],
    ]
    step, bubble = replay(orders, lambda action: EQUAL[action.kind])
    assert step == 5 and bubble == pytest.approx(1 - 6 / 10)


def test_a_slow_stage_is_what_the_others_wait_for():
    """Stage 1 costs twice stage 0: of 4 microbatches, 4·6 for it, and 1 and 2 of stage 0 around it."""
    step, _ = replay(gpipe(2, 4), lambda action: EQUAL[action.kind] * (1 + action.stage))
    assert step == 1 + 4 * 6 + 2


def test_orders_that_wait_for_each_other_are_refused():
    orders = [[Action("B", 0, 0), Action("F", 0, 0)], [Action("F", 1, 0), Action("B", 1, 0)]]
    with pytest.raises(ValueError, match=r"wait for each other at \[0, 0\]; expected those of one step"):
        replay(orders, lambda action: 1.0)


def test_predictions_are_those_of_the_table():
    """Every schedule's cell, evaluated."""
    source = Path(__file__).parents[2] / "parallel" / "pipeline.py"
    lines = [
        line.split("|")[1:4] for line in (ast.get_docstring(ast.parse(source.read_text())) or "").split("\n") if "−1)/(" in line
    ]
    found = {}
    for names, stages, cell in lines:
        formula = cell.partition(",")[0].replace("·", "*").replace("−", "-")
        v = 3 if stages.strip() == "v" else int(stages)
        for name in names.split(","):
            found[name.strip()] = eval(formula, {"n": 4, "M": 8, "v": v}), predicted(name.strip(), 4, 8, v)
    assert len(found) == 5
    for table, bench in found.values():
        assert table == pytest.approx(bench, abs=1e-12)
