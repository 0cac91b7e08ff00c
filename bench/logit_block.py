"""The memory-bound steps on one block of logits, in bytes a second, beside a copy of the same block.

Run     warpline bench logit_block [--quick] [--out DIR]
Expect  a row per step. Bytes: a statistics step reads the block (4 an element), a gradient reads it and writes 2 (bf16, CUDA)
        or 4; the copy reads and writes 4. The steps have no peers; their values are checked by the tests of `logit_block` and,
        here, by the benches of the losses made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ..kernels.logit_block import (
    Coefficient,
    Divergence,
    LogitMap,
    Side,
    Targets,
    Wanted,
    logit_block,
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


def steps_on(x: Inputs) -> dict[str, Callable[[], object]]:
    """Calls on one block, with buffers of their own."""
    product, teacher = x["product"], x["teacher"]
    device, (rows, columns) = product.device, product.shape
    steps = logit_block(device)
    target = Targets(x["target"], 0)
    statistics, picked = new_statistics(rows, 1, product)
    pair = new_pair_statistics(rows, product)
    table = torch.zeros(len(Coefficient), rows, device=device)
    table[Coefficient.LOG_SUM], table[Coefficient.A] = 10.0, 1.0
    side, other = Side(product, None, LogitMap()), Side(teacher, None, LogitMap())
    scratch = product.clone()
    is_narrow = device.type == "cuda"
    out = scratch.view(torch.bfloat16)[:, :columns] if is_narrow else scratch
    over, kl = Side(scratch, None, LogitMap()), Divergence("forward_kl")
    # A gradient is written over its product: what a second call reads is finite, and costs the same.
    calls: tuple[Callable[[], object], ...] = (
        lambda: steps.statistics(side, target, statistics, picked, Wanted()),
        lambda: steps.statistics(side, target, statistics, picked, Wanted(entropy=True)),
        lambda: steps.pair_statistics(side, other, kl, pair),
        lambda: steps.gradient(over, table, target, x["d_target"], Wanted(), out),
        lambda: steps.divergence_gradient(over, other, kl, table, table, out),
    )
    return dict(zip(STEPS, calls, strict=True))


def inputs_of(rows: int, columns: int, generator: torch.Generator) -> Inputs:
    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=generator.device)

    target = torch.randint(0, columns, (rows, 1), generator=generator, device=generator.device)
    return {"product": random(rows, columns), "teacher": random(rows, columns), "target": target, "d_target": random(rows, 1)}


def _step(name: str, x: Inputs) -> Callable[[], object]:
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
                {f"warpline {name}": candidate},
                flops=4.0 * rows * columns, bytes_moved=float(moved), limits={"copy": copy_of(moved)},
            )  # fmt: skip
