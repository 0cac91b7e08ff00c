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
from ...models.decoder import Decoder
from ...models.generation import Completion, generate
from .config import Config
from .reward import RewardConfig, rewards_of
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
    """Per task its prompt, and per completion the text, whether it is right, its tokens and whether it ended by itself."""

    prompts: list[Prompt]
    texts: list[str]
    right: list[bool]
    completions: list[Completion]

    def accuracy(self, family: str | None = None) -> float:
        """The share of right completions, of one family or of all tasks."""
        chosen = [right for prompt, right in zip(self.prompts, self.right, strict=True) if family in (None, family_of(prompt))]
        return sum(chosen) / len(chosen)


def family_of(prompt: Prompt) -> str:
    return str(prompt.columns.get("family", "tasks"))


@torch.no_grad()
def bits_per_byte(decoder: Decoder, tokenizer: ChatTokenizer, documents: Sequence[Document], window_tokens: int) -> float:
    """Σ −log2 p(token) over all tokens of `documents`, divided by their UTF-8 bytes.

    Every token is predicted once, from at most `window_tokens` tokens before it in its window; the first of a document from
    the document token.
    """
    samples, num_bytes = [], 0
    for document in documents:
        num_bytes += len(document.text.encode())
        ids = [tokenizer.document_id, *tokenizer.encode(document.text)]
        for start in range(0, len(ids) - 1, window_tokens):
            part = ids[start : start + window_tokens + 1]
            samples.append(Sample(part, [False] + [True] * (len(part) - 1), document.source))
    decoder.eval()
    nats = 0.0
    for start in range(0, len(samples), 16):
        nats -= token_stats(decoder, pack(samples[start : start + 16])).logprob_T.sum().item()
    return nats / math.log(2) / num_bytes


def grade(
    decoder: Decoder,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Prompt],
    config: EvaluateConfig,
    *,
    temperature: float,
    completions_per_task: int,
    generator: torch.Generator,
) -> GradedTasks:
    """Sample `completions_per_task` completions of every prompt, one after the other, and grade them."""
    require_room(prompts, config.max_new_tokens, decoder.config.max_positions)
    decoder.eval()
    repeated = [prompt for prompt in prompts for _ in range(completions_per_task)]
    completions = generate(
        decoder, [prompt.ids for prompt in repeated], max_new_tokens=config.max_new_tokens, end_ids=tokenizer.end_ids,
        temperature=temperature, generator=generator,
    )  # fmt: skip
    texts = [tokenizer.decode(completion.ids) for completion in completions]
    rewards = rewards_of(config.rewards, repeated, texts, [completion.ids for completion in completions])
    return GradedTasks(repeated, texts, [reward >= config.right_from for reward in rewards], completions)


def score_tasks(
    decoder: Decoder, tokenizer: ChatTokenizer, prompts: Sequence[Prompt], config: EvaluateConfig, generator: torch.Generator
) -> tuple[dict, list[dict]]:
    """The task part of a score (accuracies are means over families of the share of right completions), and sample
    completions.
    """
    count = config.completions_per_task
    sampled = grade(
        decoder, tokenizer, prompts, config, temperature=config.temperature, completions_per_task=count, generator=generator
    )
    greedy = grade(decoder, tokenizer, prompts, config, temperature=0.0, completions_per_task=1, generator=generator)
    names = list(dict.fromkeys(family_of(prompt) for prompt in prompts))
    families = {name: round(sampled.accuracy(name), 4) for name in names}
    lengths = [len(completion.ids) for completion in sampled.completions]
    score = {
        "accuracy": round(sum(families.values()) / len(families), 4),
        "greedy_accuracy": round(sum(greedy.accuracy(name) for name in names) / len(names), 4),
        "families": families,
        "completion_tokens": round(sum(lengths) / len(lengths), 3),
        "ended": round(sum(completion.ended for completion in sampled.completions) / len(lengths), 4),
    }
    shown = range(0, count * min(config.samples_shown, len(prompts)), count)
    samples = [
        {
            "family": family_of(sampled.prompts[index]), "prompt": shown_prompt(sampled.prompts[index]),
            "completion": sampled.texts[index], "answer": sampled.prompts[index].columns.get("answer"),
            "correct": sampled.right[index],
        }
        for index in shown
    ]  # fmt: skip
    return score, samples


def shown_prompt(prompt: Prompt) -> str:
    return prompt.prompt if isinstance(prompt.prompt, str) else prompt.prompt[-1]["content"]
