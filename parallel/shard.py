"""Sharded data parallelism: every parameter, gradient and moment over ranks, by PyTorch's FSDP2; with two axes, HSDP.

Axis: `shard` (and `replicate` before it). Sharded: every parameter's first dim; each layer is one group, the rest of the model
another. Every rank takes its share of a step's batches, and gradients are summed, not averaged: losses divide by global counts.

| collective, for each row; P parameters, L of them in layers  | bytes a rank of n, b a number  |
|--------------------------------------------------------------|--------------------------------|
| forward: all-gather, a layer at a time                       | (n−1)/n·P·b                    |
| backward: all-gather of the layers again, one ahead          | (n−1)/n·L·b                    |
| backward: reduce-scatter                                     | (n−1)/n·P·4                    |
| HSDP: all-reduce over r `replicate` ranks                    | 2·(r−1)/r·P/n·4                |

A first dim that n does not divide is padded to a multiple.

**Source** ZeRO, arXiv 1910.02054; PyTorch FSDP, arXiv 2304.11277; activation checkpointing, arXiv 1604.06174.
**Limits** The output matrix is whole inside the model's forward alone: losses are computed by its `head`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

RECOMPUTE = ("none", "attention", "mlp", "full")


def apply(
    model: Any,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = torch.float32,
    offload: bool = False,
    recompute: Literal["none", "attention", "mlp", "full"] = "none",
) -> None:
    """Shards a decoder in place over `mesh`, of one axis, or two (the first replicates).

    `compute_dtype` is what gathered parameters are cast to (None: as they are stored), `reduce_dtype` what gradients are summed
    in (None: as they come). `offload` keeps parameters and moments in host memory. `recompute`: what of each layer's
    activations is made again in the backward, instead of kept.
    """
    if mesh.ndim not in (1, 2):
        raise ValueError(f"received a mesh of {mesh.ndim} axes; expected shard, or replicate and shard: slice the mesh")
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy(),
    }
    recompute_layers(model, recompute)
    for layer in layers_of(model):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # not all backends scale while they sum


def layers_of(model: Any) -> list[nn.Module]:
    return list(model.layers.values() if isinstance(model.layers, nn.ModuleDict) else model.layers)


def recompute_layers(model: Any, recompute: str) -> None:
    """Makes these parts of every layer keep no activations."""
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute is {recompute!r}; expected one of {list(RECOMPUTE)}")
    for layer in layers_of(model):
        for module in recomputed(layer, recompute):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def recomputed(layer: Any, recompute: str) -> list[nn.Module]:
    """The parts of a layer whose activations are made again."""
    return {"none": [], "attention": [layer.self_attn], "mlp": [layer.mlp], "full": [layer]}[recompute]
