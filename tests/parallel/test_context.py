"""Context parallelism: the split, the plans and the bytes against numbers worked by hand; every result against one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from warpline.kernels.attention import attention
from warpline.parallel.context import ContextBatch, Zigzag, ring_attention, ulysses_attention

WORKER = Path(__file__).parent / "context_worker.py"


def test_ranks_hold_an_early_and_a_late_chunk_of_uneven_rows():
    layout = Zigzag((0, 5, 11), 11, 2)  # chunks of 11 tokens: 0–1, 2–4, 5–7, 8–10
    assert [layout.chunks(rank) for rank in range(2)] == [((0, 2), (8, 11)), ((2, 5), (5, 8))]
    assert layout.index(0).tolist() == [0, 1, 8, 9, 10] and layout.index(1).tolist() == [2, 3, 4, 5, 6, 7]
    assert layout.position(0).tolist() == [0, 1, 3, 4, 5] and layout.position(1).tolist() == [2, 3, 4, 0, 1, 2]
    assert [layout.tokens(rank) for rank in range(2)] == [5, 6]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 64, 61])
def test_every_token_is_on_one_rank(size, num_tokens):
    layout = Zigzag((0, num_tokens), num_tokens, size)
    everywhere = torch.cat([layout.index(rank) for rank in range(size)])
    assert sorted(everywhere.tolist()) == list(range(num_tokens))


def test_a_pair_of_chunks_is_planned_as_worked_by_hand():
    """Rank 1's chunks 2–4 (of document 0–4) and 5–7 (of 5–10) with rank 0's keys 0–1 and 8–10."""
    pairs = Zigzag((0, 5, 11), 11, 2).pairs(1, 0)
    assert [(p.queries, p.keys) for p in pairs] == [(slice(0, 3), slice(0, 2)), (slice(3, 6), slice(2, 5))]
    first, second = pairs
    assert first.cu_seqlens.tolist() == [0, 3] and first.cu_seqlens_k.tolist() == [0, 2]
    assert first.query_offset.tolist() == [2] and first.distances == ((1, 4),)  # query 2 stands 2 behind key 0
    assert second.query_offset.tolist() == [-3] and second.distances == ((-5, -1),)  # queries 5–7 before keys 8–10
    assert first.is_seen(True, None) and not second.is_seen(True, None) and second.is_seen(False, None)
    assert not first.is_seen(True, 1) and first.is_seen(True, 2) and not second.is_seen(False, 1) and second.is_seen(False, 2)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_every_rank_has_the_same_number_of_pairs_in_a_causal_document(size):
    """2n + 1: its two diagonal ones, and half of the rest; a window of a chunk leaves those beside the diagonal."""
    layout = Zigzag((0, 64 * size), 64 * size, size)
    counts = []
    for rank in range(size):
        pairs = [pair for other in range(size) for pair in layout.pairs(rank, other)]
        counts.append([sum(pair.is_seen(True, window) for pair in pairs) for window in (None, 32)])
    assert {count for count, _ in counts} == {2 * size + 1}
    assert [count for _, count in counts] == [3] + [4] * (size - 1)


@pytest.mark.parametrize("function", [ring_attention, ulysses_attention])
def test_one_rank_is_plain_attention(function):
    q, k, v = (torch.randn(11, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    batch = ContextBatch.of((0, 4, 11), 11, None, torch.device("cpu"))
    order = batch.layout.index(0)
    assert order.tolist() == list(range(11))
    expected = attention(q, k, v, cu_seqlens=torch.tensor([0, 4, 11], dtype=torch.int32), window=3)
    torch.testing.assert_close(function(q, k, v, batch, window=3), expected, rtol=0, atol=1e-14)


def test_bad_input_is_named_with_its_remedy():
    with pytest.raises(ValueError, match=r"bounds \[1, 4\] of 4 tokens.*pass cu_seqlens"):
        Zigzag((1, 4), 4, 2)
    with pytest.raises(ValueError, match="to at most the tokens"):
        Zigzag((0, 5), 4, 2)
    batch = ContextBatch.of((0, 4), 4, None, torch.device("cpu"))
    x = torch.zeros(3, 2, 8)
    with pytest.raises(ValueError, match=r"expected 4 tokens of rank 0 each: split with batch\.local"):
        ring_attention(x, x, x, batch)
    over_three = ContextBatch(Zigzag((0, 4), 4, 3), 0, None, torch.device("cpu"))
    x = torch.zeros(over_three.layout.tokens(0), 4, 8)
    with pytest.raises(ValueError, match="4 query heads over 3 ranks; expected a multiple: use the ring"):
        ulysses_attention(x, x, x, over_three)


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_compute_what_one_process_computes_and_every_communication_is_needed(num_ranks):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), str(WORKER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert len(result["errors"]) == 30 and max(result["errors"].values()) < 1e-12
    assert result["plain"] < 1e-12 and len(result["mutations"]) == 8
    unnoticed = [name for name, error in result["mutations"].items() if not error > 1e-6]
    assert not unnoticed
    per_rank = max(result["sent"]["ring"]["tokens"]) * (8 + 6)
    assert result["held"]["forward"] <= 2 * per_rank, "more keys and values than two ranks'"
    assert result["held"]["backward"] <= 4 * per_rank, "more than two ranks' keys and values, and their gradients"
    # q, k, v and the output of 4n heads: 8 + 6 numbers a query head and a key head, and the log-sum-exp.
    assert result["saved"] == 4 * num_ranks * (8 + 6 + 1) + 2 * (8 + 6)
    check_bytes(result["sent"], num_ranks)


def check_bytes(sent, num_ranks):
    """Rank 0's, in fp64, against the table in the header: 4n query heads, 2 key heads, widths 8 and 6."""
    tokens = sent["ring"]["tokens"]
    others = sum(tokens) - tokens[1]  # what rank 0 passes on: its own keys first, last those that came from rank 2
    per_token = 2 * (8 + 6) * 8
    assert sent["ring"]["forward"] == {"p2p": others * per_token, "all_to_all": 0}
    assert sent["ring"]["both"]["p2p"] == (2 * others + sum(tokens)) * per_token
    repeated = 2 if num_ranks == 2 else num_ranks if num_ranks == 4 else 2 * num_ranks
    here, rest = tokens[0], sum(tokens) - tokens[0]
    inward = (4 * num_ranks * 8 + repeated * (8 + 6)) // num_ranks * (num_ranks - 1) * here * 8
    outward = 4 * 6 * rest * 8
    assert sent["ulysses"]["forward"] == {"p2p": 0, "all_to_all": inward + outward}
