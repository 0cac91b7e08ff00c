"""The report: rebuilt byte for byte, honest about what fails or is missing, and whole in a browser."""

import contextlib
import json
import math
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from warpline.stages.parts.report_figures import Axes, Curve, averaged, chart, ends, running_mean
from warpline.stages.report import write_report

STAGES = ("pretrain", "sft", "preference", "rl", "distill", "distill_control")
FAMILIES = ("addition", "sorting", "reversal")
ACCURACY = {"pretrain": 0.012, "sft": 0.41, "preference": 0.447, "rl": 0.634, "distill": 0.592, "distill_control": 0.389}
HOSTILE = '<script>throw new Error("escaped?")</script><img src="https://example.com/x.png" onerror=alert(1)>\u0000'


def write_run(folder: Path, stages: tuple[str, ...] = STAGES, is_ended: bool = True, failing_claim: bool = False) -> Path:
    """A synthetic run that has trained and evaluated `stages`."""
    folder.mkdir(parents=True)
    config = {"verb": "line", "seed": 17, **{stage: {"steps": 400} for stage in STAGES if stage != "distill_control"}}
    config["evaluate"] = {"completions_per_task": 4}
    config["data"] = {"tasks": {"held_out_per_family": 100, "wrong_demonstrations": 0.25}}
    files: dict[str, Any] = {
        "config": config,
        "environment": {"warpline": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "cpu": "AMD EPYC",
                        "threads": 2, "started": "2026-01-02T03:04:05+00:00"},
        "scores": [_score(stage) for stage in stages],
        "baseline": {"zlib_bits_per_byte": 2.05, "bytes": 200_000},
        "timing": {name: 20.0 + 31 * i for i, name in enumerate(("data", *stages, "evaluate"))},
        "data": {"documents": 1800, "exact_duplicates": 12, "near_duplicates": 40, "train_documents": 1660,
                 "held_out_documents": 88, "train_tokens": 4_200_000, "vocab_size": 2048, "bytes_per_token": 3.31},
    }  # fmt: skip
    if is_ended:
        files["release"] = _release()
        files["claims"] = _claims(failing_claim)
        files["ended"] = {"reason": "done", "step": 400}
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    lines = [_step(stage, step) for stage in stages for step in range(1, 401)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    samples = [_sample(stage, family, i) for stage in stages for family in FAMILIES for i in range(4)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples), encoding="utf-8")
    return folder


def _score(stage: str) -> dict[str, Any]:
    accuracy = ACCURACY[stage]
    families = {family: min(1.0, accuracy * (0.7 + 0.3 * i)) for i, family in enumerate(FAMILIES)}
    return {"stage": stage, "bits_per_byte": 2.6 - 0.4 * accuracy, "accuracy": accuracy, "greedy_accuracy": accuracy + 0.08,
            "families": families, "completion_tokens": 12.5, "ended": 0.97}  # fmt: skip


def _step(stage: str, step: int) -> dict[str, Any]:
    wave = math.sin(7.3 * step)
    loss = 1 + 3 * math.exp(-step / 90) + 0.1 * wave
    line = {"stage": stage, "step": step, "loss": loss, "seconds": 0.3 * step, "tokens": 4096 * step, "grad_norm": 0.7,
            "tokens_per_second": 9000 + 500 * wave, "learning_rate": 1e-3, "skipped_steps": 0}  # fmt: skip
    bits = {"held_out_bits_per_byte": 2.42 + 3 * math.exp(-step / 80)} if step % 40 == 0 else {}
    more = {
        "pretrain": bits,
        "preference": {"margin": step / 200, "reward_accuracy": 0.5 + step / 1000},
        "rl": {"reward": 0.4 + step / 1600 + 0.05 * wave, "completion_tokens": 14 - step / 200, "ended": 0.95 + step / 10_000,
               "mismatch_mean": 10 ** (-6 + wave), "kl": step / 9000, "clip_fraction": 0.01, "entropy": 0.9 - step / 1000},
    }  # fmt: skip
    return {**line, **more.get(stage, {})}


def _sample(stage: str, family: str, i: int) -> dict[str, Any]:
    right = ACCURACY[stage] > 0.2 + 0.1 * i
    completion = HOSTILE if stage == "pretrain" and i == 0 else "79" if right else "the def return self"
    return {"stage": stage, "family": family, "prompt": f"What is {30 + i} + 49?", "completion": completion, "answer": "79",
            "correct": right}  # fmt: skip


def _release() -> dict[str, Any]:
    candidates = [
        {"stage": "rl", "score": 0.634, "parameters": 1_100_000, "bits_per_byte": 2.35, "allowed": True, "reason": None},
        {
            "stage": "distill",
            "score": 0.592,
            "parameters": 550_000,
            "bits_per_byte": 2.36,
            "allowed": True,
            "reason": "half the size",
        },
        {
            "stage": "sft",
            "score": 0.41,
            "parameters": 1_100_000,
            "bits_per_byte": 2.44,
            "allowed": False,
            "reason": "below 90 %",
        },
    ]
    return {"stage": "distill", "reason": "smallest within 10 % of the best", "checkpoint": "checkpoints/distill/step-400",
            "parameters": 550_000, "candidates": candidates}  # fmt: skip


def _claims(failing: bool) -> list[dict[str, Any]]:
    kept = 0.86 if failing else 0.934
    return [
        {"claim": "RL gains at least 10 points over SFT", "measured": "+22.4 points", "target": "≥ 10 points", "holds": True},
        {"claim": "The student keeps its teacher's accuracy", "measured": kept, "target": 0.9, "holds": kept >= 0.9},
        {"claim": "The student beats its control", "measured": "+20.3 points", "target": "> 0", "holds": True},
        {"claim": "Held-out bits per byte of pretraining", "measured": 2.42, "target": 2.6, "holds": True},
    ]  # fmt: skip


def page_of(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def section(page: str, identity: str) -> str:
    return page.split(f'<section id="{identity}">')[1].split("</section>")[0]


def test_rebuilding_gives_the_same_bytes(tmp_path):
    run = write_run(tmp_path / "laptop")
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert write_report(write_run(tmp_path / "elsewhere" / "laptop")).read_bytes() == first


def test_numbers_and_denominators_are_those_of_the_files(tmp_path):
    page = page_of(write_run(tmp_path / "laptop"))
    scores = section(page, "scores")
    assert "3 families × 100 held-out tasks × 4 completions = 1,200" in scores
    assert "25% of the demonstrations" in scores
    assert "at most 2.9 points (50/√300" in scores
    assert '<span class="up">+18.7 points</span> <small>against preference</small>' in scores
    assert '<span class="down">−4.2 points</span> <small>against rl</small>' in scores
    assert "41.0 % → 63.4 %" in page and "93.4 %" in page  # SFT to RL, and 0.592 / 0.634 of the teacher
    assert "2 min 55 s" in section(page, "time")  # distill: 20 + 31 * 5 s


def test_zlib_is_said_to_win_when_it_does(tmp_path):
    run = write_run(tmp_path / "laptop")
    assert "zlib wins at this budget, by 0.390 bits per byte" in section(page_of(run), "pretraining")
    (run / "baseline.json").write_text('{"zlib_bits_per_byte": 3.0, "bytes": 200000}', encoding="utf-8")
    words = section(page_of(run), "pretraining")
    assert "the model wins, by 0.560" in words and "zlib wins" not in words


def test_a_claim_that_fails_is_named_at_the_top_and_marked_in_its_row(tmp_path):
    page = page_of(write_run(tmp_path / "laptop", failing_claim=True))
    header = page.split("<header>")[1].split("</header>")[0]
    assert '<p class="verdict bad">✗ 1 of 4 claims does not hold: The student keeps its teacher&#x27;s accuracy.' in header
    claims = section(page, "claims")
    assert claims.count("✗ does not hold") == 1 and claims.count("✓ holds") == 3


def test_an_unmeasured_claim_is_not_counted_as_held(tmp_path):
    run = write_run(tmp_path / "laptop")
    (run / "claims.json").write_text('[{"claim": "C", "measured": null, "target": 1, "holds": null}]', encoding="utf-8")
    page = page_of(run)
    assert "1 of 1 claims not measured: C." in page and "All 1 claims" not in page


def test_nothing_a_model_writes_becomes_markup(tmp_path):
    page = page_of(write_run(tmp_path / "laptop"))
    assert "<script" not in page and "<img" not in page and "\0" not in page
    assert "&lt;script&gt;throw new Error(&quot;escaped?&quot;)&lt;/script&gt;" in page


def test_a_lone_surrogate_in_a_completion_is_spelled_out(tmp_path):
    run = write_run(tmp_path / "laptop")
    with (run / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write(
            '{"stage": "rl", "family": "odd", "prompt": "p", "completion": "a\\ud800b", "answer": "", "correct": false}\n'
        )
    assert r"a\ud800b" in page_of(run)


def test_the_page_refers_to_nothing_outside_itself(tmp_path):
    page = page_of(write_run(tmp_path / "laptop"))
    references = re.findall(r"""<[^>]*?\b(?:src|href)=["']([^"']*)|url\(([^)]*)\)|@import""", page)
    assert {a or b for a, b in references if not (a or b).startswith("#")} == {"data:,"}


def test_a_run_stopped_half_way_says_what_is_missing(tmp_path):
    run = write_run(tmp_path / "laptop", stages=("pretrain", "sft"), is_ended=False)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"stage": "preference", "step": 1, "lo')
    page = page_of(run)
    assert "This run has not ended" in page and "No claims were measured" in page
    assert "no stage rl" in section(page, "rl")
    assert "no model has been released" in section(page, "release")
    assert "preference, rl, distill, distill_control" in section(page, "scores")
    assert "(torn by a kill), left out: 1." in section(page, "what")
    assert section(page, "line").count("not reached") == 2 * 5  # in the picture and in its label: four stages and the release


def test_a_stage_run_by_itself_has_a_report(tmp_path):
    run = tmp_path / "sft"
    run.mkdir()
    (run / "config.json").write_text('{"verb": "sft", "seed": 1}', encoding="utf-8")
    (run / "metrics.jsonl").write_text(
        json.dumps({**_step("sft", 1), "loss": None}) + "\n" + json.dumps(_step("sft", 2)), encoding="utf-8"
    )
    page = page_of(run)
    assert 'id="figure-loss-sft"' in page and "figure-loss-rl" not in page
    assert 'id="scores"' not in page


def test_an_empty_run_has_a_report_and_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json, so it is no run; name the folder"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert page_of(tmp_path).count('class="missing"') >= 9


def test_averaging_keeps_the_mean_and_a_running_mean_keeps_a_line():
    points = [(float(i), 3.0 * i + 1) for i in range(1200)]
    fewer = averaged(points)
    assert len(fewer) == 300
    assert math.fsum(y for _, y in fewer) / 300 == pytest.approx(math.fsum(y for _, y in points) / 1200, rel=1e-12)
    inner = zip(running_mean(points)[30:-30], points[30:-30], strict=True)
    assert max(abs(mean - y) for (_, mean), (_, y) in inner) < 1e-9
    assert ends(points) == pytest.approx((3 * 29.5 + 1, 3 * 1169.5 + 1), rel=1e-12)  # 60 points at each end
    assert ends([(1, 5.0)]) == (5.0, 5.0)


def test_a_curve_is_drawn_where_its_axes_say():
    """From (0, 0) to (10, 100): y grows upward, and the tick at 50 stands half-way between those at 0 and 100."""
    drawn = chart("label", Curve([(0, 0), (10, 100)], "red"), Axes("x", "y"))
    (x0, y0), (x1, y1) = ((float(a), float(b)) for a, b in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn))
    rules = [float(y) for y in re.findall(r'class="rule" d="M52 ([\d.]+)H', drawn)]
    assert x0 == 52 and x1 == 388 and y1 < y0
    assert rules[0] == pytest.approx(y0, abs=0.11) and rules[-1] == pytest.approx(y1, abs=0.11)
    logarithmic = chart("label", Curve([(0, 1e-6), (1, 1e-4), (2, 1e-2)], "red"), Axes("x", "y", log=True))
    y = [float(b) for b in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', logarithmic)]
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)
    assert ">1e−6<" in logarithmic


# ----------------------------------------------------------------------------------------------------------------- browser


class Tab:
    """One tab of a headless Chromium, spoken to over DevTools; keeps what the page threw or logged."""

    LOUD = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")

    def __init__(self, socket: Any):
        self.socket, self.sent, self.noise, self.seen = socket, 0, [], []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": params}))
        while True:
            message = self._receive()
            if message.get("id") == self.sent:
                assert "error" not in message, message
                return message["result"]

    def wait_for(self, event: str) -> None:
        while event not in self.seen:
            self._receive()

    def evaluate(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"]["value"]

    def _receive(self) -> dict[str, Any]:
        message = json.loads(self.socket.recv())
        if "method" in message:
            self.seen.append(message["method"])
            self.noise += [message] if message["method"] in self.LOUD else []
        return message


@contextlib.contextmanager
def chromium_tab(profile: Path) -> Iterator[Tab]:
    binary = shutil.which("chromium")
    if binary is None:
        pytest.skip("no `chromium` on PATH: the report is not opened in a browser (Debian: apt-get install chromium)")
    websocket = pytest.importorskip("websocket", reason="websocket-client is not installed")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0",
             "--remote-allow-origins=*"]  # fmt: skip
    with subprocess.Popen([binary, *flags, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.DEVNULL) as browser:
        try:
            address = _first_page(_port(profile, browser))
            with contextlib.closing(websocket.create_connection(address, timeout=30)) as socket:
                yield Tab(socket)
        finally:
            browser.terminate()


def _port(profile: Path, browser: subprocess.Popen) -> int:
    deadline = time.monotonic() + 60
    path = profile / "DevToolsActivePort"
    while time.monotonic() < deadline:
        assert browser.poll() is None, f"chromium ended with {browser.returncode}"
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) == 2:
            return int(lines[0])
        time.sleep(0.1)
    raise AssertionError("chromium opened no DevTools port within 60 s")


def _first_page(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
        return next(target["webSocketDebuggerUrl"] for target in json.load(answer) if target["type"] == "page")


FIGURES = (
    "figure-line", "figure-family-all", *(f"figure-family-{family}" for family in FAMILIES),
    *(f"figure-loss-{stage}" for stage in STAGES), "figure-bits-per-byte", "figure-rl-reward", "figure-rl-completion_tokens",
    "figure-rl-mismatch_mean", "figure-preference-margin", "figure-time", "figure-throughput",
)  # fmt: skip
FLAT_PICTURES = """[...document.querySelectorAll('svg')].filter(svg => {
  const box = svg.getBoundingClientRect();
  return !(box.width > 20 && box.height > 20 && svg.childElementCount && svg.getAttribute('role') === 'img' && svg.ariaLabel);
}).map(svg => svg.outerHTML.slice(0, 200))"""
CUT_WORDS = """[...document.querySelectorAll('svg text')].filter(text => {
  const box = text.getBoundingClientRect(), frame = text.ownerSVGElement.getBoundingClientRect();
  return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1;
}).map(text => text.textContent)"""


def test_every_picture_is_there_in_a_browser_and_the_console_is_silent(tmp_path):
    half_way = write_report(write_run(tmp_path / "half-way", stages=("pretrain", "sft"), is_ended=False))
    whole = write_report(write_run(tmp_path / "laptop", failing_claim=True))
    with chromium_tab(tmp_path / "profile") as tab:
        for domain in ("Runtime", "Log", "Page"):
            tab.call(f"{domain}.enable")
        for page, figures in ((half_way, FIGURES[:7]), (whole, FIGURES)):
            _open(tab, page, width=1200)
            assert tab.evaluate(f"{json.dumps(figures)}.filter(id => !document.getElementById(id)?.querySelector('svg'))") == []
            for width in (1200, 420):
                _resize(tab, width)
                assert tab.evaluate(FLAT_PICTURES) == []
                assert tab.evaluate(CUT_WORDS) == []
                assert tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        assert tab.evaluate("document.querySelectorAll('.badge.bad')[0].getBoundingClientRect().width") > 20
        assert tab.noise == []


def test_the_browser_harness_hears_a_page_that_throws(tmp_path):
    page = tmp_path / "loud.html"
    page.write_text("<script>console.log('said'); throw new Error('thrown')</script>", encoding="utf-8")
    with chromium_tab(tmp_path / "profile") as tab:
        for domain in ("Runtime", "Log", "Page"):
            tab.call(f"{domain}.enable")
        _open(tab, page, width=420)
        assert {message["method"] for message in tab.noise} >= {"Runtime.exceptionThrown", "Runtime.consoleAPICalled"}


def _resize(tab: Tab, width: int) -> None:
    tab.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)


def _open(tab: Tab, page: Path, width: int) -> None:
    _resize(tab, width)
    tab.seen.clear()
    tab.call("Page.navigate", url=page.as_uri())
    tab.wait_for("Page.loadEventFired")


def test_a_stage_by_itself_shows_its_own_sections_and_nothing_that_it_cannot_have(tmp_path):
    write_run(tmp_path / "run", stages=("sft",))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"verb": "sft"}))
    for name in ("claims.json", "scores.json", "release.json", "data.json", "samples.jsonl"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    page = write_report(tmp_path / "run").read_text()
    assert re.findall(r'<section id="(\w+)">', page) == ["losses", "time", "what"]
    assert "is not there" not in page and "No claims" not in page
