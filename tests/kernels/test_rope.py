"""rope against its fp64 reference, rotation identities, and transformers' tables."""

import itertools

import pytest
import torch

from warpline.kernels.rope import Llama3Scaling, rope, rope_reference, rope_tables


def results(function, q, k, cos, sin, norms=(None, None)):
    leaves = [x.clone().requires_grad_() for x in (q, k, *norms) if x is not None]
    keywords = {} if norms[0] is None else {"q_norm_weight": leaves[2], "k_norm_weight": leaves[3], "eps": 1e-3}
    outputs = function(leaves[0], leaves[1], cos, sin, **keywords)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    return [y.detach() for y in (*outputs, *torch.autograd.grad(loss, leaves))]


CASES = list(itertools.product([((5,), (5,)), ((2, 5), (5,)), ((2, 5), (2, 5))], [8, 4], [False, True]))


@pytest.mark.parametrize(("shapes", "rotated", "has_norm"), CASES, ids=str)
def test_values_and_gradients_equal_the_fp64_reference(shapes, rotated, has_norm):
    (tokens, table), wide = shapes, torch.float64
    q, k = torch.randn(*tokens, 4, 8, dtype=wide), torch.randn(*tokens, 2, 8, dtype=wide)
    cos, sin = rope_tables(torch.randint(0, 99, table), rotated, 100.0, dtype=wide)
    norms = tuple(torch.randn(2, 8, dtype=wide)) if has_norm else (None, None)
    mine, truth = (results(function, q, k, cos, sin, norms) for function in (rope, rope_reference))
    for received, expected in zip(mine, truth, strict=True):
        torch.testing.assert_close(received, expected, rtol=0, atol=1e-13)


def test_gradients_pass_gradcheck():
    cos, sin = rope_tables(torch.arange(3), 2, 10.0, dtype=torch.float64)
    shapes = ((3, 2, 4), (3, 1, 4), (4,), (4,))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    for function in (rope, rope_reference):
        check = lambda q, k, a, b, f=function: f(q, k, cos, sin, q_norm_weight=a, k_norm_weight=b)  # noqa: E731
        assert torch.autograd.gradcheck(check, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_the_eager_references_error(dtype):
    q, k = torch.randn(100, 4, 16).to(dtype), torch.randn(100, 2, 16).to(dtype)
    cos, sin = rope_tables(torch.arange(100), 16, 1e4)
    norms = tuple(torch.rand(2, 16).to(dtype))
    mine, eager = (results(function, q, k, cos, sin, norms) for function in (rope, rope_reference))
    truth = results(rope_reference, q.double(), k.double(), cos, sin, tuple(x.double() for x in norms))
    for received, plain, exact in zip(mine, eager, truth, strict=True):
        allowed = 2 * (plain - exact).abs().max() + 2 * torch.finfo(dtype).eps * exact.abs().max()
        assert (received - exact).abs().max() <= allowed


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64)
    scores = []
    for first in (0, 31):
        cos, sin = rope_tables(torch.tensor([first, first + 6]), 8, 100.0, dtype=torch.float64)
        turned_q, turned_k = rope(q.expand(2, 1, 8), k.expand(2, 1, 8), cos, sin)
        scores.append((turned_q[1] * turned_k[0]).sum())
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-13)


def test_channel_i_pairs_with_channel_i_plus_half():
    q = torch.tensor([[[1.0, 0, 0, 0, 7]]])
    cos, sin = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    assert rope(q, q, cos, sin)[0].tolist() == [[[0, 0, 1, 0, 7]]]


SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("scaling", [None, SCALING], ids=["plain", "llama3"])
def test_tables_equal_those_of_transformers(scaling):
    transformers = pytest.importorskip("transformers")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    kind = {"rope_type": "llama3", **scaling} if scaling else {"rope_type": "default"}
    parameters = {"rope_theta": 5000.0, **kind}
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
        rope_parameters=parameters,
    )  # fmt: skip
    position_1T = torch.arange(512)[None]
    expected = llama.LlamaRotaryEmbedding(config)(torch.zeros(1, 1, 64), position_1T)
    mine = rope_tables(position_1T, 32, 5000.0, scaling=Llama3Scaling(**scaling) if scaling else None)
    for received, truth in zip(mine, expected, strict=True):
        torch.testing.assert_close(torch.cat([received, received], -1), truth, rtol=0, atol=1e-6)
    q, k = torch.randn(1, 512, 2, 32), torch.randn(1, 512, 2, 32)
    theirs = llama.apply_rotary_pos_emb(q, k, *expected, unsqueeze_dim=2)
    for received, truth in zip(rope(q, k, *mine), theirs, strict=True):
        torch.testing.assert_close(received, truth, rtol=0, atol=1e-5)


def test_bad_calls_are_refused():
    q = torch.zeros(3, 2, 4)
    with pytest.raises(ValueError, match="even width"):
        rope_tables(torch.arange(3), 5, 10.0)
    with pytest.raises(ValueError, match="half as wide"):
        rope(q, q, torch.zeros(3, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="table row per token"):
        rope(q, q, torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="meta"):
        rope(q.to("meta"), q.to("meta"), torch.zeros(3, 2), torch.zeros(3, 2))
