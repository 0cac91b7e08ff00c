"""The report of a run: one self-contained page, readable without a network.

Run:    warpline report RUN
Reads:  the run's JSON files alone (`parts/report_run.py` lists them)
Writes: report.html; the same files give the same bytes
Expect: a section whose numbers the run does not have (stopped half-way, or a single stage) says so; the page is written anyway
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from .parts.file import write_atomic
from .parts.report_figures import Axes, Bar, Curve, Station, bars, chart, color, ends, stacked_bar, station, text
from .parts.report_run import (
    Record,
    Run,
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
from .parts.report_style import STYLE

TITLES = {"distill": "student", "distill_control": "control"}

SAMPLES_PER_FAMILY = 3
SAMPLE_CHARACTERS = 600


def write_report(run: Path) -> Path:
    """Make report.html in the run folder from its JSON files."""
    if not (run / "config.json").exists():
        raise ValueError(f"{run} has no config.json, so it is no run; name the folder that a stage wrote, as runs/laptop")
    path = run / "report.html"
    write_atomic(path, _page(read_run(run)).encode("utf-8"))
    return path


# ---------------------------------------------------------------------------------------------------------------- sections


def _header(run: Run) -> str:
    environment = run.environment
    where = [environment.get("started"), environment.get("cpu"), f"seed {run.config['seed']}" if "seed" in run.config else None]
    if environment.get("threads"):
        where.insert(2, f"{environment['threads']} threads")
    reason = run.ended.get("reason")
    at = f", at step {run.ended['step']}" if run.ended.get("step") is not None else ""
    state = f"Ended: {reason}{at}." if reason else "This run has not ended: the page shows how far it is."
    facts = " · ".join(text(fact) for fact in where if fact)
    return (
        f'<header><p class="kicker">warpline · run report</p><h1>{text(run.name)}</h1>'
        f'<p class="facts">{facts}</p><p class="facts">{text(state)}</p>{_verdict(run)}{_tiles(run)}</header>'
    )


def _verdict(run: Run) -> str:
    if run.config.get("verb") in SECTIONS_OF_ONE:
        return ""
    if not run.claims:
        return '<p class="verdict open">No claims were measured in this run.</p>'
    failed = [claim["claim"] for claim in run.claims if claim.get("holds") is False]
    unmeasured = [claim["claim"] for claim in run.claims if claim.get("holds") is None]
    total = len(run.claims)
    words = (
        [f"✗ {len(failed)} of {total} claims {'does' if len(failed) == 1 else 'do'} not hold: {'; '.join(failed)}."]
        if failed
        else []
    )
    words += [f"{len(unmeasured)} of {total} claims not measured: {'; '.join(unmeasured)}."] if unmeasured else []
    kind = "bad" if failed else "open" if unmeasured else "good"
    return f'<p class="verdict {kind}">{text(" ".join(words) or f"✓ All {total} claims hold.")}</p>'


def _tiles(run: Run) -> str:
    sft, rl, student = (run.score(stage).get("accuracy") for stage in ("sft", "rl", "distill"))
    tiles = []
    if is_number(sft) and is_number(rl):
        tiles.append((f"{percent(sft)} → {percent(rl)}", f"task accuracy, SFT to RL ({points(rl - sft)})"))
    if is_number(student) and is_number(rl) and rl > 0:
        tiles.append((percent(student / rl), "of its teacher's accuracy is kept by the distilled student"))
    bits = run.score("pretrain").get("bits_per_byte")
    if is_number(bits):
        beside = f" (zlib -9: {fixed(run.baseline['zlib_bits_per_byte'])})" if run.baseline else ""
        tiles.append((fixed(bits), f"held-out bits per byte after pretraining{beside}"))
    if run.timing:
        tiles.append((duration(math.fsum(run.timing.values())), "wall time, all stages"))
    drawn = "".join(f"<div><b>{text(big)}</b><span>{text(small)}</span></div>" for big, small in tiles)
    return f'<div class="tiles">{drawn}</div>'


def _claims(run: Run) -> str:
    if not run.claims:
        return missing("claims.json is not there: claims are judged when the whole line has been evaluated.")
    marks = {
        True: '<span class="badge good">✓ holds</span>',
        False: '<span class="badge bad">✗ does not hold</span>',
        None: '<span class="badge open">not measured</span>',
    }
    rows = [
        [marks[claim.get("holds")], *(text(plain(claim.get(name))) for name in ("claim", "measured", "target"))]
        for claim in run.claims
    ]
    return table(("verdict", "claim", "measured", "target"), rows, "claims")


def _line(run: Run) -> str:
    documents = run.data.get("train_documents")
    read = [f"{plain(documents)} documents"] if documents else ["no data.json"]
    stops = [Station("data", "text", read, color("data"), is_reached=bool(run.data))]
    last: float | None = None
    for stage in run.stages:
        stops.append(_stop(run, stage, last))
        accuracy = run.score(stage).get("accuracy")
        last = accuracy if is_number(accuracy) else last
    if run.release or len(run.stages) > 1:
        words = [_title(run.release["stage"])] if run.release else ["not reached"]
        big = "↗" if run.release else "–"
        stops.append(Station("release", big, words, color("release"), is_reached=bool(run.release)))
    pictures = "".join(station(stop, i == 0, i == len(stops) - 1) for i, stop in enumerate(stops))
    note = (
        "A ring is filled by the task accuracy after that stage; under it, held-out bits per byte and the change of accuracy "
        "from the stop before. The student is distilled from RL; its control learned as many steps, from labels alone."
    )
    return f'<p>{text(note)}</p><div id="figure-line" class="track">{pictures}</div>'


def _stop(run: Run, stage: str, last: float | None) -> Station:
    """A stage's stop on the line; `last` is the accuracy at the stop before."""
    score, name = run.score(stage), _title(stage)
    if not score and stage in run.metrics:
        return Station(name, "…", ["trained so far,", "not evaluated"], color(stage))
    if not score:
        return Station(name, "–", ["not reached"], color(stage), is_reached=False)
    accuracy = score.get("accuracy") if is_number(score.get("accuracy")) else None
    words = [f"{fixed(score.get('bits_per_byte'))} bits per byte"]
    if accuracy is not None and last is not None:
        words.append(points(accuracy - last))
    return Station(name, "–" if accuracy is None else f"{100 * accuracy:.0f} %", words, color(stage), accuracy)


def _scores(run: Run) -> str:
    if not run.scores:
        return missing("scores.json is not there: no stage of this run has been evaluated yet.")
    rows = []
    for i, score in enumerate(run.scores):
        cells = (
            percent(score.get("greedy_accuracy")),
            fixed(score.get("bits_per_byte"), 3),
            fixed(score.get("completion_tokens"), 1),
            percent(score.get("ended")),
        )
        change = _change(score, run.scores[i - 1]) if i else "–"
        rows.append([_named(score["stage"]), f"<b>{percent(score.get('accuracy'))}</b>", change, *cells])
    head = ("after", "accuracy (sampled)", "change", "greedy", "bits per byte", "completion tokens, mean", "ended by itself")
    families = list(dict.fromkeys(name for score in run.scores for name in score.get("families") or {}))
    pictures = "".join(_family_bars(run, name) for name in ["", *families])
    absent = [stage for stage in run.stages if not run.score(stage)]
    note = missing(f"Not evaluated in this run, or not yet: {', '.join(absent)}.") if absent else ""
    return f'<p>{text(_denominator(run))}</p>{table(head, rows, "scores")}{note}<div class="grid">{pictures}</div>'


def _title(stage: str) -> str:
    return TITLES.get(stage, stage)


def _named(stage: str) -> str:
    return f"{dot(color(stage))}{text(stage)}"


def _change(score: Record, before: Record) -> str:
    if not (is_number(score.get("accuracy")) and is_number(before.get("accuracy"))):
        return "–"
    gain = score["accuracy"] - before["accuracy"]
    kind = "even" if score["stage"] == "distill_control" else "up" if gain >= 0 else "down"  # a control is no step of the line
    return f'<span class="{kind}">{points(gain)}</span> <small>against {text(before["stage"])}</small>'


def _denominator(run: Run) -> str:
    """What an accuracy is a share of, and how far chance alone moves it."""
    said = (
        "Accuracy is the share of completions, sampled at temperature 1, that match the answer exactly (mean over families); "
        "greedy is one completion a task. "
    )
    tasks = (run.config.get("data") or {}).get("tasks") or {}
    num_tasks = tasks.get("held_out_per_family")
    if tasks.get("wrong_demonstrations"):
        said += (
            f"{tasks['wrong_demonstrations']:.0%} of the demonstrations that SFT and the control student learn from are "
            "wrong on purpose (near misses), as people's are; the graders that RL learns from are right. "
        )
    num_completions = (run.config.get("evaluate") or {}).get("completions_per_task")
    num_families = max((len(score.get("families") or {}) for score in run.scores), default=0)
    if not (num_tasks and num_completions and num_families):
        return f"{said}The configuration does not say over how many tasks."
    total = num_tasks * num_families
    return (
        f"{said}Each is over {num_families} families × {num_tasks} held-out tasks × {num_completions} completions = "
        f"{total * num_completions:,}, the same tasks for every stage. The standard error of one accuracy is at most "
        f"{50 / math.sqrt(total):.1f} points (50/√{total}, since completions of one task are not independent), and of one "
        f"family's {50 / math.sqrt(num_tasks):.1f}."
    )


def _family_bars(run: Run, family: str) -> str:
    """One picture of accuracies by stage: of a family, or of all (the empty name) with the greedy accuracy as a mark."""
    rows = []
    for score in run.scores:
        value = (score.get("families") or {}).get(family) if family else score.get("accuracy")
        mark = None if family else score.get("greedy_accuracy")
        if is_number(value):
            rows.append(Bar(_title(score["stage"]), value, percent(value), color(score["stage"]), mark))
    caption = f"<b>{text(family or 'all families')}</b> {'accuracy' if family else 'accuracy; the upright mark is greedy'}"
    spoken = "; ".join(f"{row.name} {row.text}" for row in rows)
    if not rows:
        return ""
    picture = bars(f"Accuracy by stage, {family or 'all families'}: {spoken}", rows, 1.0)
    return figure(f"family-{family or 'all'}", caption, picture)


def _losses(run: Run) -> str:
    note = (
        "Each stage minimises its own loss, so levels compare within a picture only: the student's is a divergence from its "
        "teacher, its control's a cross-entropy on labels; an RL loss is near zero by construction and says little, its reward "
        "says more. Thin: every step (neighbours averaged where there are over 300). Thick: running mean over a twentieth of "
        "the stage. Numbers with an arrow, here and below: means over the first and the last twentieth."
    )
    absent = [stage for stage in run.stages if not run.curve(stage, "loss")]
    rest = missing(f"No finite loss in metrics.jsonl, or not reached: {', '.join(absent)}.") if absent else ""
    pictures = "".join(_loss(run, stage) for stage in run.stages if stage not in absent)
    if not run.stages:
        rest = missing("metrics.jsonl has no training steps.")
    return f'<p>{text(note)}</p><div class="grid">{pictures}</div>{rest}'


def _loss(run: Run, stage: str) -> str:
    curve = run.curve(stage, "loss")
    change = "{:.3f} → {:.3f}".format(*ends(curve))
    skipped = max(line.get("skipped_steps", 0) for line in run.metrics[stage])
    caption = f"{dot(color(stage))}<b>{text(stage)}</b> {run.metrics[stage][-1]['step']:,} steps, {change}"
    if skipped:
        caption += f' <span class="down">{text(skipped)} updates skipped as not finite</span>'
    picture = chart(f"Loss of {stage} by step, {change}", Curve(curve, color(stage)), Axes("step", "loss"))
    return figure(f"loss-{stage}", caption, picture)


def _pretraining(run: Run) -> str:
    curve = run.curve("pretrain", "held_out_bits_per_byte", over="seconds")
    if not curve:
        return missing("metrics.jsonl has no held-out bits per byte: this run has not pretrained.")
    reached, zlib = curve[-1][1], run.baseline.get("zlib_bits_per_byte")
    level = (zlib, f"zlib -9: {zlib:.2f}") if is_number(zlib) else None
    words = f"After {duration(curve[-1][0])} of training the model needs {reached:.3f} bits for a byte of held-out text."
    axes = Axes("training seconds", "bits per byte", level)
    spoken = f"Held-out bits per byte against training seconds, ending at {reached:.3f}; {level[1] if level else 'no zlib'}"
    picture = chart(spoken, Curve(curve, color("pretrain")), axes)
    caption = f"<b>held-out bits per byte</b> {len(curve)} measurements while training"
    compared = _against_zlib(reached, zlib, run.baseline.get("bytes"))
    return f'<div class="beside"><div><p>{text(words)}</p>{compared}</div>{figure("bits-per-byte", caption, picture)}</div>'


def _against_zlib(reached: float, zlib: float | None, num_bytes: int | None) -> str:
    if not is_number(zlib):
        return missing("baseline.json is not there, so there is no zlib to compare with.")
    same = f"the same {num_bytes:,} bytes" if num_bytes else "the same bytes"
    words = f"zlib -9, which needs no training and no parameters, takes {zlib:.3f} for {same}: "
    if reached < zlib:
        return f"<p>{text(words)}<b>the model wins, by {zlib - reached:.3f} bits per byte.</b></p>"
    return f"<p>{text(words)}<b>zlib wins at this budget, by {reached - zlib:.3f} bits per byte.</b></p>"


DYNAMICS = {
    "rl": (
        ("reward", "mean reward", False),
        ("completion_tokens", "mean completion length, tokens", False),
        ("mismatch_mean", "generation against trainer, |Δ log p|", True),
        ("ended", "share of completions that end", False),
        ("entropy", "entropy, nats per token", False),
        ("kl", "KL to the reference", False),
        ("clip_fraction", "share of tokens clipped", False),
    ),
    "preference": (("reward_accuracy", "share of pairs ranked right", False), ("margin", "implicit reward margin", False)),
}


def _dynamics(run: Run, stage: str) -> str:
    if stage not in run.metrics:
        return missing(f"metrics.jsonl has no stage {stage}: this run has not come to it, or does not have it.")
    pictures = []
    for name, label, log in DYNAMICS[stage]:
        curve = run.curve(stage, name)
        if curve:
            first, last = ends(curve)
            caption = f"<b>{text(label)}</b> {first:.3g} → {last:.3g}"
            axes = Axes("step", name.replace("_", " "), log=log)
            picture = chart(f"{label} of {stage} by step", Curve(curve, color(stage)), axes)
            pictures.append(figure(f"{stage}-{name}", caption, picture))
    return f'<div class="grid">{"".join(pictures) or missing(f"The lines of {stage} hold none of its metrics.")}</div>'


def _reinforcement(run: Run) -> str:
    note = (
        "Reward is the graders' verdict on the completions of a step. The mismatch is how far the log-probabilities that "
        "generation reports lie from the trainer's own for the same tokens; the policy ratio divides by the trainer's."
    )
    return f"<p>{text(note)}</p>{_dynamics(run, 'rl')}"


def _preference(run: Run) -> str:
    return _dynamics(run, "preference")


def _time(run: Run) -> str:
    return f'<div class="stack">{_wall_time(run)}{_throughput(run)}</div>'


def _throughput(run: Run) -> str:
    rates = {stage: [rate for _, rate in run.curve(stage, "tokens_per_second")] for stage in run.stages}
    medians = {stage: median(values) for stage, values in rates.items() if values}
    if not medians:
        return missing("metrics.jsonl has no tokens per second.")
    rows = [Bar(_title(stage), rate, f"{rate:,.0f}", color(stage)) for stage, rate in medians.items()]
    spoken = "; ".join(f"{row.name} {row.text}" for row in rows)
    picture = bars(f"Tokens per second by stage: {spoken}", rows, max(1e-9, *medians.values()), width=480)
    return figure("throughput", "<b>throughput</b> tokens per second, median over the steps of a stage", picture)


def _wall_time(run: Run) -> str:
    parts = [(name, seconds, color(name)) for name, seconds in run.timing.items() if is_number(seconds) and seconds > 0]
    if not parts:
        return missing("timing.json is not there: wall time by stage is not known.")
    total = math.fsum(seconds for _, seconds, _ in parts)
    spoken = ", ".join(f"{name} {seconds:.0f} s" for name, seconds, _ in parts)
    legend = "".join(
        f"<li>{dot(paint)}{text(name)} <b>{duration(seconds)}</b> <small>{100 * seconds / total:.0f} %</small></li>"
        for name, seconds, paint in parts
    )
    bar = stacked_bar(f"Wall time of {total:.0f} s: {spoken}", parts)
    caption = f"<b>where the time went</b> {duration(total)} of wall time"
    return figure("time", caption, f'{bar}<ul class="legend">{legend}</ul>')


def _samples(run: Run) -> str:
    groups: dict[tuple[str, str], list[Record]] = {}
    for sample in run.samples:
        groups.setdefault((plain(sample.get("family", "")), plain(sample.get("prompt", ""))), []).append(sample)
    if not groups:
        return missing("samples.jsonl is not there: no stage of this run has been evaluated yet.")
    shown: dict[str, list[str]] = {}
    for (family, prompt), samples in groups.items():
        articles = shown.setdefault(family, [])
        if len(articles) < SAMPLES_PER_FAMILY:
            articles.append(_sample(family, prompt, samples))
    articles = [article for family in shown.values() for article in family]
    note = (
        f"The same held-out prompts after each stage: {len(articles)} of the {len(groups)} prompts in samples.jsonl, the first "
        "of each family, not chosen by result."
    )
    return f'<p>{text(note)}</p><div class="samples">{"".join(articles)}</div>'


def _sample(family: str, prompt: str, samples: Sequence[Record]) -> str:
    answers = list(dict.fromkeys(plain(sample["answer"]) for sample in samples if "answer" in sample))
    answer = f'<p class="answer">answer <code>{text(" or ".join(answers))}</code></p>' if answers else ""
    said = "".join(_completion(sample) for sample in samples)
    return f'<article><p class="kicker">{text(family)}</p><pre>{text(prompt)}</pre>{answer}{said}</article>'


def _completion(sample: Record) -> str:
    stage, completion = sample["stage"], plain(sample.get("completion", ""))
    rest = len(completion) - SAMPLE_CHARACTERS
    cut = f" <small>… {rest:,} more characters</small>" if rest > 0 else ""
    words = f"<code>{text(completion[:SAMPLE_CHARACTERS])}</code>{cut}" if completion.strip() else "<small>(empty)</small>"
    kind, mark = ("up", "✓") if sample.get("correct") else ("down", "✗")
    who = f"<span>{dot(color(stage))}{text(_title(stage))}</span>"
    return f'<div class="said">{who}<span class="{kind}">{mark}</span><div>{words}</div></div>'


def _release(run: Run) -> str:
    release = run.release
    if not release:
        return missing("release.json is not there: no model has been released from this run.")
    size = f" with {text(plain(release['parameters']))} parameters" if release.get("parameters") else ""
    words = f"<p>{_named(release['stage'])} is released{size}: {text(release.get('reason', 'no reason recorded'))}</p>"
    if release.get("checkpoint"):
        words += f"<p>Checkpoint <code>{text(release['checkpoint'])}</code></p>"
    head = ("candidate", "score", "parameters", "bits per byte", "allowed", "why")
    rows = [_candidate(row, row["stage"] == release["stage"]) for row in release.get("candidates", [])]
    return words + (table(head, rows) if rows else "")


def _candidate(row: Record, is_released: bool) -> list[str]:
    name = _named(row["stage"]) + (' <span class="badge good">released</span>' if is_released else "")
    kind, mark = ("up", "✓") if row.get("allowed") else ("down", "✗")
    numbers = [fixed(row.get("score"), 3), text(plain(row.get("parameters"))), fixed(row.get("bits_per_byte"), 3)]
    return [name, *numbers, f'<span class="{kind}">{mark}</span>', text(row.get("reason") or "")]


def _what(run: Run) -> str:
    precisions = sorted({lines[-1]["precision"] for lines in run.metrics.values() if "precision" in lines[-1]})
    environment = {**run.environment, **({"precision": ", ".join(precisions)} if precisions else {})}
    machine = pairs(environment) if run.environment else missing("environment.json is not there.")
    data = f"<h3>Data</h3>{pairs(run.data)}" if run.data else ""
    torn = f"Unreadable lines of the .jsonl files (torn by a kill), left out: {run.num_unreadable}."
    configuration = text(json.dumps(run.config, indent=2, ensure_ascii=False))
    return (
        f"<h3>Machine and versions</h3>{machine}{data}{missing(torn) if run.num_unreadable else ''}"
        f"<details><summary>Configuration, as resolved</summary><pre>{configuration}</pre></details>"
    )


SECTIONS: tuple[tuple[str, str, Callable[[Run], str]], ...] = (
    ("claims", "Claims", _claims),
    ("line", "The line", _line),
    ("scores", "What each stage gained", _scores),
    ("losses", "Loss of every stage", _losses),
    ("pretraining", "Pretraining, against zlib", _pretraining),
    ("preference", "Preference", _preference),
    ("rl", "Reinforcement learning", _reinforcement),
    ("time", "Throughput and time", _time),
    ("samples", "Before and after", _samples),
    ("release", "The released model", _release),
    ("what", "What was run", _what),
)

# What a run of one stage by itself has to show; a whole line shows every section.
SECTIONS_OF_ONE = {
    "data": ("what",),
    "pretrain": ("losses", "pretraining", "time", "what"),
    "sft": ("losses", "time", "what"),
    "preference": ("losses", "preference", "time", "what"),
    "rl": ("losses", "rl", "time", "what"),
    "distill": ("losses", "time", "what"),
    "evaluate": ("scores", "samples", "what"),
}


def _page(run: Run) -> str:
    shown = SECTIONS_OF_ONE.get(run.config.get("verb", "line"))
    chosen = [section for section in SECTIONS if shown is None or section[0] in shown]
    links = "".join(f'<a href="#{identity}">{title}</a>' for identity, title, _ in chosen)
    sections = "\n".join(f'<section id="{identity}"><h2>{title}</h2>{make(run)}</section>' for identity, title, make in chosen)
    title = text(run.name)
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{title} · warpline</title>\n<style>{STYLE}</style>"
    )
    footer = "Made from this folder's JSON files alone; <code>warpline report</code> makes it again."
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{_header(run)}<nav>{links}</nav>\n'
        f"<main>{sections}</main>\n<footer>{footer}</footer></body></html>\n"
    )
