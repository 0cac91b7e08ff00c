"""A pretraining step: our stage beside a plain transformers and torch loop.

Run     warpline bench pretrain [--quick] [--out DIR]
Expect  a row each, see `stage`. The plain loop lets the documents of a window see each other, as such loops do; ours does not,
        so their losses are not compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.packing import num_windows, text_batch, windows_of_step
from ..data.shards import TokenShards
from ..stages import pretrain
from ..stages.parts.seed import seed_of
from .stage import StageCase, ground, measure_stage, model_folder, optimizer, our_loop, plain_loop, size_of, stage_dtype

measure_case = measure_stage


def cases(device: torch.device, is_quick: bool) -> Iterator[StageCase]:
    size = size_of(device, is_quick)
    folder, model = ground(device, size), model_folder(device, size)
    per_step = size.tokens_per_step // size.window_tokens

    def config(steps: int) -> pretrain.PretrainStageConfig:
        return pretrain.PretrainStageConfig(
            steps=steps, optimizer=optimizer(), sequence_tokens=size.window_tokens, sequences_per_step=per_step,
            evaluate_every_steps=10**6, checkpoint_every_steps=10**6, data=str(folder), start=str(model),
        )  # fmt: skip

    def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        shards = TokenShards(folder / "data" / "train")
        count = num_windows(shards, size.window_tokens)
        for step in range(steps):
            windows = windows_of_step(count, per_step, step, seed_of(0, "pretrain", "order"))
            batch = text_batch(shards, list(windows), size.window_tokens)
            yield batch.tokens_T.view(per_step, -1).to(device), batch.target_T.view(per_step, -1).to(device)

    yield StageCase(
        "pretrain", size, model,
        {"warpline": our_loop("pretrain", pretrain.main, config),
         "transformers + torch": plain_loop(model, device, batches, cross_entropy_step)},
        3.0, stage_dtype(device), is_checked=False,
    )  # fmt: skip


def cross_entropy_step(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
    tokens, targets, *mask = batch
    logits = model(tokens, attention_mask=mask[0] if mask else None).logits
    read = float(mask[0].sum()) if mask else float(tokens.numel())
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()), read
