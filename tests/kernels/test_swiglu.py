"""swiglu against its fp64 reference."""

import pytest
import torch

from warpline.kernels.swiglu import swiglu, swiglu_reference


def results(function, gate, up, d_out):
    leaves = [x.clone().requires_grad_() for x in (gate, up)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 11), (0, 4)], ids=str)
def test_values_and_gradients_equal_the_fp64_reference(shape):
    gate, up, d_out = 4 * torch.randn(3, *shape, dtype=torch.float64)
    for mine, truth in zip(results(swiglu, gate, up, d_out), results(swiglu_reference, gate, up, d_out), strict=True):
        torch.testing.assert_close(mine, truth, rtol=0, atol=1e-13)


def test_gradients_pass_gradcheck():
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up)) and torch.autograd.gradcheck(swiglu_reference, (gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_the_eager_references_error(dtype):
    inputs = (3 * torch.randn(3, 100, 33)).to(dtype)
    truth = results(swiglu_reference, *inputs.double())
    mine, eager = results(swiglu, *inputs), results(swiglu_reference, *inputs)
    for received, plain, exact in zip(mine, eager, truth, strict=True):
        allowed = 2 * (plain - exact).abs().max() + 2 * torch.finfo(dtype).eps * exact.abs().max()
        assert (received - exact).abs().max() <= allowed


def test_large_gates_neither_overflow_nor_make_nan():
    gate, up = torch.tensor([-200.0, 200.0]), torch.tensor([3.0, 3.0])
    out, d_gate, d_up = results(swiglu, gate, up, torch.ones(2))
    assert out.tolist() == [0, 600] and d_gate.tolist() == [0, 3] and d_up.tolist() == [0, 200]


def test_only_the_gradient_asked_for_is_computed():
    gate, up = torch.randn(4), torch.randn(4, requires_grad=True)
    swiglu(gate, up).sum().backward()
    torch.testing.assert_close(up.grad, torch.nn.functional.silu(gate))
    assert gate.grad is None


def test_bad_calls_are_refused():
    with pytest.raises(ValueError, match=r"\[2\].*\[3\]"):
        swiglu(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="meta"):
        swiglu(torch.zeros(2, device="meta"), torch.zeros(2, device="meta"))
