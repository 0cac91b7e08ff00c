"""Whole layers for generation, in one process; tests/parallel/test_model.py compares completions under every layout, of ranks
with prompts and without."""

import sys
from pathlib import Path

import pytest
import torch

from warpline.models.decoder import Decoder, KeyValueCache
from warpline.models.generation import generate
from warpline.parallel.gather import WholeDecoder
from warpline.parallel.mesh import Mesh, Sizes
from warpline.parallel.model import ParallelModel

sys.path.insert(0, str(Path(__file__).parent))
from tensor_worker import CONFIGS, build

CPU = torch.device("cpu")


@pytest.fixture(params=list(CONFIGS))
def pair(request) -> tuple[Decoder, WholeDecoder]:
    """A decoder, and what stands for one with its weights."""
    config = CONFIGS[request.param]
    with torch.device("meta"):
        template = Decoder(config).double()
    return build(config), WholeDecoder(ParallelModel(build(config), Mesh(0, Sizes(), CPU)), template)


@torch.no_grad()
def test_it_computes_what_the_decoder_computes_with_a_cache_and_without(pair):
    decoder, gathered = pair
    tokens, caches = torch.tensor([[1, 5, 9, 2], [7, 3, 3, 8]]), []
    with gathered as whole:
        assert torch.equal(whole.output_weight, decoder.output_weight)
        torch.testing.assert_close(whole(tokens), decoder(tokens), rtol=0, atol=1e-13)
        for one in (whole, decoder):
            caches.append(KeyValueCache(decoder.config, 2, 5, CPU, torch.float64))
            one(tokens, cache=caches[-1])
            caches[-1].length_B += 4
            caches[-1].longest = 4
        following = torch.tensor([[4], [6]])
        expected = decoder(following, cache=caches[1])
        torch.testing.assert_close(whole(following, cache=caches[0]), expected, rtol=0, atol=1e-13)


def test_generation_takes_it_for_a_decoder(pair):
    decoder, gathered = pair
    prompts, options = [[1, 2], [3], [9, 8, 7]], {"max_new_tokens": 5, "end_ids": (3,)}
    uniform = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with gathered as whole:
        found = generate(whole, prompts, uniform=uniform, **options)
    assert [x.ids for x in found] == [x.ids for x in generate(decoder, prompts, uniform=uniform, **options)]


def test_what_is_held_beside_a_layer_is_let_go_at_the_end_even_after_an_error(pair):
    _, gathered = pair
    with gathered as whole:
        assert {name for name in whole.outer if name.startswith("layers.")} == set() != set(whole.outer)
    assert gathered.outer == {}
    with pytest.raises(KeyError, match="mine"), gathered:
        raise KeyError("mine")
    assert gathered.outer == {}


@torch.no_grad()
def test_weights_are_those_of_the_moment(pair):
    """Training goes on between two generations."""
    _, gathered = pair
    tokens = torch.tensor([[1, 5, 9]])
    with gathered as whole:
        before = whole(tokens)
    for parameter in gathered.model.parameters():
        parameter.mul_(1.5)
    with gathered as whole:
        after = whole(tokens)
    torch.testing.assert_close(after, gathered.model.decoder(tokens), rtol=0, atol=1e-13)
    assert (after - before).abs().max() > 1e-3
