import math

import pytest
import torch
from torch.nn import functional as F

from warpline.data.conversation import Prompt
from warpline.data.text import Document
from warpline.stages.parts.score import EvaluateConfig, bits_per_byte, grade, score_tasks


@pytest.mark.parametrize("window", [1000, 5])
def test_bits_per_byte_counts_every_token_once(window, tiny_decoder, model_of, tokenizer):
    decoder = tiny_decoder.double()
    documents = [Document("def add(first):\n    return 7\n", "a"), Document("Sörted: ü", "b")]
    nats = 0.0
    for document in documents:
        ids = [tokenizer.document_id, *tokenizer.encode(document.text)]
        for start in range(0, len(ids) - 1, window):
            part = torch.tensor([ids[start : start + window + 1]])
            logprobs = F.linear(decoder(part)[0], decoder.output_weight).log_softmax(-1)
            nats -= logprobs[:-1].gather(1, part[0, 1:, None]).sum().item()
    num_bytes = sum(len(document.text.encode()) for document in documents)
    found = bits_per_byte(model_of(decoder, "fp64"), tokenizer, documents, window)
    assert found == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-12)


def prompts_of(tokenizer) -> list[Prompt]:
    texts = ["Sort: d a", "Add: 3 + 7", "Sort: c b", "Add: 1 + 1"]
    families = ["sorting", "addition"] * 2
    return [
        Prompt(
            [{"role": "user", "content": text}],
            tokenizer.encode_prompt([{"role": "user", "content": text}]),
            {"answer": "x", "family": family},
            "t",
        )
        for text, family in zip(texts, families, strict=True)
    ]


def test_scores_are_means_over_families_of_graded_completions(tiny_decoder, model_of, tokenizer, monkeypatch, tmp_path):
    (tmp_path / "my_graders.py").write_text(
        "def by_family(prompts, completions, completion_ids, family, **columns):\n"
        "    return [float(name == 'sorting' or index % 4 == 0) for index, name in enumerate(family)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = EvaluateConfig(max_new_tokens=5, samples_shown=3, rewards=[{"function": "my_graders:by_family"}])
    model, generator = model_of(tiny_decoder), torch.Generator().manual_seed(0)
    score, samples = score_tasks(model, tokenizer, prompts_of(tokenizer), config, generator)
    assert score["families"] == {"sorting": 1.0, "addition": 0.25}
    assert score["accuracy"] == 0.625 and score["greedy_accuracy"] == 0.5
    assert 1 <= score["completion_tokens"] <= 5 and 0 <= score["ended"] <= 1
    assert [sample["prompt"] for sample in samples] == ["Sort: d a", "Add: 3 + 7", "Sort: c b"]


def test_completions_of_a_prompt_differ_when_sampled_and_agree_when_greedy(tiny_decoder, model_of, tokenizer):
    prompts, config, model = prompts_of(tokenizer)[:1], EvaluateConfig(max_new_tokens=8), model_of(tiny_decoder)
    options = {"completions_per_task": 6, "generator": torch.Generator().manual_seed(0)}
    sampled = grade(model, tokenizer, prompts, config, temperature=1.0, **options)
    greedy = grade(model, tokenizer, prompts, config, temperature=0.0, **options)
    assert len({tuple(rollout.completion.ids) for rollout in sampled.rollouts}) > 1
    assert len({tuple(rollout.completion.ids) for rollout in greedy.rollouts}) == 1


def test_a_completion_is_right_from_the_reward_that_the_config_names(tiny_decoder, model_of, tokenizer, monkeypatch, tmp_path):
    """Rewards of 0, 0.25, 0.5 and 0.75 for the four completions of every prompt."""
    (tmp_path / "my_partial_grader.py").write_text(
        "def quarters(prompts, completions, completion_ids, **columns):\n"
        "    return [index % 4 / 4 for index in range(len(prompts))]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = EvaluateConfig(max_new_tokens=2, right_from=0.5, rewards=[{"function": "my_partial_grader:quarters"}])
    options = {"temperature": 1.0, "completions_per_task": 4, "generator": torch.Generator().manual_seed(0)}
    graded = grade(model_of(tiny_decoder), tokenizer, prompts_of(tokenizer), config, **options)
    assert graded.right == [False, False, True, True] * 4 and graded.accuracy() == graded.accuracy("sorting") == 0.5
    assert [rollout.prompt.prompt[0]["content"] for rollout in graded.rollouts[::4]] == [
        "Sort: d a", "Add: 3 + 7", "Sort: c b", "Add: 1 + 1",
    ]  # fmt: skip
