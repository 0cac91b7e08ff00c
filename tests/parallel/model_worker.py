"""One rank of a decoder under many layouts: losses, gradients, their norm and greedy completions against one process, in fp64.

Run     torchrun --nproc-per-node N tests/parallel/model_worker.py
Prints  on rank 0, one JSON object: for each layout of N ranks the errors of the loss, of the worst parameter's gradient and of
        the gradient's norm, and whether completions are equal
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from tensor_worker import CONFIGS, build

from warpline.kernels.linear_logprob import linear_cross_entropy
from warpline.models.decoder import Decoder
from warpline.models.generation import generate
from warpline.parallel.gather import WholeDecoder
from warpline.parallel.mesh import Mesh, Sizes
from warpline.parallel.model import Loss, ParallelModel, Techniques

LAYOUTS = {
    "tp2": (Sizes(tensor=2), Techniques()),
    "pp2 gpipe": (Sizes(pipeline=2), Techniques(schedule="gpipe")),
    "pp2 1f1b": (Sizes(pipeline=2), Techniques()),
    "pp2 interleaved": (Sizes(pipeline=2), Techniques(schedule="interleaved", stages_per_rank=2)),
    "pp2 zero_bubble": (Sizes(pipeline=2), Techniques(schedule="zero_bubble", stages_per_rank=2)),
    "pp2 zbv": (Sizes(pipeline=2), Techniques(schedule="zbv", stages_per_rank=2)),
    "cp2 ring": (Sizes(context=2), Techniques()),
    "cp2 ulysses": (Sizes(context=2), Techniques(context="ulysses")),
    "fsdp2": (Sizes(shard=2), Techniques(recompute="full")),
    "dp2": (Sizes(replicate=2), Techniques()),
    "hsdp2x2": (Sizes(replicate=2, shard=2), Techniques()),
    "fsdp2 tp2": (Sizes(shard=2, tensor=2), Techniques()),
    "pp2 tp2": (Sizes(pipeline=2, tensor=2), Techniques()),
    "pp2 cp2": (Sizes(pipeline=2, context=2), Techniques()),
    "tp2 cp2": (Sizes(context=2, tensor=2), Techniques(context="ulysses")),
    "pp2 fsdp2": (Sizes(pipeline=2, shard=2), Techniques()),
    "pp2 fsdp2 interleaved": (Sizes(pipeline=2, shard=2), Techniques(schedule="interleaved", stages_per_rank=2)),
    "fsdp2 cp2": (Sizes(shard=2, context=2), Techniques()),
    "pp2 dp2": (Sizes(pipeline=2, replicate=2), Techniques()),
    "pp2 cp2 tp2": (Sizes(pipeline=2, context=2, tensor=2), Techniques()),
    "pp2 fsdp2 tp2": (Sizes(pipeline=2, shard=2, tensor=2), Techniques()),
}
LENGTHS = ((7, 13, 3), (9, 11), (5, 8, 12), (6,), (14, 2, 7), (9, 9))  # documents of each row of a step


class Row(NamedTuple):
    tokens_T: torch.Tensor
    target_T: torch.Tensor
    cu_seqlens: torch.Tensor


def rows():
    generator = torch.Generator().manual_seed(1)
    found = []
    for lengths in LENGTHS:
        tokens, target = (torch.randint(0, 37, (sum(lengths),), generator=generator) for _ in range(2))
        target[::5] = -100
        found.append(Row(tokens, target, torch.tensor([0, *lengths]).cumsum(0).int()))
    return found


def head(view, hidden, weight):
    summed = linear_cross_entropy(hidden, weight, view.target_T, reduction="sum", **view.options)
    sequences = view.sequence_sum((view.target_T >= 0).to(hidden.dtype)).square().sum()
    return Loss(summed / 100, torch.stack([summed.detach(), view.once(sequences)]))


@torch.no_grad()
def fill(model, whole):
    for name, piece in model.pieces().items():
        x = whole[name]
        for dim, (start, size) in enumerate(zip(piece.offset, piece.tensor.shape, strict=True)):
            x = x.narrow(dim, start, size)
        piece.tensor.copy_(x)


def run(config, sizes, techniques):
    """(numbers, norm, {name: this rank's gradients}, completions of its prompts)"""
    mesh = Mesh(dist.get_rank() if sizes.product > 1 else 0, sizes, torch.device("cpu"))
    with torch.device("meta"):
        meta = [Decoder(config).to(torch.float64) for _ in range(2)]
    model = ParallelModel(meta[0], mesh, techniques, lambda: {"softcap": config.logit_softcap})
    fill(model, dict(build(config).named_parameters()))
    numbers = model.accumulate(mesh.share(rows()), head, 2)
    model.reduce_gradients()
    norm = model.grad_norm()
    gradients = model.pieces(lambda parameter: parameter.grad)
    prompts = mesh.share_among_all([[1 + i, 5, 9, i][: 2 + i % 3] for i in range(5)])
    with WholeDecoder(model, meta[1]) as whole:
        greedy = generate(whole, prompts, max_new_tokens=6, end_ids=(3,), temperature=0.0)
    completions = mesh.gather([completion.ids for completion in greedy])
    evaluated = model.evaluate(mesh.share(rows()), lambda view, hidden, weight: head(view, hidden, weight).numbers[0].item())
    counted = sum(evaluated) if mesh.place.tensor == 0 else 0.0
    return numbers, norm, gradients, completions, mesh.share(list(range(5))), mesh.sum([counted])[0]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    chosen = sys.argv[1:] or [name for name, (sizes, _) in LAYOUTS.items() if sizes.product == size]
    found = {}
    for index, name in enumerate(chosen):
        config = CONFIGS[list(CONFIGS)[index % len(CONFIGS)]]
        sizes, techniques = LAYOUTS[name]
        numbers, norm, truth, completions, _, _ = run(config, Sizes(), Techniques())
        received = run(config, sizes, techniques)
        errors = [0.0]
        for key, piece in received[2].items():
            x = truth[key].tensor
            for dim, (start, length) in enumerate(zip(piece.offset, piece.tensor.shape, strict=True)):
                x = x.narrow(dim, start, length)
            if x.numel():
                errors.append(((piece.tensor - x).abs().max() / truth[key].tensor.abs().max().clamp(min=1e-6 * norm)).item())
        worst = torch.tensor([max(errors), float(received[3] != [completions[i] for i in received[4]])], dtype=torch.float64)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        found[name] = {
            "loss": abs(received[0][0] - numbers[0]) / abs(numbers[0]),
            "sequences": abs(received[0][1] - numbers[1]),
            "evaluated": abs(received[5] - numbers[0]) / abs(numbers[0]),
            "norm": abs(received[1] - norm) / norm,
            "gradients": worst[0].item(),
            "completions differ": bool(worst[1]),
        }
        if dist.get_rank() == 0:
            print(name, found[name], file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        json.dump(found, sys.stdout)
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
