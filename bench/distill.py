"""A distillation step: our stage beside a plain transformers and torch loop that pads and keeps both sides' logits.

Run     warpline bench distill [--quick] [--out DIR]
Expect  a row each, see `stage`. Forward KL and half the cross-entropy of the labels, on the same conversations. The student
        starts as the teacher: what is compared of the first step's losses is the labels' part. Passes: 3 of the student and
        1 of the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..stages import distill
from .sft import conversations
from .stage import StageCase, ground, measure_stage, model_folder, optimizer, our_loop, plain_loop, size_of, stage_dtype

measure_case = measure_stage
LABEL_WEIGHT = 0.5


def cases(device: torch.device, is_quick: bool) -> Iterator[StageCase]:
    size = size_of(device, is_quick)
    folder, model = ground(device, size), model_folder(device, size)
    file = folder / "data" / "sft.jsonl"

    def config(steps: int) -> distill.DistillStageConfig:
        return distill.DistillStageConfig.model_validate({
            "steps": steps, "optimizer": optimizer(), "tokens_per_step": size.tokens_per_step, "start": str(model),
            "checkpoint_every_steps": 10**6, "teacher": str(model), "files": [str(file)], "label_weight": LABEL_WEIGHT,
        })  # fmt: skip

    def batches(steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return conversations(file, model, size, "distill", device)

    yield StageCase(
        "distill", size, model,
        {"warpline": our_loop("distill", distill.main, config),
         "transformers + torch": plain_loop(model, device, batches, kl_step, frozen=True)},
        4.0, stage_dtype(device),
    )  # fmt: skip


def kl_step(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
    teacher, (tokens, targets, mask) = batch
    with torch.no_grad():
        wanted = teacher(tokens, attention_mask=mask).logits.float().log_softmax(-1)
    logits = model(tokens, attention_mask=mask).logits.float()
    counted = targets >= 0
    divergence_BS = F.kl_div(logits.log_softmax(-1), wanted, reduction="none", log_target=True).sum(-1)
    label_loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return (divergence_BS * counted).sum() / counted.sum() + LABEL_WEIGHT * label_loss, float(mask.sum())
