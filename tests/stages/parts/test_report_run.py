"""A run as the report sees it: what is there is read, what is missing or torn is said, and nothing becomes markup."""

import json
import math

import pytest

from warpline.stages.parts.report_run import (
    STAGES,
    dot,
    duration,
    figure,
    fixed,
    is_number,
    missing,
    pairs,
    percent,
    plain,
    points,
    read_run,
    table,
)


def put(folder, **files):
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")


def put_lines(folder, *lines):
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "metrics.jsonl").write_bytes(b"\n".join(raw))


def test_an_empty_folder_is_an_empty_run(tmp_path):
    run = read_run(tmp_path)
    assert (run.config, run.environment, run.baseline, run.timing, run.data, run.release, run.ended) == ({},) * 7
    assert (run.scores, run.samples, run.claims, run.stages, run.metrics) == ([], [], [], [], {})
    assert run.num_unreadable == 0 and run.name == tmp_path.name
    assert run.score("rl") == {} and run.curve("rl", "loss") == []


def test_every_file_comes_back_as_it_was_written(tmp_path):
    names = ("config", "environment", "baseline", "timing", "data", "release", "ended")
    put(
        tmp_path, **{name: {"key": name} for name in names}, scores=[{"stage": "sft", "accuracy": 0.4}], claims=[{"claim": "c"}]
    )
    run = read_run(tmp_path)
    assert [getattr(run, name) for name in names] == [{"key": name} for name in names]
    assert run.score("sft") == {"stage": "sft", "accuracy": 0.4} and run.score("rl") == {}
    assert run.claims == [{"claim": "c"}]


def test_lines_torn_by_a_kill_are_counted_and_left_out(tmp_path):
    whole = {"stage": "rl", "step": 1, "loss": 0.5}
    put_lines(tmp_path, whole, b'{"stage": "rl", "st', b"", b'{"stage": "\xff"}', b"[1, 2]", {"step": 2}, {**whole, "step": 3})
    (tmp_path / "samples.jsonl").write_bytes(b'{"stage": "rl", "completion": "4')
    run = read_run(tmp_path)
    assert [line["step"] for line in run.metrics["rl"]] == [1, 3]
    assert run.samples == [] and run.num_unreadable == 6


def test_a_torn_json_file_is_refused_not_taken_for_a_missing_one(tmp_path):
    (tmp_path / "scores.json").write_text('[{"stage": "rl", ', encoding="utf-8")
    with pytest.raises(ValueError, match="Expecting"):
        read_run(tmp_path)


def test_stages_come_in_the_order_of_the_line_and_strangers_last(tmp_path):
    put(tmp_path, config={"distill": {"steps": 4}, "sft": {"steps": 3}, "rl": None}, scores=[{"stage": "zebra"}])
    put_lines(tmp_path, {"stage": "aside", "step": 1}, {"stage": "pretrain", "step": 1})
    assert read_run(tmp_path).stages == ["pretrain", "sft", "distill", "distill_control", "aside", "zebra"]
    put(tmp_path, config={stage: {"steps": 1} for stage in reversed(STAGES)}, scores=[])
    (tmp_path / "metrics.jsonl").unlink()
    assert read_run(tmp_path).stages == list(STAGES)


def test_a_curve_leaves_out_lines_without_the_number(tmp_path):
    put_lines(
        tmp_path,
        {"stage": "rl", "step": 1, "seconds": 0.5, "loss": 2.0},
        {"stage": "rl", "step": 2, "seconds": 1.0, "loss": None},
        {"stage": "rl", "step": 3, "seconds": 1.5},
        {"stage": "rl", "loss": 7.0},
        {"stage": "sft", "step": 3, "seconds": 9.0, "loss": 9.0},
        {"stage": "rl", "step": 4, "seconds": 2.0, "loss": 1},
    )
    run = read_run(tmp_path)
    assert run.curve("rl", "loss") == [(1, 2.0), (4, 1)]
    assert run.curve("rl", "loss", over="seconds") == [(0.5, 2.0), (2.0, 1)]


def test_a_number_is_finite_and_no_truth_value():
    assert all(map(is_number, (0, -3, 0.5)))
    assert not any(map(is_number, (True, None, "1", math.nan, math.inf, [1])))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (percent(0.6344), "63.4 %"),
        (percent(None), "–"),
        (percent(math.nan), "–"),
        (fixed(1234.5678), "1,234.57"),
        (fixed(2, 3), "2.000"),
        (fixed("2"), "–"),
        (points(0.1), "+10.0 points"),
        (points(-0.046), "−4.6 points"),
        (duration(59.44), "59.4 s"),
        (duration(59.7), "1 min 00 s"),
        (duration(125), "2 min 05 s"),
        (plain(None), "–"),
        (plain(4_200_000), "4,200,000"),
        (plain(0.123456), "0.1235"),
        (plain(True), "true"),
        (plain("<b>"), "<b>"),
        (plain({"é": [1, None]}), '{"é": [1, null]}'),
    ],
)
def test_numbers_become_these_words(said, expected):
    assert said == expected


def test_pieces_of_html_escape_what_is_text_and_keep_what_is_html():
    assert missing("<i>") == '<p class="missing">&lt;i&gt;</p>'
    assert pairs({"a_b": "<i>"}) == '<dl class="pairs"><div><dt>a b</dt><dd>&lt;i&gt;</dd></div></dl>'
    assert figure('"x', "<b>c</b>", "<svg/>") == '<figure id="figure-&quot;x"><figcaption><b>c</b></figcaption><svg/></figure>'
    drawn = table(("h", "k"), [["<b>1</b>", "2"], ["3", "4"]], "scores")
    assert '<table class="scores"><thead><tr><th>h</th><th>k</th></tr></thead>' in drawn
    assert "<tbody><tr><td><b>1</b></td><td>2</td></tr><tr><td>3</td><td>4</td></tr></tbody>" in drawn
    assert dot("var(--rl)") == '<i class="dot" style="background:var(--rl)"></i>'
