import numpy as np
import pytest
import torch

from warpline.data.packing import (
    Sample,
    num_windows,
    pack,
    permutation,
    plan_batches,
    text_batch,
    windows_of_step,
)
from warpline.data.shards import TokenShards, write_shards


def test_a_target_is_the_next_supervised_token_of_the_same_sample():
    first = Sample([5, 6, 7, 8], [False, False, True, True], "a:1")
    second = Sample([9, 10], [True, True], "a:2")  # nothing predicts its first token, though it is supervised
    third = Sample([11], [True], "a:3")
    batch = pack([first, second, third])
    assert batch.tokens_T.tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert batch.target_T.tolist() == [-100, 7, 8, -100, 10, -100, -100]
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 7]
    assert (batch.tokens_T.dtype, batch.target_T.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int64, torch.int32)


def test_an_empty_or_uneven_sample_is_refused_by_name():
    for sample in (Sample([], [], "a:4"), Sample([1], [True, True], "a:4")):
        with pytest.raises(ValueError, match="a:4"):
            pack([sample])
    with pytest.raises(ValueError, match="no samples"):
        pack([])


@pytest.fixture
def shards(tmp_path):
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 50, length).tolist() for length in (7, 1, 0, 30, 12, 3, 25)]
    write_shards(tmp_path, documents, vocab_size=50, document_id=0, tokens_per_shard=13)
    return TokenShards(tmp_path)


def test_no_window_target_or_sequence_crosses_a_document_boundary(shards):
    stream = shards.window(0, shards.num_tokens).tolist()
    size = 8
    ids = [3, 0, 1, num_windows(shards, size) - 1]
    batch = text_batch(shards, ids, size)
    assert batch.tokens_T.tolist() == [stream[i * size + j] for i in ids for j in range(size)]
    following = [stream[i * size + j + 1] for i in ids for j in range(size)]
    assert batch.target_T.tolist() == [-100 if token == 0 else token for token in following]
    starts = set(batch.cu_seqlens[:-1].tolist())
    assert starts == {p for p, token in enumerate(batch.tokens_T.tolist()) if token == 0 or p % size == 0}
    assert batch.cu_seqlens[-1] == len(ids) * size
    assert (batch.cu_seqlens.diff() > 0).all()


def test_windows_need_one_token_more_than_their_length(shards):
    assert num_windows(shards, shards.num_tokens - 1) == 1
    with pytest.raises(ValueError, match="expected more than sequence_tokens"):
        num_windows(shards, shards.num_tokens)


def test_a_permutation_is_a_pure_function_of_seed_and_epoch():
    assert sorted(permutation(100, 1, 2)) == list(range(100))
    assert permutation(8, 1, 2).tolist() == [6, 0, 7, 5, 1, 4, 3, 2]  # pinned: a resumed run depends on it
    assert permutation(100, 1, 2).tolist() != permutation(100, 1, 3).tolist()
    assert permutation(100, 1, 2).tolist() != permutation(100, 2, 2).tolist()


def test_every_window_comes_once_per_epoch_and_a_step_needs_no_history():
    steps = [windows_of_step(10, 4, step, seed=3).tolist() for step in range(15)]  # six epochs; steps 2 and 7 span two
    flat = [window for step in steps for window in step]
    for epoch in range(6):
        assert sorted(flat[epoch * 10 : (epoch + 1) * 10]) == list(range(10))
    assert flat[:10] != flat[10:20]
    assert windows_of_step(10, 4, 7, seed=3).tolist() == steps[7]
    assert np.bincount(windows_of_step(3, 7, 0, seed=0), minlength=3).tolist().count(2) == 2  # a step of 2 1/3 epochs


def test_batches_hold_every_sample_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(1, 40, 200).tolist()
    batches = plan_batches(lengths, 64, seed=1, epoch=0)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    totals = [sum(lengths[i] for i in batch) for batch in batches]
    assert max(totals) <= 64
    for total, following in zip(totals, batches[1:], strict=False):
        assert total + lengths[following[0]] > 64
    assert batches == plan_batches(lengths, 64, seed=1, epoch=0)
    assert batches != plan_batches(lengths, 64, seed=1, epoch=1)
    assert plan_batches([], 64, seed=1, epoch=0) == []
    with pytest.raises(ValueError, match="sample 1 has 65 tokens"):
        plan_batches([1, 65], 64, seed=0, epoch=0)
