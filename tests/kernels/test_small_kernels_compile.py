"""rms_norm, rope and swiglu under torch.compile: no graph break, the eager bits, and operators that hold their promises."""

import pytest
import torch
from error_rule import results

from warpline.kernels.rms_norm import rms_norm
from warpline.kernels.rope import rope, rope_tables
from warpline.kernels.swiglu import swiglu


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def turned(q, k, weight):
    return rope(q, k, *rope_tables(torch.arange(q.shape[0]), 8, 100.0), q_norm_weight=weight)


def normed(x, weight, residual):
    return rms_norm(x, weight, residual=residual)


CALLS = {
    "rms_norm": (rms_norm, lambda t: [random(t, 8), random(8, seed=1)]),
    "rms_norm, residual": (normed, lambda t: [random(t, 8), random(8, seed=1), random(t, 8, seed=2)]),
    "rope": (turned, lambda t: [random(t, 3, 12), random(t, 1, 12), random(12)]),
    "swiglu": (swiglu, lambda t: [random(t, 8), random(t, 8, seed=1)]),
}


@pytest.mark.parametrize("name", CALLS)
def test_compiled_calls_have_the_eager_bits_and_one_graph_for_every_number_of_tokens(name):
    function, inputs = CALLS[name]
    torch.compiler.reset()
    num_graphs = []

    def backend(graph, example_inputs):
        num_graphs.append(1)
        return graph

    for backend_name, sizes in ((backend, (6, 7, 9, 12)), ("aot_eager", (6, 9))):
        compiled = torch.compile(function, fullgraph=True, backend=backend_name)
        for num_tokens in sizes:
            pair = (results(f, inputs(num_tokens)) for f in (compiled, function))
            assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))
    assert len(num_graphs) <= 2, "one graph, and one more with a dynamic number of tokens"


def leaf(*shape, seed=0, has_gradient=True):
    return random(*shape, seed=seed).requires_grad_(has_gradient)


TABLES, HALF_TABLES = (rope_tables(torch.arange(3), width, 10.0) for width in (4, 2))
OPERATORS = {
    "rms_norm": [
        lambda: (leaf(3, 8), leaf(8), None, 1e-3, False),
        lambda: (leaf(3, 8), leaf(8), leaf(3, 8, seed=1), 1e-3, True),
        lambda: (random(3, 8).half(), random(8), None, 1e-3, False),
        lambda: (random(8, 3).t().detach().requires_grad_(), leaf(8), random(8, 3).t(), 1e-3, False),
    ],
    "rope": [
        lambda: (leaf(3, 2, 4), *TABLES, None, 1e-3, False),
        lambda: (leaf(3, 2, 4), *HALF_TABLES, leaf(4), 1e-3, True),
    ],
    "swiglu": [lambda: (leaf(3, 8), leaf(3, 8, seed=1)), lambda: (random(3, 8), leaf(3, 8))],
    "rms_norm_backward": [
        lambda: (random(3, 8), None, random(3, 8, seed=1), random(8), torch.ones(3, 1), False, [True, True]),
        lambda: (random(8, 3).t(), None, random(3, 8, seed=1), random(8), torch.ones(3, 1), False, [True, True]),
        lambda: (random(3, 8), random(3, 8), random(3, 8, seed=1), random(8), torch.ones(3, 1), True, [False, True]),
    ],
    "rope_backward": [
        lambda: (random(3, 2, 4), random(3, 2, 4, seed=1), *TABLES, random(4), 1e-3, False, [True, True]),
        lambda: (random(3, 2, 4), None, *TABLES, None, 1e-3, False, [True, False]),
    ],
    "swiglu_backward": [lambda: (*(random(3, 8, seed=seed) for seed in range(3)), [True, False])],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_operators_hold_what_torch_asks_of_them(name):
    for arguments in OPERATORS[name]:
        torch.library.opcheck(getattr(torch.ops.warpline, name).default, arguments())
