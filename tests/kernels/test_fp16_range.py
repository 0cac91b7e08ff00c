"""fp16 reaches from 6e-8 to 65504: sums over tokens, and small upstream gradients, leave it; the losses' gradients do not."""

import pytest
import torch

from warpline.kernels.linear_divergence import linear_divergence, linear_divergence_reference
from warpline.kernels.linear_logprob import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_logprob,
    linear_logprob_reference,
)
from warpline.kernels.logit_block import LogitMap
from warpline.kernels.vocabulary_sweep import BLOCKING, Blocking, Form, underflow_factor

NUM_TOKENS, WIDTH, NUM_ENTRIES = 96, 8, 11
SMALLEST = 2.0**-24  # a gradient cannot be rounded more finely than that


@pytest.fixture(autouse=True, params=["one chunk", "several chunks"])
def blocks(request, monkeypatch):
    elements = 2**12 if request.param == "one chunk" else 176
    monkeypatch.setitem(BLOCKING, "cpu", Blocking(8, 4, 32, 5, elements, elements))


def random(*shape, seed, scale=1.0):
    x = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.half()


def gradients(function, tensors, upstream, dtype=torch.float16):
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    value = function(*leaves)
    return torch.autograd.grad(value, leaves, (upstream if upstream.dim() else upstream.expand(value.shape)).to(value.dtype))


def check(mine, exact):
    """To a rounding of each gradient in fp16, and of the factors of its product."""
    for d, truth in zip(mine, exact, strict=True):
        assert d.dtype == torch.float16 and truth.abs().max() < 65504, "the truth must fit, for the test to say something"
        limit = 4 * torch.finfo(torch.float16).eps * truth.abs().max() + SMALLEST
        assert (d.double() - truth).abs().max() <= limit


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("upstream", [1.0, 2.0**-12, 2.0**10], ids=["plain", "small", "scaled"])
def test_mean_cross_entropy_sums_its_gradients_outside_of_fp16(is_compiled, upstream):
    """Every token pulls one entry the same way: the sum over tokens is 96 times the mean, and above 65504."""
    tensors = [random(NUM_TOKENS, WIDTH, seed=0).abs() * 400 + 800, random(NUM_ENTRIES, WIDTH, seed=1, scale=0.01)]
    target_T = torch.zeros(NUM_TOKENS, dtype=torch.int64)
    tensors[0] /= max(1.0, upstream)

    def mine(hidden, weight):
        return linear_cross_entropy(hidden, weight, target_T)

    def reference(hidden, weight):
        return linear_cross_entropy_reference(hidden, weight, target_T)

    torch.compiler.reset()
    function = torch.compile(mine, fullgraph=True, backend="aot_eager") if is_compiled else mine
    scale = torch.tensor(upstream)
    exact = gradients(reference, tensors, scale.double(), torch.float64)
    check(gradients(function, tensors, scale), exact)


@pytest.mark.parametrize("kind", ["logprob", "forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("size", [1e-7, 1e-3, 1e2])
def test_small_and_large_upstream_gradients_survive(kind, size):
    """A loss over many tokens gives each an upstream gradient below fp16's smallest number; the gradients are not so small."""
    tensors = [random(NUM_TOKENS, WIDTH, seed=0), random(NUM_ENTRIES, WIDTH, seed=1)]
    teacher = [random(NUM_TOKENS, WIDTH, seed=2), random(NUM_ENTRIES, WIDTH, seed=3)]
    target_T = torch.arange(NUM_TOKENS) % NUM_ENTRIES
    tensors[0 if kind == "logprob" else 1] *= 8  # logits are not small, either

    def mine(hidden, weight):
        if kind == "logprob":
            return linear_logprob(hidden, weight, target_T).logprob_T
        return linear_divergence(hidden, weight, *teacher, kind=kind)

    def reference(hidden, weight):
        if kind == "logprob":
            return linear_logprob_reference(hidden, weight, target_T).logprob_T
        return linear_divergence_reference(hidden, weight, *(x.to(hidden.dtype) for x in teacher), kind=kind)

    upstream_T = random(NUM_TOKENS, seed=4).double() * size
    exact = gradients(reference, tensors, upstream_T, torch.float64)
    check(gradients(mine, tensors, upstream_T), exact)


def test_the_factor_is_a_power_of_two_of_what_is_there_and_only_for_fp16():
    form = Form(LogitMap(), torch.float16, torch.float32, BLOCKING["cpu"])
    factors = [float(underflow_factor(form, torch.tensor([0.0, -x]), None)) for x in (3e-7, 1.0, 40000.0)]
    assert factors == [2.0**-21, 2.0, 65536.0]
    assert float(underflow_factor(form, torch.zeros(3))) == 1.0 == float(underflow_factor(form, torch.tensor([torch.inf])))
    assert underflow_factor(form, torch.zeros(0)) is None
    assert underflow_factor(Form(LogitMap(), torch.bfloat16, torch.float32, BLOCKING["cpu"]), torch.ones(1)) is None
