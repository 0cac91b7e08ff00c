"""Pictures of results: what varies is the axis, what does not stands in the title, and a file is drawn."""

import json

import matplotlib.image
import pytest

from warpline.bench.picture import draw, panels


def row(operation, candidate, milliseconds, **shape):
    return {"operation": operation, "candidate": candidate, "milliseconds": milliseconds, "spread": 0.1, "shape": shape}


ROWS = [
    row("norm", "ours", 2.0, R=64, D=8), row("norm", "eager", 3.0, R=64, D=8), row("norm", "ours", 1.0, R=32, D=8),
    row("cap", "ours", 5.0, R=64, D=8),
]  # fmt: skip


def test_what_varies_is_the_axis_and_the_rest_the_title():
    found = panels(ROWS)
    assert found["norm"] == {
        "axis": "R",
        "fixed": "D=8",
        "lines": {"ours": [(32, 1.0, 0.1), (64, 2.0, 0.1)], "eager": [(64, 3.0, 0.1)]},
    }
    assert found["cap"] == {"axis": None, "fixed": "R=64 D=8", "lines": {"ours": [(64, 5.0, 0.1)]}}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # matplotlib's own, of the libraries below it
def test_a_file_of_results_becomes_a_picture_beside_it(tmp_path):
    machine = {"card": "cpu", "processor": "two cores", "torch": "2.13", "date": "2026-11-25T00:00:00"}
    path = tmp_path / "norm.json"
    path.write_text(json.dumps({"machine": machine, "rows": ROWS}))
    picture = draw(path)
    assert picture == tmp_path / "norm.png"
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 900 and pixels.std() > 0.05, "two panels, and not blank"
