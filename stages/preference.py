"""Preference optimisation (DPO and its relatives) on pairs, against the frozen model that training starts from.

Run     warpline preference configs/preference/own_data.toml
Reads   `files` of `prompt`/`chosen`/`rejected` (text or messages), a model folder (`start`), which is also the reference
Writes  RUN/checkpoints/preference/step-N, RUN/metrics.jsonl (margin = β·(chosen − rejected log-ratio), reward_accuracy =
        share above 0)
Expect  the loss per pair; DPO starts at log 2 = 0.693
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from ..data.conversation import Pair, read_preferences
from ..kernels.preference_loss import (
    apo_down,
    apo_zero,
    bco_pair,
    discopop,
    dpo,
    exo_pair,
    hinge,
    ipo,
    nca_pair,
    robust_dpo,
    sppo_hard,
)
from ..parallel.mesh import Mesh
from ..parallel.model import Loss, View
from .parts.config import ParallelConfig, TrainingConfig
from .parts.model import frozen, start_from
from .parts.run import RunFolder
from .parts.seed import seed_of
from .parts.session import Session, StopSignal
from .parts.tokens import microbatches, num_tokens, sample_order, token_stats


class PreferenceConfig(TrainingConfig):
    """`loss` names a function of `kernels/preference_loss.py`, on summed log-probabilities; `ipo` on their means per token (the
    authors' convention), β is its τ, and so is `dpo_norm`, which is `dpo` on means.

    `sft_weight` adds that share of the chosen completion's negative log-likelihood per token, so that it does not fall with
    the rejected one's (Llama 3 uses 0.2 beside DPO).
    """

    tokens_per_step: PositiveInt
    loss: Literal[
        "dpo", "dpo_norm", "ipo", "robust_dpo", "hinge", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero",
        "apo_down", "discopop",
    ] = "dpo"  # fmt: skip
    beta: PositiveFloat = 0.1
    sft_weight: NonNegativeFloat = 0.0
    max_tokens: PositiveInt = 2048


class PreferenceStageConfig(PreferenceConfig):
    """The stage by itself."""

    start: str
    files: list[str] = Field(min_length=1)
    seed: NonNegativeInt = 0
    parallel: ParallelConfig = ParallelConfig()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "dpo": dpo, "dpo_norm": dpo, "ipo": ipo, "robust_dpo": robust_dpo, "hinge": hinge, "exo_pair": exo_pair,
    "nca_pair": nca_pair, "bco_pair": bco_pair, "sppo_hard": sppo_hard, "apo_zero": apo_zero, "apo_down": apo_down,
    "discopop": discopop,
}  # fmt: skip
AVERAGED = ("ipo", "dpo_norm")  # take means per token


def main(config: PreferenceStageConfig, run: RunFolder, mesh: Mesh, stop: StopSignal | None = None) -> Path:
    """Train to `config.steps`; returns the last checkpoint."""
    # -- Whence: the last checkpoint, or the model folder; the reference is always the model folder ----------------------------
    start = Path(config.start)
    session = Session("preference", config, run, mesh, config.parallel, lambda: start_from(start, mesh), stop)
    reference = frozen(start_from(start, mesh), mesh, config.parallel, session.precision)

    # -- What: pairs -----------------------------------------------------------------------------------------------------------
    pairs = read_preferences(
        [Path(path) for path in config.files], session.tokenizer, min(config.max_tokens, session.model.config.max_positions)
    )
    lengths = [len(pair.chosen.ids) + len(pair.rejected.ids) for pair in pairs]
    order = sample_order(lengths, config.tokens_per_step, seed_of(config.seed, "preference", "order"), session.step)

    # -- The loop --------------------------------------------------------------------------------------------------------------
    for _ in session.steps():
        mine = [pairs[index] for index in mesh.share(next(order))]
        batches = microbatches([_sequences(pair) for pair in mine], config.tokens_per_microbatch)
        num_pairs, read = mesh.sum_data([len(mine), num_tokens(batches)])  # losses are means over all ranks' pairs
        frozen_logprobs = reference.evaluate(batches, sequence_logprobs)
        sums = session.model.accumulate(batches, partial(pair_loss, config, frozen_logprobs, num_pairs), 3)
        loss, margin, above = (value / num_pairs for value in sums)
        session.update(loss)
        session.finish_step(loss, read, margin=margin, reward_accuracy=above, num_pairs=num_pairs)
    return session.checkpoint


def pair_loss(
    config: PreferenceConfig, frozen_logprobs: Sequence[tuple[Tensor, Tensor]], num_pairs: float,
    view: View, hidden_TD: Tensor, weight_VD: Tensor,
) -> Loss:  # fmt: skip
    """A row's share of the mean over `num_pairs`, and sums over its pairs: loss, margin, margins above 0."""
    policy_B, length_B = sequence_logprobs(view, hidden_TD, weight_VD)
    frozen_B, _ = frozen_logprobs[view.index]
    divisor_B = length_B if config.loss in AVERAGED else torch.ones_like(length_B)
    policy, reference = policy_B / divisor_B, frozen_B / divisor_B
    losses_B = LOSSES[config.loss](policy[::2], policy[1::2], reference[::2], reference[1::2], beta=config.beta)
    losses_B = losses_B - config.sft_weight * (policy_B / length_B)[::2]
    margin_B = config.beta * ((policy - reference)[::2] - (policy - reference)[1::2]).detach()
    numbers = torch.stack([losses_B.detach().sum(), margin_B.sum(), (margin_B > 0).sum().to(margin_B)])
    return Loss(losses_B.sum() / num_pairs, view.once(numbers))


def _sequences(pair: Pair) -> list:
    return [pair.chosen, pair.rejected]


def sequence_logprobs(view: View, hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Per sequence [B]: the sum of its supervised tokens' log-probabilities in nats, and how many they are."""
    logprob_T = token_stats(view, hidden_TD, weight_VD).logprob_T
    return view.sequence_sum(logprob_T), view.sequence_sum((view.target_T >= 0).to(logprob_T))
