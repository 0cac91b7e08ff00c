"""The pictures of the report, as inline SVG whose colours are the page's CSS variables (so they follow light and dark).

Every function is pure: text and numbers in, one `<svg role="img" aria-label=…>` out, equal input giving equal bytes.
"""

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 26, 40
MAX_POINTS = 300  # more are averaged into that many; finer than the pixels of a column
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


def text(value: object) -> str:
    """Anything as HTML text: escaped, control characters made visible, lone surrogates spelled out."""
    visible = str(value).translate(CONTROL_PICTURES)
    return html.escape(visible.encode("utf-8", "backslashreplace").decode("utf-8"))


def color(stage: str) -> str:
    """The CSS variable of a stage's colour, grey for a stage the palette does not know."""
    return f"var(--{stage.replace('_', '-')}, var(--muted))" if stage.replace("_", "").isalnum() else "var(--muted)"


@dataclass(frozen=True)
class Curve:
    """One quantity over x; a curve of many points is drawn thin, with its running mean thick."""

    points: Sequence[tuple[float, float]]
    color: str


@dataclass(frozen=True)
class Axes:
    """What a chart's axes say; `level` is a labelled horizontal line, `log` asks for a logarithmic y axis."""

    x_label: str
    y_label: str
    level: tuple[float, str] | None = None
    log: bool = False


@dataclass(frozen=True)
class Bar:
    """One row of a bar picture; `mark` is a second value, drawn as a tick across the bar."""

    name: str
    value: float
    text: str
    color: str
    mark: float | None = None


def chart(label: str, curve: Curve, axes: Axes) -> str:
    """A curve with axes. `curve` has at least one point; a log axis is used only if all of them are positive."""
    points = averaged(curve.points)
    y_values = [y for _, y in points] + ([axes.level[0]] if axes.level else [])
    is_log = axes.log and min(y_values) > 0 and max(y_values) / min(y_values) > 10
    bend = math.log10 if is_log else float
    x_low, x_high = _padded([x for x, _ in points], share=0.0)
    y_low, y_high = _padded([bend(y) for y in y_values], share=0.06)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (bend(y) - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    drawn = []
    for tick in _powers(y_low, y_high) if is_log else _ticks(y_low, y_high):
        y = place(x_low, tick)[1]
        drawn.append(f'<path class="rule" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    for tick in _ticks(x_low, x_high):
        x = place(tick, points[0][1])[0]
        anchor = "end" if x > WIDTH - RIGHT - 14 else "middle"
        drawn.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">{_short(tick)}</text>')
    drawn.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    drawn.append(f'<text class="name" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{text(axes.x_label)}</text>')
    drawn.append(f'<text class="name" x="{LEFT}" y="14">{text(axes.y_label)}</text>')
    drawn.extend(_line([place(x, y) for x, y in points], curve.color))
    if axes.level:
        y = place(x_low, axes.level[0])[1]
        name_y = y + (15 if y < TOP + 16 else -6)
        drawn.append(f'<path class="level" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        drawn.append(f'<text class="level" x="{WIDTH - RIGHT}" y="{name_y:.1f}" text-anchor="end">{text(axes.level[1])}</text>')
    return _svg(label, WIDTH, HEIGHT, "chart", "".join(drawn))


def bars(label: str, rows: Sequence[Bar], maximum: float, width: int = WIDTH) -> str:
    """Horizontal bars on a common scale from 0 to `maximum` (> 0)."""
    left, right, row_height = 108, 64, 26
    scale = (width - left - right) / maximum
    drawn = []
    for i, row in enumerate(rows):
        y = i * row_height
        length = max(1.0, min(row.value, maximum) * scale)
        drawn.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{text(row.name)}</text>')
        drawn.append(f'<rect class="bed" x="{left}" y="{y + 5}" width="{width - left - right}" height="16" rx="3"/>')
        drawn.append(f'<rect x="{left}" y="{y + 5}" width="{length:.1f}" height="16" rx="3" fill="{row.color}"/>')
        if row.mark is not None:
            drawn.append(f'<path class="mark" d="M{left + min(row.mark, maximum) * scale:.1f} {y + 2}v22"/>')
        drawn.append(f'<text class="value" x="{width - right + 8}" y="{y + 17}">{text(row.text)}</text>')
    return _svg(label, width, max(1, len(rows)) * row_height, "bars", "".join(drawn))


def stacked_bar(label: str, parts: Sequence[tuple[str, float, str]]) -> str:
    """One bar divided by the values of (name, value, colour); the page sets its height and prints the legend."""
    total = sum(value for _, value, _ in parts)
    drawn, at = [], 0.0
    for name, value, paint in parts:
        share = 1000 * value / total
        place = f'x="{at:.2f}" y="0" width="{max(share - 1.5, 0.5):.2f}" height="40"'
        drawn.append(f'<rect {place} fill="{paint}"><title>{text(name)}</title></rect>')
        at += share
    return _svg(label, 1000, 40, "stacked", "".join(drawn), 'preserveAspectRatio="none" ')


@dataclass(frozen=True)
class Station:
    """One stop of the line. `share` (0 to 1) fills its ring; None leaves it open, for a stop without an accuracy."""

    name: str
    big: str
    lines: Sequence[str]
    color: str
    share: float | None = None
    is_reached: bool = True


def station(stop: Station, is_first: bool, is_last: bool) -> str:
    """A stop with its piece of rail; stops laid side by side, or wrapped into rows, join into one track."""
    rail = f'<path class="rail{"" if stop.is_reached else " ahead"}" d="M{70 if is_first else 0} 52H{70 if is_last else 140}"/>'
    ring = '<circle class="disc" cx="70" cy="52" r="38"/><circle class="ring" cx="70" cy="52" r="38"/>'
    if stop.share is not None:
        arc = 100 * min(max(stop.share, 0.0), 1.0)
        dash = f'pathLength="100" stroke-dasharray="{arc:.2f} 100" stroke="{stop.color}"'
        ring += f'<circle class="arc" cx="70" cy="52" r="38" {dash} transform="rotate(-90 70 52)"/>'
    words = f'<text class="big" x="70" y="58">{text(stop.big)}</text><text class="stop" x="70" y="114">{text(stop.name)}</text>'
    for i, line in enumerate(stop.lines):
        words += f'<text class="small" x="70" y="{132 + 16 * i}">{text(line)}</text>'
    label = f"{stop.name}: {', '.join([stop.big, *stop.lines])}"
    return _svg(label, 140, 156, "station" if stop.is_reached else "station ahead", rail + ring + words)


def averaged(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points: neighbours averaged in equal bins, in x and in y."""
    if len(points) <= MAX_POINTS:
        return list(points)
    edges = [i * len(points) // MAX_POINTS for i in range(MAX_POINTS + 1)]
    return [_mean_point(points[a:b]) for a, b in itertools.pairwise(edges)]


def running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Every y replaced by the mean over the twentieth of the curve centred on it, cut off at the ends."""
    half = max(1, len(points) // 40)
    return [(x, _mean_point(points[max(0, i - half) : i + half + 1])[1]) for i, (x, _) in enumerate(points)]


def ends(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The means over the first and the last twentieth of a curve, of one point at least."""
    few = max(1, len(points) // 20)
    return _mean_point(points[:few])[1], _mean_point(points[-few:])[1]


def _mean_point(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return math.fsum(x for x, _ in points) / len(points), math.fsum(y for _, y in points) / len(points)


def _line(points: Sequence[tuple[float, float]], paint: str) -> list[str]:
    if len(points) < 30:
        dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{paint}"/>' for x, y in points]
        return [f'<polyline class="thick" points="{_joined(points)}" stroke="{paint}"/>', *dots]
    return [
        f'<polyline class="thin" points="{_joined(points)}" stroke="{paint}"/>',
        f'<polyline class="thick" points="{_joined(running_mean(points))}" stroke="{paint}"/>',
    ]


def _joined(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-12):
        pad = abs(low) / 10 or 1.0
        return low - pad, high + pad
    return low - share * (high - low), high + share * (high - low)


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round values within [low, high]."""
    power = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= (high - low) / 5)
    return [float(f"{i * step:.10g}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten within [10^low, 10^high], at most about six."""
    every = max(1, math.ceil((high - low) / 6))
    return [10.0**i for i in range(math.ceil(low), math.floor(high) + 1) if i % every == 0]


def _short(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}".replace("e-0", "e-").replace("-", "−")


def _svg(label: str, width: int, height: int, kind: str, drawn: str, options: str = "") -> str:
    return f'<svg class="{kind}" viewBox="0 0 {width} {height}" {options}role="img" aria-label="{text(label)}">{drawn}</svg>'
