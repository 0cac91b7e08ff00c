"""rms_norm, rope and swiglu on a GPU: values and gradients against fp64, 64-bit offsets, equal bits, compiled calls."""

import pytest
import torch
from error_rule import check, results

from warpline.kernels.rms_norm import rms_norm, rms_norm_reference
from warpline.kernels.rope import rope, rope_reference, rope_tables
from warpline.kernels.swiglu import swiglu, swiglu_reference

pytestmark = pytest.mark.gpu


def random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def with_residual(function, zero_centred=False):
    return lambda x, weight, residual: function(x, weight, residual=residual, zero_centred=zero_centred)


def turned(function, rotated=None):
    def call(q, k, q_weight, k_weight):
        positions = torch.arange(q.shape[0], device=q.device)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        tables = rope_tables(positions, rotated or q.shape[-1], 1e6, dtype=wide)
        return function(q, k, *tables, q_norm_weight=q_weight, k_norm_weight=k_weight)

    return call


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 4096), (3000, 128), (513, 2880), (300, 16384), (70, 32768)], ids=str)
@pytest.mark.parametrize("zero_centred", [False, True])
def test_rms_norm_is_right(shape, dtype, zero_centred):
    x, residual = (random(*shape, seed=seed, dtype=dtype) for seed in (0, 1))
    weight = random(shape[1], seed=2, dtype=dtype)
    check(with_residual(rms_norm, zero_centred), with_residual(rms_norm_reference, zero_centred), [x, weight, residual])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sizes", [(1000, 32, 8, 128, 128), (77, 7, 1, 80, 40), (9, 64, 64, 256, 64)], ids=str)
def test_rope_is_right(sizes, dtype):
    tokens, heads, key_heads, width, rotated = sizes
    inputs = [random(tokens, n, width, seed=n, dtype=dtype) for n in (heads, key_heads)]
    inputs += [random(width, seed=seed, dtype=dtype) for seed in (1, 2)]
    check(turned(rope, rotated), turned(rope_reference, rotated), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (777, 1013), (300, 28672)], ids=str)
def test_swiglu_is_right(shape, dtype):
    check(swiglu, swiglu_reference, [random(*shape, seed=seed, dtype=dtype) for seed in (0, 1)])
    both = random(shape[0], 2 * shape[1], dtype=dtype).chunk(2, -1)
    plain = results(swiglu, [x.contiguous() for x in both])
    assert all(torch.equal(a, b) for a, b in zip(results(swiglu, both), plain, strict=True))


def test_more_than_2_to_the_31_elements_are_reached():
    """The last rows of 2^31 + … elements are those computed alone."""
    rows, width = 2**19 + 8, 4096
    x, weight = torch.ones(rows, width, device="cuda", dtype=torch.bfloat16), random(width)
    x[-3:] = random(3, width, seed=1)
    tail = x[-3:].clone()
    assert torch.equal(rms_norm(x, weight)[-3:], rms_norm(tail, weight))
    assert torch.equal(swiglu(x, x)[-3:], swiglu(tail, tail))
    q, k = x.view(-1, 32, 128), tail.view(-1, 32, 128)
    tables = rope_tables(torch.zeros(len(q), device="cuda", dtype=torch.int64) + 5, 128, 100.0)
    far, near = rope(q, q[:, :1], *tables)[0][-3:], rope(k, k[:, :1], *(table[:3] for table in tables))[0]
    assert torch.equal(far, near)


CALLS = {
    "rms_norm": (with_residual(rms_norm), lambda: [random(1000, 512), random(512, seed=1), random(1000, 512, seed=2)]),
    "rope": (turned(rope), lambda: [random(1000, 6, 64), random(1000, 2, 64), random(64), random(64, seed=1)]),
    "swiglu": (swiglu, lambda: [random(1000, 512), random(1000, 512, seed=1)]),
}


@pytest.mark.parametrize("name", CALLS)
def test_equal_calls_and_compiled_calls_give_equal_bits(name):
    function, inputs = CALLS[name]
    torch.compiler.reset()
    once, again, compiled = (results(f, inputs()) for f in (function, function, torch.compile(function, fullgraph=True)))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    for a, b in zip(compiled, once, strict=True):
        torch.testing.assert_close(a, b)


def test_the_operators_hold_what_torch_asks_of_them():
    x, weight = random(64, 128, dtype=torch.float32).requires_grad_(), random(128, dtype=torch.float32).requires_grad_()
    operators = torch.ops.warpline
    torch.library.opcheck(operators.rms_norm.default, (x, weight, None, 1e-6, False))
    torch.library.opcheck(operators.swiglu.default, (x, random(64, 128, seed=1, dtype=torch.float32)))
    q = random(16, 4, 128, dtype=torch.float32).requires_grad_()
    tables = rope_tables(torch.arange(16, device="cuda"), 128, 100.0)
    torch.library.opcheck(operators.rope.default, (q, *tables, weight, 1e-6, False))
