"""Reinforcement learning from verifiable rewards: GRPO with a token-level clipped policy loss.

Run     warpline rl configs/rl/own_data.toml
Reads   `files` of prompts (any columns), reward functions named module:function, a model folder (`start`), which is also the
        frozen reference when `kl_coefficient` is set
Writes  RUN/checkpoints/rl/step-N, RUN/metrics.jsonl, RUN/rollouts.jsonl (`samples_per_step` completions of every step)
Expect  reward = mean over all ranks' completions; loss ≈ 0 at the first minibatch of a step (on-policy), its gradient is what
        matters

A step samples `prompts_per_step` × `completions_per_prompt` completions, recomputes their log-probabilities with the trainer
(the policy ratio's denominator; `mismatch_*` is what generation reported minus that), normalises rewards within each prompt's
group and makes one update per minibatch. The loss is a mean over the completion tokens of the minibatch, on all ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from ..data.conversation import Prompt, read_prompts, require_room
from ..data.packing import PackedBatch, windows_of_step
from ..kernels.policy_loss import group_advantage, kl_k3, ppo
from ..models.decoder import Decoder
from ..models.generation import Completion, generate
from ..parallel.mesh import Mesh
from .parts.checkpoint import load_start
from .parts.config import BadConfig, ParallelConfig, TrainingConfig
from .parts.reward import RewardConfig, rewards_of
from .parts.run import RunFolder
from .parts.score import shown_prompt
from .parts.session import Session, StopSignal, generator_of, seed_of
from .parts.tokens import completion_sample, completion_values, microbatches, num_targets, place_values, token_stats


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
class Rollouts:
    """Completions of one step on this rank, group after group, with rewards and group-normalised advantages."""

    prompts: list[Prompt]
    completions: list[Completion]
    texts: list[str]
    rewards: list[float]
    advantages: list[float]


@dataclass(frozen=True)
class Frozen:
    """What an update takes as constants, per token of a batch [T]: the advantage, and log-probabilities before the step's
    first update as the trainer computes them, as generation reported them, and of the reference (None without a KL term)."""

    batch: PackedBatch
    advantage_T: Tensor
    old_T: Tensor
    sampled_T: Tensor
    reference_T: Tensor | None


def main(config: RlStageConfig, run: RunFolder, mesh: Mesh, stop: StopSignal | None = None) -> Path:
    """Train to `config.steps`; returns the last checkpoint."""
    # -- Whence: the last checkpoint, or the model folder ----------------------------------------------------------------------
    session = Session("rl", config, run, mesh, lambda: load_start(Path(config.start), mesh.device), stop)
    reference = load_start(Path(config.start), mesh.device)[0].requires_grad_(False) if config.kl_coefficient else None

    # -- What: prompts ---------------------------------------------------------------------------------------------------------
    prompts = read_prompts([Path(path) for path in config.files], session.tokenizer)
    if config.prompts_per_step % (config.minibatches_per_step * mesh.size):
        raise BadConfig(
            f"prompts_per_step={config.prompts_per_step} is not a multiple of minibatches_per_step="
            f"{config.minibatches_per_step} times {mesh.size} process(es): choose one that is, groups are never split"
        )
    require_room(prompts, config.max_new_tokens, session.decoder.config.max_positions)
    run.rewind("rollouts.jsonl", "rl", session.step)

    # -- The loop --------------------------------------------------------------------------------------------------------------
    for step in session.steps():
        chosen = windows_of_step(len(prompts), config.prompts_per_step, step, seed_of(config.seed, "rl", "order"))
        mine = [prompts[index] for index in mesh.share(list(chosen))]
        rollouts = roll_out(session, config, mine, generator_of(config.seed, "rl", "sample", step, mesh.rank))
        minibatches = freeze(session, reference, config, rollouts)
        totals, losses = torch.zeros(5, dtype=torch.float64), []
        for minibatch in minibatches:
            denominator = mesh.sum([num_targets([part.batch for part in minibatch])])[0]  # completion tokens on all ranks
            summed = torch.zeros((), dtype=torch.float64)
            for part in minibatch:
                loss, numbers = policy_loss(session, config, part, denominator)
                loss.backward()
                summed += loss.detach().double().cpu()
                totals += numbers.double().cpu()
            losses.append(mesh.sum([summed.item()])[0])
            session.update(losses[-1])
        finish(session, config, step, rollouts, sum(losses) / len(losses), totals)
    return session.checkpoint


def roll_out(session: Session, config: RlConfig, prompts: Sequence[Prompt], generator: torch.Generator) -> Rollouts:
    """Sample `completions_per_prompt` completions of each prompt from the current weights, and reward them."""
    session.decoder.eval()
    repeated = [prompt for prompt in prompts for _ in range(config.completions_per_prompt)]
    with session.autocast():
        completions = generate(
            session.decoder, [prompt.ids for prompt in repeated], max_new_tokens=config.max_new_tokens,
            end_ids=session.tokenizer.end_ids, temperature=config.temperature, generator=generator,
        )  # fmt: skip
    session.decoder.train()
    texts = [session.tokenizer.decode(completion.ids) for completion in completions]
    rewards = rewards_of(config.rewards, repeated, texts, [completion.ids for completion in completions])
    advantages = group_advantage(torch.tensor(rewards, dtype=torch.float64), config.completions_per_prompt)
    return Rollouts(repeated, completions, texts, rewards, advantages.tolist())


@torch.no_grad()
def freeze(session: Session, reference: Decoder | None, config: RlConfig, rollouts: Rollouts) -> list[list[Frozen]]:
    """The step's minibatches of packed batches, with every constant computed before the first update."""
    group = config.completions_per_prompt
    num_groups = len(rollouts.prompts) // group
    per_minibatch = num_groups // config.minibatches_per_step
    minibatches = []
    for first in range(0, num_groups, per_minibatch):
        entry = first * group
        inside = range(entry, entry + per_minibatch * group)
        samples = [completion_sample(rollouts.prompts[index].ids, rollouts.completions[index].ids) for index in inside]
        groups = [samples[start : start + group] for start in range(0, len(samples), group)]
        parts = []
        for batch in microbatches(groups, config.tokens_per_microbatch):
            with session.autocast():
                old_T = token_stats(session.decoder, batch, temperature=config.temperature).logprob_T
                reference_T = (
                    token_stats(reference, batch, temperature=config.temperature).logprob_T if reference is not None else None
                )
            inside = range(entry, entry + len(batch.cu_seqlens) - 1)
            advantages = [rollouts.advantages[index] for index in inside for _ in rollouts.completions[index].ids]
            sampled = [logprob for index in inside for logprob in rollouts.completions[index].logprobs]
            parts.append(
                Frozen(batch, place_values(batch, advantages, old_T), old_T, place_values(batch, sampled, old_T), reference_T)
            )
            entry = inside.stop
        minibatches.append(parts)
    return minibatches


def policy_loss(session: Session, config: RlConfig, part: Frozen, denominator: float) -> tuple[Tensor, Tensor]:
    """The clipped loss of one batch over `denominator` tokens, and sums over its tokens: tokens, |mismatch|, ratio outside
    the bounds, k3 against the reference, entropy."""
    with session.autocast():
        stats = token_stats(session.decoder, part.batch, temperature=config.temperature, entropy=True)
    assert stats.entropy_T is not None  # asked for above
    mask_T = part.batch.target_T.to(stats.logprob_T.device) >= 0
    loss = ppo(
        stats.logprob_T, part.old_T, part.advantage_T, mask_T=mask_T, clip_low=config.clip_low, clip_high=config.clip_high,
        denominator=denominator,
    )  # fmt: skip
    divergence = torch.zeros_like(loss)
    if part.reference_T is not None:
        divergence = kl_k3(stats.logprob_T, part.reference_T, mask_T=mask_T).sum()
        loss = loss + config.kl_coefficient * divergence / denominator
    ratio_T = (stats.logprob_T.detach() - part.old_T).exp()
    is_outside_T = ((ratio_T < 1 - config.clip_low) | (ratio_T > 1 + config.clip_high)) & mask_T
    mismatch_T = completion_values(part.batch, (part.sampled_T - part.old_T).abs())
    numbers = torch.stack([
        mask_T.sum().to(loss), mismatch_T.sum().to(loss), is_outside_T.sum().to(loss), divergence.detach(),
        stats.entropy_T.detach().sum().to(loss),
    ])  # fmt: skip
    return loss, numbers


def finish(session: Session, config: RlConfig, step: int, rollouts: Rollouts, loss: float, totals: Tensor) -> None:
    """Log the step: means over all ranks' completions or completion tokens."""
    counts = [len(rollouts.rewards), sum(rollouts.rewards), sum(completion.ended for completion in rollouts.completions)]
    read_here = sum(len(prompt.ids) for prompt in rollouts.prompts)
    read_here += sum(len(completion.ids) for completion in rollouts.completions)
    tokens, mismatch, outside, divergence, entropy, completions, reward, ended, read = session.mesh.sum(
        [*totals.tolist(), *counts, read_here]
    )
    against_reference = {"kl": divergence / tokens} if config.kl_coefficient else {}
    session.finish_step(
        loss, read, reward=reward / completions, completion_tokens=tokens / completions, ended=ended / completions,
        mismatch_mean=mismatch / tokens, clip_fraction=outside / tokens, entropy=entropy / tokens, **against_reference,
    )  # fmt: skip
    for index in range(min(config.samples_per_step, len(rollouts.texts))):
        session.run.append("rollouts.jsonl", {
            "stage": "rl", "step": step + 1, "prompt": shown_prompt(rollouts.prompts[index]),
            "completion": rollouts.texts[index], "reward": rollouts.rewards[index],
        })  # fmt: skip
