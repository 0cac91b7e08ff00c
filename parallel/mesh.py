"""The mesh: every process has a place on five axes, and this file alone reads RANK and WORLD_SIZE.

Axes, outermost first: `pipeline` (layers), `replicate` and `shard` (a step's work items; `shard` also cuts every parameter),
`context` (tokens of a packed row), `tensor` (heads, MLP width, vocabulary). Ranks that differ in `tensor` alone are neighbours.

| collective                          | ranks            | bytes a rank                          |
|-------------------------------------|------------------|---------------------------------------|
| `sum`, `max`: a few host numbers    | all, n           | 2·(n−1)/n·8 a number                  |
| `gather`: what ranks have, as JSON  | of some axes     | the longest one's, from every rank    |

A collective that waits longer than the timeout ends its job; `watch.py` gives the rank to blame its name.
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh

from .watch import Watch

TOGETHER = ("pipeline", "context", "tensor")  # the ranks that compute the same work items together


class Sizes(NamedTuple):
    """Ranks along each axis, outermost first."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def product(self) -> int:
        return math.prod(self)

    def __str__(self) -> str:
        given = [f"{axis}={size}" for axis, size in self._asdict().items() if size > 1]
        return ", ".join(given) or "one process"


ALONE = Sizes()


def nearest_sizes(wanted: Sizes, num_ranks: int, is_legal: Callable[[Sizes], bool] = lambda sizes: True) -> Sizes | None:
    """The legal sizes of this product that change the fewest axes, then change them least (in octaves), data axes first."""
    divisors = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
    best: tuple[Any, Sizes | None] = ((math.inf,), None)
    for four in itertools.product(divisors, repeat=4):
        rest = num_ranks // math.prod(four) if num_ranks % math.prod(four) == 0 else 0
        sizes = Sizes(four[0], rest, *four[1:])
        if not rest or not is_legal(sizes):
            continue
        changes = [abs(math.log2(size / old)) for size, old in zip(sizes, wanted, strict=True)]
        num_model_changes = sum(change > 0 for axis, change in enumerate(changes) if axis not in (1, 2))
        best = min(best, ((num_model_changes, sum(change > 0 for change in changes), sum(changes)), sizes), key=lambda x: x[0])
    return best[1]


def problem_of(sizes: Sizes, model: Any, attention: str = "ring", stages_per_rank: int = 1) -> str | None:
    """Why a decoder of this configuration cannot lie on these axes, or None."""
    over = f"context={sizes.context}" + (f" and tensor={sizes.tensor}" if sizes.tensor > 1 else "")
    stages = f"pipeline={sizes.pipeline}" + (f" of {stages_per_rank} stages a rank" if stages_per_rank > 1 else "")
    checks = (
        (model.num_heads % sizes.tensor == 0, f"tensor={sizes.tensor} does not divide its {model.num_heads} query heads"),
        (model.mlp_width % sizes.tensor == 0, f"tensor={sizes.tensor} does not divide its MLP's width {model.mlp_width}"),
        (model.vocab_size >= sizes.tensor, f"tensor={sizes.tensor} exceeds its {model.vocab_size} tokens"),
        (
            sizes.pipeline == 1 or model.num_layers >= sizes.pipeline * stages_per_rank,
            f"{stages} exceeds its {model.num_layers} layers",
        ),
        (
            attention != "ulysses" or model.num_heads % (sizes.tensor * sizes.context) == 0,
            f"attention='ulysses' cuts heads by {over}, which does not divide its {model.num_heads} query heads",
        ),
    )
    return next((problem for is_fine, problem in checks if not is_fine), None)


def check_sizes(sizes: Sizes, model: Any, attention: str = "ring", stages_per_rank: int = 1) -> None:
    """Refuses a layout that the model cannot have, naming the nearest that it can."""
    problem = problem_of(sizes, model, attention, stages_per_rank)
    if problem:
        nearest = nearest_sizes(
            sizes, sizes.product, lambda other: problem_of(other, model, attention, stages_per_rank) is None
        )
        raise ValueError(f"[parallel] {sizes} does not fit the model: {problem}; the nearest legal layout is {nearest}")


@dataclass(frozen=True)
class Mesh:
    """This process's place. `device` is where it computes; `watch` is None in a process that is alone."""

    rank: int
    sizes: Sizes
    device: torch.device
    timeout: datetime.timedelta = datetime.timedelta(seconds=100)
    watch: Watch | None = None
    groups: dict[tuple[str, ...], dist.ProcessGroup] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.sizes.product

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @cached_property
    def place(self) -> Sizes:
        """Where this rank stands on each axis."""
        return Sizes(*(int(x) for x in np.unravel_index(self.rank, self.sizes)))

    @cached_property
    def data_rank(self) -> int:
        """Which share of a step's work items is this rank's, of `num_data`."""
        return self.place.replicate * self.sizes.shard + self.place.shard

    @property
    def num_data(self) -> int:
        return self.sizes.replicate * self.sizes.shard

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for the group that computes its work items together."""
        return self.place.pipeline == self.place.context == self.place.tensor == 0

    def ranks(self, *axes: str) -> list[int]:
        """The ranks that differ from this one on these axes alone, in order."""
        index = tuple(slice(None) if axis in axes else getattr(self.place, axis) for axis in Sizes._fields)
        return np.arange(self.size).reshape(self.sizes)[index].reshape(-1).tolist()

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """The process group of `ranks(*axes)`; None where that is this rank alone. Every rank of the mesh must ask for it."""
        ranks = self.ranks(*axes)
        if len(ranks) == 1:
            return None
        if axes not in self.groups:
            self.groups[axes] = self.new_group(ranks)
        return self.groups[axes]

    def new_group(
        self, ranks: Sequence[int], backend: str | None = None, timeout: datetime.timedelta | None = None
    ) -> dist.ProcessGroup:
        """A group of these ranks, made by them alone."""
        timeout = timeout or self.timeout
        group = dist.new_group(list(ranks), timeout=timeout, backend=backend, use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        return group

    def shard_mesh(self) -> DeviceMesh | None:
        """What FSDP cuts parameters over: `shard` and `context` as one axis, behind `replicate` where that is more than 1."""
        if self.sizes.shard == 1:
            return None
        shard = self.group("shard", "context")
        assert shard is not None
        ranks = self.ranks("replicate", "shard", "context")
        if self.sizes.replicate == 1:
            return DeviceMesh.from_group(shard, self.device.type, mesh=ranks, mesh_dim_names=("shard",))
        replicate = self.group("replicate")
        assert replicate is not None
        grid = torch.tensor(ranks).view(self.sizes.replicate, -1)
        return DeviceMesh.from_group(
            [replicate, shard], self.device.type, mesh=grid, mesh_dim_names=("replicate", "shard")
        )  # fmt: skip

    def sum(self, values: Iterable[float]) -> list[float]:
        """Sums over all ranks, in fp64, of a few host numbers; every rank receives the same bits."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def sum_data(self, values: Iterable[float]) -> list[float]:
        """`sum` of numbers about work items, which all ranks of a model group have alike."""
        values = list(values)
        return self.sum(values if self.leads else [0.0] * len(values))

    def max(self, values: Iterable[float]) -> list[float]:
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: Iterable[float], operation: Any) -> list[float]:
        values = list(values)
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, operation)
        return total.tolist()

    def share(self, items: list) -> list:
        """This rank's part of a step's work items: every `num_data`-th."""
        return self.deal(items, "replicate", "shard")

    def shares(self, items: list) -> list[list]:
        """Every data rank's part."""
        return [items[rank :: self.num_data] for rank in range(self.num_data)]

    def deal(self, items: list, *axes: str) -> list:
        """Every n-th of the items, over the n ranks that differ on these axes alone."""
        ranks = self.ranks(*axes)
        return items[ranks.index(self.rank) :: len(ranks)]

    def gather(self, values: list, *axes: str) -> list:
        """The inverse of `deal`: what every one of these ranks has for its part, in the items' order. Travels as JSON."""
        group = self.group(*axes)
        if group is None:
            return values
        data = np.frombuffer(json.dumps(values).encode(), dtype=np.uint8).copy()
        lengths = _all_gather(torch.tensor([len(data)], device=self.device), group)
        padded = torch.zeros(int(lengths.max()), dtype=torch.uint8, device=self.device)
        padded[: len(data)] = torch.from_numpy(data).to(self.device)
        rows = _all_gather(padded, group).cpu().numpy()
        parts = [json.loads(row[: int(length)].tobytes()) for row, length in zip(rows, lengths, strict=True)]
        whole: list = [None] * sum(map(len, parts))
        for index, part in enumerate(parts):
            whole[index :: len(parts)] = part
        return whole

    def barrier(self) -> None:
        if self.size > 1:
            self.sum([0.0])

    def on_first(self, work: Callable[[], Any]) -> None:
        """The first rank works, for as long as it likes; the others wait for it. What it raises ends the others as well."""
        if self.watch is None:
            work()
            return
        turn = self.watch.next_turn()
        if not self.is_first:
            self.watch.wait_for(turn)
            return
        outcome = "failed"
        try:
            work()
            outcome = "done"
        finally:
            self.watch.store.set(turn, outcome)

    def note(self, where: str) -> None:
        """Say where this rank is ("sft step 12"), for whoever finds it silent."""
        if self.watch is not None:
            self.watch.where = where


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[…] of every rank to [ranks, …]."""
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x, group=group)
    return torch.stack(parts)


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def this_device() -> torch.device:
    """Where this process computes."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")


def start_mesh(sizes: Sizes = ALONE, timeout_seconds: float = 100.0) -> Mesh:
    """Join the processes that torchrun started (or be alone); the sizes must multiply to their number."""
    size, rank = num_processes(), int(os.environ.get("RANK", "0"))
    if sizes.product != size:
        nearest = nearest_sizes(sizes, size)
        raise ValueError(
            f"[parallel] {sizes} is {sizes.product} rank(s) but {size} process(es) were started; "
            f"start torchrun with {sizes.product}, or set the nearest legal layout: {nearest}"
        )
    device, timeout = this_device(), datetime.timedelta(seconds=timeout_seconds)
    if size == 1:
        return Mesh(rank, sizes, device, timeout)
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    mesh = Mesh(rank, sizes, device, timeout, _watch(rank, size, timeout))
    for axes in (TOGETHER, Sizes._fields):
        mesh.group(*axes)  # made while all are there: a rank that dies later breaks a connection and is missed at once
    return mesh


def other_layout(mesh: Mesh, sizes: Sizes) -> Mesh:
    """The same processes on other axes (a teacher's)."""
    if sizes.product != mesh.size:
        raise ValueError(f"received {sizes} for {mesh.size} processes; expected a layout of as many: change it")
    return Mesh(mesh.rank, sizes, mesh.device, mesh.timeout, mesh.watch)


def _watch(rank: int, size: int, timeout: datetime.timedelta) -> Watch:
    """Its thread has a connection of its own: a store's client serves one call at a time."""
    attempt = f"warpline/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    stores = [PrefixStore(attempt, TCPStore(host, port, is_master=False, timeout=timeout)) for _ in range(2)]
    return Watch(rank, size, timeout, *stores)


def end_mesh(mesh: Mesh | None) -> None:
    if mesh is not None and mesh.watch is not None:
        mesh.watch.stop()
    if dist.is_initialized():
        dist.destroy_process_group()
