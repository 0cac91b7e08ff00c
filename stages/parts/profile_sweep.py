"""Scaling: a stage under several settings, one after another on this machine, and its rate against the ideal.

Strong: the same batch a step on more ranks. Weak: a batch that grows with the data ranks (replicate × shard). The ideal is the
rate of the fewest ranks × (ranks / fewest). A rate is the median of tokens_per_second over the steps before the recorded ones,
the first left out.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from .config import BadConfig, ParallelConfig

BATCH_KEYS = ("sequences_per_step", "tokens_per_step", "prompts_per_step")


class Point(NamedTuple):
    """One run: `scaling` is "strong" or "weak"."""

    scaling: str
    overrides: list[str]
    num_ranks: int

    @property
    def name(self) -> str:
        return "_".join(item.replace("=", "-").replace("/", "-") for item in self.overrides)


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BadConfig("a sweep ends in a picture and matplotlib is not installed; pip install matplotlib") from error


def combinations(sweep: Sequence[str]) -> list[list[str]]:
    """Every combination of the values of `key=value,value`."""
    choices = []
    for item in sweep:
        key, separator, values = item.partition("=")
        if not (key and separator and all(values.split(","))):
            raise BadConfig(f"received --sweep {item}; expected key=value,value, as parallel.tensor=1,2,4")
        choices.append([f"{key}={value}" for value in values.split(",")])
    return [list(chosen) for chosen in itertools.product(*choices)]


def points(found: Sequence[tuple[list[str], Any]]) -> list[Point]:
    """Of (overrides, the stage's config under them): strong ones, and where data ranks differ weak ones."""
    made = [Point("strong", overrides, config.parallel.sizes.product) for overrides, config in found]
    data_ranks = [_num_data(config.parallel) for _, config in found]
    if len(set(data_ranks)) == 1:
        return made
    fewest = min(data_ranks)
    for (overrides, config), count in zip(found, data_ranks, strict=True):
        key = next(key for key in BATCH_KEYS if hasattr(config, key))
        batch, rest = divmod(getattr(config, key) * count, fewest)
        if rest:
            raise BadConfig(f"{key}={getattr(config, key)} × {count} data ranks / {fewest} is no whole number; change {key}")
        grown = [] if count == fewest else [f"{key}={batch}"]
        made.append(Point("weak", [*overrides, *grown], config.parallel.sizes.product))
    return made


def _num_data(parallel: ParallelConfig) -> int:
    return parallel.replicate * parallel.shard


def check_machine(found: Sequence[Point], num_gpus: int) -> None:
    """A machine with GPUs runs a rank on each; one without runs as many ranks as asked."""
    most = max(found, key=lambda point: point.num_ranks)
    if num_gpus and most.num_ranks > num_gpus:
        raise BadConfig(
            f"{' '.join(most.overrides)} is {most.num_ranks} ranks but this machine has {num_gpus} GPU(s); "
            "leave it out of the sweep, or profile it by itself on more machines"
        )


def num_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def run_point(point: Point, arguments: Sequence[str], folder: Path) -> Path:
    """Profile it in a folder of its own; what it says goes to `output.txt` there."""
    path = folder / point.name
    path.mkdir(parents=True, exist_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(point.num_ranks), "-m", "--"]
    command = [sys.executable, *torchrun, "warpline.stages.command", "profile", *arguments, *point.overrides]
    log = folder / f"{point.name}.txt"
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run([*command, "--run", str(path)], stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("warpline:")]
        raise BadConfig(f"{' '.join(point.overrides)} failed ({lines[0] if lines else f'see {log}'}); the sweep ends here")
    return path


def rate(path: Path, num_before: int) -> float:
    """Tokens a second: the median over steps 2 to `num_before`."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return median(line["tokens_per_second"] for line in lines if "loss" in line and 1 < line["step"] <= num_before)


def scaled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows {scaling, setting, ranks, tokens_per_second} with `ideal` and `efficiency`, against the row of the fewest ranks of
    the same scaling (the fastest of several)."""
    first = {}
    for scaling in {row["scaling"] for row in rows}:
        mine = [row for row in rows if row["scaling"] == scaling]
        first[scaling] = min(mine, key=lambda row: (row["ranks"], -row["tokens_per_second"]))
    made = []
    for row in rows:
        start = first[row["scaling"]]
        ideal = start["tokens_per_second"] * row["ranks"] / start["ranks"]
        made.append({**row, "ideal": ideal, "efficiency": row["tokens_per_second"] / ideal})
    return made


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'scaling':<9}{'ranks':>5}  {'tokens/s':>12}{'ideal':>12}{'efficiency':>12}  setting"]
    for row in rows:
        rates = f"{row['tokens_per_second']:>12,.0f}{row['ideal']:>12,.0f}{row['efficiency']:>12.0%}"
        lines.append(f"{row['scaling']:<9}{row['ranks']:>5}  {rates}  {row['setting']}")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel a scaling: rate over ranks, and the ideal."""
    from matplotlib.figure import Figure  # here: the rest of the command line needs no pictures

    kinds = list(dict.fromkeys(row["scaling"] for row in rows))
    figure = Figure(figsize=(6.4 * len(kinds), 4.4), layout="constrained")
    for column, kind in enumerate(kinds):
        axes = figure.add_subplot(1, len(kinds), column + 1)
        mine = sorted((row for row in rows if row["scaling"] == kind), key=lambda row: (row["ranks"], row["tokens_per_second"]))
        ranks = sorted({row["ranks"] for row in mine})
        ideal = {row["ranks"]: row["ideal"] for row in mine}
        axes.plot(ranks, [ideal[count] for count in ranks], "--", color="0.5", label="ideal")
        axes.plot(
            [row["ranks"] for row in mine], [row["tokens_per_second"] for row in mine], "o", color="#3b6fd4", label="measured"
        )
        for row in mine:
            is_last = row["ranks"] == ranks[-1] > ranks[0]
            axes.annotate(
                f"{row['setting']} ({row['efficiency']:.0%})", (row["ranks"], row["tokens_per_second"]), fontsize=7,
                xytext=(-6 if is_last else 6, -10), textcoords="offset points", ha="right" if is_last else "left",
            )  # fmt: skip
        axes.set_title(f"{kind} scaling: " + ("the same batch" if kind == "strong" else "the batch grows with the data ranks"))
        axes.set_xlabel("ranks")
        axes.set_ylabel("tokens a second, all ranks")
        axes.set_xticks(ranks)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.2)
        axes.grid(True, alpha=0.25)
        axes.legend()
    figure.savefig(path, dpi=130)
