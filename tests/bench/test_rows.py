"""Results on disk: what is saved is what is loaded, and a file that is not of the schema is refused by row and field."""

import json
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest

from warpline.bench.rows import BadResults, Bench, Ceilings, Results, Row, load, path_of, save

MACHINE = {"name": "cpu-two-cores", "date": "2026-11-25T01:02:03+00:00", "commit": "abc1234", "cores": 2, "card": "cpu",
           "processor": "two cores", "threads": 2, "torch": "2.13"}  # fmt: skip
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
        (
            lambda r: r["rows"][0].update(milliseconds=0),
            "rows[0].milliseconds: received 0; expected a number of 1e-12 or more, at most 1e+15",
        ),
        (
            lambda r: r["rows"][0].update(milliseconds=-5.0),
            "rows[0].milliseconds: received -5.0; expected a number of 1e-12 or more",
        ),
        (lambda r: r["rows"][0].update(milliseconds=math.nan), "rows[0].milliseconds: received nan; expected a number"),
        (
            lambda r: r["rows"][0].update(spread=math.inf),
            "rows[0].spread: received inf; expected a number not below zero",
        ),
        (
            lambda r: r["rows"][0].update(self_spread=-0.1),
            "rows[0].self_spread: received -0.1; expected a number not below",
        ),
        (lambda r: r["rows"][0].update(milliseconds=10**400), "rows[0].milliseconds: received 1000"),
        (lambda r: r["rows"][0].update(joules=math.nan), "rows[0].joules: received nan; expected a number, at most 1e+15:"),
        (
            lambda r: r["ceilings"]["product_tflops"].update(float32=0.0),
            "ceilings.product_tflops.float32: received 0.0; expected",
        ),
        (
            lambda r: r["ceilings"].update(copy_gbytes_per_second=-1.0),
            "copy_gbytes_per_second: received -1.0; expected a number",
        ),
        (lambda r: r.update(machine={}), "machine: received no name, processor, card, threads, torch, date, commit; expected"),
        (lambda r: r["machine"].pop("card"), "machine: received no card; expected"),
        (lambda r: r["machine"].update(load_before="high"), "machine.load_before: received 'high'; expected float"),
        (
            lambda r: r["rows"].append(r["rows"][0]),
            "rows[0] and rows[1] of one key, rms_norm / norm / R=4 / float32 / warpline",
        ),
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


def test_a_row_whose_result_was_no_number_can_be_read_again(tmp_path):
    made = results()
    made.rows[0].error = math.inf
    save(made, tmp_path / "x.json")
    assert load(tmp_path / "x.json") == made


@pytest.mark.parametrize(
    "words", ["{", "[" * 100_000, '{"a":' * 100_000, "1" * 5000], ids=["cut off", "deep", "deep object", "long"]
)
def test_what_is_no_json_is_refused_with_its_name(tmp_path, words):
    (tmp_path / "x.json").write_text(words)
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


def test_ceilings_are_said_with_their_units():
    assert str(Ceilings(51.26, {"float32": 0.2, "bfloat16": 812.4})) == (
        "copy 51.3 GB/s; product float32 0.2 TFLOP/s; product bfloat16 812 TFLOP/s"
    )
