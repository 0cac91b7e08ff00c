"""Scores of a model: bits per byte of held-out text, and graded completions of held-out tasks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt

from ...data.conversation import Prompt, require_room
from ...data.packing import Sample, pack
from ...data.text import Document
from ...data.tokenizer import ChatTokenizer
from ...parallel.model import ParallelModel
from .config import Config
from .reward import RewardConfig
from .sampling import Rollout, sample
from .tokens import token_stats


class EvaluateConfig(Config):
    """How models are scored. A completion is right when its reward is at least `right_from`."""

    completions_per_task: PositiveInt = 4
    temperature: NonNegativeFloat = 1.0
    max_new_tokens: PositiveInt = 64
    window_tokens: PositiveInt = 256
    samples_shown: PositiveInt = 6
    right_from: float = 1.0
    rewards: list[RewardConfig] = Field(default=[RewardConfig(function="warpline.data.task:exact_match")], min_length=1)


@dataclass(frozen=True)
class GradedTasks:
    """Completions task after task, and whether each is right."""

    rollouts: list[Rollout]
    right: list[bool]

    def accuracy(self, family: str | None = None) -> float:
        """The share of right completions, of one family or of all tasks."""
        pairs = zip(self.rollouts, self.right, strict=True)
        chosen = [right for rollout, right in pairs if family in (None, family_of(rollout.prompt))]
        return sum(chosen) / len(chosen)


def family_of(prompt: Prompt) -> str:
    return str(prompt.columns.get("family", "tasks"))


def bits_per_byte(model: ParallelModel, tokenizer: ChatTokenizer, documents: Sequence[Document], window_tokens: int) -> float:
    """Σ −log2 p(token) over all tokens of `documents`, divided by their UTF-8 bytes.

    Every token is predicted once, from at most `window_tokens` tokens before it in its window; the first of a document from
    the document token. Every rank computes its share, and returns the same.
    """
    samples, num_bytes = [], 0
    for document in documents:
        num_bytes += len(document.text.encode())
        ids = [tokenizer.document_id, *tokenizer.encode(document.text)]
        for start in range(0, len(ids) - 1, window_tokens):
            part = ids[start : start + window_tokens + 1]
            samples.append(Sample(part, [False] + [True] * (len(part) - 1), document.source))
    model.eval()
    rows, mesh, logprob = [samples[start : start + 16] for start in range(0, len(samples), 16)], model.mesh, 0.0
    per_call = 16 * mesh.num_data
    for first in range(0, len(rows), per_call):
        mine = [pack(row) for row in mesh.share(rows[first : first + per_call])]
        logprob += model.totals(mine, lambda view, *head: token_stats(view, *head).logprob_T.sum()[None], 1)[0]
    return -logprob / math.log(2) / num_bytes


def grade(
    model: ParallelModel,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Prompt],
    config: EvaluateConfig,
    *,
    temperature: float,
    completions_per_task: int,
    generator: torch.Generator,
) -> GradedTasks:
    """Sample `completions_per_task` completions of every prompt, one after the other, and grade them. Every rank samples its
    share, and returns all."""
    require_room(prompts, config.max_new_tokens, model.config.max_positions)
    mesh = model.mesh
    uniform = torch.rand(
        len(prompts), completions_per_task, config.max_new_tokens, dtype=torch.float64, generator=generator
    )  # fmt: skip
    mine = mesh.deal(list(range(len(prompts))), *mesh.sizes._fields)
    sampled = sample(model, tokenizer, [prompts[i] for i in mine], config.rewards, uniform[mine], temperature)
    found = mesh.gather([[rollout.as_json() for rollout in rollouts] for rollouts in sampled], *mesh.sizes._fields)
    rollouts = [Rollout.from_json(prompt, x) for prompt, part in zip(prompts, found, strict=True) for x in part]
    return GradedTasks(rollouts, [rollout.reward >= config.right_from for rollout in rollouts])


def score_tasks(
    model: ParallelModel,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Prompt],
    config: EvaluateConfig,
    generator: torch.Generator,
) -> tuple[dict, list[dict]]:
    """The task part of a score (accuracies are means over families of the share of right completions), and sample
    completions.
    """
    count = config.completions_per_task
    sampled = grade(
        model, tokenizer, prompts, config, temperature=config.temperature, completions_per_task=count, generator=generator
    )
    greedy = grade(model, tokenizer, prompts, config, temperature=0.0, completions_per_task=1, generator=generator)
    names = list(dict.fromkeys(family_of(prompt) for prompt in prompts))
    families = {name: round(sampled.accuracy(name), 4) for name in names}
    completions = [rollout.completion for rollout in sampled.rollouts]
    lengths = [len(completion.ids) for completion in completions]
    score = {
        "accuracy": round(sum(families.values()) / len(families), 4),
        "greedy_accuracy": round(sum(greedy.accuracy(name) for name in names) / len(names), 4),
        "families": families,
        "completion_tokens": round(sum(lengths) / len(lengths), 3),
        "ended": round(sum(completion.ended for completion in completions) / len(lengths), 4),
    }
    shown = range(0, count * min(config.samples_shown, len(prompts)), count)
    samples = [
        {
            "family": family_of(rollout.prompt), "prompt": shown_prompt(rollout.prompt), "completion": rollout.text,
            "answer": rollout.prompt.columns.get("answer"), "correct": sampled.right[index],
        }
        for index, rollout in enumerate(sampled.rollouts) if index in shown
    ]  # fmt: skip
    return score, samples


def shown_prompt(prompt: Prompt) -> str:
    return prompt.prompt if isinstance(prompt.prompt, str) else prompt.prompt[-1]["content"]
