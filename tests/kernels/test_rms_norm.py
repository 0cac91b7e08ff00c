"""rms_norm against its fp64 reference."""

import pytest
import torch

from warpline.kernels.rms_norm import rms_norm, rms_norm_reference


def results(function, x, weight, residual=None, dtype=torch.float64):
    leaves = [t.clone().to(dtype).requires_grad_() for t in (x, weight, residual) if t is not None]
    outputs = function(leaves[0], leaves[1], eps=1e-3, residual=leaves[2] if residual is not None else None)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    return [y.detach() for y in (*outputs, *torch.autograd.grad(loss, leaves))]


@pytest.fixture(params=[(7,), (5, 7), (2, 3, 4, 6), (0, 7)], ids=str)
def tensors(request):
    generator = torch.Generator().manual_seed(0)
    shapes = (request.param, request.param[-1:], request.param)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("has_residual", [False, True])
def test_values_and_gradients_equal_the_fp64_reference(tensors, has_residual):
    x, weight, residual = tensors
    residual = residual if has_residual else None
    mine, truth = (results(f, x, weight, residual) for f in (rms_norm, rms_norm_reference))
    for received, expected in zip(mine, truth, strict=True):
        torch.testing.assert_close(received, expected, rtol=0, atol=1e-13)


def test_gradients_pass_gradcheck():
    x, weight, residual = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (5,), (3, 5)))
    for function in (rms_norm, rms_norm_reference):
        assert torch.autograd.gradcheck(lambda x, w, r, f=function: f(x, w, eps=1e-2, residual=r), (x, weight, residual))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_the_eager_references_error(dtype):
    x, weight = torch.randn(300, 64).to(dtype), torch.randn(64).to(dtype)
    mine, eager = (results(f, x, weight, dtype=dtype) for f in (rms_norm, rms_norm_reference))
    truth = results(rms_norm_reference, x, weight)
    for received, plain, exact in zip(mine, eager, truth, strict=True):
        allowed = 2 * (plain - exact).abs().max() + 2 * torch.finfo(dtype).eps * exact.abs().max()
        assert (received - exact).abs().max() <= allowed


def test_weight_gradient_is_summed_in_fp32():
    x = torch.ones(4096, 8, dtype=torch.bfloat16)
    weight = torch.ones(8, dtype=torch.bfloat16, requires_grad=True)
    rms_norm(x, weight).backward(torch.full_like(x, 1.0))
    assert (weight.grad == 4096).all()


def test_non_contiguous_input_gives_the_same_values_and_gradients():
    x, weight = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    mine, truth = results(rms_norm, x.t(), weight), results(rms_norm, x.t().contiguous(), weight)
    for received, expected in zip(mine, truth, strict=True):
        torch.testing.assert_close(received, expected, rtol=0, atol=1e-14)


def test_a_zero_row_stays_zero_with_a_finite_gradient():
    x = torch.zeros(2, 4, requires_grad=True)
    y = rms_norm(x, torch.ones(4))
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((2, 4), 1e3))
    assert (y == 0).all()


def test_bad_calls_are_refused():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"weight \[3\].*expected \[4\]"):
        rms_norm(x, torch.ones(3))
    with pytest.raises(ValueError, match=r"residual.*float64.*float32"):
        rms_norm(x, torch.ones(4), residual=x.double())
    with pytest.raises(ValueError, match="meta"):
        rms_norm(x.to("meta"), torch.ones(4, device="meta"))
