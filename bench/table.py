"""The table of a run: every candidate of every case beside ours, and what took no part.

Run     by `suite`
Expect  "× ours" is a candidate's time over ours, above 1 where ours is faster; "=" where they differ by less than the same code
        differs from itself; no ratio at all where our own check failed. A terminal narrower than the table gets the columns
        of `NARROW`
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby

from .rows import Results, Row

HEADINGS = ("candidate", "ms", "± ms", "self", "× ours", "ceiling", "MiB", "J", "error", "eager's", "")
WIDTH = 125
NARROW = ("candidate", "ms", "± ms", "× ours", "ceiling", "MiB", "error", "")  # 79 columns


def table(results: Results, benches: Iterable[str], columns: int | None = None) -> str:
    """`columns`: no line is longer, None for any length."""
    lines = []
    for bench in benches:
        rows = [row for row in results.rows if row.bench == bench]
        if bench not in results.benches:
            continue
        lines += ["", _folded_line(f"{bench}: {results.benches[bench].ended}, {results.benches[bench].seconds:.0f} s", columns)]
        for (operation, _, dtype), group in groupby(rows, key=lambda row: (row.operation, tuple(row.shape.items()), row.dtype)):
            chosen = list(group)
            sizes = " ".join(f"{name}={size}" for name, size in chosen[0].shape.items())
            lines += ["", _folded_line(f"  {operation}   {sizes}   {dtype}", columns), _line(HEADINGS, columns)]
            lines += [_line(cells(row, chosen[0]), columns) for row in chosen]
        absent = results.benches[bench].absent
        lines += [""] * bool(absent) + [_folded_line(f"  absent: {name}: {reason}", columns) for name, reason in absent.items()]
    if lines and columns is not None and columns < WIDTH:
        missing = ", ".join(heading for heading in HEADINGS if heading not in NARROW)
        lines += ["", _folded_line(f"without {missing}, for which {columns} columns are too few: {WIDTH} have them", columns)]
    return "\n".join(lines)


def terminal_columns() -> int | None:
    """None where nobody's terminal is written to."""
    return shutil.get_terminal_size((0, 0)).columns or None


def folded(parts: Sequence[str], columns: int, indent: str) -> str:
    """The parts on lines of so many columns; a part is broken only where it is longer than a line."""
    lines: list[str] = []
    room = max(columns - len(indent), 1)
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= room:
            lines[-1] += f"  {part}"
        else:
            lines += textwrap.wrap(part, room, break_on_hyphens=False)
    return "\n".join(indent + line for line in lines)


def _folded_line(line: str, columns: int | None) -> str:
    if columns is None or len(line) <= columns:
        return line
    words = line.lstrip()
    first = " " * (len(line) - len(words))
    return first + folded([words], columns, f"{first}  ").lstrip()


def cells(row: Row, ours: Row) -> tuple[str, ...]:
    marks = [] if row.check in ("", "passed") else [row.check]
    marks += [f"throttled: {row.telemetry['throttled']}"] if "throttled" in row.telemetry else []
    marks += stage_words(row)
    return (
        row.candidate, f"{row.milliseconds:.4g}", f"{row.spread:.2g}", _percent(row.self_spread), ratio(row, ours),
        _percent(row.of_ceiling), _number(row.peak_mib), _number(row.joules), _scientific(row.error),
        _scientific(row.eager_error), "; ".join([*marks, row.note] if row.note else marks),
    )  # fmt: skip


def stage_words(row: Row) -> list[str]:
    """Of a stage's step, tokens a second and the shares of its parts, the largest first; else nothing."""
    whole = sum(row.split.values())
    if row.tokens is None or whole <= 0:
        return []
    parts = sorted(row.split.items(), key=lambda part: -part[1])
    return [f"{1e3 * row.tokens / row.milliseconds:,.0f} tokens/s", ", ".join(f"{name} {t / whole:.0%}" for name, t in parts)]


def ratio(row: Row, ours: Row) -> str:
    """A candidate's time over ours; refused where our check failed, and called equal within the spread."""
    if row is ours:
        return "ours"
    if ours.check not in ("", "passed"):
        return "refused"
    value = row.milliseconds / ours.milliseconds
    within = max(row.self_spread or 0.0, ours.self_spread or 0.0)
    return f"= ({value:.2f})" if max(value, 1 / value) - 1 <= within else f"{value:.2f}"


def _line(values: tuple[str, ...], columns: int | None) -> str:
    """What does not fit behind the numbers goes below them."""
    first, *rest, last = values
    if columns is None or columns >= WIDTH:
        line = f"    {first:<22}" + "".join(f"{value:>11}" for value in rest)
    else:
        first, time, *rest, last = (value for heading, value in zip(HEADINGS, values, strict=True) if heading in NARROW)
        line = f"  {first:<22}{time:>10}" + "".join(f"{value:>9}" for value in rest)
    whole = f"{line}  {last}".rstrip()
    if columns is None or len(whole) <= columns:
        return whole
    return "\n".join([line.rstrip(), folded([last], columns, "      ")])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
