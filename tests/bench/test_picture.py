"""Pictures of results: what varies alone is an axis, a shape alone is bars, and every picture is drawn and not blank."""

import matplotlib.image
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from warpline.bench.page import write_page
from warpline.bench.picture import Panel, draw_bench, draw_panel, draw_roofline, draw_stages, panels
from warpline.bench.rows import Bench, Ceilings, Results, Row, save

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # matplotlib's own, of the libraries below it
MACHINE = {"name": "cpu", "card": "cpu", "processor": "two <cores>", "threads": 2, "torch": "2.13", "commit": "abc",
           "date": "2026-11-25T00:00:00", "load_before": "0.10"}  # fmt: skip


def row(operation, candidate, milliseconds, **shape):
    return Row(operation, candidate, shape, "float32", milliseconds, 0.1, bench="rms_norm", tflops=0.01 / milliseconds,
               gbytes_per_second=10 / milliseconds, peak_mib=4.0)  # fmt: skip


ROWS = [
    row("norm", "warpline", 2.0, R=64, D=8), row("norm", "eager", 3.0, R=64, D=8), row("norm", "warpline", 1.0, R=32, D=8),
    row("norm", "warpline", 4.0, R=64, D=16), row("norm", "warpline", 9.0, R=7, D=7), row("cap", "warpline", 5.0, B=2, S=8),
    row("cap", "warpline", 5.0, B=1, S=16),
]  # fmt: skip


def results(rows=ROWS) -> Results:
    benches = {name: Bench("complete", True, 1.0, {"liger": "runs on <CUDA>"}) for name in dict.fromkeys(r.bench for r in rows)}
    return Results(dict(MACHINE), Ceilings(20.0, {"float32": 0.05}), benches, list(rows))


def test_a_size_that_varies_alone_is_an_axis_and_a_shape_alone_is_bars():
    found = [(p.operation, p.axis, p.fixed, [r.milliseconds for r in p.rows]) for p in panels(ROWS)]
    assert found == [
        ("norm", "R", "D=8", [2.0, 3.0, 1.0]),
        ("norm", "D", "R=64", [2.0, 3.0, 4.0]),
        ("norm", None, "R=7 D=7", [9.0]),
        ("cap", "S", "", [5.0, 5.0]),
    ]


def is_drawn(path) -> bool:
    pixels = matplotlib.image.imread(path)
    return pixels.shape[0] > 300 and pixels.shape[1] > 500 and pixels.std() > 0.05


def test_a_bench_is_drawn_with_time_and_memory(tmp_path):
    with_memory = matplotlib.image.imread(draw_bench(results(), "rms_norm", tmp_path)).shape[0]
    for one in (bare := results()).rows:
        one.peak_mib = None
    path = draw_bench(bare, "rms_norm", tmp_path)
    assert is_drawn(path) and with_memory > 1.7 * matplotlib.image.imread(path).shape[0]


@pytest.mark.parametrize("axis", ["R", None])
def test_a_whisker_is_cut_short_at_its_foot_and_never_at_its_head(axis):
    wide = row("norm", "warpline", 2.0, R=64)
    wide.spread = 10.0
    axes = Figure().add_subplot()
    rows = [wide, row("norm", "warpline", 2.0, R=32)] if axis else [wide]
    draw_panel(axes, Panel("norm", axis, "", rows), ["warpline"], "milliseconds", lambda row: row.milliseconds)
    (lines,) = (found for found in axes.findobj(LineCollection) if len(found.get_segments()) == len(rows))
    (_, foot), (_, head) = lines.get_segments()[-1]
    assert head == pytest.approx(7.0) and foot == pytest.approx(0.2 if axis else 0.0)


def test_the_roofline_needs_ceilings(tmp_path):
    path = draw_roofline(results(), tmp_path)
    assert path is not None and is_drawn(path)
    bare = results()
    bare.ceilings = None
    assert draw_roofline(bare, tmp_path) is None


def test_stages_are_drawn_where_a_row_has_a_split(tmp_path):
    assert draw_stages(results(), tmp_path) is None
    stage = row("step", "warpline", 500.0, T=64)
    stage.split, stage.tokens = {"forward": 0.2, "backward": 0.3}, 64
    path = draw_stages(results([*ROWS, stage]), tmp_path)
    assert path is not None and is_drawn(path)


def test_one_page_holds_the_pictures_and_escapes_what_it_shows(tmp_path):
    save(results(), tmp_path / "run.json")
    page, *pictures = write_page(tmp_path / "run.json")
    words = page.read_text()
    assert {p.name for p in pictures} == {"roofline.png", "rms_norm.png"}
    assert words.count("data:image/png;base64,") == 2 and "two &lt;cores&gt;" in words and "<CUDA>" not in words
