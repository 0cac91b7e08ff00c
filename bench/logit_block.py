"""The memory-bound steps on one block of logits, in bytes a second, beside a copy of the same block.

Run     python -m warpline.bench.logit_block [--quick] [--out DIR]
Writes  DIR/<machine>/logit_block.json
Expect  a row per step. Bytes: a statistics step reads the block (4 an element), a gradient reads it and writes 2 (bf16, CUDA)
        or 4; the copy reads and writes 4.
"""

from __future__ import annotations

from collections.abc import Callable

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
from .measure import Row, begin, interleaved


def steps_on(rows: int, columns: int, device: torch.device) -> dict[str, tuple[Callable[[], object], int]]:
    """name → (call, bytes an element)."""
    steps = logit_block(device)
    product, teacher = (torch.randn(rows, columns, device=device) for _ in range(2))
    target = Targets(torch.randint(0, columns, (rows, 1), device=device), 0)
    statistics, picked = new_statistics(rows, 1, product)
    pair = new_pair_statistics(rows, product)
    table = torch.zeros(len(Coefficient), rows, device=device)
    table[Coefficient.LOG_SUM], table[Coefficient.A] = 10.0, 1.0
    d_target = torch.randn(rows, 1, device=device)
    side, other = Side(product, None, LogitMap()), Side(teacher, None, LogitMap())
    scratch = torch.empty_like(product)
    is_narrow = device.type == "cuda"
    out = scratch.view(torch.bfloat16)[:, :columns] if is_narrow else scratch
    written, over = (2 if is_narrow else 4), Side(scratch, None, LogitMap())
    kl = Divergence("forward_kl")
    scratch.copy_(product)
    return {
        "copy": (lambda: scratch.copy_(product), 8),
        "statistics, logprob": (lambda: steps.statistics(side, target, statistics, picked, Wanted()), 4),
        "statistics, entropy": (lambda: steps.statistics(side, target, statistics, picked, Wanted(entropy=True)), 4),
        "pair statistics, forward KL": (lambda: steps.pair_statistics(side, other, kl, pair), 8),
        # The gradient is written over its product: what a second call reads is finite, and costs the same.
        "gradient, logprob": (lambda: steps.gradient(over, table, target, d_target, Wanted(), out), 4 + written),
        "divergence gradient, forward KL": (
            lambda: steps.divergence_gradient(over, other, kl, table, table, out), 8 + written),
    }  # fmt: skip


def main() -> None:
    device, report, is_quick = begin("logit_block", __doc__, "a fifth of a second a step")
    blocking = BLOCKING[device.type]
    blocks = {"forward's block": (blocking.rows, blocking.columns)}
    blocks["backward's block"] = (blocking.backward_elements // blocking.backward_columns, blocking.backward_columns)
    for name, (rows, columns) in blocks.items():
        steps = steps_on(rows, columns, device)
        times = interleaved({step: call for step, (call, _) in steps.items()}, device, 0.2 if is_quick else 1.0)
        for step, (median, spread) in times.items():
            moved = rows * columns * steps[step][1] / median / 1e6
            shape = {"R": rows, "W": columns}
            report.add(Row(name, step, shape, "float32", median, spread, gbytes_per_second=moved))


if __name__ == "__main__":
    main()
