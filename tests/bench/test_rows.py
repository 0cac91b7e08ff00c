"""Results on disk: what is saved is what is loaded, and a file that is not of the schema is refused by row and field."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from warpline.bench.rows import BadResults, Bench, Ceilings, Results, Row, load, path_of, save

MACHINE = {"name": "cpu-two-cores", "date": "2026-11-25T01:02:03+00:00", "commit": "abc1234", "cores": 2}
ROOT = Path(__file__).parents[2]


def results() -> Results:
    row = Row("norm", "warpline", {"R": 4}, "float32", 2.0, 0.1, bench="rms_norm", check="passed", self_spread=0.01, tokens=4)
    ceilings = Ceilings(50.0, {"float32": 0.2})
    return Results(dict(MACHINE), ceilings, {"rms_norm": Bench("complete", True, 1.5, {"liger": "runs on CUDA"})}, [row])


def test_what_is_saved_is_what_is_loaded(tmp_path):
    path = path_of(tmp_path, MACHINE)
    assert path == tmp_path / "cpu-two-cores" / "2026-11-25-abc1234.json"
    save(results(), path)
    assert load(path) == results()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["rows"][0].update(milliseconds="fast"), "rows[0].milliseconds: received 'fast'; expected float"),
        (lambda r: r["rows"][0].update(speed=1), "unknown field 'speed'"),
        (lambda r: r["rows"][0].pop("spread"), "missing field 'spread'"),
        (lambda r: r["rows"][0]["shape"].update(R=1.5), "shape.R: received 1.5; expected int"),
        (lambda r: r["benches"]["rms_norm"].update(is_quick=1), "is_quick: received 1; expected bool"),
        (lambda r: r["ceilings"].update(product_tflops=[1]), "product_tflops: received [1]; expected dict"),
        (lambda r: r.update(schema=1), "received schema 1; expected 2"),
        (lambda r: r.update(rows={}), "rows: received {}; expected list"),
    ],
)
def test_a_file_of_another_schema_is_refused_by_its_field(tmp_path, change, words):
    path = tmp_path / "x.json"
    save(results(), path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(BadResults, match=re.escape(words)):
        load(path)


def test_what_is_no_json_is_refused_with_its_name(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(BadResults, match=r"x\.json: .*expected a file that `warpline bench` wrote"):
        load(tmp_path / "x.json")


def test_ceilings_allow_the_slower_of_product_and_copy():
    ceilings = Ceilings(copy_gbytes_per_second=100.0, product_tflops={"float32": 2.0})
    assert ceilings.milliseconds(4e9, 1.0, "float32") == pytest.approx(2.0)
    assert ceilings.milliseconds(1.0, 1e9, "float32") == pytest.approx(10.0)


def test_every_field_is_documented():
    words = (ROOT / "docs" / "benchmarks.md").read_text()
    for kind in (Results, Bench, Ceilings, Row):
        for field in fields(kind):
            assert f"`{field.name}`" in words, f"docs/benchmarks.md does not say what {kind.__name__}.{field.name} is"


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").rglob("*.json")), ids=lambda path: path.name)
def test_committed_results_are_of_the_schema(path):
    assert load(path).rows
