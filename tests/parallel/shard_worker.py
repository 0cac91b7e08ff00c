"""One rank of FSDP2, HSDP, and both with tensor parallelism: a decoder's gradients and steps against one process, in fp64.

Run     torchrun --nproc-per-node N tests/parallel/shard_worker.py
Prints  on rank 0, one JSON object: for each layout the largest error of a parameter's gradient, and of one after 3 steps
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))
from tensor_worker import CONFIGS, build, gathered

from warpline.kernels.linear_logprob import linear_cross_entropy
from warpline.parallel import shard, tensor

CONFIG = CONFIGS["Gemma with sinks"]
LENGTHS = (7, 13, 9, 11, 5, 8, 12, 6)  # eight batches a step, of different sizes


def batches(step):
    generator = torch.Generator().manual_seed(step)
    return [[torch.randint(0, 37, (n,), generator=generator) for _ in range(2)] for n in LENGTHS]


def backward(decoder, mine, options):
    counted = sum(LENGTHS)  # over all ranks
    for tokens_T, target_T in mine:

        def head(hidden_BSD, weight_VD, target_T=target_T):
            softcap = CONFIG.logit_softcap
            return linear_cross_entropy(hidden_BSD[0], weight_VD, target_T, reduction="sum", softcap=softcap, **options)

        (decoder(tokens_T[None], head=head) / counted).backward()


def train(decoder, share, options=(), after_backward=lambda: None):
    """Gradients of the first step, and parameters after three."""
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    first = None
    for step in range(3):
        backward(decoder, share(batches(step)), dict(options))
        after_backward()
        if first is None:
            first = {name: full(p.grad).clone() for name, p in decoder.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return first, {name: full(p.detach()) for name, p in decoder.named_parameters()}


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def error(received, expected):
    norm = torch.stack([x.norm() for x in expected.values()]).norm()
    pairs = [(received[name], x) for name, x in expected.items()]
    return max(((a - b).norm() / b.norm().clamp(min=1e-6 * norm)).item() for a, b in pairs)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    expected = train(build(CONFIG), lambda whole: whole)
    found = {}
    layouts = {"fsdp": ((size,), ("shard",), {}), "fsdp, recomputed": ((size,), ("shard",), {"recompute": "full"})}
    layouts["fsdp, attention recomputed"] = ((size,), ("shard",), {"recompute": "attention"})
    if size == 4:
        layouts["hsdp"] = ((2, 2), ("replicate", "shard"), {})
    for name, (sizes, names, options) in layouts.items():
        decoder = build(CONFIG)
        shard.apply(decoder, init_device_mesh("cpu", sizes, mesh_dim_names=names), reduce_dtype=None, **options)
        received = train(decoder, lambda whole: whole[rank::size])
        found[name] = {"gradients": error(received[0], expected[0]), "steps": error(received[1], expected[1])}
    if size == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
        decoder = build(CONFIG)
        shards = tensor.apply(decoder, mesh["tensor"].get_group())
        shard.apply(decoder, mesh["shard"], reduce_dtype=None)
        replicated = [p for name, p in decoder.named_parameters() if shards.parts[name] is None]

        def sum_replicated():
            for parameter in replicated:
                dist.all_reduce(parameter.grad.to_local(), group=shards.group)

        mine = mesh["shard"].get_local_rank()
        received = train(decoder, lambda whole: whole[mine::2], shards.head, sum_replicated)
        whole = [{name: gathered(shards, name, x) for name, x in part.items()} for part in received]
        found["fsdp × tensor"] = {"gradients": error(whole[0], expected[0]), "steps": error(whole[1], expected[1])}
    if rank == 0:
        json.dump(found, sys.stdout)
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
