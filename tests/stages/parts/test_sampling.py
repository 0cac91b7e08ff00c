import json

import pytest
import torch

from warpline.data.conversation import Prompt
from warpline.stages.parts.reward import RewardConfig
from warpline.stages.parts.sampling import Rollout, sample

GRADER = """
def length(prompts, completions, completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch) -> list[RewardConfig]:
    """A completion's length."""
    (tmp_path / "my_length_grader.py").write_text(GRADER)
    monkeypatch.syspath_prepend(tmp_path)
    return [RewardConfig(function="my_length_grader:length")]


def prompts_of(tokenizer) -> list[Prompt]:
    return [Prompt(text, tokenizer.encode(text), {}, "t") for text in ("Sort: d a", "Add", "Sort: c b a", "class Tree")]


def uniform_of(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def test_every_prompt_has_its_completions_with_text_and_reward(tiny_decoder, model_of, tokenizer, rewards):
    prompts = prompts_of(tokenizer)
    found = sample(model_of(tiny_decoder), tokenizer, prompts, rewards, uniform_of(4, 3, 7), 1.0)
    assert [[rollout.prompt for rollout in group] for group in found] == [[prompt] * 3 for prompt in prompts]
    for rollout in (rollout for group in found for rollout in group):
        assert rollout.text == tokenizer.decode(rollout.completion.ids)
        assert rollout.reward == len(rollout.completion.ids) == len(rollout.completion.logprobs) <= 7


def test_what_is_sampled_for_a_prompt_depends_on_its_numbers_and_on_no_other_prompt(tiny_decoder, model_of, tokenizer, rewards):
    """So ranks may share prompts out as they like: each alone gives what all together give, in fp64 to the last id."""
    prompts, uniform, model = prompts_of(tokenizer), uniform_of(4, 3, 7), model_of(tiny_decoder.double(), "fp64")
    together = sample(model, tokenizer, prompts, rewards, uniform, 0.7)
    alone = [sample(model, tokenizer, [p], rewards, uniform[[i]], 0.7)[0] for i, p in enumerate(prompts)]
    assert [[x.completion.ids for x in group] for group in alone] == [[x.completion.ids for x in group] for group in together]
    assert len({tuple(rollout.completion.ids) for rollout in together[0]}) == 3, "completions of one prompt differ"


def test_a_rank_without_prompts_takes_part(tiny_decoder, model_of, tokenizer, rewards):
    model = model_of(tiny_decoder)
    model.train()
    assert sample(model, tokenizer, [], rewards, uniform_of(0, 3, 7), 1.0) == []
    assert not model.decoder.training


def test_a_rollout_travels_as_json(tiny_decoder, model_of, tokenizer, rewards):
    prompt = prompts_of(tokenizer)[0]
    ((rollout,),) = sample(model_of(tiny_decoder), tokenizer, [prompt], rewards, uniform_of(1, 1, 5), 1.0)
    assert Rollout.from_json(prompt, json.loads(json.dumps(rollout.as_json()))) == rollout
