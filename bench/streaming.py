"""How the benches of memory-bound operations measure: bytes a second of every candidate beside a plain copy of as many bytes.

Run     by `rms_norm`, `rope` and `swiglu`
Writes  DIR/<machine>/<bench>.json
Expect  a copy of the same bytes in every comparison, and the error of ours and of the eager reference against fp64
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .measure import Report, Row, begin, host_microseconds, interleaved, relative_error


@dataclass
class Streaming:
    """A memory-bound operation at one shape: functions of its inputs by name, ours first, and a reference; the bytes that its
    forward and its backward need to move."""

    operation: str
    shape: dict[str, int]
    inputs: list[torch.Tensor]
    functions: Mapping[str, Callable[..., Any]]
    reference: Callable[..., Any]
    forward_bytes: int
    backward_bytes: int


def add_streaming_rows(problem: Streaming, report: Report, seconds: float) -> None:
    """Forward and backward of every function beside a plain copy of as many bytes."""
    inputs, device = [x.detach().requires_grad_() for x in problem.inputs], problem.inputs[0].device
    outputs = {name: _tuple(function(*inputs)) for name, function in problem.functions.items()}
    generator = torch.Generator(device).manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator, device=device).to(y.dtype) for y in next(iter(outputs.values()))]
    name_of_ours, dtype = next(iter(outputs)), str(inputs[0].dtype).removeprefix("torch.")
    errors = _streaming_errors(problem, upstream)

    def backward(name: str) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(outputs[name], inputs, upstream, retain_graph=True)

    forwards = {name: partial(function, *inputs) for name, function in problem.functions.items()}
    backwards = {name: backward(name) for name in problem.functions}
    for kind, calls, size in (("forward", forwards, problem.forward_bytes), ("backward", backwards, problem.backward_bytes)):
        source = torch.randn(size // 8, generator=generator, device=device)
        target = torch.empty_like(source)
        times = interleaved({"copy": partial(target.copy_, source), **calls}, device, seconds)
        copy_rate = size / times["copy"][0] / 1e6
        for name, (median, spread) in times.items():
            is_ours, rate = name == name_of_ours, size / median / 1e6
            report.add(Row(
                f"{problem.operation}, {kind}", name, problem.shape, dtype, median, spread, gbytes_per_second=rate,
                of_copy=rate / copy_rate, host_microseconds=host_microseconds(calls[name], device) if name in calls else None,
                error=errors[0] if is_ours else None, eager_error=errors[1] if is_ours else None,
            ))  # fmt: skip


def _streaming_errors(problem: Streaming, upstream: list[torch.Tensor]) -> tuple[float, float]:
    """(ours, the reference's in the inputs' dtype): the largest relative error of outputs and gradients against fp64."""

    def results(function: Callable[..., Any], dtype: torch.dtype | None) -> list[torch.Tensor]:
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in problem.inputs]
        made = _tuple(function(*leaves))
        d = [u.to(y.dtype) for u, y in zip(upstream, made, strict=True)]
        return [*made, *torch.autograd.grad(made, leaves, d)]

    truth = results(problem.reference, torch.float64)
    pairs = (results(next(iter(problem.functions.values())), None), results(problem.reference, None))
    ours, eager = (max(relative_error(a, t) for a, t in zip(made, truth, strict=True)) for made in pairs)
    return ours, eager


def _tuple(x: Any) -> tuple[torch.Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def run(
    name: str,
    description: str | None,
    shapes: Callable[[bool, bool], Iterable[tuple[int, ...]]],
    problems: Callable[..., Iterable[Streaming]],
) -> None:
    """A bench's command line: `shapes(is_gpu, is_quick)`, and `problems(*shape, device)` of each."""
    device, report, is_quick = begin(name, description, "fewer shapes, a fifth of a second a candidate")
    for sizes in shapes(device.type == "cuda", is_quick):
        for problem in problems(*sizes, device):
            add_streaming_rows(problem, report, 0.2 if is_quick else 1.0)
