import torch

from warpline.data.conversation import Prompt
from warpline.stages.parts.pairs import PairsConfig, sample_pairs
from warpline.stages.parts.score import EvaluateConfig

GRADER = """
def has_even_length(prompts, completions, completion_ids, **columns):
    return [float(len(ids) % 2 == 0) for ids in completion_ids]
"""


def test_pairs_hold_a_right_and_a_wrong_completion_of_one_prompt_that_both_ended(
    tiny_decoder, model_of, tokenizer, tmp_path, monkeypatch
):
    (tmp_path / "my_pair_grader.py").write_text(GRADER)
    monkeypatch.syspath_prepend(tmp_path)
    with torch.no_grad():
        tiny_decoder.embed_tokens.weight[tokenizer.end_id] *= 6  # completions of this random model then often end
    prompts = [
        Prompt([{"role": "user", "content": str(n)}], tokenizer.encode_prompt([{"role": "user", "content": str(n)}]), {}, "t")
        for n in range(30)
    ]
    evaluate = EvaluateConfig(max_new_tokens=12, rewards=[{"function": "my_pair_grader:has_even_length"}])
    config = PairsConfig(prompts=20, completions_per_prompt=8)
    model = model_of(tiny_decoder)
    records = sample_pairs(model, tokenizer, prompts, config, evaluate, torch.Generator().manual_seed(1))
    assert 3 <= len(records) <= 20
    for record in records:
        (chosen,), (rejected,) = record["chosen"], record["rejected"]
        assert chosen["role"] == rejected["role"] == "assistant" and chosen["content"] != rejected["content"]
    again = sample_pairs(model, tokenizer, prompts, config, evaluate, torch.Generator().manual_seed(1))
    assert records == again
