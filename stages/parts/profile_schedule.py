"""A pipeline's schedule: its order, when everything runs if nothing costs but compute, its bubble, and its picture.

Costs: a forward of one stage is 1, its backward 2; split, 1 for the gradient of the input and 1 for the weights'. Predicted
bubble: the share of ranks × time in which a rank has nothing to do. Measured: the share in which a rank waits for a neighbour's
message, or for the last rank's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import nn

from ...parallel.pipeline import SCHEDULES, stages_of
from .profile_trace import Window
from .report_figures import text

COSTS = {"F": 1, "B": 2, "I": 1, "W": 1}
COLORS = {"F": "--pretrain", "B": "--rl", "I": "--rl", "W": "--preference"}
NAMES = {"F": "forward", "B": "backward", "I": "backward, input", "W": "backward, weights"}
SYMBOLS = {"F": "0123456789", "B": "abcdefghij", "I": "abcdefghij", "W": "ABCDEFGHIJ"}
LABEL_WIDTH = 8


class Action(NamedTuple):
    """`kind`: F forward, B backward, or apart I (gradient of the input) and W (of the weights)."""

    stage: int
    kind: str
    microbatch: int


class Placed(NamedTuple):
    action: Action
    start: int
    end: int


def order(schedule: str, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> list[list[Action]]:
    """What each rank does, in order; refuses (ValueError) what torch's schedule refuses."""
    if schedule == "gpipe":
        count = range(num_microbatches)
        return [[Action(r, kind, m) for kind in "FB" for m in count] for r in range(num_ranks)]
    if schedule == "1f1b":
        return [_one_forward_one_backward(r, num_ranks, num_microbatches) for r in range(num_ranks)]
    kind, fixed = SCHEDULES[schedule]
    held = fixed or stages_per_rank
    stages = [
        SimpleNamespace(
            stage_index=index, num_stages=num_ranks * held, group_size=num_ranks, group_rank=0, submod=nn.Identity(),
            is_first=index == 0, is_last=index == num_ranks * held - 1,
        )
        for index in stages_of(schedule, 0, num_ranks, held)
    ]  # fmt: skip
    orders = kind(stages, num_microbatches, loss_fn=None).pipeline_order
    return [[_action(x) for x in orders[rank] if x is not None and x.microbatch_index is not None] for rank in range(num_ranks)]


def _action(x: Any) -> Action:
    return Action(x.stage_index, x.computation_type.value, x.microbatch_index)


def _one_forward_one_backward(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    ahead = min(num_microbatches, num_ranks - rank)
    actions = [Action(rank, "F", m) for m in range(ahead)]
    for m in range(num_microbatches):
        actions.append(Action(rank, "B", m))
        if m + ahead < num_microbatches:
            actions.append(Action(rank, "F", m + ahead))
    return actions


def place(orders: Sequence[Sequence[Action]]) -> list[list[Placed]]:
    """When everything runs, each rank in its order and as soon as what it needs is there; messages cost nothing."""
    last_stage = max(action.stage for actions in orders for action in actions)
    done: dict[Action, int] = {}
    placed: list[list[Placed]] = [[] for _ in orders]
    progress = True
    while progress:
        progress = False
        for actions, row in zip(orders, placed, strict=True):
            while len(row) < len(actions):
                action = actions[len(row)]
                times = [_done(done, need) for need in _needs(action, last_stage)]
                if None in times:
                    break
                start = max([row[-1].end if row else 0, *(time for time in times if time is not None)])
                row.append(Placed(action, start, start + COSTS[action.kind]))
                done[action] = row[-1].end
                progress = True
    if any(len(row) < len(actions) for actions, row in zip(orders, placed, strict=True)):
        raise ValueError("received an order in which ranks wait for each other in a circle; expected one that ends")
    return placed


def _needs(action: Action, last_stage: int) -> list[Action]:
    stage, kind, microbatch = action
    if kind == "F":
        return [Action(stage - 1, "F", microbatch)] if stage else []
    if kind == "W":
        return [Action(stage, "I", microbatch)]
    return [Action(stage, "F", microbatch), *([Action(stage + 1, "I", microbatch)] if stage < last_stage else [])]


def _done(done: dict[Action, int], action: Action) -> int | None:
    """A whole backward gives the input's gradient as well."""
    found = done.get(action)
    return done.get(action._replace(kind="B")) if found is None and action.kind == "I" else found


def predicted_bubble(placed: Sequence[Sequence[Placed]]) -> float:
    """Idle time over ranks × the time from the first start to the last end."""
    whole = len(placed) * max(row[-1].end for row in placed)
    return 1.0 - sum(item.end - item.start for row in placed for item in row) / whole


def measured_bubble(windows: Sequence[Sequence[Window]]) -> float | None:
    """Of the ranks of one pipeline, whose clocks are one: idle time over ranks × schedule time, over all schedules recorded;
    None where a rank's trace shows none."""
    idle = whole = 0.0
    if not windows or len({len(row) for row in windows}) > 1:
        return None
    for together in zip(*windows, strict=True):
        start, end = min(window.start for window in together), max(window.end for window in together)
        idle += sum(window.start - start + window.waited + end - window.end for window in together)
        whole += len(together) * (end - start)
    return idle / whole if whole else None


def draw_text(placed: Sequence[Sequence[Placed]], width: int = 80) -> str:
    """A line a rank; what does not fit is cut off and said."""
    whole = max(row[-1].end for row in placed)
    room = width - LABEL_WIDTH
    scale, shown = max(1, min(4, room // whole)), min(whole, room)
    lines = []
    for rank, row in enumerate(placed):
        cells = ["·"] * (shown * scale)
        for action, start, end in row:
            symbol = SYMBOLS[action.kind][action.microbatch % 10]
            for column in range(start * scale, min(end * scale, len(cells))):
                cells[column] = symbol
        lines.append(f"rank {rank:<3}{''.join(cells)}")
    kinds = {item.action.kind for row in placed for item in row}
    legend = ["0–9 forward of a microbatch", "a–j its backward"]
    if "I" in kinds:
        legend[1:] = [f"a–j input's gradient{' (2 wide: both)' if 'B' in kinds else ''}", "A–J weights'"]
    lines.append(", ".join([*legend, "· idle"]))
    if shown < whole:
        lines.append(f"the first {shown} of {whole}")
    return "\n".join(lines)


def draw_svg(placed: Sequence[Sequence[Placed]], label: str) -> str:
    """One row a rank; later stages of a rank are paler. Colours are the page's."""
    whole, left, height = max(row[-1].end for row in placed), 52, 24
    scale = (1000 - left) / whole
    drawn = []
    for rank, row in enumerate(placed):
        y = rank * height
        first = min(item.action.stage for item in row)
        drawn.append(f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">rank {rank}</text>')
        drawn.append(f'<rect class="bed" x="{left}" y="{y + 2}" width="{1000 - left}" height="{height - 4}"/>')
        for action, start, end in row:
            x, wide = left + start * scale, (end - start) * scale
            pale = 1.0 if action.stage == first else 0.55
            title = f"<title>{NAMES[action.kind]}, stage {action.stage}, microbatch {action.microbatch}</title>"
            drawn.append(
                f'<rect x="{x:.1f}" y="{y + 2}" width="{max(wide - 1, 0.5):.1f}" height="{height - 4}" rx="2" '
                f'fill="var({COLORS[action.kind]})" fill-opacity="{pale if action.kind != "I" else 0.8 * pale}">{title}</rect>'
            )
            if wide > 13:
                drawn.append(f'<text class="cell" x="{x + wide / 2:.1f}" y="{y + 16}">{action.microbatch}</text>')
    size = f"0 0 1000 {len(placed) * height}"
    return f'<svg class="schedule" viewBox="{size}" role="img" aria-label="{text(label)}">{"".join(drawn)}</svg>'
