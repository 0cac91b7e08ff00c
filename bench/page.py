"""One HTML page of a run: the pictures inside it, the table, and what took no part.

Run     by `suite`; or python -m warpline.bench.page bench/results/<machine>/<date>-<commit>.json
Writes  <date>-<commit>.html beside the results, and the pictures of `picture`
"""

from __future__ import annotations

import base64
import html
import sys
from pathlib import Path

from .picture import draw_bench, draw_roofline, draw_stages
from .rows import Results, load
from .table import table

STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;color:#111;background:#fff}"
    "img{max-width:100%;height:auto;display:block;margin:.6rem 0 1.6rem}pre{overflow-x:auto;font-size:12px;line-height:1.35}"
    "table{border-collapse:collapse}td{padding:.1rem 1rem .1rem 0;vertical-align:top}h2{margin-top:2.2rem}"
)


def write_page(path: Path) -> list[Path]:
    """The page and its pictures, of one file of results; returns what was written."""
    results = load(path)
    folder = path.parent
    found: list[tuple[str, Path]] = []
    for name, drawn in (("Roofline", draw_roofline(results, folder)), ("Stages", draw_stages(results, folder))):
        if drawn is not None:
            found.append((name, drawn))
    for bench in results.benches:
        if any(row.bench == bench and not row.split for row in results.rows):  # stages are in one picture
            found.append((bench, draw_bench(results, bench, folder)))
    page = path.with_suffix(".html")
    page.write_text(_page(results, found))
    return [page, *(picture for _, picture in found)]


def _page(results: Results, pictures: list[tuple[str, Path]]) -> str:
    facts = "".join(f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in results.machine.items())
    parts = [f"<h1>warpline bench</h1><table>{facts}</table><p>Ceilings: {_text(results.ceilings)}</p>"]
    for name, picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<h2>{_text(name)}</h2><img alt="{_text(name)}" src="data:image/png;base64,{data}">')
        benches = [name] if name in results.benches else [r.bench for r in results.rows if r.split and name == "Stages"]
        if benches:
            shown = table(results, dict.fromkeys(benches))
            parts.append(f"<details><summary>Table</summary><pre>{_text(shown)}</pre></details>")
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>warpline bench</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}{body}</html>\n'


def _text(value: object) -> str:
    return html.escape(str(value))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(*write_page(Path(name)), sep="\n")
