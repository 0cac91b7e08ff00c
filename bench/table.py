"""The table of a run: every candidate of every case beside ours, and what took no part.

Run     by `suite`
Expect  "× ours" is a candidate's time over ours, above 1 where ours is faster; "=" where they differ by less than the same code
        differs from itself; no ratio at all where our own check failed
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from .rows import Results, Row

HEADINGS = ("candidate", "ms", "± ms", "self", "× ours", "ceiling", "MiB", "J", "error", "eager's", "")


def table(results: Results, benches: Iterable[str]) -> str:
    lines = []
    for bench in benches:
        rows = [row for row in results.rows if row.bench == bench]
        if bench not in results.benches:
            continue
        lines.append(f"\n{bench}: {results.benches[bench].ended}, {results.benches[bench].seconds:.0f} s")
        for (operation, _, dtype), group in groupby(rows, key=lambda row: (row.operation, tuple(row.shape.items()), row.dtype)):
            chosen = list(group)
            sizes = " ".join(f"{name}={size}" for name, size in chosen[0].shape.items())
            lines += ["", f"  {operation}   {sizes}   {dtype}", _line(HEADINGS)]
            lines += [_line(cells(row, chosen[0])) for row in chosen]
        absent = results.benches[bench].absent
        lines += [""] * bool(absent) + [f"  absent: {name}: {reason}" for name, reason in absent.items()]
    return "\n".join(lines)


def cells(row: Row, ours: Row) -> tuple[str, ...]:
    marks = [] if row.check in ("", "passed") else [row.check]
    marks += [f"throttled: {row.telemetry['throttled']}"] if "throttled" in row.telemetry else []
    return (
        row.candidate, f"{row.milliseconds:.4g}", f"{row.spread:.2g}", _percent(row.self_spread), ratio(row, ours),
        _percent(row.of_ceiling), _number(row.peak_mib), _number(row.joules), _scientific(row.error),
        _scientific(row.eager_error), "; ".join([*marks, row.note] if row.note else marks),
    )  # fmt: skip


def ratio(row: Row, ours: Row) -> str:
    """A candidate's time over ours; refused where our check failed, and called equal within the spread."""
    if row is ours:
        return "ours"
    if ours.check not in ("", "passed"):
        return "refused"
    value = row.milliseconds / ours.milliseconds
    within = max(row.self_spread or 0.0, ours.self_spread or 0.0)
    return f"= ({value:.2f})" if max(value, 1 / value) - 1 <= within else f"{value:.2f}"


def _line(values: tuple[str, ...]) -> str:
    first, *rest, last = values
    return f"    {first:<22}" + "".join(f"{value:>11}" for value in rest) + f"  {last}".rstrip()


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
