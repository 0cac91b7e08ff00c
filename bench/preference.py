"""A DPO step: our stage beside a plain transformers and torch loop that pads, with the same reference model.

Run     warpline bench preference [--quick] [--out DIR]
Expect  a row each, see `stage`. The same pairs in the same order; the first step's losses are compared. Passes: 3 of the policy
        and 1 of the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.conversation import read_preferences
from ..data.packing import pack
from ..data.tokenizer import ChatTokenizer
from ..stages import preference
from ..stages.parts.seed import seed_of
from ..stages.parts.tokens import sample_order
from .stage import (
    StageCase,
    ground,
    measure_stage,
    model_folder,
    optimizer,
    our_loop,
    padded,
    plain_loop,
    sequence_logprobs,
    size_of,
    stage_dtype,
)

measure_case = measure_stage
BETA = 0.1


def cases(device: torch.device, is_quick: bool) -> Iterator[StageCase]:
    size = size_of(device, is_quick)
    folder, model = ground(device, size), model_folder(device, size)
    file = folder / "data" / "pairs.jsonl"

    def config(steps: int) -> preference.PreferenceStageConfig:
        return preference.PreferenceStageConfig(
            steps=steps, optimizer=optimizer(), tokens_per_step=size.tokens_per_step, checkpoint_every_steps=10**6,
            start=str(model), files=[str(file)], beta=BETA,
        )  # fmt: skip

    def batches(steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        pairs = read_preferences([file], ChatTokenizer.load(model), 2048)
        lengths = [len(pair.chosen.ids) + len(pair.rejected.ids) for pair in pairs]
        for chosen in sample_order(lengths, size.tokens_per_step, seed_of(0, "preference", "order"), 0):
            mine = [pairs[index] for index in chosen]
            yield padded(pack([pair.chosen for pair in mine] + [pair.rejected for pair in mine]), device)

    yield StageCase(
        "preference", size, model,
        {"warpline": our_loop("preference", preference.main, config),
         "transformers + torch": plain_loop(model, device, batches, dpo_step, frozen=True)},
        4.0, stage_dtype(device),
    )  # fmt: skip


def dpo_step(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
    reference, (tokens, targets, mask) = batch
    with torch.no_grad():
        frozen = sequence_logprobs(reference(tokens, attention_mask=mask).logits, targets)
    chosen, rejected = (sequence_logprobs(model(tokens, attention_mask=mask).logits, targets) - frozen).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean(), float(mask.sum())
