"""Lengths of documents as text has them: many short ones and a few long ones.

Run     by `attention` and `policy_loss`
Expect  the quantiles of a log-normal distribution (deviation of the logarithm: 1), scaled to the tokens asked for and
        shuffled by a fixed seed; they add up to the tokens exactly
"""

from __future__ import annotations

import math
import random
from statistics import NormalDist

import torch
from torch import Tensor

DEVIATION = 1.0  # of log(length): web text and chat completions lie between 0.8 and 1.3


def document_lengths(tokens: int, count: int) -> list[int]:
    """`count` lengths, at least 1 each, that add up to `tokens`."""
    if not 1 <= count <= tokens:
        raise ValueError(f"received {count} documents of {tokens} tokens; expected 1 to {tokens}: ask for fewer")
    normal = NormalDist(0.0, DEVIATION)
    raw = [math.exp(normal.inv_cdf((number + 0.5) / count)) for number in range(count)]
    lengths = [max(1, int(value * tokens / sum(raw))) for value in raw]
    random.Random(0).shuffle(lengths)
    lengths[lengths.index(max(lengths))] += tokens - sum(lengths)
    return lengths


def boundaries(tokens: int, count: int, device: torch.device) -> Tensor:
    """cu_seqlens, int32 [num_documents + 1], from 0 to `tokens`."""
    ends = torch.tensor([0, *document_lengths(tokens, count)]).cumsum(0)
    return ends.to(device=device, dtype=torch.int32)
