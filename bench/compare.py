"""What became faster or slower between two files of results, beyond the spread of the same code against itself.

Run     warpline bench --compare A.json B.json
Expect  exit code 1 if a row of ours became slower, its check failed, or a bench that was complete failed or was cut off. The
        machine's own drift is taken out: a row's change is over that of the others in its case, the peers and limits that ran
        in turns with it; what those differ by is added to the spread. (Three runs of one commit on a machine whose load
        changed: everything 4 to 5 times slower, and no code.) Benches that the second run left out or was not asked for are
        named, rows that only one file has are counted, and neither is a regression.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import NamedTuple

from .rows import Results, Row


class Drift(NamedTuple):
    """What happened to the other rows of a case: their median change, and their spread."""

    change: float = 1.0
    spread: float = 0.0


def compare(before: Results, after: Results) -> tuple[str, bool]:
    """(the report, whether ours regressed)."""
    old = {row.key: row for row in before.rows}
    lines, has_regressed, num_same = [], False, 0
    if before.machine["name"] != after.machine["name"]:
        lines.append(f"two machines: {before.machine['name']} and {after.machine['name']}")
    shared = [(old[row.key], row) for row in after.rows if row.key in old]
    drifts = drifts_of(shared)
    changes = [drift.change for drift in drifts.values()]
    drift = f"; the machine's median drift {statistics.median(changes):.2f}×" if changes else ""
    lines.append(f"{len(shared)} rows in both{drift}")
    for then, now in shared:
        if not is_ours(now):
            continue
        verdict = verdict_of(then, now, drifts.get(now.key[:-1], Drift()))
        if verdict is None:
            num_same += 1
            continue
        is_regression = verdict.startswith(("slower", "check"))
        has_regressed |= is_regression
        lines.append(f"{'REGRESSION ' if is_regression else ''}{verdict}: {' / '.join(now.key)}")
    for words, is_regression in ends_of(before, after):
        has_regressed |= is_regression
        lines.append(f"{'REGRESSION ' if is_regression else ''}{words}")
    only_old, only_new = len(old) - len(shared), len(after.rows) - len(shared)
    lines.append(f"{num_same} of ours within the spread; {only_old} rows only in the first, {only_new} only in the second")
    return "\n".join(lines), has_regressed


def ends_of(before: Results, after: Results) -> list[tuple[str, bool]]:
    """(what became of a bench that was complete, whether that is a regression), where it is not complete now."""
    found = []
    for name, bench in before.benches.items():
        now = after.benches.get(name)
        if bench.ended != "complete" or (now is not None and now.ended == "complete"):
            continue
        if now is None:
            found.append((f"not in the second: {name}", False))
        else:
            found.append((f"{name}: complete → {now.ended}", not now.ended.startswith("left out")))
    return found


def drifts_of(pairs: list[tuple[Row, Row]]) -> dict[tuple[str, ...], Drift]:
    """By case: the change of its rows that are not ours. Their spread is what they say, and how far they are apart."""
    cases: dict[tuple[str, ...], list[tuple[Row, Row]]] = defaultdict(list)
    for then, now in pairs:
        if not is_ours(now):
            cases[now.key[:-1]].append((then, now))
    found = {}
    for case, members in cases.items():
        changes = [now.milliseconds / then.milliseconds for then, now in members]
        middle = statistics.median(changes)
        apart = statistics.median(max(change / middle, middle / change) - 1 for change in changes)
        own = statistics.median(spread_of(then) + spread_of(now) for then, now in members)
        found[case] = Drift(middle, max(apart, own))
    return found


def verdict_of(then: Row, now: Row, drift: Drift) -> str | None:
    """None if nothing changed beyond the machine's drift and what either run saw of the same code against itself."""
    if now.check.startswith("failed") and not then.check.startswith("failed"):
        return f"check {now.check}"
    change = now.milliseconds / then.milliseconds / drift.change
    allowed = spread_of(then) + spread_of(now) + drift.spread
    if max(change, 1 / change) - 1 <= allowed:
        return None
    words = "slower" if change > 1 else "faster"
    times = f"{then.milliseconds:.4g} → {now.milliseconds:.4g} ms, drift {drift.change:.2f}×, spread {allowed:.1%}"
    return f"{words} {change:.2f}× ({times})"


def spread_of(row: Row) -> float:
    """Relative: the self-spread, at least half the interquartile range; at least 1 %."""
    return max(row.self_spread or 0.0, row.spread / 2 / row.milliseconds, 0.01)


def is_ours(row: Row) -> bool:
    return row.candidate.startswith("warpline")
