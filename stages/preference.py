"""Preference optimisation (DPO and its relatives) on pairs, against the frozen model that training starts from.

Run     warpline preference configs/preference/own_data.toml
Reads   `files` of `prompt`/`chosen`/`rejected` (text or messages), a model folder (`start`), which is also the reference
Writes  RUN/checkpoints/preference/step-N, RUN/metrics.jsonl (margin = β·(chosen − rejected log-ratio), reward_accuracy =
        share above 0)
Expect  the loss per pair; DPO starts at log 2 = 0.693
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from ..data.conversation import Pair, read_preferences
from ..data.packing import PackedBatch
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
from ..kernels.sequence_sum import sequence_sum
from ..models.decoder import Decoder
from ..parallel.mesh import Mesh
from .parts.checkpoint import load_start
from .parts.config import ParallelConfig, TrainingConfig
from .parts.run import RunFolder
from .parts.session import Session, StopSignal, seed_of
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
    session = Session("preference", config, run, mesh, lambda: load_start(Path(config.start), mesh.device), stop)
    reference = load_start(Path(config.start), mesh.device)[0].requires_grad_(False)

    # -- What: pairs -----------------------------------------------------------------------------------------------------------
    pairs = read_preferences(
        [Path(path) for path in config.files], session.tokenizer, min(config.max_tokens, session.decoder.config.max_positions)
    )
    lengths = [len(pair.chosen.ids) + len(pair.rejected.ids) for pair in pairs]
    order = sample_order(lengths, config.tokens_per_step, seed_of(config.seed, "preference", "order"), session.step)

    # -- The loop --------------------------------------------------------------------------------------------------------------
    for _ in session.steps():
        mine = [pairs[index] for index in mesh.share(next(order))]
        batches = microbatches([_sequences(pair) for pair in mine], config.tokens_per_microbatch)
        num_pairs, read = mesh.sum([len(mine), num_tokens(batches)])  # losses are means over all ranks' pairs
        sums = torch.zeros(3, dtype=torch.float64)
        for batch in batches:
            with session.autocast():
                policy_B, length_B = sequence_logprobs(session.decoder, batch)
                with torch.no_grad():
                    frozen_B, _ = sequence_logprobs(reference, batch)
            divisor_B = length_B if config.loss in AVERAGED else torch.ones_like(length_B)
            policy, frozen = policy_B / divisor_B, frozen_B / divisor_B
            losses_B = LOSSES[config.loss](policy[::2], policy[1::2], frozen[::2], frozen[1::2], beta=config.beta)
            losses_B = losses_B - config.sft_weight * (policy_B / length_B)[::2]
            (losses_B.sum() / num_pairs).backward()
            margin_B = config.beta * ((policy - frozen)[::2] - (policy - frozen)[1::2]).detach()
            sums += (
                torch.stack([losses_B.detach().sum(), margin_B.sum(), (margin_B > 0).sum()]).double().cpu()
            )  # the step's sync
        loss, margin, above = (value / num_pairs for value in mesh.sum(sums.tolist()))
        session.update(loss)
        session.finish_step(loss, read, margin=margin, reward_accuracy=above, num_pairs=num_pairs)
    return session.checkpoint


def _sequences(pair: Pair) -> list:
    return [pair.chosen, pair.rejected]


def sequence_logprobs(decoder: Decoder, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Per sequence [B]: the sum of its supervised tokens' log-probabilities in nats, and how many they are."""
    logprob_T = token_stats(decoder, batch).logprob_T
    cu_seqlens = batch.cu_seqlens.to(logprob_T.device)
    is_counted_T = batch.target_T.to(logprob_T.device) >= 0
    return sequence_sum(logprob_T, cu_seqlens), sequence_sum(is_counted_T.to(logprob_T), cu_seqlens)
