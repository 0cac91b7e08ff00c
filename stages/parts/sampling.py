"""Completions of prompts, decoded and rewarded, from a model under any layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...data.conversation import Prompt
from ...data.tokenizer import ChatTokenizer
from ...models.generation import Completion, generate
from ...parallel.model import ParallelModel
from .model import whole
from .reward import RewardConfig, rewards_of


@dataclass(frozen=True)
class Rollout:
    """One completion of a prompt, its text and its reward."""

    prompt: Prompt
    completion: Completion
    text: str
    reward: float

    def as_json(self) -> list[Any]:
        """What another rank, which knows the prompt, needs."""
        return [self.completion.ids, self.completion.logprobs, self.completion.ended, self.text, self.reward]

    @classmethod
    def from_json(cls, prompt: Prompt, values: list[Any]) -> "Rollout":
        ids, logprobs, ended, text, reward = values
        return cls(prompt, Completion(ids, logprobs, ended), text, reward)


def sample(
    model: ParallelModel,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Prompt],
    rewards: Sequence[RewardConfig],
    uniform: Tensor,
    temperature: float,
) -> list[list[Rollout]]:
    """As many completions of each of this rank's prompts as `uniform` [prompts, completions, max_new_tokens] has numbers for.

    Every rank calls it, with prompts or without. The model is left in evaluation mode.
    """
    _, count, max_new_tokens = uniform.shape
    repeated = [prompt for prompt in prompts for _ in range(count)]
    model.eval()
    with whole(model) as decoder:
        completions = generate(
            decoder, [prompt.ids for prompt in repeated], max_new_tokens=max_new_tokens, end_ids=tokenizer.end_ids,
            temperature=temperature, uniform=uniform.reshape(-1, max_new_tokens),
        )  # fmt: skip
    texts = [tokenizer.decode(completion.ids) for completion in completions]
    values = rewards_of(rewards, repeated, texts, [completion.ids for completion in completions]) if repeated else []
    found = [Rollout(*parts) for parts in zip(repeated, completions, texts, values, strict=True)]
    return [found[start : start + count] for start in range(0, len(found), count)]
