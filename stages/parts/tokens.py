"""From packed batches to numbers per token, and from a step's samples to batches."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...data.packing import PackedBatch, Sample, pack, plan_batches
from ...kernels.linear_logprob import TokenStats, linear_cross_entropy, linear_logprob
from ...parallel.model import Loss, View
from .session import Session


def token_stats(view: View, hidden_TD: Tensor, weight_VD: Tensor, **options: Any) -> TokenStats:
    """`linear_logprob` of every supervised token that is here; 0 where `target_T` is ignored."""
    return linear_logprob(hidden_TD, weight_VD, view.target_T, **view.options, **options)


def backward_cross_entropy(session: Session, batches: Sequence[PackedBatch]) -> tuple[float, float]:
    """Accumulate the gradient of the mean negative log-likelihood per supervised token, over all batches and ranks.

    Returns that mean in nats, and the tokens read over all ranks.
    """
    counted, read = session.mesh.sum_data([num_targets(batches), num_tokens(batches)])

    def head(view: View, hidden_TD: Tensor, weight_VD: Tensor) -> Loss:
        summed = summed_cross_entropy(view, hidden_TD, weight_VD)
        return Loss(summed / max(counted, 1), summed[None])

    (summed,) = session.model.accumulate(batches, head, 1)
    return summed / max(counted, 1), read


def summed_cross_entropy(view: View, hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
    return linear_cross_entropy(hidden_TD, weight_VD, view.target_T, reduction="sum", **view.options)


def num_targets(batches: Sequence[PackedBatch]) -> int:
    """Supervised tokens; the stages' targets are ignored where they are negative."""
    return sum(int((batch.target_T >= 0).sum()) for batch in batches)


def num_tokens(batches: Sequence[PackedBatch]) -> int:
    return sum(batch.tokens_T.numel() for batch in batches)


def microbatches(groups: Sequence[Sequence[Sample]], tokens_per_microbatch: int) -> list[PackedBatch]:
    """Pack groups of samples in order into batches of at most `tokens_per_microbatch` tokens; a group is never split."""
    batches: list[PackedBatch] = []
    pending: list[Sample] = []
    pending_tokens = 0
    for group in groups:
        group_tokens = sum(len(sample.ids) for sample in group)
        if pending and pending_tokens + group_tokens > tokens_per_microbatch:
            batches.append(pack(pending))
            pending, pending_tokens = [], 0
        pending += group
        pending_tokens += group_tokens
    return [*batches, pack(pending)] if pending else batches


def sample_order(lengths: Sequence[int], tokens_per_step: int, seed: int, first_step: int) -> Iterator[list[int]]:
    """Endless steps of sample indices from `first_step` on: every sample once per epoch, each epoch in its own order."""
    step, epoch = 0, 0
    while True:
        for indices in plan_batches(lengths, tokens_per_step, seed, epoch):
            if step >= first_step:
                yield indices
            step += 1
        epoch += 1


def completion_sample(prompt_ids: Sequence[int], completion_ids: Sequence[int], source: str = "completion") -> Sample:
    """A sampled completion behind its prompt, supervised on the completion's tokens."""
    return Sample([*prompt_ids, *completion_ids], [False] * len(prompt_ids) + [True] * len(completion_ids), source)


def place_values(batch: PackedBatch, values: Sequence[float]) -> Tensor:
    """fp64 [T] on the host: one number per supervised token of the row, in order, and 0 elsewhere."""
    placed_T = torch.zeros(len(batch.target_T), dtype=torch.float64)
    placed_T[batch.target_T >= 0] = torch.tensor(values, dtype=torch.float64)
    return placed_T
