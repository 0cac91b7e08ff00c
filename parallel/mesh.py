"""The mesh: which processes take part. Today it has one axis, `replicate` (every process holds the whole model).

Axis: `replicate`, the data-parallel one. Sharded: nothing; each rank takes its share of a step's work items.
Collectives: one all-reduce of the gradients per update (4 bytes · parameters, fp32), and one of a few scalars per step.
This is the only file that reads RANK and WORLD_SIZE.
"""

import datetime
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = datetime.timedelta(seconds=100)  # a rank that waits longer for another ends the job


@dataclass(frozen=True)
class Mesh:
    """This process among `size` replicas; `device` is where it computes."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Iterable[float]) -> list[float]:
        """Sums over ranks, in fp64, of a few host numbers; every rank receives the same bits."""
        values = list(values)
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add every parameter's gradient over ranks, in place, in one flat all-reduce (a missing gradient counts as zero)."""
        if self.size == 1:
            return
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()

    def share(self, items: list) -> list:
        """This rank's part of a step's work items: every `size`-th."""
        return items[self.rank :: self.size]

    def barrier(self) -> None:
        if self.size > 1:
            self.sum([0.0])


def start_mesh(replicate: int) -> Mesh:
    """Join the processes that torchrun started (or be alone); `replicate` must be their number."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if replicate != size:
        raise ValueError(
            f"parallel.replicate is {replicate} but {size} process(es) were started; "
            f"set parallel.replicate={size} or start torchrun with {replicate}"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")
    if size > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return Mesh(rank, size, device)


def end_mesh() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
