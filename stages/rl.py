"""Reinforcement learning from verifiable rewards: GRPO with a token-level clipped policy loss.

Run     warpline rl configs/rl/own_data.toml
Reads   `files` of prompts (any columns), reward functions named module:function, a model folder (`start`), which is also the
        frozen reference when `kl_coefficient` is set
Writes  RUN/checkpoints/rl/step-N, RUN/metrics.jsonl, RUN/rollouts.jsonl (`samples_per_step` completions of every step)
Expect  reward = mean over all ranks' completions; loss ≈ 0 at the first minibatch of a step (on-policy), its gradient is what
        matters

A step samples `prompts_per_step` × `completions_per_prompt` completions (every rank its share, whatever the layout; what is
drawn depends on seed, step and place in the step alone), recomputes their log-probabilities with the trainer
(the policy ratio's denominator; `mismatch_*` is what generation reported minus that), normalises rewards within each prompt's
group and makes one update per minibatch. The loss is a mean over the completion tokens of the minibatch, on all ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from ..data.conversation import Prompt, read_prompts, require_room
from ..data.packing import PackedBatch, windows_of_step
from ..kernels.policy_loss import group_advantage, kl_k3, ppo
from ..parallel.mesh import TOGETHER, Mesh
from ..parallel.model import Loss, ParallelModel, View
from .parts.config import BadConfig, ParallelConfig, TrainingConfig
from .parts.model import frozen, start_from
from .parts.reward import RewardConfig
from .parts.run import RunFolder
from .parts.sampling import Rollout, sample
from .parts.score import shown_prompt
from .parts.seed import generator_of, seed_of
from .parts.session import Session, StopSignal
from .parts.tokens import completion_sample, microbatches, num_targets, place_values, token_stats


class RlConfig(TrainingConfig):
    """`clip_low`, `clip_high`: the ratio's bounds 1 − low and 1 + high. A step's prompts are split into
    `minibatches_per_step` updates.
    """

    prompts_per_step: PositiveInt
    completions_per_prompt: int = Field(ge=2)
    minibatches_per_step: PositiveInt = 1
    max_new_tokens: PositiveInt
    temperature: PositiveFloat = 1.0
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2
    kl_coefficient: NonNegativeFloat = 0.0
    samples_per_step: NonNegativeInt = 0
    rewards: list[RewardConfig] = Field(default=[RewardConfig(function="warpline.data.task:exact_match")], min_length=1)


class RlStageConfig(RlConfig):
    """The stage by itself."""

    start: str
    files: list[str] = Field(min_length=1)
    seed: NonNegativeInt = 0
    parallel: ParallelConfig = ParallelConfig()


@dataclass(frozen=True)
class Minibatch:
    """What one update learns from, on this rank: packed rows, and per row what the update takes as constants: advantages and
    log-probabilities as generation reported them ([T], on the host), log-probabilities before the step's first update as the
    trainer computes them, and of the reference (of the tokens that are here, where losses are computed; None without a KL
    term)."""

    batches: list[PackedBatch]
    advantage_T: list[Tensor]
    sampled_T: list[Tensor]
    old_T: list[Tensor]
    reference_T: list[Tensor] | None


def main(config: RlStageConfig, run: RunFolder, mesh: Mesh, stop: StopSignal | None = None) -> Path:
    """Train to `config.steps`; returns the last checkpoint."""
    # -- Whence: the last checkpoint, or the model folder ----------------------------------------------------------------------
    start = Path(config.start)
    session = Session("rl", config, run, mesh, config.parallel, lambda: start_from(start, mesh), stop)
    reference = frozen(start_from(start, mesh), mesh, config.parallel, session.precision) if config.kl_coefficient else None

    # -- What: prompts ---------------------------------------------------------------------------------------------------------
    prompts = read_prompts([Path(path) for path in config.files], session.tokenizer)
    if config.prompts_per_step % (config.minibatches_per_step * mesh.num_data):
        raise BadConfig(
            f"prompts_per_step={config.prompts_per_step} is not a multiple of minibatches_per_step="
            f"{config.minibatches_per_step} times {mesh.num_data} (parallel.replicate × parallel.shard): choose one that is, "
            "groups are never split"
        )
    require_room(prompts, config.max_new_tokens, session.model.config.max_positions)
    run.rewind("rollouts.jsonl", "rl", session.step)

    # -- The loop --------------------------------------------------------------------------------------------------------------
    for step in session.steps():
        order = windows_of_step(len(prompts), config.prompts_per_step, step, seed_of(config.seed, "rl", "order"))
        rollouts = roll_out(session, config, [prompts[index] for index in order], step)
        minibatches = freeze(session.model, reference, config, rollouts)
        totals, losses = [0.0] * 5, []
        for minibatch in minibatches:
            denominator = mesh.sum_data([num_targets(minibatch.batches)])[0]  # completion tokens on all ranks
            loss, *numbers = session.model.accumulate(
                minibatch.batches, partial(policy_loss, config, minibatch, denominator), 6
            )
            losses.append(loss)
            totals = [total + number for total, number in zip(totals, numbers, strict=True)]
            session.update(loss)
        finish(session, config, step, rollouts, sum(losses) / len(losses), totals)
    return session.checkpoint


def roll_out(session: Session, config: RlStageConfig, prompts: Sequence[Prompt], step: int) -> list[Rollout]:
    """Completions of this rank's share of the step's prompts, group after group, sampled from the current weights and
    rewarded."""
    mesh, group = session.mesh, config.completions_per_prompt
    uniform = torch.rand(
        len(prompts), group, config.max_new_tokens, dtype=torch.float64,
        generator=generator_of(config.seed, "rl", "sample", step),
    )  # fmt: skip
    places = mesh.share(list(range(len(prompts))))
    mine = mesh.deal(places, *TOGETHER)
    sampled = sample(
        session.model, session.tokenizer, [prompts[place] for place in mine], config.rewards, uniform[mine], config.temperature
    )
    session.model.train()
    found = mesh.gather([[rollout.as_json() for rollout in rollouts] for rollouts in sampled], *TOGETHER)
    return [Rollout.from_json(prompts[place], x) for place, part in zip(places, found, strict=True) for x in part]


def freeze(
    model: ParallelModel, reference: ParallelModel | None, config: RlConfig, rollouts: Sequence[Rollout]
) -> list[Minibatch]:
    """The step's minibatches of packed rows, with every constant computed before the first update."""
    group = config.completions_per_prompt
    rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
    advantages = group_advantage(rewards, group).tolist() if rollouts else []
    size = len(rollouts) // config.minibatches_per_step

    def logprobs(view: View, hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        return token_stats(view, hidden_TD, weight_VD, temperature=config.temperature).logprob_T

    minibatches = []
    for first in range(0, size * config.minibatches_per_step, size):
        inside = range(first, first + size)
        samples = [completion_sample(rollouts[index].prompt.ids, rollouts[index].completion.ids) for index in inside]
        groups = [samples[start : start + group] for start in range(0, len(samples), group)]
        batches = microbatches(groups, config.tokens_per_microbatch)
        advantage_T, sampled_T = [], []
        for batch in batches:
            entries = range(first, first + len(batch.cu_seqlens) - 1)
            completions = [rollouts[index].completion for index in entries]
            repeated = [advantages[index] for index in entries for _ in rollouts[index].completion.ids]
            advantage_T.append(place_values(batch, repeated))
            sampled_T.append(place_values(batch, [logprob for completion in completions for logprob in completion.logprobs]))
            first = entries.stop
        reference_T = None if reference is None else reference.evaluate(batches, logprobs)
        minibatches.append(Minibatch(batches, advantage_T, sampled_T, model.evaluate(batches, logprobs), reference_T))
    return minibatches


def policy_loss(
    config: RlConfig, minibatch: Minibatch, denominator: float, view: View, hidden_TD: Tensor, weight_VD: Tensor
) -> Loss:
    """The clipped loss of one row over `denominator` tokens; it, and sums over the row's tokens: tokens, |mismatch|, ratio
    outside the bounds, k3 against the reference, entropy."""
    stats = token_stats(view, hidden_TD, weight_VD, temperature=config.temperature, entropy=True)
    assert stats.entropy_T is not None  # asked for above
    old_T, mask_T = minibatch.old_T[view.index], view.target_T >= 0
    advantage_T, sampled_T = (
        view.local(values[view.index]).to(old_T) for values in (minibatch.advantage_T, minibatch.sampled_T)
    )
    loss = ppo(
        stats.logprob_T, old_T, advantage_T, mask_T=mask_T, clip_low=config.clip_low, clip_high=config.clip_high,
        denominator=denominator,
    )  # fmt: skip
    divergence = torch.zeros_like(loss)
    if minibatch.reference_T is not None:
        divergence = kl_k3(stats.logprob_T, minibatch.reference_T[view.index], mask_T=mask_T).sum()
        loss = loss + config.kl_coefficient * divergence / denominator
    ratio_T = (stats.logprob_T.detach() - old_T).exp()
    is_outside_T = ((ratio_T < 1 - config.clip_low) | (ratio_T > 1 + config.clip_high)) & mask_T
    mismatch_T = torch.where(mask_T, (sampled_T - old_T).abs(), 0.0)
    numbers = torch.stack([
        loss.detach(), mask_T.sum().to(loss), mismatch_T.sum().to(loss), is_outside_T.sum().to(loss), divergence.detach(),
        stats.entropy_T.detach().sum().to(loss),
    ])  # fmt: skip
    return Loss(loss, numbers)


def finish(
    session: Session, config: RlConfig, step: int, rollouts: Sequence[Rollout], loss: float, totals: Sequence[float]
) -> None:
    """Log the step: means over all ranks' completions or completion tokens."""
    tokens, mismatch, outside, divergence, entropy = totals
    completions, reward, ended, read = session.mesh.sum_data([
        len(rollouts), sum(rollout.reward for rollout in rollouts), sum(rollout.completion.ended for rollout in rollouts),
        sum(len(rollout.prompt.ids) + len(rollout.completion.ids) for rollout in rollouts),
    ])  # fmt: skip
    against_reference = {"kl": divergence / tokens} if config.kl_coefficient else {}
    session.finish_step(
        loss, read, reward=reward / completions, completion_tokens=tokens / completions, ended=ended / completions,
        mismatch_mean=mismatch / tokens, clip_fraction=outside / tokens, entropy=entropy / tokens, **against_reference,
    )  # fmt: skip
    for rollout in rollouts[: config.samples_per_step]:
        session.run.append("rollouts.jsonl", {
            "stage": "rl", "step": step + 1, "prompt": shown_prompt(rollout.prompt), "completion": rollout.text,
            "reward": rollout.reward,
        })  # fmt: skip
