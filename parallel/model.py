"""A decoder under any layout: the techniques of this room applied in one order, behind four verbs that no stage looks behind.

`accumulate` leaves gradients of a loss over packed rows, `evaluate` gives what a head computes of them, `reduce_gradients` adds
gradients up over ranks, and `pieces` says which part of which tensor lies here (checkpoints, generation and the gradient norm
need no more). Order: layers over `pipeline`, matrices over `tensor`, then every parameter over `shard` and `context`; where
`shard` is 1, gradients are summed over `replicate` and `context` once an update.

A row is cut over `context` alone. Every rank of a model group (those that differ in `pipeline`, `context`, `tensor`) is given
the same rows; where parameters are sharded, groups with fewer rows take part with empty ones, as its collectives need all.

| collective, once an update, P parameters here    | ranks                     | bytes a rank   |
|--------------------------------------------------|---------------------------|----------------|
| shard = 1: all-reduce of the gradients           | replicate × context = n   | 2·(n−1)/n·P·b  |
| tensor: all-reduce of R replicated ones          | tensor = n                | 2·(n−1)/n·R·b  |
| pipeline, tied: all-reduce of the embedding's    | first and last stage      | V·D·b          |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..kernels.sequence_sum import sequence_sum
from . import pipeline, shard, tensor
from .checkpoint import Piece
from .context import ContextBatch
from .mesh import Mesh, check_sizes

M = TypeVar("M")
FLAT_NUMBERS = 2**26  # of gradients in one all-reduce


class Packed(Protocol):
    """A packed row on the host: tokens and targets int64 [T] (targets below 0 are ignored), boundaries int32
    [num_sequences + 1]."""

    @property
    def tokens_T(self) -> Tensor: ...
    @property
    def target_T(self) -> Tensor: ...
    @property
    def cu_seqlens(self) -> Tensor: ...


@dataclass(frozen=True)
class Techniques:
    """How the axes work: attention over `context`, the schedule over `pipeline`, what of a layer's activations is made again
    in the backward, what sharded parameters are gathered in (None: as stored), and whether they rest in host memory."""

    context: Literal["ring", "ulysses"] = "ring"
    schedule: str = "1f1b"
    stages_per_rank: int = 1
    recompute: Literal["none", "attention", "mlp", "full"] = "none"
    gather_dtype: torch.dtype | None = None
    offload: bool = False


@dataclass(frozen=True)
class View:
    """A row as the head of one rank sees it: all of the row, or its tokens of a row that lies over `context`.

    `options` is how hidden states become logits here: pass them to `linear_logprob` and its relatives.
    """

    index: int
    tokens: Tensor  # int64 [t]
    target_T: Tensor  # int64 [t]
    bounds: Tensor  # int32 [num_sequences + 1]: the sequences' tokens among these
    shared: ContextBatch | None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def cu_seqlens(self) -> Tensor | None:
        return self.bounds if self.shared is None else None

    @property
    def places(self) -> Tensor:
        """int64 [t]: where in the row the tokens here stand."""
        if self.shared is None:
            return torch.arange(len(self.tokens), device=self.tokens.device)
        return self.shared.layout.index(self.shared.rank).to(self.tokens.device)

    def local(self, values_T: Tensor) -> Tensor:
        """Of numbers about all the row's tokens [T, …], those about the tokens here; 0 where the row is padded."""
        num_tokens = len(self.tokens) if self.shared is None else self.shared.layout.num_tokens
        missing = [0, 0] * (values_T.dim() - 1) + [0, num_tokens - len(values_T)]
        return nn.functional.pad(values_T.to(self.tokens.device), missing)[self.places]

    def sequence_sum(self, values_T: Tensor) -> Tensor:
        """[num_sequences]: sums over each sequence's tokens, wherever they lie; differentiable."""
        return sequence_sum(values_T, self.bounds, group=None if self.shared is None else self.shared.group)

    def once(self, x: Tensor) -> Tensor:
        """A number about whole sequences, which every rank of `context` has: zero on all but one, so that a sum has it once."""
        return x if self.shared is None or self.shared.rank == 0 else torch.zeros_like(x)


class Loss(NamedTuple):
    """What a head gives: the row's share of the loss, to be differentiated, and numbers to be summed over rows and ranks."""

    loss: Tensor
    numbers: Tensor  # [n]


class ParallelModel:
    """This rank's part of a decoder. It is built on the meta device and takes memory here, without values: fill `pieces()`."""

    def __init__(
        self,
        decoder: Any,
        mesh: Mesh,
        techniques: Techniques = Techniques(),
        options: Callable[[], dict[str, Any]] = dict,
        precision: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.config, self.mesh, self.techniques, self.options, self.precision = (
            decoder.config, mesh, techniques, options, precision,
        )  # fmt: skip
        self.decoder, self.whole_shapes = decoder, {name: tuple(p.shape) for name, p in decoder.named_parameters()}
        stages_per_rank = pipeline.SCHEDULES[techniques.schedule][1] or techniques.stages_per_rank
        check_sizes(mesh.sizes, decoder.config, techniques.context, stages_per_rank)
        dtype = next(decoder.parameters()).dtype
        self.context_group, self.pipeline_group = mesh.group("context"), mesh.group("pipeline")
        tensor_group = mesh.group("tensor")
        self.tensor_shards = None if tensor_group is None else tensor.apply(decoder, tensor_group)
        self.stages: list[pipeline.Stage] = []
        if self.pipeline_group is not None:
            self.stages = pipeline.split(decoder, self.pipeline_group, techniques.schedule, techniques.stages_per_rank)
        self.tied_group = self._tied_group()
        shard_mesh = mesh.shard_mesh()
        self.is_sharded = shard_mesh is not None
        if self.is_sharded and techniques.schedule in pipeline.SPLIT and self.stages:
            received = f"schedule {techniques.schedule!r} with shard={mesh.sizes.shard}"
            raise ValueError(f"received {received}, whose gradients torch gets wrong; use interleaved or 1f1b, or shard=1")
        self.roots: list[Any] = list(self.stages) or [decoder]
        for root in self.roots:
            if shard_mesh is not None:
                shard.apply(
                    root, shard_mesh, compute_dtype=techniques.gather_dtype, offload=techniques.offload,
                    reduce_dtype=torch.float64 if dtype == torch.float64 else torch.float32, recompute=techniques.recompute,
                )  # fmt: skip
            else:
                shard.recompute_layers(root, techniques.recompute)
        data = ("replicate", "context")
        self.data_group = None if self.is_sharded else mesh.group(*data)
        if any(parameter.is_meta for parameter in decoder.parameters()):
            for module in self.roots:
                module.to_empty(device="cpu" if techniques.offload and self.is_sharded else mesh.device)
        self.hidden_dtype = (techniques.gather_dtype if self.is_sharded else None) or dtype
        self.schedules: dict[tuple[int, int], pipeline.Pipeline] = {}

    # ---- What lies here ----

    @property
    def is_whole(self) -> bool:
        """Whether every rank has every parameter."""
        return not self.stages and self.tensor_shards is None and not self.is_sharded

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """This rank's parameters under the decoder's names, a tied one once."""
        return list(self.decoder.named_parameters())

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def pieces(self, of: Callable[[nn.Parameter], Any] = lambda parameter: parameter.detach()) -> dict[str, Piece]:
        """Which part of each whole tensor lies here; `of` a parameter gives another tensor of its shape (gradient, moment)."""
        return {name: self.piece(name, of(parameter)) for name, parameter in self.named_parameters()}

    def piece(self, name: str, x: Tensor) -> Piece:
        offset = self.rectangle(name, self.mesh.place.tensor, self.shard_rank)[0]
        place, is_cut = self.mesh.place, self.is_cut(name)
        writes = place.replicate == 0 and (place.tensor == 0 or is_cut) and (place.context == 0 or self.is_sharded)
        is_second = self.tied_group is not None and name == "embed_tokens.weight" and place.pipeline != 0
        return Piece(local(x).detach(), self.whole_shapes[name], offset, writes and not is_second)

    @property
    def vocabulary(self) -> tuple[int, int]:
        """Which rows of the output matrix losses see here."""
        name = "embed_tokens.weight" if self.config.tie_embeddings else "lm_head.weight"
        cut = None if self.tensor_shards is None else self.tensor_shards.parts[name]
        return (0, self.config.vocab_size) if cut is None else cut[1][self.mesh.place.tensor]

    def is_cut(self, name: str) -> bool:
        return self.tensor_shards is not None and self.tensor_shards.parts[name] is not None

    @property
    def shard_rank(self) -> int:
        return self.mesh.place.shard * self.mesh.sizes.context + self.mesh.place.context if self.is_sharded else 0

    @property
    def num_shards(self) -> int:
        return self.mesh.sizes.shard * self.mesh.sizes.context if self.is_sharded else 1

    def rectangle(self, name: str, tensor_rank: int, shard_rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(offset, shape) of the part of a tensor that a rank of these places holds."""
        offset, shape = [0] * len(self.whole_shapes[name]), list(self.whole_shapes[name])
        cut = None if self.tensor_shards is None else self.tensor_shards.parts[name]
        if cut is not None:
            dim, bounds = cut
            start, stop = bounds[tensor_rank]
            offset[dim], shape[dim] = start, stop - start
        chunk = -(-shape[0] // self.num_shards)  # as torch.chunk cuts
        start = min(shard_rank * chunk, shape[0])
        offset[0], shape[0] = offset[0] + start, min(chunk, shape[0] - start)
        return tuple(offset), tuple(shape)

    # ---- Forward and backward ----

    def accumulate(self, rows: Sequence[Packed], head: Callable[[View, Tensor, Tensor], Loss], num_numbers: int) -> list[float]:
        """Adds the gradients of the sum of `head(view, hidden_tD, output_weight_VD).loss` over rows; gives the `numbers`,
        summed over rows and all ranks."""
        views, num_real = self._views(rows)
        numbers: list[Tensor] = []

        def whole_head(index: int, hidden: Tensor, weight: Tensor) -> Tensor:
            if index >= num_real:
                # Of no consequence, but every parameter has a gradient, as on the ranks whose rows are real.
                return (hidden.sum() + weight.sum()) * 0.0
            found = head(views[index], hidden, weight)
            numbers.append(found.numbers.detach())
            return found.loss

        if self.pipeline_group is not None:
            runner = self._schedule(views)
            with self.precision():
                runner.step(views, whole_head)
        else:
            for view in views:
                with self.precision():
                    loss = self._forward(view, whole_head)
                loss.backward()
        return self._summed(numbers, num_numbers)

    def totals(self, rows: Sequence[Packed], head: Callable[[View, Tensor, Tensor], Tensor], num_numbers: int) -> list[float]:
        """What `head` gives ([n]), summed over rows and all ranks, without gradients."""
        return self._summed(self.evaluate(rows, head), num_numbers)

    def _summed(self, numbers: Sequence[Tensor], num_numbers: int) -> list[float]:
        """Ranks of one tensor group have the same numbers: the first one's count. The device is read here, once."""
        is_counted = bool(numbers) and self.mesh.place.tensor == 0
        return self.mesh.sum(torch.stack(list(numbers)).double().sum(0).tolist() if is_counted else [0.0] * num_numbers)

    def evaluate(self, rows: Sequence[Packed], head: Callable[[View, Tensor, Tensor], M]) -> list[M]:
        """What `head` gives for each row, without gradients; on ranks of other pipeline stages than the last, nothing."""
        views, num_real = self._views(rows)

        def whole_head(index: int, hidden: Tensor, weight: Tensor) -> Any:
            return head(views[index], hidden, weight) if index < num_real else None

        with torch.no_grad(), self.precision():
            if self.pipeline_group is None:
                found = [self._forward(view, whole_head) for view in views]
            else:
                places = {index: rank for rank in range(self.pipeline_group.size()) for index in self._stages_of(rank)}
                owners = [places[index] for index in sorted(places)]
                found = pipeline.forward(
                    self.stages, self.pipeline_group, views, whole_head, self._between(views), owners
                )  # fmt: skip
        if self.is_sharded:
            for root in self.roots:
                root.reshard()  # what is in no layer stays whole behind a forward pass that no backward follows
        return found[:num_real]

    @property
    def computes_losses(self) -> bool:
        """Whether this rank's heads run: it is of the last pipeline stage."""
        return not self.stages or any(stage.is_last for stage in self.stages)

    def train(self, mode: bool = True) -> None:
        self.decoder.train(mode)

    def eval(self) -> None:
        self.decoder.eval()

    def _forward(self, view: View, head: Callable[[int, Tensor, Tensor], Any]) -> Any:
        return self.decoder(
            view.tokens[None], cu_seqlens=view.cu_seqlens, shared=view.shared,
            head=lambda hidden_BSD, weight_VD: head(view.index, hidden_BSD[0], weight_VD),
        )  # fmt: skip

    def _views(self, rows: Sequence[Packed]) -> tuple[list[View], int]:
        """The rows as this rank sees them, then empty ones, as many as its collectives need; and the number of the first."""
        count = len(rows)
        if self.is_sharded:
            count = int(self.mesh.max([count])[0])
        if self.pipeline_group is not None:
            count = -(-max(count, len(self.stages) * self.pipeline_group.size()) // self.pipeline_group.size())
            count *= self.pipeline_group.size()
        num_tokens = max((len(row.tokens_T) for row in rows), default=2 * self.mesh.sizes.context)
        padded = num_tokens if self.pipeline_group is not None else 0
        with self.precision():
            options = self.options() | ({} if self.tensor_shards is None else self.tensor_shards.head)
        given = [(row.tokens_T, row.target_T, row.cu_seqlens) for row in rows]
        zeros = torch.zeros(num_tokens, dtype=torch.int64)
        empty = (zeros, torch.full_like(zeros, -100), torch.tensor([0, num_tokens], dtype=torch.int32))
        given += [empty] * (count - len(rows))
        return [self._view(index, *row, padded, options) for index, row in enumerate(given)], len(rows)

    def _view(self, index: int, tokens: Tensor, target: Tensor, bounds: Tensor, num_tokens: int, options: dict) -> View:
        """Of one row, padded behind its last boundary to `num_tokens`."""
        device = self.mesh.device
        missing = max(0, num_tokens - len(tokens))
        tokens, target = nn.functional.pad(tokens, (0, missing)), nn.functional.pad(target, (0, missing), value=-100)
        shared = None
        if self.context_group is not None:
            shared = ContextBatch.of(bounds.tolist(), len(tokens), self.context_group, device, self.techniques.context)
            index_t = shared.layout.index(shared.rank)
            tokens, target, bounds = tokens[index_t], target[index_t], torch.searchsorted(index_t, bounds.long()).int()
        return View(index, tokens.to(device), target.to(device), bounds.to(device), shared, options)

    def _between(self, views: Sequence[View]) -> Tensor:
        """What travels between stages: [1, t, D], or this rank's part of it where hidden states lie over `tensor`."""
        num_tokens = len(views[0].tokens)
        share = -(-num_tokens // self.mesh.sizes.tensor)
        return torch.empty(1, share, self.config.width, dtype=self.hidden_dtype, device=self.mesh.device)

    def _schedule(self, views: Sequence[View]) -> pipeline.Pipeline:
        """Made anew for another number of rows or tokens; a few are kept."""
        assert self.pipeline_group is not None
        key = (len(views), len(views[0].tokens))
        if key not in self.schedules:
            if len(self.schedules) == 4:
                self.schedules.pop(next(iter(self.schedules)))
            between = self._between(views)
            self.schedules[key] = pipeline.Pipeline(
                self.stages, self.pipeline_group, self.techniques.schedule, len(views), between
            )
        return self.schedules[key]

    def _stages_of(self, rank: int) -> list[int]:
        assert self.pipeline_group is not None
        return pipeline.stages_of(self.techniques.schedule, rank, self.pipeline_group.size(), len(self.stages))

    # ---- Gradients ----

    def _tied_group(self) -> dist.ProcessGroup | None:
        """The first and the last stage's ranks, where they are two that hold one embedding."""
        if not self.stages or not self.config.tie_embeddings or self.techniques.schedule == "zbv":
            return None
        ranks = self.mesh.ranks("pipeline")
        is_end = self.mesh.rank in (ranks[0], ranks[-1])
        # Every rank makes one: torch names a group by how many its ranks have made before.
        group = self.mesh.new_group([ranks[0], ranks[-1]] if is_end else ranks[1:-1])
        return group if is_end else None

    def reduce_gradients(self) -> None:
        """Sums over the ranks that hold the same part, once an update; a parameter without a gradient counts as 0."""
        for _, parameter in self.named_parameters():
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        if self.tensor_shards is not None:
            same = [p for name, p in self.named_parameters() if not self.is_cut(name)]
            _sum_flat(same, self.tensor_shards.group)
        if self.tied_group is not None:
            _sum_flat([self.decoder.embed_tokens.weight], self.tied_group)
        if self.data_group is not None:
            _sum_flat(self.parameters(), self.data_group)

    def grad_norm(self) -> float:
        """The 2-norm of the whole gradient, every number counted once wherever it lies. Reads the device."""
        pieces = self.pieces(lambda parameter: parameter.grad)
        mine = [piece.tensor for piece in pieces.values() if piece.writes and piece.tensor.numel()]
        squares = torch.stack(torch._foreach_norm(mine)).double().square().sum().item() if mine else 0.0
        return math.sqrt(self.mesh.sum([squares])[0])

    def scale_gradients(self, factor: float) -> None:
        torch._foreach_mul_([local(p.grad) for p in self.parameters() if p.grad is not None], factor)

    def has_finite_weights(self) -> bool:
        bad = sum(not bool(local(p.detach()).isfinite().all()) for p in self.parameters())
        return self.mesh.sum([float(bad)])[0] == 0.0


def local(x: Tensor) -> Tensor:
    """A sharded tensor's part on this rank; any other is itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def _sum_flat(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Adds gradients up over a group, in place, some at a time in one all-reduce."""
    for part in _parts([local(p.grad) for p in parameters if p.grad is not None]):
        flat = torch.cat([gradient.flatten() for gradient in part])
        dist.all_reduce(flat, group=group)
        for gradient, total in zip(part, flat.split([gradient.numel() for gradient in part]), strict=True):
            gradient.copy_(total.view_as(gradient))


def _parts(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    part: list[Tensor] = []
    for x in tensors:
        if part and sum(y.numel() for y in part) + x.numel() > FLAT_NUMBERS:
            yield part
            part = []
        part.append(x)
    if part:
        yield part
