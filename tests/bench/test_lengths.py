"""Lengths of documents: they add up, and are many short ones and a few long ones."""

import statistics

import pytest
import torch

from warpline.bench.attention import Shape, last_tokens
from warpline.bench.lengths import boundaries, document_lengths


@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (7, 7), (2048, 8), (16384, 256), (1000, 3)])
def test_lengths_add_up_to_the_tokens(tokens, count):
    lengths = document_lengths(tokens, count)
    assert len(lengths) == count and sum(lengths) == tokens and min(lengths) >= 1
    assert document_lengths(tokens, count) == lengths, "and are the same every time"


def test_most_documents_are_shorter_than_the_mean_and_a_few_much_longer():
    lengths = document_lengths(65536, 256)
    mean = 65536 / 256
    assert statistics.median(lengths) < 0.7 * mean and max(lengths) > 6 * mean


def test_boundaries_are_cumulative_int32():
    found = boundaries(100, 4, torch.device("cpu"))
    assert found.dtype == torch.int32 and found[0] == 0 and found[-1] == 100 and (found.diff() >= 1).all()


def test_more_documents_than_tokens_are_refused():
    with pytest.raises(ValueError, match="received 5 documents of 4 tokens; expected 1 to 4"):
        document_lengths(4, 5)


def test_attention_is_checked_on_the_last_tokens_of_the_longest_document():
    shape = Shape(1, 512, 8, 2, 64, documents=32)
    lengths = document_lengths(512, 32)
    longest = lengths.index(max(lengths))
    start, end = sum(lengths[:longest]), sum(lengths[: longest + 1])
    assert start > 0 and end < 512, "of this shape it is neither the first nor the last"
    assert shape.longest == slice(start, end) and end - start > 64
    positions = torch.arange(512)
    assert last_tokens(shape, positions)[0].tolist() == list(range(end - 64, end))
    assert last_tokens(shape, positions, 512)[0].tolist() == list(range(start, end)), "fewer, and none of another document"
    dense = Shape(2, 256, 8, 2, 64)
    assert last_tokens(dense, torch.arange(512).view(2, 256))[0].tolist() == list(range(448, 512))
