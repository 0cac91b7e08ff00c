"""Preference pairs sampled from a model itself and ranked by the graders."""

from collections.abc import Sequence

import torch
from pydantic import PositiveFloat, PositiveInt

from ...data.conversation import Prompt
from ...data.tokenizer import ChatTokenizer
from ...parallel.model import ParallelModel
from .config import Config
from .score import EvaluateConfig, grade


class PairsConfig(Config):
    """How many prompts are sampled, and how often each."""

    prompts: PositiveInt
    completions_per_prompt: PositiveInt = 4
    temperature: PositiveFloat = 1.0


def sample_pairs(
    model: ParallelModel,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Prompt],
    config: PairsConfig,
    evaluate: EvaluateConfig,
    generator: torch.Generator,
) -> list[dict]:
    """Records {prompt, chosen, rejected}: a right and a wrong completion of every prompt that had both; only completions that
    ended.
    """
    prompts, count = prompts[: config.prompts], config.completions_per_prompt
    graded = grade(
        model, tokenizer, prompts, evaluate, temperature=config.temperature, completions_per_task=count, generator=generator
    )
    records = []
    for index, prompt in enumerate(prompts):
        group = range(index * count, (index + 1) * count)
        ended = [entry for entry in group if graded.rollouts[entry].completion.ended]
        right = [graded.rollouts[entry].text for entry in ended if graded.right[entry]]
        wrong = [graded.rollouts[entry].text for entry in ended if not graded.right[entry]]
        if right and wrong:
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in (right[0], wrong[0]))
            records.append({"prompt": prompt.prompt, "chosen": chosen, "rejected": rejected})
    return records
