"""A picture of a bench's results: for each operation, time against the size that varies, a line per candidate.

Run     python -m warpline.bench.picture bench/results/<machine>/<bench>.json …      (needs matplotlib: the extra `bench`)
Writes  <bench>.png beside each
Expect  readable in black and white: candidates differ by marker and line, whiskers are the interquartile range, axes are
        logarithmic; operations at one size are bars. What does not vary stands in the title.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

STYLES = [("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"), ("v", "-"), ("x", "--"), ("P", "-."), ("*", ":")]
COLUMNS = 3


def panels(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """operation → {axis: the size that varies, or None; fixed: the others; lines: candidate → [(size, ms, spread)]}."""
    found: dict[str, dict[str, Any]] = {}
    for operation in dict.fromkeys(row["operation"] for row in rows):
        mine = [row for row in rows if row["operation"] == operation]
        names = list(dict.fromkeys(name for row in mine for name in row["shape"]))
        # The size that takes most values is the axis, and stands for those that vary with it.
        values = {name: sorted({row["shape"].get(name, 0) for row in mine}) for name in names}
        axis = max(names, key=lambda name: len(values[name]))
        axis_or_none = axis if len(values[axis]) > 1 else None
        fixed = " ".join(f"{name}={values[name][0]}" for name in names if len(values[name]) == 1)
        lines: dict[str, list[tuple[int, float, float]]] = {}
        for row in mine:
            lines.setdefault(row["candidate"], []).append((row["shape"].get(axis, 0), row["milliseconds"], row["spread"]))
        found[operation] = {"axis": axis_or_none, "fixed": fixed, "lines": {name: sorted(line) for name, line in lines.items()}}
    return found


def draw(path: Path) -> Path:
    """The picture of one file of results."""
    from matplotlib.figure import Figure  # only where pictures are made

    result = json.loads(path.read_text())
    found = panels(result["rows"])
    columns = min(COLUMNS, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.9 * rows), layout="constrained")
    candidates = list(dict.fromkeys(name for panel in found.values() for name in panel["lines"]))
    for number, (operation, panel) in enumerate(found.items()):
        axes = figure.add_subplot(rows, columns, number + 1)
        draw_panel(axes, operation, panel, candidates)
    machine = result["machine"]
    figure.suptitle(
        f"{path.stem} on {machine['card']} ({machine['processor']}), torch {machine['torch']}, {machine['date'][:10]}"
    )
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=110)
    return out


def draw_panel(axes: Any, operation: str, panel: dict[str, Any], candidates: list[str]) -> None:
    axes.set_title(f"{operation}\n{panel['fixed']}", fontsize=9)
    axes.set_ylabel("milliseconds")
    axes.grid(True, which="both", alpha=0.25)
    for name, line in panel["lines"].items():
        index = candidates.index(name)
        marker, style = STYLES[index % len(STYLES)]
        sizes, times, spreads = zip(*line, strict=True)
        if panel["axis"] is None:
            shade = str(0.45 + 0.5 * (index % 4) / 4)
            bars = axes.bar(name, times[0], yerr=spreads[0] / 2, capsize=3, color=shade, edgecolor="black")
            axes.bar_label(bars, [f"{times[0]:.3g}"], label_type="center", fontsize=8)
        else:
            half = [min(spread / 2, 0.9 * time) for time, spread in zip(times, spreads, strict=True)]
            look = {"marker": marker, "linestyle": style, "color": str(0.12 * (index % 5)), "markersize": 5, "capsize": 3}
            axes.errorbar(sizes, times, yerr=half, label=name, **look)
    if panel["axis"] is None:
        axes.tick_params(axis="x", rotation=20, labelsize=7)
    else:
        axes.set_xlabel(panel["axis"])
        axes.set_xscale("symlog", linthresh=1)
        axes.set_yscale("log")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which("{x:.4g}")
        ticks = sorted({size for line in panel["lines"].values() for size, _, _ in line})
        axes.set_xticks(ticks, [str(size) for size in ticks], fontsize=7)
        axes.minorticks_off()
        axes.legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", nargs="+", type=Path, metavar="JSON", help="a file that a bench wrote")
    for path in parser.parse_args().results:
        print(draw(path))


if __name__ == "__main__":
    main()
