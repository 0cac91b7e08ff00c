"""What became faster or slower between two files of results, beyond the spread of the same code against itself.

Run     warpline bench --compare A.json B.json
Expect  exit code 1 if a row of ours became slower, or its check failed; rows that only one file has are counted. Files of two
        machines are compared too, and said to be so; peers' rows show the machine's own drift.
"""

from __future__ import annotations

from .rows import Results, Row


def compare(before: Results, after: Results) -> tuple[str, bool]:
    """(the report, whether ours regressed)."""
    old = {row.key: row for row in before.rows}
    lines, has_regressed, num_same = [], False, 0
    if before.machine["name"] != after.machine["name"]:
        lines.append(f"two machines: {before.machine['name']} and {after.machine['name']}")
    shared = [row for row in after.rows if row.key in old]
    drift = typical_change([(old[row.key], row) for row in shared if not is_ours(row)])
    lines.append(f"{len(shared)} rows in both; peers' median change {drift:+.1%}")
    for row in shared:
        then = old[row.key]
        verdict = verdict_of(then, row)
        if verdict is None:
            num_same += 1
            continue
        is_regression = is_ours(row) and verdict.startswith(("slower", "check"))
        has_regressed |= is_regression
        lines.append(f"{'REGRESSION ' if is_regression else ''}{verdict}: {' / '.join(row.key)}")
    only_old, only_new = len(old) - len(shared), len(after.rows) - len(shared)
    lines.append(f"{num_same} within the spread; {only_old} rows only in the first, {only_new} only in the second")
    return "\n".join(lines), has_regressed


def verdict_of(then: Row, now: Row) -> str | None:
    """None if nothing changed beyond what either run saw of the same code against itself."""
    if now.check.startswith("failed") and not then.check.startswith("failed"):
        return f"check {now.check}"
    change = now.milliseconds / then.milliseconds
    allowed = spread_of(then) + spread_of(now)
    if max(change, 1 / change) - 1 <= allowed:
        return None
    words = "slower" if change > 1 else "faster"
    return f"{words} {change:.2f}× ({then.milliseconds:.4g} → {now.milliseconds:.4g} ms, spread {allowed:.1%})"


def spread_of(row: Row) -> float:
    """Relative: the self-spread, at least half the interquartile range; at least 1 %."""
    return max(row.self_spread or 0.0, row.spread / 2 / row.milliseconds, 0.01)


def is_ours(row: Row) -> bool:
    return row.candidate.startswith("warpline")


def typical_change(pairs: list[tuple[Row, Row]]) -> float:
    """Median relative change; 0 over no rows."""
    changes = sorted(now.milliseconds / then.milliseconds - 1 for then, now in pairs)
    return changes[len(changes) // 2] if changes else 0.0
