"""The line: every stage in order, each resumable and scored on the same held-out sets, then the release and the report.

Run     warpline line configs/line/laptop.toml
Reads   the config alone (the text is Python's standard library unless [data] names files)
Writes  RUN/: everything of its stages, scores.json, claims.json, timing.json, release/, report.html
Expect  under ten minutes for configs/line/laptop.toml on two cores; a stage that is done is not done again
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt
from rich.table import Table

from ..data.conversation import read_prompts
from ..data.record import write_records
from ..models.decoder import DecoderShape
from ..parallel.mesh import Mesh
from . import data, distill, evaluate, preference, pretrain, release, rl, sft
from .parts.checkpoint import damage
from .parts.config import BadConfig, Config, ParallelConfig, TrainingConfig
from .parts.model import frozen, start_from
from .parts.pairs import PairsConfig, sample_pairs
from .parts.progress import console
from .parts.run import RunFolder
from .parts.score import EvaluateConfig
from .parts.seed import generator_of
from .parts.session import StopSignal
from .release import ReleaseConfig
from .report import write_report


class ClaimConfig(Config):
    """What the run is to show; each is measured and reported whichever way it falls."""

    rl_gain_points: float = 10.0
    student_keeps: float = 0.9
    max_bits_per_byte: float = 2.6


class LineConfig(Config):
    """One table per stage; where a stage reads from follows from the line."""

    seed: NonNegativeInt = 0
    data: data.DataConfig
    model: DecoderShape
    pretrain: pretrain.PretrainConfig
    sft: sft.SftConfig
    pairs: PairsConfig
    preference: preference.PreferenceConfig
    rl: rl.RlConfig
    distill: distill.DistillConfig
    evaluate: EvaluateConfig
    release: ReleaseConfig = ReleaseConfig()
    claims: ClaimConfig = ClaimConfig()
    parallel: ParallelConfig = ParallelConfig()


class Line:
    """One run of the line: knows the folders, times every part, and skips what is done."""

    def __init__(self, config: LineConfig, run: RunFolder, mesh: Mesh, stop: StopSignal):
        self.config, self.run, self.mesh, self.stop = config, run, mesh, stop
        self.data = run.path / "data"
        self.checkpoints: dict[str, Path] = {}

    def timed(self, part: str, work: Callable[[], Any]) -> Any:
        started = time.monotonic()
        result = work()
        self.run.add_seconds(part, time.monotonic() - started)
        return result

    def train(
        self, stage: str, settings: TrainingConfig, kind: Callable[..., TrainingConfig], main: Callable, **inputs: Any
    ) -> Path:
        """Bring one stage to its last checkpoint, unless it is there, and score it, unless it is scored."""
        path = self.run.checkpoints(stage) / f"step-{settings.steps}"
        if not path.exists() or damage(path):
            full = kind(**settings.model_dump(), **inputs, seed=self.config.seed, parallel=self.config.parallel)
            path = self.timed(stage, lambda: main(full, self.run, self.mesh, self.stop))
        self.checkpoints[stage] = path
        if all(score["stage"] != stage for score in self.run.read_json("scores.json", [])):
            scoring = evaluate.EvaluateStageConfig(
                **self.config.evaluate.model_dump(), model=str(path), text=[str(self.data / "held_out.jsonl")],
                tasks=[str(self.data / "held_out_tasks.jsonl")], stage=stage, seed=self.config.seed,
                precision=settings.precision, parallel=self.config.parallel,
            )  # fmt: skip
            score = self.timed("evaluate", lambda: evaluate.main(scoring, self.run, self.mesh))
            if self.mesh.is_first:
                console.print(
                    f"[bold]{stage:<16}[/] {score['bits_per_byte']:.3f} bits per byte, accuracy {score['accuracy']:.3f}"
                    f" (greedy {score['greedy_accuracy']:.3f})"
                )
        return path

    def pairs(self, start: Path) -> Path:
        """The preference pairs, sampled from the SFT model once and kept."""
        path = self.data / "preference.jsonl"
        if not path.exists():
            self.timed("preference", lambda: self._sample_pairs(start, path))
        return path

    def _sample_pairs(self, start: Path, path: Path) -> None:
        begin = start_from(start, self.mesh)
        model = frozen(begin, self.mesh, self.config.parallel, self.config.preference.precision)
        prompts = read_prompts([self.data / "rl.jsonl"], begin.tokenizer)
        generator = generator_of(self.config.seed, "preference", "sample")
        records = sample_pairs(model, begin.tokenizer, prompts, self.config.pairs, self.config.evaluate, generator)
        if not records:
            raise BadConfig(
                f"none of {self.config.pairs.prompts} prompts had both a right and a wrong completion, so there are no pairs; "
                "change the difficulty of the tasks or sft.steps"
            )
        self.mesh.on_first(lambda: write_records(path, records))

    def finish(self) -> None:
        if not (self.run.path / "release.json").exists():
            self.timed("release", lambda: release.main(self.config.release, self.run, self.checkpoints))
        scores = {score["stage"]: score for score in self.run.read_json("scores.json", [])}
        self.run.write_json("claims.json", claims(scores, self.config.claims))
        self.run.end("done")  # before the report, which says so


def main(config: LineConfig, run: RunFolder, mesh: Mesh, stop: StopSignal) -> Path:
    """Run the line; returns the path of report.html."""
    line = Line(config, run, mesh, stop)
    folder = line.data
    if config.data.tasks is None:
        raise BadConfig("the line needs tasks: add a [data.tasks] table")
    line.timed("data", lambda: data.main(data.DataStageConfig(**config.data.model_dump(), seed=config.seed), run, mesh))

    base = line.train(
        "pretrain", config.pretrain, pretrain.PretrainStageConfig, pretrain.main, data=str(folder), model=config.model
    )
    chat = {"files": [str(folder / "sft.jsonl")], "text": str(folder)}
    tuned = line.train("sft", config.sft, sft.SftStageConfig, sft.main, start=str(base), **chat)
    preferred = line.train(
        "preference",
        config.preference,
        preference.PreferenceStageConfig,
        preference.main,
        start=str(tuned),
        files=[str(line.pairs(tuned))],
    )
    policy = line.train("rl", config.rl, rl.RlStageConfig, rl.main, start=str(preferred), files=[str(folder / "rl.jsonl")])
    line.train("distill", config.distill, distill.DistillStageConfig, distill.main, teacher=str(policy), **chat)
    line.train(
        "distill_control", control(config.distill), distill.DistillStageConfig, distill_control, teacher=str(policy), **chat
    )

    mesh.on_first(line.finish)
    if mesh.is_first:
        print_scores(run)
        write_report(run.path)
    return run.path / "report.html"


def control(config: distill.DistillConfig) -> distill.DistillConfig:
    """The student's control: the same start, data and steps, on the labels alone."""
    return config.model_copy(update={"divergence_weight": 0.0, "label_weight": 1.0})


def distill_control(config: distill.DistillStageConfig, run: RunFolder, mesh: Mesh, stop: StopSignal) -> Path:
    return distill.main(config, run, mesh, stop, stage="distill_control")


def claims(scores: dict[str, dict], config: ClaimConfig) -> list[dict[str, Any]]:
    """What the run set out to show, measured: [{claim, measured, target, holds}]."""
    tuned, policy, student, other = (scores[name]["accuracy"] for name in ("sft", "rl", "distill", "distill_control"))
    bits = scores["pretrain"]["bits_per_byte"]
    gain = 100 * (policy - tuned)
    keeps = student / policy if policy else 0.0
    measured = [
        ("pretraining reaches this many bits per byte of held-out text, or fewer", f"{bits:.3f}",
         f"≤ {config.max_bits_per_byte:.2f}", bits <= config.max_bits_per_byte),
        ("RL ends this many points of task accuracy above SFT", f"{gain:+.1f} points ({tuned:.3f} to {policy:.3f})",
         f"≥ {config.rl_gain_points:+.1f} points", gain >= config.rl_gain_points),
        ("the distilled student keeps this share of its teacher's accuracy", f"{keeps:.1%} ({student:.3f} of {policy:.3f})",
         f"≥ {config.student_keeps:.0%}", keeps >= config.student_keeps),
        ("the distilled student beats its control, trained as long on the labels alone", f"{student:.3f} against {other:.3f}",
         "above", student > other),
    ]  # fmt: skip
    return [dict(zip(("claim", "measured", "target", "holds"), row, strict=True)) for row in measured]


STARTS = {"sft": "pretrain", "preference": "sft", "rl": "preference", "distill": "rl", "distill_control": "rl"}


def print_scores(run: RunFolder) -> None:
    """The table of what each stage gained over the model it started from (in points of accuracy), and the claims."""
    timing, scores = run.read_json("timing.json", {}), run.read_json("scores.json", [])
    accuracies = {score["stage"]: score["accuracy"] for score in scores}
    table = Table("stage", "bits/byte", "accuracy", "gain", "greedy", "tokens", "ended", "seconds", box=None, pad_edge=False)
    for score in scores:
        before = accuracies.get(STARTS.get(score["stage"], ""))
        gain = "" if before is None else f"{100 * (score['accuracy'] - before):+.1f}"
        table.add_row(
            score["stage"], f"{score['bits_per_byte']:.3f}", f"{score['accuracy']:.3f}", gain,
            f"{score['greedy_accuracy']:.3f}",
            f"{score['completion_tokens']:.1f}", f"{score['ended']:.2f}", f"{timing.get(score['stage'], 0.0):.0f}",
        )  # fmt: skip
    console.print(table)
    for claim in run.read_json("claims.json", []):
        mark = "[green]holds:[/]" if claim["holds"] else "[red]does not hold:[/]"
        console.print(f"{mark} {claim['claim']}: {claim['measured']} (target {claim['target']})")
    released = run.read_json("release.json", {})
    console.print(f"released: {released.get('stage') or 'nothing'} ({released.get('reason')})")
