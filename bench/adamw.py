"""One AdamW step of fp32 parameters: torch's implementations, apex's where it is found, beside a plain copy of as many bytes.

Run     warpline bench adamw [--quick] [--out DIR]
Expect  a row per candidate and model; P parameters in L layers of a Llama's matrices. A step reads parameter, gradient and both
        moments and writes all but the gradient: 28 bytes a parameter. The stages use torch's fused step, which stands first; a
        kernel of ours has a place here once it beats that on a GPU, which is not measured yet. The error is that of the
        parameters after one step.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.backend import cuda_package_absent
from .measure import Candidate, Case, Inputs
from .streaming import copy_of

BYTES_PER_PARAMETER = 28
OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}


def inputs_of(width: int, layers: int, generator: torch.Generator) -> Inputs:
    """A Llama's matrices and norms, and their gradients, end to end in two vectors."""
    size = sum(torch.Size(shape).numel() for shape in parameter_shapes(width, layers))
    return {name: torch.randn(size, generator=generator, device=generator.device) for name in ("parameters", "gradients")}


def parameter_shapes(width: int, layers: int) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(width, width), (width // 4, width), (width // 4, width), (width, width)]
    shapes += [(7 * width // 2, width), (7 * width // 2, width), (width, 7 * width // 2), (width,), (width,)]
    return shapes * layers


def parameters(x: Inputs, width: int, layers: int, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """The candidate's own copy, cut into a model's shapes."""
    shapes = parameter_shapes(width, layers)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    found = []
    for values, d, shape in zip(x["parameters"].split(sizes), x["gradients"].split(sizes), shapes, strict=True):
        parameter = torch.nn.Parameter(values.to(dtype, copy=True).view(shape))
        parameter.grad = d.to(dtype, copy=True).view(shape)
        found.append(parameter)
    return found


def flat(tensors: list[torch.nn.Parameter]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def cases(device: torch.device, is_quick: bool) -> Iterator[Case]:
    models = ((2048, 16), (4096, 8)) if device.type == "cuda" else ((128, 4), (512, 4))
    makers: dict[str, Callable[..., Any]] = {
        "warpline (torch fused)": partial(torch.optim.AdamW, fused=True, **OPTIONS),
        "torch foreach": partial(torch.optim.AdamW, foreach=True, **OPTIONS),
        "torch for-loop": partial(torch.optim.AdamW, foreach=False, **OPTIONS),
    }
    reason = cuda_package_absent("apex", "apex.optimizers")(device)
    if reason is None:
        apex: Any = importlib.import_module("apex.optimizers")
        makers["apex FusedAdam"] = partial(apex.FusedAdam, adam_w_mode=True, **OPTIONS)
    for width, layers in models[:1] if is_quick else models:
        size = sum(torch.Size(shape).numel() for shape in parameter_shapes(width, layers))
        moved = size * BYTES_PER_PARAMETER
        yield Case(
            "adamw step", {"P": size, "L": layers}, torch.float32, partial(inputs_of, width, layers),
            {name: _step(make, width, layers) for name, make in makers.items()}, partial(_reference, width, layers),
            _first_step, flops=14.0 * size, bytes_moved=float(moved), limits={"copy": copy_of(moved)},
            absent={} if reason is None else {"apex": reason},
        )  # fmt: skip


def _step(make: Callable[..., Any], width: int, layers: int) -> Candidate:
    """What it was after the first step stays beside the optimiser, for the check."""

    def prepare(x: Inputs) -> tuple[Any, list[Tensor]]:
        owned = parameters(x, width, layers)
        optimiser = make(owned)
        optimiser.step()
        return optimiser, [flat(owned) - x["parameters"]]

    def call(state: tuple[Any, list[Tensor]]) -> list[Tensor]:
        state[0].step()
        return state[1]

    return Candidate(call, prepare)


def _first_step(result: Any, _: Inputs) -> list[Tensor]:
    return result


def _reference(width: int, layers: int, x: Inputs, dtype: torch.dtype) -> list[Tensor]:
    owned = parameters(x, width, layers, dtype)
    torch.optim.AdamW(owned, foreach=False, **OPTIONS).step()
    return [flat(owned) - x["parameters"].to(dtype)]
