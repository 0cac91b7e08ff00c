"""A run as the report sees it: its JSON files read once, and the words and small pieces of HTML that numbers become."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from .file import read_json
from .report_figures import text

Record = dict[str, Any]

STAGES = ("pretrain", "sft", "preference", "rl", "distill", "distill_control")


@dataclass(frozen=True)
class Run:
    """What the run's files hold; a file that is not there is empty."""

    name: str
    config: Record
    environment: Record
    metrics: dict[str, list[Record]]
    scores: list[Record]
    baseline: Record
    timing: dict[str, float]
    samples: list[Record]
    data: Record
    release: Record
    claims: list[Record]
    ended: Record
    num_unreadable: int

    @property
    def stages(self) -> list[str]:
        """The stages this run has, or will have: of the line in its order, then any other that left numbers."""
        known = {*self.metrics, *(score["stage"] for score in self.scores), *(name for name in STAGES if self.config.get(name))}
        if self.config.get("distill"):
            known.add("distill_control")
        return [name for name in STAGES if name in known] + sorted(known.difference(STAGES))

    def score(self, stage: str) -> Record:
        return next((score for score in self.scores if score["stage"] == stage), {})

    def curve(self, stage: str, name: str, over: str = "step") -> list[tuple[float, float]]:
        """The points of a metric; a line without it, or with null for a non-finite value, has none."""
        lines = self.metrics.get(stage, [])
        return [(line[over], line[name]) for line in lines if is_number(line.get(over)) and is_number(line.get(name))]


def read_run(folder: Path) -> Run:
    def load(name: str, empty: Any) -> Any:
        path = folder / f"{name}.json"
        return read_json(path) if path.exists() else empty

    lines, torn_lines = _read_lines(folder / "metrics.jsonl")
    samples, torn_samples = _read_lines(folder / "samples.jsonl")
    metrics: dict[str, list[Record]] = {}
    for line in lines:
        metrics.setdefault(line["stage"], []).append(line)
    return Run(
        name=folder.resolve().name,
        metrics=metrics,
        samples=samples,
        num_unreadable=torn_lines + torn_samples,
        scores=load("scores", []),
        claims=load("claims", []),
        **{name: load(name, {}) for name in ("config", "environment", "baseline", "timing", "data", "release", "ended")},
    )


def _read_lines(path: Path) -> tuple[list[Record], int]:
    """The records of a .jsonl file, and the number of lines that a kill left torn."""
    raw = path.read_bytes().splitlines() if path.exists() else []
    records = [_parse(line) for line in raw]
    whole = [record for record in records if record is not None]
    return whole, len(raw) - len(whole)


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "stage" in record else None


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def percent(value: Any) -> str:
    return f"{100 * value:.1f} %" if is_number(value) else "–"


def fixed(value: Any, digits: int = 2) -> str:
    return f"{value:,.{digits}f}" if is_number(value) else "–"


def points(value: float) -> str:
    return f"{100 * value:+.1f} points".replace("-", "−")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def plain(value: Any) -> str:
    """A value of a JSON file as text, with a dash for null."""
    if value is None:
        return "–"
    if is_number(value):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def missing(what: str) -> str:
    return f'<p class="missing">{text(what)}</p>'


def figure(identity: str, caption: str, picture: str) -> str:
    return f'<figure id="figure-{text(identity)}"><figcaption>{caption}</figcaption>{picture}</figure>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already; it scrolls within itself where the page is narrow."""
    head_cells = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{head_cells}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(values: Record) -> str:
    rows = "".join(
        f"<div><dt>{text(name.replace('_', ' '))}</dt><dd>{text(plain(value))}</dd></div>" for name, value in values.items()
    )
    return f'<dl class="pairs">{rows}</dl>'


def dot(paint: str) -> str:
    return f'<i class="dot" style="background:{paint}"></i>'
