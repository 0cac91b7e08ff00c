"""Packing: samples and text windows laid end to end as one row of tokens, with the boundaries attention must not cross.

Every order here is a pure function of a seed and a step or epoch, so that a resumed run sees the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .record import BadData
from .shards import TokenShards

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Sample:
    """Tokens of one sequence; `supervised[i]` says whether predicting token i counts in the loss."""

    ids: list[int]
    supervised: list[bool]
    source: str


@dataclass(frozen=True)
class PackedBatch:
    tokens_T: torch.Tensor  # int64
    target_T: torch.Tensor  # int64; the next token of the same sequence where it is supervised, else -100
    cu_seqlens: torch.Tensor  # int32 [num_sequences + 1], the first token of each sequence, then T


def pack(samples: Sequence[Sample]) -> PackedBatch:
    for sample in samples:
        if not sample.ids or len(sample.ids) != len(sample.supervised):
            counts = f"{len(sample.ids)} ids and {len(sample.supervised)} supervised flags"
            raise BadData(f"{sample.source}: {counts}, expected at least one token and as many flags as ids")
    if not samples:
        raise BadData("no samples to pack, expected at least one; check the batch size")
    tokens = np.concatenate([np.asarray(sample.ids, dtype=np.int64) for sample in samples])
    supervised = np.concatenate([np.asarray(sample.supervised, dtype=bool) for sample in samples])
    starts = np.cumsum([0, *(len(sample.ids) for sample in samples)])
    supervised[starts[:-1]] = False  # nothing in the same sample predicts its first token
    return _batch(tokens, np.append(tokens[1:], 0), np.append(supervised[1:], False), starts)


def num_windows(shards: TokenShards, sequence_tokens: int) -> int:
    """Windows of `sequence_tokens` inputs; each reads one token more, its last target."""
    count = (shards.num_tokens - 1) // sequence_tokens
    if count < 1:
        remedy = f"add text or take sequence_tokens of at most {shards.num_tokens - 1}"
        raise BadData(f"{shards.num_tokens} tokens, expected more than sequence_tokens = {sequence_tokens}; {remedy}")
    return count


def text_batch(shards: TokenShards, window_ids: Sequence[int], sequence_tokens: int) -> PackedBatch:
    """Windows [i·S, i·S + S] of the stream. A sequence starts at each window and each document; no target crosses."""
    rows = [shards.window(int(i) * sequence_tokens, sequence_tokens + 1) for i in window_ids]
    windows = np.stack(rows).astype(np.int64)
    tokens, following = windows[:, :-1], windows[:, 1:]
    is_start = tokens == shards.document_id
    is_start[:, 0] = True
    starts = np.append(np.flatnonzero(is_start), tokens.size)
    return _batch(tokens.reshape(-1), following.reshape(-1), (following != shards.document_id).reshape(-1), starts)


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """An order of range(n), a pure function of (n, seed, epoch). Read-only."""
    return _permutation(n, seed, epoch)


def windows_of_step(num_windows: int, windows_per_step: int, step: int, seed: int) -> np.ndarray:
    """The windows of a step: every window once per epoch, epochs end to end, a step may span two."""
    positions = np.arange(step * windows_per_step, (step + 1) * windows_per_step)
    epochs = positions // num_windows
    orders = {int(epoch): permutation(num_windows, seed, int(epoch)) for epoch in np.unique(epochs)}
    return np.array([orders[int(e)][p % num_windows] for e, p in zip(epochs, positions, strict=True)], dtype=np.int64)


def plan_batches(lengths: Sequence[int], tokens_per_batch: int, seed: int, epoch: int) -> list[list[int]]:
    """Every sample once, shuffled; in that order each batch is filled up to `tokens_per_batch`."""
    batches: list[list[int]] = []
    room = -1
    for index in permutation(len(lengths), seed, epoch).tolist():
        length = lengths[index]
        if length > tokens_per_batch:
            raise BadData(
                f"sample {index} has {length} tokens, expected at most tokens_per_step = {tokens_per_batch}; raise it"
            )
        if length > room:
            batches.append([])
            room = tokens_per_batch
        batches[-1].append(index)
        room -= length
    return batches


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n)
    order.setflags(write=False)
    return order


def _batch(tokens: np.ndarray, following: np.ndarray, counts: np.ndarray, starts: np.ndarray) -> PackedBatch:
    return PackedBatch(
        tokens_T=torch.from_numpy(np.ascontiguousarray(tokens)),
        target_T=torch.from_numpy(np.where(counts, following, IGNORE_INDEX)),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
    )
