"""What the bench of context parallelism calls possible, by hand."""

import pytest
import torch

from warpline.bench.context_parallel import heads, inputs, ring_bytes

CPU = torch.device("cpu")


def test_the_ring_sends_keys_and_values_and_their_gradients():
    """2 key heads of 64 + 64 numbers: 256 a token. Of 4 ranks each forwards 3 quarters of 1,024 tokens, backwards these again
    and all four quarters' gradients."""
    assert heads(CPU) == (8, 2, 64)
    assert ring_bytes("forward", 4, 1024, CPU) == 768 * 256 * 4
    assert ring_bytes("forward and backward", 4, 1024, CPU) == (768 + 768 + 1024) * 256 * 4


def test_every_rank_draws_the_same_row():
    first, second = (inputs(7, CPU, torch.float32) for _ in range(2))
    assert [list(x.shape) for x in first] == [[7, 8, 64], [7, 2, 64], [7, 2, 64], [7, 8, 64]]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].std().item() == pytest.approx(1.0, abs=0.1)
