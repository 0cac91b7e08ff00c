"""What a profile says, as text for the terminal (80 columns) and as one self-contained HTML page.

Means are over ranks and recorded steps. A rank's step is compute, communication that no compute overlaps (exposed), and the
rest: waiting for the host, or Python between operators.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from .profile_schedule import COLORS, NAMES, Placed, draw_svg
from .report_figures import Axes, Curve, chart, text
from .report_style import STYLE

PARTS = (("compute", "--pretrain"), ("exposed communication", "--rl"), ("the rest", "--data"))
MAX_BARS = 64
MIB = 2**20
OWN_STYLE = """
.tiles { grid-template-columns:repeat(auto-fit,minmax(min(190px,100%),1fr)); }
svg.schedule text.cell { fill:#fff; text-anchor:middle; font-size:11px; }
.swatch { display:inline-block; width:12px; height:12px; border-radius:3px; margin-right:6px; vertical-align:-1px; }
td.number, th.number { text-align:right; white-space:nowrap; }
td.name { font:13px/1.5 ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace; overflow-wrap:anywhere; }
"""


class Share(NamedTuple):
    """One rank: milliseconds a step."""

    rank: int
    step: float
    compute: float
    exposed: float

    @property
    def rest(self) -> float:
        return max(0.0, self.step - self.compute - self.exposed)


class Row(NamedTuple):
    """One collective on one axis: a rank's calls, MiB and milliseconds a step, means over ranks; `worst`: most exposed."""

    axis: str
    operation: str
    calls: float
    mib: float
    milliseconds: float
    exposed: float
    worst: float


def shares(found: dict[str, Any]) -> list[Share]:
    return [
        Share(rank["rank"], *(rank[name] / 1e3 / len(rank["steps"]) for name in ("time", "compute", "exposed")))
        for rank in found["ranks"]
    ]


def collective_rows(found: dict[str, Any]) -> list[Row]:
    """Dearest first. A rank without a collective has spent nothing in it."""
    ranks = found["ranks"]
    numbers: dict[tuple[str, str], list[tuple[float, ...]]] = defaultdict(list)
    for rank in ranks:
        for axis, operation, calls, size, time, exposed in rank["collectives"]:
            numbers[axis, operation].append(tuple(x / len(rank["steps"]) for x in (calls, size, time, exposed)))
    rows = []
    for (axis, operation), parts in numbers.items():
        calls, size, time, exposed = (sum(column) / len(ranks) for column in zip(*parts, strict=True))
        worst = max(part[3] for part in parts)
        rows.append(Row(axis, operation, calls, size / MIB, time / 1e3, exposed / 1e3, worst / 1e3))
    return sorted(rows, key=lambda row: (-row.exposed, row.axis, row.operation))


def operator_rows(found: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(name, calls, milliseconds) a step, means over ranks, of each rank's dearest."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for rank in found["ranks"]:
        for name, calls, time in rank["operators"]:
            sums[name][0] += calls / len(rank["steps"]) / len(found["ranks"])
            sums[name][1] += time / 1e3 / len(rank["steps"]) / len(found["ranks"])
    return sorted(((name, calls, time) for name, (calls, time) in sums.items()), key=lambda row: -row[2])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _bubbles(found: dict[str, Any]) -> str:
    measured = found["measured_bubble"]
    seen = "not seen in the trace" if measured is None else f"{measured:.1%} measured"
    return f"{found['predicted_bubble']:.1%} predicted, {seen}"


def terminal_summary(found: dict[str, Any], num_operators: int = 8) -> str:
    rows, mine = collective_rows(found), shares(found)
    step = _mean([share.step for share in mine])
    parts = [_mean([getattr(share, name) for share in mine]) for name in ("compute", "exposed", "rest")]
    lines = [
        f"{found['stage']}, {found['layout']}: steps {found['steps'][0]} to {found['steps'][1]} on {len(mine)} rank(s)",
        f"a step {step:.1f} ms: " + ", ".join(f"{name} {x / step:.0%}" for (name, _), x in zip(PARTS, parts, strict=True)),
    ]
    if len(mine) > 1:
        slow = max(mine, key=lambda share: share.compute)
        lines.append(f"most compute: rank {slow.rank}, {slow.compute:.1f} ms; the mean is {parts[0]:.1f} ms")
    peak = max(found["ranks"], key=lambda rank: rank["peak_bytes"])
    lines.append(f"{_memory_name(found)}: {peak['peak_bytes'] / MIB:,.1f} MiB at most, on rank {peak['rank']}")
    if found["predicted_bubble"] is not None:
        lines.append(f"bubble of {found['schedule']}: {_bubbles(found)}")
    if rows:
        lines += ["", f"{'axis':<20}{'collective':<16}{'calls':>8}{'MiB':>10}{'ms':>10}{'exposed ms':>14}"]
        lines += [
            f"{row.axis[:19]:<20}{row.operation[:15]:<16}{row.calls:>8.1f}{row.mib:>10.2f}{row.milliseconds:>10.2f}"
            f"{row.exposed:>14.2f}"
            for row in rows
        ]
    lines += ["", f"{'kernel' if _on_gpu(found) else 'operator':<44}{'calls':>12}{'ms':>12}{'of step':>10}"]
    for name, calls, time in operator_rows(found)[:num_operators]:
        lines.append(f"{name[:43]:<44}{calls:>12.1f}{time:>12.2f}{time / step:>10.0%}")
    return "\n".join(lines)


def _on_gpu(found: dict[str, Any]) -> bool:
    return any(rank["on_gpu"] for rank in found["ranks"])


def _memory_name(found: dict[str, Any]) -> str:
    return "GPU memory" if _on_gpu(found) else "memory since recording began"


# ---- The page ----


def page(found: dict[str, Any], schedule: Sequence[Sequence[Placed]] | None) -> str:
    mine, rows = shares(found), collective_rows(found)
    step = _mean([share.step for share in mine])
    sections = [_ranks_section(mine), _collectives_section(rows, step)]
    if schedule is not None:
        sections.append(_schedule_section(found, schedule))
    sections += [_operators_section(found, step), _memory_section(found), _files_section(found)]
    environment = found["environment"]
    facts = [found["config"], *found["overrides"], environment.get("device", ""), f"torch {environment.get('torch', '')}"]
    tiles = [
        (f"{step:.1f} ms", "a step, recorded (slower than others)"),
        (f"{_mean([share.compute for share in mine]) / step:.0%}", "of it compute"),
        (f"{_mean([share.exposed for share in mine]) / step:.0%}", "exposed communication"),
        (f"{max(rank['peak_bytes'] for rank in found['ranks']) / MIB:,.1f} MiB", _memory_name(found)),
    ]
    if found["predicted_bubble"] is not None:
        measured = found["measured_bubble"]
        shown = "–" if measured is None else f"{measured:.1%}"
        tiles.append((shown, f"bubble, measured; {found['predicted_bubble']:.1%} predicted"))
    shown_tiles = "".join(f"<div><b>{text(big)}</b><span>{text(small)}</span></div>" for big, small in tiles)
    title = f"{found['stage']} on {found['layout']}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Profile: {text(title)}</title><style>{STYLE}{OWN_STYLE}</style></head><body>"
        f'<p class="kicker">warpline profile</p><h1>{text(title)}</h1>'
        f'<p class="facts">Steps {found["steps"][0]} to {found["steps"][1]}, {len(mine)} rank(s). '
        f'{text(" · ".join(fact for fact in facts if fact))}</p>'
        f'<div class="tiles">{shown_tiles}</div><br>{"".join(sections)}</body></html>\n'
    )  # fmt: skip


def _section(title: str, words: str, content: str) -> str:
    return f"<section><h2>{text(title)}</h2><p>{text(words)}</p>{content}</section>"


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    items = "".join(f'<li><span class="swatch" style="background:var({color})"></span>{text(x)}</li>' for x, color in entries)
    return f'<ul class="legend">{items}</ul>'


def _ranks_section(mine: Sequence[Share]) -> str:
    shown, longest, height, left, right = mine[:MAX_BARS], max(share.step for share in mine), 24, 62, 84
    scale = (1000 - left - right) / longest
    drawn = []
    for row, share in enumerate(shown):
        y, x = row * height, float(left)
        drawn.append(f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">rank {share.rank}</text>')
        for (name, color), value in zip(PARTS, (share.compute, share.exposed, share.rest), strict=True):
            title = f"<title>rank {share.rank}: {name} {value:.2f} ms</title>"
            drawn.append(f'<rect x="{x:.1f}" y="{y + 3}" width="{value * scale:.1f}" height="{height - 6}" ')
            drawn.append(f'fill="var({color})">{title}</rect>')
            x += value * scale
        drawn.append(f'<text class="value" x="{x + 8:.1f}" y="{y + 16}">{share.step:.1f} ms</text>')
    label = "Each rank's step, by what it spends its time on"
    svg = f'<svg viewBox="0 0 1000 {len(shown) * height}" role="img" aria-label="{label}">{"".join(drawn)}</svg>'
    words = "Milliseconds a step. A rank with more compute than the others is one that they wait for."
    if len(mine) > len(shown):
        words += f" The first {len(shown)} of {len(mine)} ranks."
    return _section("Where each rank's step goes", words, svg + _legend(PARTS))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], num_names: int) -> str:
    def cell(tag: str, index: int, x: str) -> str:
        kind = "name" if index < num_names and tag == "td" else "number" if index >= num_names else ""
        return f'<{tag} class="{kind}">{text(x)}</{tag}>'

    lines = [("th", heads), *(("td", row) for row in rows)]
    made = ("".join(cell(tag, index, x) for index, x in enumerate(row)) for tag, row in lines)
    return f'<div class="scroll"><table>{"".join(f"<tr>{line}</tr>" for line in made)}</table></div>'


def _collectives_section(rows: Sequence[Row], step: float) -> str:
    words = (
        "By the mesh axis whose ranks take part; a rank's mean a step. Exposed: no compute of the rank runs meanwhile. "
        "Spans of different collectives can overlap, so the column's sum may exceed the exposed share above."
    )
    if not rows:
        return _section("Communication", "One rank, or none recorded.", "")
    shown = [
        (
            row.axis, row.operation, f"{row.calls:.1f}", f"{row.mib:.2f}", f"{row.milliseconds:.2f}", f"{row.exposed:.2f}",
            f"{row.worst:.2f}", f"{row.exposed / step:.1%}",
        )
        for row in rows
    ]  # fmt: skip
    heads = ("axis", "collective", "calls", "MiB", "ms", "exposed ms", "on the worst rank", "of the step")
    return _section("Communication", words, _table(heads, shown, 2))


def _schedule_section(found: dict[str, Any], schedule: Sequence[Sequence[Placed]]) -> str:
    kinds = dict.fromkeys(item.action.kind for row in schedule for item in row)
    words = (
        f"{found['schedule']}, as it would run if nothing cost but compute (forward 1, backward 2). Bubble: {_bubbles(found)}. "
        "Measured is the share of ranks × time in which a rank waits for a neighbour's message or the last rank's end."
    )
    svg = draw_svg(schedule, f"{found['schedule']}: bubble {found['predicted_bubble']:.1%} predicted")
    return _section("The pipeline's schedule", words, svg + _legend([(NAMES[kind], COLORS[kind]) for kind in kinds]))


def _operators_section(found: dict[str, Any], step: float) -> str:
    heads = ("kernel" if _on_gpu(found) else "operator", "calls", "ms", "of the step", "µs a call")
    rows = [
        (name, f"{calls:.1f}", f"{time:.3f}", f"{time / step:.1%}", f"{1e3 * time / calls:.1f}")
        for name, calls, time in operator_rows(found)[:25]
    ]
    words = "The dearest, a rank's mean a step. An operator's time is without that of the operators it calls."
    return _section("Kernels" if _on_gpu(found) else "Operators", words, _table(heads, rows, 1))


def _memory_section(found: dict[str, Any]) -> str:
    rank = max(found["ranks"], key=lambda rank: rank["peak_bytes"])
    if not rank["memory"]:
        return _section("Memory", "The trace has no allocations.", "")
    start = rank["steps"][0][0]
    points = [((time - start) / 1e3, allocated / MIB) for time, allocated, _ in rank["memory"]]
    drawn = chart(f"Memory of rank {rank['rank']} over time", Curve(points, "var(--distill)"), Axes("ms", "MiB"))
    words = f"{_memory_name(found)}, of the rank with the most: rank {rank['rank']}. All ranks are in the merged time line."
    return _section("Memory", words[0].upper() + words[1:], f'<div class="beside"><div>{drawn}</div></div>')


def _files_section(found: dict[str, Any]) -> str:
    ranks = found["merged_ranks"]
    whose = "all ranks" if len(ranks) == len(found["ranks"]) else f"ranks {', '.join(map(str, ranks))}"
    words = f"Open merged.json.gz ({whose}, on one clock) or a rank's rank_N.json.gz in ui.perfetto.dev. Beside this page."
    return _section("Time lines", words, "")
