import json

import pytest
import torch

from warpline.data.conversation import Prompt
from warpline.models.generation import Completion
from warpline.parallel.mesh import start_mesh
from warpline.stages import rl
from warpline.stages.parts.checkpoint import load_start
from warpline.stages.parts.config import BadConfig, OptimizerConfig
from warpline.stages.parts.run import RunFolder
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
    return Session("rl", config, RunFolder(tmp_path / "run"), mesh, lambda: load_start(start_folder, mesh.device)), config


def test_frozen_numbers_stand_at_their_tokens(session):
    """Two groups of two completions of different lengths, split into microbatches: each token keeps its own advantage and
    log-probability.
    """
    session, config = session
    prompts = [Prompt("a", [7, 8], {}, "p:1")] * 2 + [Prompt("b", [9], {}, "p:2")] * 2
    ids = [[11, 12, 13], [14], [15, 16], [17, 18, 19]]
    completions = [Completion(one, [-0.1 * token for token in one], True) for one in ids]
    rollouts = rl.Rollouts(prompts, completions, ["x"] * 4, [1.0, 0.0, 0.0, 1.0], [0.7, -0.7, -0.5, 0.5])
    ((*parts,),) = rl.freeze(session, None, config, rollouts)
    assert len(parts) == 2
    seen = []
    for part in parts:
        mask = part.batch.target_T >= 0
        columns = (part.batch.target_T[mask], part.advantage_T[mask], part.sampled_T[mask])
        seen += list(zip(*(column.tolist() for column in columns), strict=True))
    expected = [
        (token, advantage, -0.1 * token) for one, advantage in zip(ids, rollouts.advantages, strict=True) for token in one
    ]
    assert [token for token, _, _ in seen] == [token for token, _, _ in expected]
    assert torch.tensor(seen) == pytest.approx(torch.tensor(expected), abs=1e-6)


def test_the_first_update_has_ratio_one_and_the_policy_gradient(session):
    """At ratio 1 the loss is −mean advantage, and its gradient that of −Σ A·logprob / tokens."""
    session, config = session
    prompts = [Prompt("a", [7, 8], {}, "p:1")] * 2
    completions = [Completion([11, 12], [0.0, 0.0], True), Completion([14], [0.0], True)]
    ((part,),) = rl.freeze(session, None, config, rl.Rollouts(prompts, completions, ["x"] * 2, [1.0, 0.0], [0.7, -0.7]))
    loss, numbers = rl.policy_loss(session, config, part, denominator=3.0)
    assert loss.item() == pytest.approx(-(0.7 * 2 - 0.7) / 3, abs=1e-6)
    assert numbers[0] == 3 and numbers[2] == 0
    loss.backward()
    got = session.decoder.embed_tokens.weight.grad.clone()
    session.decoder.zero_grad()
    total = 0.0
    for completion, advantage in zip(completions, (0.7, -0.7), strict=True):
        sequence = [7, 8, *completion.ids]
        logprobs = (session.decoder(torch.tensor([sequence]))[0] @ session.decoder.output_weight.T).log_softmax(-1)
        total = total - sum(advantage * logprobs[place - 1, sequence[place]] for place in range(2, len(sequence))) / 3
    total.backward()
    assert (got - session.decoder.embed_tokens.weight.grad).abs().max() <= 1e-5 * got.abs().max()


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
