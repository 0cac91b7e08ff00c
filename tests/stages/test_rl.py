import json
from functools import partial

import pytest
import torch

from warpline.data.conversation import Prompt
from warpline.kernels.policy_loss import group_advantage
from warpline.models.generation import Completion
from warpline.parallel.mesh import start_mesh
from warpline.stages import rl
from warpline.stages.parts.config import BadConfig, OptimizerConfig, ParallelConfig
from warpline.stages.parts.model import frozen, start_from
from warpline.stages.parts.run import RunFolder
from warpline.stages.parts.sampling import Rollout
from warpline.stages.parts.session import Session

REWARDS = """
def many_a(prompts, completions, completion_ids, **columns):
    return [float(sum(i % 2 for i in ids)) / len(ids) for ids in completion_ids]
"""


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_reward_rises_and_mismatch_stays_at_rounding(stage_runner, tmp_path, monkeypatch):
    (tmp_path / "my_rl_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    rewards = [{"function": "my_rl_rewards:many_a"}]
    optimizer = OptimizerConfig(learning_rate=5e-3)
    stage_runner(
        "rl", tmp_path / "run", steps=12, rewards=rewards, kl_coefficient=0.0, prompts_per_step=8, completions_per_prompt=8,
        optimizer=optimizer, checkpoint_every_steps=12,
    )  # fmt: skip
    lines = lines_of(tmp_path / "run")
    assert sum(line["reward"] for line in lines[-3:]) > sum(line["reward"] for line in lines[:3]) + 0.3
    if lines[0]["precision"] == "fp32":
        assert max(line["mismatch_mean"] for line in lines) < 1e-5


@pytest.fixture
def session(start_folder, tmp_path):
    (tmp_path / "run").mkdir()
    config = rl.RlConfig(
        steps=1, optimizer=OptimizerConfig(learning_rate=1e-3), prompts_per_step=2, completions_per_prompt=2, max_new_tokens=4,
        tokens_per_microbatch=9, precision="fp32",
    )  # fmt: skip
    mesh = start_mesh()
    start = start_from(start_folder, mesh)
    return Session("rl", config, RunFolder(tmp_path / "run"), mesh, ParallelConfig(), lambda: start), config


def rollouts_of(prompts: list[Prompt], ids: list[list[int]], rewards: list[float], nats_per_id: float = 0.0) -> list[Rollout]:
    """Completions whose reported log-probabilities are −`nats_per_id` · id."""
    completions = [Completion(one, [-nats_per_id * token for token in one], True) for one in ids]
    return [Rollout(*parts) for parts in zip(prompts, completions, ["x"] * len(ids), rewards, strict=True)]


def logprobs_of(model, rollout: Rollout) -> torch.Tensor:
    """Of a completion's tokens, by a forward pass over its sequence alone and a plain log_softmax."""
    sequence, first = torch.tensor([*rollout.prompt.ids, *rollout.completion.ids]), len(rollout.prompt.ids)
    logprobs = (model.decoder(sequence[None])[0] @ model.decoder.output_weight.T).log_softmax(-1)
    return logprobs[torch.arange(first - 1, len(sequence) - 1), sequence[first:]]


def test_frozen_numbers_stand_at_their_tokens(session, start_folder):
    """Two groups of two completions of different lengths, split into microbatches: each token keeps its own advantage,
    reported log-probability, and log-probability of the trainer and of the reference.
    """
    session, config = session
    prompts = [Prompt("a", [7, 8], {}, "p:1")] * 2 + [Prompt("b", [9], {}, "p:2")] * 2
    ids = [[11, 12, 13], [14], [15, 16], [17, 18, 19]]
    rollouts = rollouts_of(prompts, ids, [1.0, 0.0, 0.0, 1.0], nats_per_id=0.1)
    reference = frozen(start_from(start_folder, session.mesh), session.mesh, ParallelConfig(), "fp32")
    with torch.no_grad():
        reference.decoder.norm.weight *= 2.0
    (minibatch,) = rl.freeze(session.model, reference, config, rollouts)
    assert len(minibatch.batches) == 2
    seen = []
    for row, batch in enumerate(minibatch.batches):
        mask = batch.target_T >= 0
        numbers = minibatch.advantage_T, minibatch.sampled_T, minibatch.old_T, minibatch.reference_T
        assert all(not values[row][~mask].any() for values in numbers)
        seen.append(torch.stack([x[mask].double() for x in (batch.target_T, *(values[row] for values in numbers))], 1))
    advantages, expected = group_advantage(torch.tensor([1.0, 0.0, 0.0, 1.0]), 2).tolist(), []
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        old, other = (logprobs_of(model, rollout).tolist() for model in (session.model, reference))
        for number, token in enumerate(rollout.completion.ids):
            expected.append([token, advantage, -0.1 * token, old[number], other[number]])
    torch.testing.assert_close(torch.cat(seen), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)
    assert (torch.cat(seen)[:, 3] - torch.cat(seen)[:, 4]).abs().min() > 1e-3, "a reference of its own"


def test_a_step_is_split_into_minibatches_between_groups(session):
    session, config = session
    prompts = [Prompt("ab"[index // 2], [7 + index // 2], {}, "p") for index in range(4)]
    rollouts = rollouts_of(prompts, [[11], [12], [13], [14]], [1.0, 0.0, 0.0, 1.0])
    two = rl.freeze(session.model, None, config.model_copy(update={"minibatches_per_step": 2}), rollouts)
    targets = [[batch.target_T[batch.target_T >= 0].tolist() for batch in minibatch.batches] for minibatch in two]
    assert targets == [[[11, 12]], [[13, 14]]] and [minibatch.reference_T for minibatch in two] == [None, None]


def test_the_first_update_has_ratio_one_and_the_policy_gradient(session):
    """At ratio 1 the loss is −mean advantage, and its gradient that of −Σ A·logprob / tokens."""
    session, config = session
    rollouts = rollouts_of([Prompt("a", [7, 8], {}, "p:1")] * 2, [[11, 12], [14]], [1.0, 0.0])
    advantages = group_advantage(torch.tensor([1.0, 0.0]), 2).tolist()
    (minibatch,) = rl.freeze(session.model, None, config, rollouts)
    loss, tokens, mismatch, outside, divergence, entropy = session.model.accumulate(
        minibatch.batches, partial(rl.policy_loss, config, minibatch, 3.0), 6
    )
    assert loss == pytest.approx(-(advantages[0] * 2 + advantages[1]) / 3, abs=1e-6)
    reported = sum(logprobs_of(session.model, rollout).abs().sum().item() for rollout in rollouts)
    assert (tokens, outside, divergence) == (3, 0, 0) and mismatch == pytest.approx(reported, rel=1e-5) and entropy > 0
    got = {name: parameter.grad.clone() for name, parameter in session.model.named_parameters()}
    session.optimizer.zero_grad()
    weighted = [-advantage * logprobs_of(session.model, x).sum() for x, advantage in zip(rollouts, advantages, strict=True)]
    (sum(weighted) / 3).backward()
    largest = max(gradient.abs().max() for gradient in got.values())
    for name, parameter in session.model.named_parameters():
        assert (got[name] - parameter.grad).abs().max() <= 1e-5 * largest, name


def test_the_kl_term_is_k3_against_the_reference(session, start_folder):
    """k3 = exp(d) − 1 − d with d = reference − policy, per token; its weight is in the loss, its sum in the numbers."""
    session, config = session
    config = config.model_copy(update={"kl_coefficient": 0.5})
    rollouts = rollouts_of([Prompt("a", [7, 8], {}, "p:1")] * 2, [[11, 12], [14]], [1.0, 0.0])
    reference = frozen(start_from(start_folder, session.mesh), session.mesh, ParallelConfig(), "fp32")
    with torch.no_grad():
        reference.decoder.norm.weight *= 1.3
    (minibatch,) = rl.freeze(session.model, reference, config, rollouts)
    loss, _, _, _, divergence, _ = session.model.accumulate(
        minibatch.batches, partial(rl.policy_loss, config, minibatch, 3.0), 6
    )
    d = torch.cat([logprobs_of(reference, rollout) - logprobs_of(session.model, rollout) for rollout in rollouts])
    assert divergence == pytest.approx((d.exp() - 1 - d).sum().item(), rel=1e-4) and divergence > 1e-3
    advantages = group_advantage(torch.tensor([1.0, 0.0]), 2).tolist()
    assert loss == pytest.approx(-(advantages[0] * 2 + advantages[1]) / 3 + 0.5 * divergence / 3, abs=1e-5)


def test_groups_that_do_not_divide_are_refused(stage_runner, tmp_path):
    with pytest.raises(BadConfig, match="groups are never split"):
        stage_runner("rl", tmp_path / "run", prompts_per_step=5)


def test_sampled_completions_are_kept_for_reading(stage_runner, tmp_path):
    stage_runner("rl", tmp_path / "run")
    rollouts = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in rollouts] == [1, 2, 3, 4, 5, 6]
    assert all(line["prompt"].startswith(("Sort:", "Reverse:")) for line in rollouts)


def test_completions_that_do_not_fit_the_model_are_refused_by_line(stage_runner, tmp_path):
    with pytest.raises(ValueError, match=r"rl.jsonl:1: .* exceed the model's 128 positions"):
        stage_runner("rl", tmp_path / "run", max_new_tokens=5000)
