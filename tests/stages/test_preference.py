import json
import math
from functools import partial

import pytest
import torch

from warpline.data.conversation import read_preferences
from warpline.data.packing import pack
from warpline.stages.parts.checkpoint import load_start
from warpline.stages.parts.config import OptimizerConfig
from warpline.stages.preference import LOSSES, PreferenceConfig, pair_loss, sequence_logprobs


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_dpo_starts_at_log_two_and_separates_the_pairs(stage_runner, tmp_path):
    stage_runner("preference", tmp_path / "run", steps=25, checkpoint_every_steps=25)
    lines = lines_of(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and lines[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["loss"] < 0.6 and lines[-1]["margin"] > 0.1 and lines[-1]["reward_accuracy"] > 0.9


def test_ipo_starts_at_its_target_squared(stage_runner, tmp_path):
    """(h_w − h_l − 1/(2β))² with equal policies is 1/(4β²), on means per token."""
    stage_runner("preference", tmp_path / "run", steps=6, loss="ipo", beta=0.5, optimizer=OptimizerConfig(learning_rate=2e-3))
    lines = lines_of(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(1.0, abs=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_microbatches_never_split_a_pair_and_change_nothing_but_rounding(stage_runner, tmp_path):
    for name, size in (("whole", 4096), ("parts", 8)):
        stage_runner("preference", tmp_path / name, tokens_per_microbatch=size)
    whole, parts = ([line["loss"] for line in lines_of(tmp_path / name)] for name in ("whole", "parts"))
    assert whole == pytest.approx(parts, rel=1e-4)


def test_the_sft_term_is_the_chosen_completions_mean_nll(stage_runner, tmp_path, pair_file, start_folder):
    """A first step with the term, minus one without, is weight × mean over pairs of the NLL per chosen token."""
    for name, weight in (("with", 0.5), ("without", 0.0)):
        stage_runner("preference", tmp_path / name, steps=1, sft_weight=weight, tokens_per_step=100_000)
    decoder, tokenizer = load_start(start_folder, torch.device("cpu"))
    means = []
    for pair in read_preferences([pair_file], tokenizer, None):
        logprobs = (decoder(torch.tensor([pair.chosen.ids]))[0] @ decoder.output_weight.T).log_softmax(-1)
        chosen = [
            logprobs[place - 1, token].item() for place, token in enumerate(pair.chosen.ids) if pair.chosen.supervised[place]
        ]
        means.append(-sum(chosen) / len(chosen))
    added = lines_of(tmp_path / "with")[0]["loss"] - lines_of(tmp_path / "without")[0]["loss"]
    assert added == pytest.approx(0.5 * sum(means) / len(means), rel=1e-4)


@pytest.mark.parametrize("loss", ["dpo", "dpo_norm"])
def test_a_row_of_pairs_has_the_loss_the_margins_and_the_gradient_of_its_pairs_apart(
    loss, pair_file, tiny_decoder, model_of, tokenizer
):
    """Three pairs in two rows, against a reference of other weights: −log σ(β·(chosen − rejected log-ratio)), with plain
    torch."""
    policy = model_of(tiny_decoder.double(), "fp64")
    with torch.no_grad():
        tiny_decoder.norm.weight *= 1.2
    reference = model_of(tiny_decoder, "fp64")
    pairs = read_preferences([pair_file], tokenizer, None)[:3]
    rows = [pack([sequence for pair in part for sequence in (pair.chosen, pair.rejected)]) for part in (pairs[:2], pairs[2:])]
    config = PreferenceConfig(steps=1, optimizer=OptimizerConfig(learning_rate=1.0), tokens_per_step=1, loss=loss, beta=0.5)
    frozen_logprobs = reference.evaluate(rows, sequence_logprobs)
    sums = policy.accumulate(rows, partial(pair_loss, config, frozen_logprobs, 3), 3)
    received = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    policy.decoder.zero_grad()

    def logprob(model, sample):
        ids = torch.tensor(sample.ids)
        logprobs = (model.decoder(ids[None])[0] @ model.decoder.output_weight.T).log_softmax(-1)[:-1]
        chosen = logprobs.gather(1, ids[1:, None])[:, 0][torch.tensor(sample.supervised[1:])]
        return chosen.mean() if loss == "dpo_norm" else chosen.sum()

    margins = []
    for pair in pairs:
        ratios = [logprob(policy, x) - logprob(reference, x).detach() for x in (pair.chosen, pair.rejected)]
        margins.append(0.5 * (ratios[0] - ratios[1]))
    losses = -torch.nn.functional.logsigmoid(torch.stack(margins))
    losses.mean().backward()
    expected = [losses.sum().item(), sum(margins).item(), sum(margin.item() > 0 for margin in margins)]
    assert sums == pytest.approx(expected, rel=1e-10)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(received[name], parameter.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_a_pair_of_equal_answers_is_refused(stage_runner, tmp_path):
    (tmp_path / "same.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    with pytest.raises(ValueError, match=r"same.jsonl:1: chosen and rejected are the same"):
        stage_runner("preference", tmp_path / "run", files=[str(tmp_path / "same.jsonl")])


def test_every_loss_of_the_config_is_a_function_that_starts_where_its_formula_says(stage_runner, tmp_path):
    """At step 0 the policy is the reference: all log-ratios are 0, β is 0.1."""
    one = math.log(2)
    at_zero = {
        "dpo_norm": one, "robust_dpo": one, "nca_pair": 2 * one, "bco_pair": 2 * one, "hinge": 1.0, "sppo_hard": 50.0,
        "apo_zero": 1.0, "apo_down": 1.0, "discopop": 0.5 * one + 0.5,
        "exo_pair": 0.5 * math.log(0.5 / 0.999) + 0.5 * math.log(0.5 / 0.001),
    }  # fmt: skip
    assert {*at_zero, "dpo", "ipo"} == set(LOSSES)
    for name, expected in at_zero.items():
        stage_runner("preference", tmp_path / name, steps=1, loss=name)
        assert lines_of(tmp_path / name)[0]["loss"] == pytest.approx(expected, rel=1e-4)
