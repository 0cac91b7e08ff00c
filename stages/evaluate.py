"""Evaluation: bits per byte of held-out text, accuracy on held-out tasks.

Run     warpline evaluate configs/evaluate/own_data.toml
Reads   a model folder (`model`), `text` files and `tasks` (prompts with the graders' columns, such as `answer`); either may
        be empty
Writes  an entry of RUN/scores.json, and RUN/samples.jsonl
Expect  accuracy = mean over families of the share of right completions among `completions_per_task` sampled at `temperature`
        per task
"""

from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt

from ..data.conversation import read_prompts
from ..data.text import read_documents
from ..parallel.mesh import Mesh
from .parts.config import BadConfig, ParallelConfig, Precision
from .parts.model import frozen, start_from
from .parts.run import RunFolder
from .parts.score import EvaluateConfig, bits_per_byte, score_tasks
from .parts.seed import generator_of


class EvaluateStageConfig(EvaluateConfig):
    """The stage by itself; `stage` names the entry in scores.json."""

    model: str
    text: list[str] = []
    tasks: list[str] = []
    stage: str = "evaluate"
    seed: NonNegativeInt = 0
    precision: Precision = "auto"
    parallel: ParallelConfig = ParallelConfig()


def main(config: EvaluateStageConfig, run: RunFolder, mesh: Mesh) -> dict:
    """Score the model, the work shared among all ranks; returns the entry of scores.json."""
    if not config.text and not config.tasks:
        raise BadConfig("nothing to evaluate on: give text or tasks")
    score: dict[str, Any] = {"stage": config.stage}
    mesh.note(f"evaluating {config.stage}")
    start = start_from(Path(config.model), mesh)
    model = frozen(start, mesh, config.parallel, config.precision)
    samples: list[dict] = []
    if config.text:
        documents = list(read_documents([Path(path) for path in config.text]))
        score["bits_per_byte"] = round(bits_per_byte(model, start.tokenizer, documents, config.window_tokens), 4)
    if config.tasks:
        prompts = read_prompts([Path(path) for path in config.tasks], start.tokenizer)
        accuracies, samples = score_tasks(
            model, start.tokenizer, prompts, config, generator_of(config.seed, "evaluate", "sample")
        )  # fmt: skip
        score |= accuracies
    run.rewind("samples.jsonl", config.stage, -1)
    for sample in samples:
        run.append("samples.jsonl", {"stage": config.stage, "step": 0, **sample})
    if run.writes:
        run.replace_score(score)
    mesh.barrier()
    return score
