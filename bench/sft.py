"""A fine-tuning step on conversations: our stage beside a plain transformers and torch loop that pads.

Run     warpline bench sft [--quick] [--out DIR]
Expect  a row each, see `stage`. The same conversations in the same order; the first step's losses are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..data.conversation import read_supervised
from ..data.packing import pack
from ..data.tokenizer import ChatTokenizer
from ..stages import sft
from ..stages.parts.seed import seed_of
from ..stages.parts.tokens import sample_order
from .pretrain import cross_entropy_step
from .stage import (
    Size,
    StageCase,
    ground,
    measure_stage,
    model_folder,
    optimizer,
    our_loop,
    padded,
    plain_loop,
    size_of,
    stage_dtype,
)

measure_case = measure_stage


def cases(device: torch.device, is_quick: bool) -> Iterator[StageCase]:
    size = size_of(device, is_quick)
    folder, model = ground(device, size), model_folder(device, size)
    file = folder / "data" / "sft.jsonl"

    def config(steps: int) -> sft.SftStageConfig:
        return sft.SftStageConfig(
            steps=steps, optimizer=optimizer(), tokens_per_step=size.tokens_per_step, checkpoint_every_steps=10**6,
            start=str(model), files=[str(file)],
        )  # fmt: skip

    def batches(steps: int) -> Iterator[tuple[Tensor, ...]]:
        return conversations(file, model, size, "sft", device)

    yield StageCase(
        "sft", size, model,
        {"warpline": our_loop("sft", sft.main, config), "transformers + torch": plain_loop(
            model, device, batches, cross_entropy_step)},
        3.0, stage_dtype(device),
    )  # fmt: skip


def conversations(
    file: Path, model: Path, size: Size, stage: str, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The stage's own batches, padded."""
    samples = read_supervised([file], ChatTokenizer.load(model), 2048)
    lengths = [len(sample.ids) for sample in samples]
    for chosen in sample_order(lengths, size.tokens_per_step, seed_of(0, stage, "order"), 0):
        yield padded(pack([samples[index] for index in chosen]), device)
