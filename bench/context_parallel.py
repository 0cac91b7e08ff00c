"""Context parallelism: ring attention and Ulysses beside torch's own over flex_attention, and beside what is possible.

Run     warpline bench context_parallel [--quick] [--out DIR]; starts its own 2 and 4 ranks, and runs by name only
Expect  per ranks n and tokens T of one causal document, in milliseconds: ours; torch's context parallelism (every rank gathers
        all keys and values) on the same inputs in the same order, flex_attention compiled, forward alone on a CPU, where it
        has no backward; one process / n, on a CPU divided by its cores if fewer, and of the ring a ring of one, since on a
        CPU its parts cannot use torch's fused attention, which gives no log-sum-exp; and what the ring sends over what one
        rank passes to the next, measured in the same run. `error` is against fp64 in one process at 1,024 tokens, of all
        ranks, with gradients where a candidate has them; `eager_error` that of one process in the same dtype.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..kernels.attention import attention
from ..parallel.context import ContextBatch
from ..parallel.mesh import Mesh, Sizes, end_mesh, num_processes, start_mesh
from .measure import Report, relative_error
from .rows import Row
from .scaling import bandwidth, cores, cpu_milliseconds, device_of, emit, fill_with_ranks, rounds, row_of, work

CHECKED_TOKENS = 1024
NO_BACKWARD = {"torch flex, forward and backward": "flex_attention has no backward on a CPU (torch 2.13)"}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def heads(device: torch.device) -> tuple[int, int, int]:
    """Query heads, key heads, width."""
    return (8, 2, 64) if device.type == "cpu" else (32, 8, 128)


def lengths(device: torch.device, is_quick: bool) -> tuple[int, ...]:
    if device.type == "cpu":
        return (1024,) if is_quick else (1024, 2048)
    return (16384,) if is_quick else (16384, 65536, 131072)


def inputs(num_tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q [T, N, H], k and v [T, K, H], and the output's gradient [T, N, H]."""
    num_heads, num_key_heads, width = heads(device)
    generator = torch.Generator().manual_seed(num_tokens)
    drawn = (
        torch.randn(num_tokens, n, width, generator=generator) for n in (num_heads, num_key_heads, num_key_heads, num_heads)
    )
    return [x.to(device, dtype) for x in drawn]


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


# ---- torch's own ----


class Flex(nn.Module):
    """flex_attention as the module that torch's context parallelism wraps: [1, N, t, H], [1, K, t, H] of this rank's tokens."""

    def __init__(self, mask: Any, is_compiled: bool):
        super().__init__()
        flex: Any = importlib.import_module("torch.nn.attention.flex_attention").flex_attention
        self.mask, self.flex = mask, torch.compile(flex, dynamic=False) if is_compiled else flex

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.flex(q, k, v, block_mask=self.mask, enable_gqa=True)


def torch_attention(num_tokens: int, mesh: DeviceMesh, is_compiled: bool) -> Attend:
    """Causal attention over one document whose tokens lie over the mesh, by torch's `_ContextParallel` over flex_attention.

    Takes and gives this rank's tokens as `ContextBatch` deals them: torch's head-and-tail balancer cuts alike where 2n divides
    the tokens, and its mask wants multiples of 128·n.
    """
    own: Any = importlib.import_module("torch.distributed.tensor.experimental._context_parallel._attention")
    balancers: Any = importlib.import_module("torch.distributed.tensor.experimental._context_parallel._load_balancer")
    parallel: Any = importlib.import_module("torch.distributed.tensor.parallel")
    balancer = balancers._HeadTailLoadBalancer(num_tokens, mesh.size(), mesh.device_type)
    with torch.compiler.set_stance("default" if mesh.device_type == "cuda" else "force_eager"):
        mask = own._create_cp_block_mask(causal_mask, 1, 1, num_tokens, num_tokens, mesh, balancer)
    style = own._ContextParallel(seq_dim=2, attention_type=own._ContextParallel.AttentionType.FLEX)
    module = parallel.parallelize_module(Flex(mask, is_compiled), mesh, style)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = module(*(x.transpose(0, 1)[None].contiguous() for x in (q, k, v)))
        return out[0].transpose(0, 1)

    return attend


def causal_mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


# ---- What is measured ----


def whole_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bounds = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
    out = attention(q, k, v, cu_seqlens=bounds, max_seqlen=len(q))
    assert isinstance(out, Tensor)
    return out


def forward(attend: Attend, tensors: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return attend(*tensors[:3])


def forward_backward(attend: Attend, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The output, and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = attend(*leaves)
    return [out, *torch.autograd.grad(out, leaves, tensors[3])]


PASSES = {"forward": forward, "forward and backward": forward_backward}


def candidates(num_tokens: int, mesh: Mesh, is_training: bool) -> dict[str, Attend]:
    """Ours first."""
    group = mesh.group("context")
    assert group is not None
    found: dict[str, Attend] = {}
    for kind in ("ring", "ulysses"):
        batch = ContextBatch.of((0, num_tokens), num_tokens, group, mesh.device, kind)
        found[f"warpline {kind}"] = batch.attend
    device_mesh = DeviceMesh.from_group(group, mesh.device.type, mesh=mesh.ranks("context"), mesh_dim_names=("context",))
    if mesh.device.type == "cuda" or not is_training:
        found["torch flex"] = torch_attention(num_tokens, device_mesh, is_compiled=True)
    return found


def errors(mesh: Mesh) -> dict[str, tuple[float, float]]:
    """By candidate: (its largest error, that of one process), with gradients if the candidate has them."""
    whole = inputs(CHECKED_TOKENS, mesh.device, dtype_of(mesh.device))
    truth = forward_backward(whole_attention, [x.cpu().double() for x in whole])
    alone = forward_backward(whole_attention, whole)
    eager = max(relative_error(a.cpu(), t) for a, t in zip(alone, truth, strict=True))
    batch = ContextBatch.of((0, CHECKED_TOKENS), CHECKED_TOKENS, mesh.group("context"), torch.device("cpu"))
    mine = [batch.local(x.cpu()).to(mesh.device) for x in whole]
    trained, found = candidates(CHECKED_TOKENS, mesh, is_training=True), {}
    for name, attend in candidates(CHECKED_TOKENS, mesh, is_training=False).items():
        received = forward_backward(attend, mine) if name in trained else [forward(attend, mine)]
        parts = [
            (a.cpu().double() - batch.local(t)).abs().max().item() / t.abs().max().item()
            for a, t in zip(received, truth, strict=False)
        ]
        found[name] = mesh.max([max(parts)])[0], eager
    return found


def shape_of(num_ranks: int, num_tokens: int, device: torch.device) -> dict[str, int]:
    num_heads, num_key_heads, width = heads(device)
    return {"n": num_ranks, "T": num_tokens, "N": num_heads, "K": num_key_heads, "H": width}


def alone(is_quick: bool) -> list[Row]:
    """One process, the whole row."""
    device, found = device_of(), []
    for num_tokens in lengths(device, is_quick):
        whole = inputs(num_tokens, device, dtype_of(device))
        for name, call in PASSES.items():
            taken = rounds(partial(call, whole_attention, whole), None, device, 5)
            found.append(row_of(f"attention, {name}", "one process", shape_of(1, num_tokens, device), taken))
    return found


def ring_bytes(name: str, num_ranks: int, num_tokens: int, device: torch.device) -> float:
    """By the table of parallel/context.py."""
    _, key_heads, width = heads(device)
    per_token = key_heads * 2 * width
    sent = (num_ranks - 1) * num_tokens / num_ranks * per_token * dtype_of(device).itemsize
    return sent if name == "forward" else 2 * sent + num_tokens * per_token * 4


def of_one_process(num_tokens: int, device: torch.device) -> dict[str, Attend]:
    """What Ulysses and torch divide, and what the ring divides: the same parts and merges by one rank alone."""
    return {
        "one process": whole_attention,
        "ring of one": ContextBatch.of((0, num_tokens), num_tokens, None, device).attend,
    }


def measured_alone(calls: Mapping[str, Callable[[], Any]], mesh: Mesh) -> list[float]:
    """Of each call three times in milliseconds, and its CPU time; by the first rank while the others wait, and 0 there."""
    found: list[float] = []

    def measure() -> None:
        for call in calls.values():
            found.extend([*rounds(call, None, mesh.device, 3), cpu_milliseconds(call, None)])

    mesh.on_first(measure)
    return found or [0.0] * 4 * len(calls)


def worker(is_quick: bool) -> None:
    mesh = start_mesh(Sizes(context=num_processes()))
    device, group = mesh.device, mesh.group("context")
    assert group is not None
    rate, parallel = bandwidth(mesh, group), mesh.size if device.type == "cuda" else min(mesh.size, cores())
    checked = errors(mesh)
    for num_tokens in lengths(device, is_quick):
        whole, shape = inputs(num_tokens, device, dtype_of(device)), shape_of(mesh.size, num_tokens, device)
        mine = [ContextBatch.of((0, num_tokens), num_tokens, group, device).local(x) for x in whole]
        for name, call in PASSES.items():
            operation = f"attention, {name}"
            references = {other: partial(call, attend, whole) for other, attend in of_one_process(num_tokens, device).items()}
            taken_alone = mesh.sum(measured_alone(references, mesh))
            ideals = {}
            for place, reference in enumerate(references):
                *taken, spent = taken_alone[4 * place : 4 * place + 4]
                ideals[reference] = [x / parallel for x in taken], spent / mesh.size
            for candidate, attend in candidates(num_tokens, mesh, name != "forward").items():
                mine_call = partial(call, attend, mine)
                row = row_of(operation, candidate, shape, rounds(mine_call, mesh, device, 3))
                reference = "ring of one" if candidate == "warpline ring" else "one process"
                ideal, spent = ideals[reference]
                row.note = f"{row.milliseconds / statistics.median(ideal):.2f} × {reference} / {parallel}"
                if device.type == "cpu":
                    row.note += f"; CPU time of a rank {cpu_milliseconds(mine_call, mesh) / spent:.2f} × its / {mesh.size}"
                row.error, row.eager_error = checked[candidate]
                allowed = 2 * row.eager_error + 2 * torch.finfo(dtype_of(device)).eps
                row.check = "passed" if row.error <= allowed else f"failed: error {row.error:.1e}, allowed {allowed:.1e}"
                emit(mesh, row)
            for reference, (ideal, _) in ideals.items():
                emit(mesh, row_of(operation, f"{reference} / n", shape, ideal, f"over {parallel}"))
            sent = ring_bytes(name, mesh.size, num_tokens, device)
            words = f"the ring's {sent / 2**20:.1f} MiB at {rate / 1e9:.2f} GB/s"
            emit(mesh, row_of(operation, "bytes / bandwidth", shape, [1e3 * sent / rate], words))
    end_mesh(mesh)


def fill(report: Report, is_quick: bool) -> None:
    """Its rows, of one process and of ranks, as `fill_with_ranks` says."""
    fill_with_ranks(report, is_quick, alone, NO_BACKWARD if report.device.type == "cpu" else {})


if __name__ == "__main__":
    work(worker)
