"""From packed batches to numbers per token, and from a step's samples to batches."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...data.packing import PackedBatch, Sample, pack, plan_batches
from ...kernels.linear_logprob import TokenStats, linear_cross_entropy, linear_logprob
from ...models.decoder import Decoder
from .precision import product_dtype
from .session import Session


def on_batch(decoder: Decoder, batch: PackedBatch, head: Callable[[Tensor, Tensor, Tensor], object]):
    """`head(hidden_TD, output_weight_VD, target_T)` computed inside the decoder's forward over one packed batch."""
    device = decoder.embed_tokens.weight.device
    target_T = batch.target_T.to(device)
    return decoder(
        batch.tokens_T[None].to(device),
        cu_seqlens=batch.cu_seqlens.to(device),
        head=lambda hidden_BSD, weight_VD: head(hidden_BSD[0], weight_VD, target_T),
    )


def token_stats(decoder: Decoder, batch: PackedBatch, **options) -> TokenStats:
    """`linear_logprob` of every supervised token of the batch; 0 where `target_T` is ignored."""
    options |= head_options(decoder)
    return on_batch(decoder, batch, lambda hidden, weight, target: linear_logprob(hidden, weight, target, **options))


def head_options(decoder: Decoder) -> dict[str, Any]:
    """How this decoder's hidden states become logits: its softcap, and the products in the surrounding autocast's dtype."""
    return {"softcap": decoder.config.logit_softcap, "product_dtype": product_dtype(decoder.embed_tokens.weight.device)}


def backward_cross_entropy(session: Session, batches: Sequence[PackedBatch]) -> tuple[float, float]:
    """Accumulate the gradient of the mean negative log-likelihood per supervised token, over all batches and ranks.

    Returns that mean in nats, and the tokens read over all ranks.
    """
    counted, read = session.mesh.sum([num_targets(batches), num_tokens(batches)])
    loss = 0.0
    for batch in batches:
        with session.autocast():
            summed = on_batch(session.decoder, batch, partial(summed_cross_entropy, **head_options(session.decoder)))
        (summed / counted).backward()
        loss += summed.item() / counted
    return session.mesh.sum([loss])[0], read


def summed_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, **options) -> Tensor:
    return linear_cross_entropy(hidden_TD, weight_VD, target_T, reduction="sum", **options)


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


def completion_values(batch: PackedBatch, values_T: Tensor) -> Tensor:
    """The entries of `values_T` at supervised tokens, in order: completion after completion."""
    return values_T[batch.target_T.to(values_T.device) >= 0]


def place_values(batch: PackedBatch, values: Sequence[float], like_T: Tensor) -> Tensor:
    """The inverse of `completion_values`: one host number per supervised token, 0 elsewhere, as [T]."""
    placed_T = torch.zeros_like(like_T)
    placed_T[batch.target_T.to(like_T.device) >= 0] = torch.tensor(values, dtype=like_T.dtype, device=like_T.device)
    return placed_T
