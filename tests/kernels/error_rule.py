"""The house's rule for the error of a kernel, per output and per gradient, judged against fp64."""

from pathlib import Path

import torch


def random(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def far_apart(near: torch.Tensor, strides: tuple[int, ...], folder: Path) -> torch.Tensor:
    """A copy whose rows lie further apart than 32 bits can count, in a sparse file."""
    size = 1 + sum((length - 1) * stride for length, stride in zip(near.shape, strides, strict=True))
    path = folder / "sparse.bin"
    with path.open("wb") as file:
        file.truncate(4 * size)
    return torch.from_file(str(path), shared=True, size=size).as_strided(near.shape, strides).copy_(near)


def results(function, tensors, dtype=None, **options):
    """[outputs…, gradients…] of function(*tensors, **options) under random upstream gradients; None stays None."""
    leaves = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    outputs = function(*leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(9)
    upstream = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, [x for x in leaves if x is not None], upstream)
    return [x.detach() for x in (*outputs, *gradients)]


def check(function, reference, tensors, **options):
    """‖error‖∞ ≤ 2·‖eager's error‖∞ + 2·eps(output)·‖truth‖∞."""
    mine, eager = (results(f, tensors, **options) for f in (function, reference))
    truth = results(reference, tensors, torch.float64, **options)
    for index, (a, e, t) in enumerate(zip(mine, eager, truth, strict=True)):
        assert a.dtype == e.dtype and a.shape == t.shape
        if t.numel():
            error, eager_error = ((x.double() - t).abs().max() for x in (a, e))
            limit = 2 * eager_error + 2 * torch.finfo(a.dtype).eps * t.abs().max()
            assert error <= limit, f"result {index}: error {error:.3g}, allowed {limit:.3g}"
