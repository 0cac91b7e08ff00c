"""Lengths of documents: they add up, and are many short ones and a few long ones."""

import statistics

import pytest
import torch

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
