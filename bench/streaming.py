"""Memory-bound operations: their forward and their backward as cases, in bytes a second beside a plain copy of as many bytes.

Run     by `rms_norm`, `rope` and `swiglu`
Expect  a copy of the same bytes in every comparison; the backward alone is timed, on outputs made beforehand
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .measure import Candidate, Case, Inputs

Function = Callable[..., Any]


@dataclass
class Streaming:
    """A memory-bound operation at one shape: functions of its inputs by name, ours first, and a reference; the bytes that its
    forward and its backward need to move, and the FLOPs that a formula written out takes (an exp is one)."""

    operation: str
    shape: dict[str, int]
    dtype: torch.dtype
    sizes: tuple[tuple[int, ...], ...]  # of the random inputs
    functions: Mapping[str, Function]
    reference: Function
    forward_bytes: int
    backward_bytes: int
    forward_flops: int
    backward_flops: int
    absent: dict[str, str]


def cases_of(problem: Streaming) -> Iterator[Case]:
    def inputs(generator: torch.Generator) -> Inputs:
        device = generator.device
        names = [f"x{number}" for number in range(len(problem.sizes))]
        made = [torch.randn(size, generator=generator, device=device).to(problem.dtype) for size in problem.sizes]
        x: Inputs = {name: value.requires_grad_() for name, value in zip(names, made, strict=True)}
        upstream = tuple_of(problem.reference(*(value.detach() for value in made)))
        for number, y in enumerate(upstream):
            x[f"d{number}"] = torch.randn(y.shape, generator=generator, device=device).to(problem.dtype)
        return x

    def reference(x: Inputs, dtype: torch.dtype, kind: str) -> list[Tensor]:
        leaves = [value.detach().to(dtype).requires_grad_() for value in _some(x, "x")]
        made = tuple_of(problem.reference(*leaves))
        if kind == "forward":
            return [y.detach() for y in made]
        return list(torch.autograd.grad(made, leaves, [d.to(dtype) for d in _some(x, "d")]))

    kinds = (
        ("forward", _forward, problem.forward_bytes, problem.forward_flops),
        ("backward", _backward, problem.backward_bytes, problem.backward_flops),
    )
    for kind, make, size, flops in kinds:
        yield Case(
            f"{problem.operation}, {kind}", problem.shape, problem.dtype, inputs,
            {name: make(function) for name, function in problem.functions.items()}, partial(reference, kind=kind),
            flops=float(flops), bytes_moved=float(size), limits={"copy": copy_of(size)}, absent=problem.absent,
        )  # fmt: skip


def _forward(function: Function) -> Candidate:
    return Candidate(lambda x: [y.detach() for y in tuple_of(function(*_some(x, "x")))])


def _backward(function: Function) -> Candidate:
    def prepare(x: Inputs) -> tuple[tuple[Tensor, ...], list[Tensor], list[Tensor]]:
        leaves = [value.detach().requires_grad_() for value in _some(x, "x")]
        return tuple_of(function(*leaves)), leaves, _some(x, "d")

    return Candidate(gradients, prepare)


def gradients(state: tuple[Any, list[Tensor], Any]) -> tuple[Tensor, ...]:
    """Of (outputs, inputs, upstream), on a graph that stays."""
    outputs, leaves, upstream = state
    return torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)


def copy_of(size: int) -> Candidate:
    """A copy that reads and writes `size` bytes in all."""

    def prepare(x: Inputs) -> tuple[Tensor, Tensor]:
        source = torch.randn(size // 8, device=next(iter(x.values())).device)
        return torch.empty_like(source), source

    return Candidate(lambda pair: pair[0].copy_(pair[1]), prepare)


def _some(x: Inputs, letter: str) -> list[Tensor]:
    return [value for name, value in x.items() if name[0] == letter]


def tuple_of(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)
