"""Pictures of a run: time and memory against size for each operation, the roofline, and how a stage's step splits.

Run     by `page`, at the end of `warpline bench`      (needs matplotlib: the extra `bench`)
Writes  <bench>.png for every bench of the results, roofline.png, stages.png
Expect  readable in black and white: candidates differ by marker, line and hatching; whiskers are the interquartile range; axes
        carry units. Where one size varies and the others stay, it is an axis, on a logarithmic scale; a shape alone is bars.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .rows import Results, Row

STYLES = (("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"), ("v", "-"), ("x", "--"), ("P", "-."), ("*", ":"))
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
COLUMNS = 3
LABEL: dict[str, Any] = {
    "ha": "center", "va": "bottom", "fontsize": 8, "bbox": {"facecolor": "white", "pad": 1.5, "edgecolor": "none"},
}  # fmt: skip
# Sizes that follow from another one that is there: sequences from a fixed number of tokens, pairs from their length.
FOLLOWING = ("B", "P")


class Panel(NamedTuple):
    """One operation: a line per candidate over `axis`, or at one shape (axis None) a bar per candidate."""

    operation: str
    axis: str | None
    fixed: str
    rows: list[Row]


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Each operation's rows: a panel for every size that varies while the others stay, and one for each shape left over."""
    found = []
    for operation in dict.fromkeys(row.operation for row in rows):
        mine = [row for row in rows if row.operation == operation]
        left = {id(row) for row in mine}
        for axis in _axes(mine):
            groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
            for row in mine:
                groups[tuple(size for name, size in row.shape.items() if name not in (axis, *FOLLOWING))].append(row)
            for group in groups.values():
                if len({row.shape[axis] for row in group}) > 1:
                    found.append(Panel(operation, axis, _fixed(group, axis), group))
                    left -= {id(row) for row in group}
        shapes = dict.fromkeys(tuple(row.shape.items()) for row in mine if id(row) in left)
        for shape in shapes:
            alone = [row for row in mine if tuple(row.shape.items()) == shape]
            found.append(Panel(operation, None, _fixed(alone, ""), alone))
    return found


def _axes(rows: Sequence[Row]) -> list[str]:
    """Sizes that vary; those that follow from another only if nothing else does."""
    varying = [name for name in rows[0].shape if len({row.shape.get(name) for row in rows}) > 1]
    leading = [name for name in varying if name not in FOLLOWING]
    return leading or varying


def _fixed(rows: Sequence[Row], axis: str) -> str:
    names = rows[0].shape
    return " ".join(
        f"{name}={size}" for name, size in names.items() if name != axis and {row.shape[name] for row in rows} == {size}
    )


def draw_bench(results: Results, bench: str, folder: Path) -> Path:
    """Time in the upper half; memory in the lower, where it was measured."""
    rows = [row for row in results.rows if row.bench == bench]
    found = panels(rows)
    candidates = list(dict.fromkeys(row.candidate for row in rows))
    measures: list[tuple[str, Callable[[Row], float | None]]] = [("milliseconds", lambda row: row.milliseconds)]
    if any(row.peak_mib for row in rows):
        measures.append(("peak memory beyond the inputs, MiB", lambda row: row.peak_mib))
    columns = min(COLUMNS, len(found))
    height = -(-len(found) // columns)
    figure = Figure(figsize=(5.4 * columns, 3.6 * height * len(measures) + 0.6), layout="constrained")
    for part, (label, value) in enumerate(measures):
        for number, panel in enumerate(found):
            place = (part * height + number // columns) * columns + number % columns + 1
            axes = figure.add_subplot(height * len(measures), columns, place)
            draw_panel(axes, panel, candidates, label, value)
    figure.suptitle(title_of(results, bench))
    return _save(figure, folder / f"{bench}.png")


def draw_panel(axes: Axes, panel: Panel, candidates: Sequence[str], label: str, value: Callable[[Row], float | None]) -> None:
    axes.set_title(f"{panel.operation}\n{panel.fixed}", fontsize=9)
    axes.set_ylabel(label, fontsize=8)
    axes.grid(True, alpha=0.25)
    is_time = label == "milliseconds"
    if panel.axis is None:
        for row in panel.rows:
            index, height = candidates.index(row.candidate), value(row) or 0.0
            axes.bar(
                row.candidate, height, yerr=whiskers([row.spread / 2], [height], 1.0) if is_time else None, capsize=3,
                edgecolor="black", color=str(0.95 - 0.12 * (index % 4)), hatch=HATCHES[index % len(HATCHES)],
            )  # fmt: skip
            axes.annotate(f"{height:.3g}", (row.candidate, 0), xytext=(0, 4), textcoords="offset points", **LABEL)
        axes.tick_params(axis="x", rotation=20, labelsize=7)
        return
    sizes = sorted({row.shape[panel.axis] for row in panel.rows})
    for candidate in dict.fromkeys(row.candidate for row in panel.rows):
        line = sorted((row for row in panel.rows if row.candidate == candidate), key=lambda row: row.shape[panel.axis or ""])
        points = [(row.shape[panel.axis], made, row.spread / 2) for row in line if (made := value(row)) is not None]
        if not points:
            continue
        index = candidates.index(candidate)
        marker, style = STYLES[index % len(STYLES)]
        xs, ys, halves = zip(*points, strict=True)
        axes.errorbar(
            xs, ys, yerr=whiskers(halves, ys, 0.9) if is_time else None, label=candidate, marker=marker, linestyle=style,
            color=str(0.13 * (index % 5)), markersize=5, capsize=3,
        )  # fmt: skip
    axes.set_xlabel(f"{panel.axis} ({LETTERS.get(panel.axis, panel.axis)})", fontsize=8)
    axes.set_xscale("log", base=2)
    is_positive = all(made > 0 for row in panel.rows if (made := value(row)) is not None)
    axes.set_yscale("log" if is_positive else "symlog")
    if is_positive:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=7)
    axes.minorticks_off()
    axes.legend(fontsize=7)


def whiskers(halves: Sequence[float], heights: Sequence[float], most: float) -> list[list[float]]:
    """[below, above] of every point: below at most that part of its height, which a logarithmic axis needs above zero."""
    return [[min(half, most * height) for half, height in zip(halves, heights, strict=True)], list(halves)]


LETTERS = {
    "T": "tokens", "V": "entries of the vocabulary", "D": "width", "U": "teacher's width", "S": "tokens of a sequence",
    "B": "sequences", "docs": "documents packed", "window": "keys a query sees", "R": "rows", "F": "columns", "W": "columns",
    "P": "parameters or pairs", "N": "query heads", "H": "width of a head",
}  # fmt: skip


def draw_roofline(results: Results, folder: Path) -> Path | None:
    """Every row of ours that says what it needs, under the copy's slope and the product's roof."""
    ceilings = results.ceilings
    rows = [row for row in results.rows if row.candidate.startswith("warpline") and row.tflops and row.gbytes_per_second]
    if ceilings is None or not rows:
        return None
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.add_subplot()
    benches = list(dict.fromkeys(row.bench for row in rows))
    intensities = [1e3 * (row.tflops or 0.0) / (row.gbytes_per_second or 1.0) for row in rows]
    low, high = min(intensities) / 2, max(intensities) * 2
    slope = ceilings.copy_gbytes_per_second / 1e3
    for (dtype, roof), style in zip(ceilings.product_tflops.items(), ("-", "--", ":"), strict=False):
        knee = roof / slope
        words = f"ceiling: copy {ceilings.copy_gbytes_per_second:.3g} GB/s, {dtype} product {roof:.3g} TFLOP/s"
        if low < knee < high:
            axes.plot([low, knee, high], [low * slope, roof, roof], style, color="black", label=words)
        else:
            axes.plot([low, high], [min(x * slope, roof) for x in (low, high)], style, color="black", label=words)
    for row, x in zip(rows, intensities, strict=True):
        index = benches.index(row.bench)
        marker = ("o", "s", "^", "D", "v", "x", "P", "*", "<", ">", "h")[index % 11]
        face = "none" if index % 2 and marker not in "xP*" else str(0.15 * (index % 4))
        axes.plot(x, row.tflops or 0.0, marker, color=str(0.15 * (index % 4)), markerfacecolor=face, markersize=7)
    for index, bench in enumerate(benches):
        marker = ("o", "s", "^", "D", "v", "x", "P", "*", "<", ">", "h")[index % 11]
        face = "none" if index % 2 and marker not in "xP*" else str(0.15 * (index % 4))
        shade = str(0.15 * (index % 4))
        axes.plot([], [], marker, color=shade, markerfacecolor=face, label=bench, linestyle="none")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs that the operation needs per byte that it needs to move")
    axes.set_ylabel("TFLOP/s")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8, loc="lower right")
    figure.suptitle(title_of(results, "roofline: ours, every kernel and shape"))
    return _save(figure, folder / "roofline.png")


def draw_stages(results: Results, folder: Path) -> Path | None:
    """A bar per stage and candidate: the parts of its step in seconds, and tokens a second above it."""
    rows = [row for row in results.rows if row.split]
    if not rows:
        return None
    figure = Figure(figsize=(max(7.0, 2.2 + 1.25 * len(rows)), 5.4), layout="constrained")
    axes = figure.add_subplot()
    parts = list(dict.fromkeys(part for row in rows for part in row.split))
    names = [f"{row.bench}\n{row.candidate}" for row in rows]
    bottoms = [0.0] * len(rows)
    for index, part in enumerate(parts):
        heights = [row.split.get(part, 0.0) for row in rows]
        shade, hatch = str(1.0 - 0.11 * index), HATCHES[index % len(HATCHES)]
        axes.bar(names, heights, bottom=bottoms, label=part, width=0.65, edgecolor="black", hatch=hatch, color=shade)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for name, top, row in zip(names, bottoms, rows, strict=True):
        rate = "" if row.tokens is None else f"{1e3 * row.tokens / row.milliseconds:,.0f}\ntokens/s"
        axes.annotate(rate, (name, top), ha="center", va="bottom", fontsize=8)
    axes.margins(y=0.14)
    axes.set_ylabel("seconds a step")
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(fontsize=8)
    figure.suptitle(title_of(results, "stages: where a step's time goes"))
    return _save(figure, folder / "stages.png")


def title_of(results: Results, what: str) -> str:
    machine = results.machine
    where = machine["processor"] if machine["card"] == "cpu" else machine["card"]
    load = f", load {machine['load_before']}" if float(machine.get("load_before", 0)) > 0.5 else ""
    return f"{what} — {where}, {machine['threads']} threads, torch {machine['torch']}, {str(machine['date'])[:10]}{load}"


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=100)
    return path
