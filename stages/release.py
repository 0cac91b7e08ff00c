"""Release: pick one checkpoint by the rule in the config, and export it as a Hugging Face folder.

Reads   RUN/scores.json and the last checkpoint of every scored stage
Writes  RUN/release/ (config.json, safetensors, tokenizer.json, chat template, generation config), RUN/release.json

The rule: a stage may be released if its bits per byte are at most `max_bits_per_byte_increase` above those of
`regression_from`, and no task family lost more than `max_family_loss` against `regression_from_tasks`; of those the best
accuracy wins, unless a smaller model keeps at least `smaller_keeps` of it: then the smallest such.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, NonNegativeFloat

from ..models import huggingface
from ..models.decoder import num_parameters
from .parts.checkpoint import load_start
from .parts.config import BadConfig, Config
from .parts.run import RunFolder

ROUNDING = 1e-6  # scores are written with four decimals; a difference of exactly the limit is allowed


class ReleaseConfig(Config):
    """See the rule above; bits per byte and accuracies are those of scores.json."""

    regression_from: str = "pretrain"
    max_bits_per_byte_increase: NonNegativeFloat = 0.5
    regression_from_tasks: str = "sft"
    max_family_loss: float = Field(default=0.1, ge=0, le=1)
    smaller_keeps: float = Field(default=0.95, gt=0, le=1)


def main(config: ReleaseConfig, run: RunFolder, checkpoints: dict[str, Path]) -> dict[str, Any]:
    """`checkpoints`: the last checkpoint of every candidate stage. Returns what release.json says."""
    scores = {score["stage"]: score for score in run.read_json("scores.json", [])}
    for reference in (config.regression_from, config.regression_from_tasks):
        if reference not in scores:
            raise BadConfig(f"release compares with stage {reference!r}, which has no score; choose among {', '.join(scores)}")
    candidates = [
        candidate(scores[stage], _parameters(path), scores, config) for stage, path in checkpoints.items() if stage in scores
    ]
    chosen, reason = choose(candidates, config)
    released = {"stage": chosen, "reason": reason, "candidates": candidates}
    if chosen:
        path = checkpoints[chosen]
        parameters = next(entry["parameters"] for entry in candidates if entry["stage"] == chosen)
        export(path, run.path / "release")
        released |= {"checkpoint": str(path.relative_to(run.path)), "parameters": parameters}
    run.write_json("release.json", released)
    return released


def candidate(score: dict, parameters: int, scores: dict[str, dict], config: ReleaseConfig) -> dict[str, Any]:
    """One stage under the rule: its numbers, and why it may or may not be released."""
    limit = scores[config.regression_from]["bits_per_byte"] + config.max_bits_per_byte_increase
    problems = []
    if score["bits_per_byte"] > limit + ROUNDING:
        problems.append(f"bits per byte {score['bits_per_byte']:.3f} above {limit:.3f}")
    for family, before in scores[config.regression_from_tasks]["families"].items():
        if score["families"][family] < before - config.max_family_loss - ROUNDING:
            problems.append(f"{family} fell from {before:.3f} to {score['families'][family]:.3f}")
    return {
        "stage": score["stage"], "score": score["accuracy"], "bits_per_byte": score["bits_per_byte"], "parameters": parameters,
        "allowed": not problems, "reason": "; ".join(problems) or "no regression beyond the limits",
    }  # fmt: skip


def choose(candidates: list[dict[str, Any]], config: ReleaseConfig) -> tuple[str | None, str]:
    """The released stage and the reason in words; None if the rule allows no candidate."""
    allowed = [entry for entry in candidates if entry["allowed"]]
    if not allowed:
        return None, "no stage passes the regression limits"
    best = max(allowed, key=lambda entry: entry["score"])
    smaller = [
        entry for entry in allowed
        if entry["parameters"] < best["parameters"] and entry["score"] >= config.smaller_keeps * best["score"]
    ]  # fmt: skip
    if not smaller:
        return best["stage"], f"best accuracy, {best['score']:.3f}, among the stages without a regression beyond the limits"
    chosen = min(smaller, key=lambda entry: (entry["parameters"], -entry["score"]))
    share = chosen["score"] / best["score"] if best["score"] else 1.0  # all of nothing
    return chosen["stage"], (
        f"{chosen['parameters'] / best['parameters']:.0%} of the parameters of {best['stage']} at {share:.0%} of its accuracy"
        f" ({chosen['score']:.3f} against {best['score']:.3f})"
    )


def export(checkpoint: Path, folder: Path) -> None:
    """Write the checkpoint's model and tokenizer as a Hugging Face folder, complete or not at all."""
    decoder, tokenizer = load_start(checkpoint, torch.device("cpu"))
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    huggingface.save(decoder, temporary, tokenizer)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def _parameters(checkpoint: Path) -> int:
    return num_parameters(load_start(checkpoint, torch.device("cpu"))[0])
