"""One rank of a context group: ring attention and torch's own context parallelism on the same inputs, in fp64.

Run     torchrun --nproc-per-node N tests/parallel/torch_context_worker.py
Prints  on rank 0, one JSON object, over all ranks: the largest relative error of each one's outputs against one process,
        the largest difference between them, and whether torch's balancer dealt other tokens than ours
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental._context_parallel._attention import _context_parallel_shard
from torch.distributed.tensor.experimental._context_parallel._load_balancer import _HeadTailLoadBalancer

sys.path.insert(0, str(Path(__file__).parent))
from context_worker import error, random

from warpline.bench.context_parallel import forward, torch_attention, whole_attention
from warpline.parallel.context import ContextBatch, ring_attention


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    num_tokens = 256 * size
    whole = [random(num_tokens, heads, 16, seed=seed) for seed, heads in enumerate((4, 2, 2, 4))]
    truth = forward(whole_attention, whole)
    batch = ContextBatch.of((0, num_tokens), num_tokens, dist.group.WORLD, torch.device("cpu"))
    mine = [batch.local(x) for x in whole]
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("context",))
    balancer = _HeadTailLoadBalancer(num_tokens, size, "cpu")
    theirs = _context_parallel_shard(mesh, [x.transpose(0, 1)[None].clone() for x in whole], [2] * 4, balancer)
    same = all(torch.equal(a, b[0].transpose(0, 1)) for a, b in zip(mine, theirs, strict=True))
    ring = forward(lambda q, k, v: ring_attention(q, k, v, batch), mine)
    flex = forward(torch_attention(num_tokens, mesh, is_compiled=False), mine)
    errors = [error(found, batch.local(truth)) for found in (ring, flex)]
    between = error(ring, flex)
    worst = torch.tensor([*errors, between, float(not same)], dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        names = ("ring", "torch", "between", "inputs differ")
        json.dump(dict(zip(names, worst.tolist(), strict=True)), sys.stdout)
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
