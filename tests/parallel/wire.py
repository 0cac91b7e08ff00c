"""Stands before torch.distributed in every module that speaks through it: counts what this rank sends, and takes a call away.

A call is known by its chain: the functions of ours (and of FSDP and torch's pipelines) that led to it, innermost first, each
with the line of its source. One that is removed still takes place, so that no rank waits for another, but leaves what an author
who forgot it would have: a sum is this rank's part, a gathering this rank's own part in every place, what is received is 0.
"""

import linecache
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.distributed.pipelining.stage import PipelineStage

from warpline.kernels import sequence_sum, vocabulary_sweep
from warpline.parallel import context, gather, mesh, model, pipeline, tensor

SPEAKERS = (sequence_sum, vocabulary_sweep, context, gather, mesh, model, pipeline, tensor, _fsdp_collectives)
OURS = ("warpline.", "torch.distributed.fsdp.", "torch.distributed.pipelining.")


class Call(NamedTuple):
    """`sent`: bytes that leave this rank (all-reduces as a reduce-scatter and an all-gather; a broadcast's, on every rank)."""

    kind: str
    chain: str
    sent: float

    def has(self, *parts: str) -> bool:
        return all(part in self.chain for part in parts)


def chain() -> str:
    """ "file.function: line", of every frame of ours above the wire."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(OURS):
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            found.append(f"{module.rpartition('.')[2]}.{frame.f_code.co_qualname}: {line}")
        frame = frame.f_back
    return "\n".join(found)


class Wire:
    """Active from its making until `cut`."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.is_removed: Callable[[Call], bool] = lambda call: False
        self.undo: list[tuple[Any, str, Any]] = []
        for module in SPEAKERS:
            self._replace(module, "dist", _Front(self._wrapped(module is pipeline)))
        for name in ("get_fwd_send_ops", "get_bwd_send_ops"):
            self._replace(PipelineStage, name, self._counting(getattr(PipelineStage, name)))
        for name in ("_retrieve_recv_activations", "_retrieve_recv_grads"):
            self._replace(PipelineStage, name, self._zeroing(getattr(PipelineStage, name)))

    def _replace(self, owner: Any, name: str, new: Any) -> None:
        self.undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, new)

    def cut(self) -> None:
        for owner, name, old in reversed(self.undo):
            setattr(owner, name, old)

    def note(self, kind: str, sent: float, where: str = "") -> bool:
        """Counts a call; whether it is removed."""
        call = Call(kind, f"{where}\n{chain()}".strip(), sent)
        self.calls.append(call)
        return self.is_removed(call)

    # ---- torch.distributed's functions ----

    def _wrapped(self, sends_alone: bool) -> dict[str, Any]:
        wrapped = {
            "all_reduce": self._all_reduce, "all_gather": self._all_gather, "broadcast": self._broadcast,
            "all_to_all_single": self._all_to_all, "all_gather_into_tensor": self._gather_into,
            "reduce_scatter_tensor": self._reduce_scatter,
        }  # fmt: skip
        if hasattr(dist, "all_gather_single"):
            wrapped |= {"all_gather_single": self._gather_into, "reduce_scatter_single": self._reduce_scatter}
        return wrapped | ({"isend": self._isend, "recv": self._recv} if sends_alone else {"batch_isend_irecv": self._batch})

    def _all_reduce(self, x: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, **others: Any) -> Any:
        size = dist.get_world_size(group)
        own = x.clone()
        removed = self.note("all_reduce", 2 * (size - 1) / size * x.nbytes)
        return self._done(dist.all_reduce(x, op, group=group, **others), removed, lambda: x.copy_(own))

    def _all_gather(self, parts: list[torch.Tensor], x: torch.Tensor, group: Any = None) -> Any:
        removed = self.note("all_gather", (len(parts) - 1) * x.nbytes, str(x.dtype))
        return self._done(dist.all_gather(parts, x, group=group), removed, lambda: [part.copy_(x) for part in parts])

    def _gather_into(self, out: torch.Tensor, x: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        own, size = x.clone(), dist.get_world_size(group)
        removed = self.note("all_gather", (size - 1) * x.nbytes, str(x.dtype))
        work = _single("all_gather")(out, x, group=group, async_op=async_op)
        return self._done(work, removed, lambda: out.view(size, -1).copy_(own.view(1, -1)))

    def _reduce_scatter(
        self, output: torch.Tensor, input: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        own = input.reshape(dist.get_world_size(group), -1)[dist.get_rank(group)].clone()
        removed = self.note("reduce_scatter", (dist.get_world_size(group) - 1) * output.nbytes)
        work = _single("reduce_scatter")(output, input, op=op, group=group, async_op=async_op)
        return self._done(work, removed, lambda: output.view(-1).copy_(own))

    def _all_to_all(self, received: torch.Tensor, sent: torch.Tensor, counts: Any, sent_counts: Any, group: Any = None) -> Any:
        rank, row = dist.get_rank(group), sent[:1].nbytes
        removed = self.note("all_to_all", row * (sum(sent_counts) - sent_counts[rank]))

        def forget() -> None:
            own = sent[sum(sent_counts[:rank]) :][: sent_counts[rank]]
            received.zero_()[sum(counts[:rank]) :][: counts[rank]] = own

        return self._done(dist.all_to_all_single(received, sent, counts, sent_counts, group=group), removed, forget)

    def _broadcast(self, x: torch.Tensor, group: Any, group_src: int) -> Any:
        removed = self.note("broadcast", x.nbytes)
        is_source = dist.get_rank(group) == group_src
        return self._done(dist.broadcast(x, group=group, group_src=group_src), removed and not is_source, x.zero_)

    def _batch(self, operations: list[dist.P2POp]) -> Any:
        removed = self.note("send", sum(o.tensor.nbytes for o in operations if o.op is dist.isend))
        works = dist.batch_isend_irecv(operations)
        if not removed:
            return works
        for work in works:
            work.wait()
        for operation in operations:
            if operation.op is dist.irecv:
                operation.tensor.zero_()
        return []

    def _isend(self, x: torch.Tensor, **where: Any) -> Any:
        self.note("send", x.nbytes)
        return dist.isend(x, **where)

    def _recv(self, x: torch.Tensor, **where: Any) -> Any:
        removed = self.note("receive", 0)
        return self._done(dist.recv(x, **where), removed, x.zero_)

    @staticmethod
    def _done(work: Any, removed: bool, forget: Callable[[], Any]) -> Any:
        if removed:
            if isinstance(work, dist.Work):
                work.wait()
            with torch.no_grad():
                forget()
        return work

    # ---- The pipelines' own ----

    def _counting(self, plain: Any) -> Any:
        def send_ops(stage: Any, chunk: int) -> Any:
            operations = plain(stage, chunk)
            if operations:
                self.note("send", sum(o.tensor.nbytes for o in operations), plain.__qualname__)
            return operations

        return send_ops

    def _zeroing(self, plain: Any) -> Any:
        def retrieve(stage: Any, chunk: int) -> Any:
            found = plain(stage, chunk)
            if found and self.note("receive", 0, plain.__qualname__):
                for x in found:
                    x.detach().zero_()
            return found

        return retrieve


class _Front:
    """torch.distributed, but for some of its functions."""

    def __init__(self, instead: dict[str, Any]):
        self.instead = instead

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["instead"].get(name) or getattr(dist, name)


def _single(name: str) -> Any:
    """all_gather_into_tensor and reduce_scatter_tensor under their names from torch 2.13 on, where it has them."""
    old = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}[name]
    return getattr(dist, f"{name}_single", None) or getattr(dist, old)
