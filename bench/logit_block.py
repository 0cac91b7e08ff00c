"""The memory-bound steps on one block of logits, in bytes a second, beside a copy of the same block.

Run     warpline bench logit_block [--quick] [--out DIR]
Expect  a row per step. Bytes: a statistics step reads the block (4 an element), a gradient reads it and writes 2 (bf16, CUDA)
        or 4; the copy reads and writes 4. The steps have no peers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..kernels.logit_block import (
    Coefficient,
    Divergence,
    LogitMap,
    PairStatistic,
    Side,
    Statistic,
    Targets,
    Wanted,
    divergence_reference,
    logit_block,
    logit_block_reference,
    new_pair_statistics,
    new_statistics,
)
from ..kernels.vocabulary_sweep import BLOCKING
from .measure import Candidate, Case, Inputs
from .streaming import copy_of

# step → bytes an element, without what a gradient writes.
STEPS = {
    "statistics, logprob": 4, "statistics, entropy": 4, "pair statistics, forward KL": 8, "gradient, logprob": 4,
    "divergence gradient, forward KL": 8,
}  # fmt: skip


def steps_on(x: Inputs) -> dict[str, Callable[[], None]]:
    """Calls on one block, whose buffers are in `x` from then on."""
    product, teacher, target = x["product"], x["teacher"], Targets(x["target"], 0)
    device, (rows, columns) = product.device, product.shape
    steps = logit_block(device)
    statistics, picked = x["statistics"], x["picked"] = new_statistics(rows, 1, product)
    pair = x["pair"] = new_pair_statistics(rows, product)
    side, other = Side(product, None, LogitMap()), Side(teacher, None, LogitMap())
    upstream = x["d_target"][:, 0]
    of_logprob, of_divergence, of_teacher = (
        _coefficients(z, a) for z, a in ((product, -upstream), (product, upstream), (teacher, upstream))
    )
    scratch = product.clone()
    out = x["out"] = scratch.view(torch.bfloat16)[:, :columns] if is_narrow(device) else scratch
    over, kl = Side(scratch, None, LogitMap()), Divergence("forward_kl")
    # A gradient is written over its product: what a second call reads is finite, and costs the same.
    calls: tuple[Callable[[], None], ...] = (
        lambda: steps.statistics(side, target, statistics, picked, Wanted()),
        lambda: steps.statistics(side, target, statistics, picked, Wanted(entropy=True)),
        lambda: steps.pair_statistics(side, other, kl, pair),
        lambda: steps.gradient(over, of_logprob, target, x["d_target"], Wanted(), out),
        lambda: steps.divergence_gradient(over, other, kl, of_divergence, of_teacher, out),
    )
    return dict(zip(STEPS, calls, strict=True))


def _coefficients(z: Tensor, upstream: Tensor) -> Tensor:
    """[6, R] of a gradient step on a block that is the whole vocabulary."""
    table = torch.zeros(len(Coefficient), len(z), dtype=z.dtype, device=z.device)
    table[Coefficient.MAX] = z.amax(1)
    table[Coefficient.LOG_SUM] = z.logsumexp(1) - table[Coefficient.MAX]
    table[Coefficient.A] = upstream
    return table


def is_narrow(device: torch.device) -> bool:
    """Whether gradients are written in bf16."""
    return device.type == "cuda"


def _part(step: str, result: object, x: Inputs) -> list[Tensor]:
    """What one call has left in its buffers."""
    statistics, pair = x["statistics"], x["pair"]
    if "gradient" in step:
        return [x["out"]]
    if step == "statistics, logprob":
        return [x["picked"][:, 0] - statistics[Statistic.MAX] - statistics[Statistic.SUM].log()]
    if step == "statistics, entropy":
        return [statistics[Statistic.SUM].log() - statistics[Statistic.SUM_Z] / statistics[Statistic.SUM]]
    student_sum, teacher_sum = pair[PairStatistic.SUM], pair[PairStatistic.TEACHER_SUM]
    return [pair[PairStatistic.CROSS] / teacher_sum + (student_sum / teacher_sum).log()]


def reference(step: str, x: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """The same by `logit_block_reference` and `divergence_reference`, on the block as the whole vocabulary; a gradient that is
    not fp64's in the dtype that the step writes."""
    product, teacher, d_target = (x[name].to(dtype) for name in ("product", "teacher", "d_target"))
    product = product.detach().requires_grad_()
    student, target = Side(product, None, LogitMap()), Targets(x["target"], 0)
    if "divergence" in step or "KL" in step:
        found = divergence_reference(student, Side(teacher, None, LogitMap()), Divergence("forward_kl"))
        gradient = torch.autograd.grad((found * d_target[:, 0]).sum(), product)[0]
    else:
        values, gradient = logit_block_reference(student, target, {"logprob": d_target})
        found = values["entropy"] if "entropy" in step else values["logprob"][:, 0]
    if "gradient" not in step:
        return [found.detach()]
    return [gradient.bfloat16() if is_narrow(product.device) and dtype != torch.float64 else gradient]


def inputs_of(rows: int, columns: int, generator: torch.Generator) -> Inputs:
    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=generator.device)

    target = torch.randint(0, columns, (rows, 1), generator=generator, device=generator.device)
    return {"product": random(rows, columns), "teacher": random(rows, columns), "target": target, "d_target": random(rows, 1)}


def _step(name: str, x: Inputs) -> Callable[[], None]:
    return steps_on(x)[name]


def cases(device: torch.device, is_quick: bool) -> Iterator[Case]:
    blocking, name = BLOCKING[device.type], "triton" if device.type == "cuda" else "torch"
    blocks = {"forward's block": (blocking.rows, blocking.columns)}
    blocks["backward's block"] = (blocking.backward_elements // blocking.backward_columns, blocking.backward_columns)
    for block, (rows, columns) in blocks.items():
        for step, read in STEPS.items():
            if ("gradient" in step) != (block == "backward's block"):
                continue  # each step on the block it is given
            moved = rows * columns * (read + ("gradient" in step) * (2 if device.type == "cuda" else 4))
            candidate = Candidate(lambda call: call(), partial(_step, step))
            yield Case(
                step, {"R": rows, "W": columns}, torch.float32, partial(inputs_of, rows, columns),
                {f"warpline {name}": candidate}, partial(reference, step), partial(_part, step),
                flops=4.0 * rows * columns, bytes_moved=float(moved), limits={"copy": copy_of(moved)},
            )  # fmt: skip
