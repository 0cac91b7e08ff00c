"""One rank of a decoder under many layouts: losses, gradients, their norm and greedy completions against one process, in fp64.

Run     torchrun --nproc-per-node N tests/parallel/model_worker.py [LAYOUT ...]
Prints  on rank 0, one JSON object: for each layout (default: all of N ranks) the errors of the numbers, of the worst
        parameter's gradient and of the gradient's norm, for a step of six rows and for one of a single row, which leaves data
        ranks without any; the error of what is evaluated, and whether completions differ
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from tensor_worker import CONFIGS, build

from warpline.kernels.linear_logprob import linear_cross_entropy, linear_logprob
from warpline.models.decoder import Decoder
from warpline.models.generation import generate
from warpline.parallel.checkpoint import Piece
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
    "pp4 1f1b": (Sizes(pipeline=4), Techniques()),
    "pp4 gpipe": (Sizes(pipeline=4), Techniques(schedule="gpipe")),
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
    """A sum over tokens, and one over sequences that is no sum over their tokens."""
    summed = linear_cross_entropy(hidden, weight, view.target_T, reduction="sum", **view.options)
    logprob_t = linear_logprob(hidden, weight, view.target_T, **view.options).logprob_T
    sequences = view.sequence_sum(logprob_t).square().sum()
    return Loss(summed / 100 + sequences / 1000, torch.stack([summed.detach(), view.once(sequences.detach())]))


@torch.no_grad()
def fill(model, whole):
    for name, piece in model.pieces().items():
        x = whole[name]
        for dim, (start, size) in enumerate(zip(piece.offset, piece.tensor.shape, strict=True)):
            x = x.narrow(dim, start, size)
        piece.tensor.copy_(x)


class Found(NamedTuple):
    """Of a step on this rank: numbers, the gradient's norm, and pieces of gradients by name."""

    numbers: list[float]
    norm: float
    gradients: dict[str, Piece]


def step(model, mesh, given):
    for parameter in model.parameters():
        parameter.grad = None
    numbers = model.accumulate(mesh.share(given), head, 2)
    model.reduce_gradients()
    return Found(numbers, model.grad_norm(), model.pieces(lambda parameter: parameter.grad))


def run(config, sizes, techniques):
    """(steps of six rows and of one, completions of all prompts, numbers evaluated)"""
    mesh = Mesh(dist.get_rank() if sizes.product > 1 else 0, sizes, torch.device("cpu"))
    with torch.device("meta"):
        meta = [Decoder(config).to(torch.float64) for _ in range(2)]
    model = ParallelModel(meta[0], mesh, techniques, lambda: {"softcap": config.logit_softcap})
    fill(model, dict(build(config).named_parameters()))
    steps = [step(model, mesh, given) for given in (rows(), rows()[:1])]
    totals = model.totals(mesh.share(rows()), lambda *seen: head(*seen).numbers, 2)
    completions = []
    for count in (5, 1):  # one prompt leaves the other ranks none
        prompts = mesh.deal([[1 + i, 5, 9, i][: 2 + i % 3] for i in range(count)], *Sizes._fields)
        with WholeDecoder(model, meta[1]) as whole:
            greedy = generate(whole, prompts, max_new_tokens=6, end_ids=(3,), temperature=0.0)
        completions += mesh.gather([completion.ids for completion in greedy], *Sizes._fields)
    return steps, completions, totals


def relative(received, expected):
    return max(abs(a - b) / abs(b) for a, b in zip(received, expected, strict=True))


def worst(received, expected):
    """Over this rank's parameters, the largest error in a gradient, beside the largest number in it."""
    errors = [0.0]
    for name, piece in received.gradients.items():
        x = truth = expected.gradients[name].tensor
        for dim, (start, length) in enumerate(zip(piece.offset, piece.tensor.shape, strict=True)):
            x = x.narrow(dim, start, length)
        if x.numel():
            errors.append(((piece.tensor - x).abs().max() / truth.abs().max().clamp(min=1e-6 * expected.norm)).item())
    return max(errors)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    chosen = sys.argv[1:] or [name for name, (sizes, _) in LAYOUTS.items() if sizes.product == size]
    alone, found = {}, {}
    for name in chosen:
        key = list(CONFIGS)[(list(LAYOUTS).index(name) + 2) % len(CONFIGS)]
        if key not in alone:
            alone[key] = run(CONFIGS[key], Sizes(), Techniques())
        steps, completions, totals = alone[key]
        received = run(CONFIGS[key], *LAYOUTS[name])
        errors = [worst(*pair) for pair in zip(received[0], steps, strict=True)]
        shared = torch.tensor([*errors, float(received[1] != completions)], dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        found[name] = {
            "numbers": [relative(a.numbers, b.numbers) for a, b in zip(received[0], steps, strict=True)],
            "norms": [relative([a.norm], [b.norm]) for a, b in zip(received[0], steps, strict=True)],
            "gradients": shared[:-1].tolist(),
            "evaluated": relative(received[2], totals),
            "completions differ": bool(shared[-1]),
        }
        if dist.get_rank() == 0:
            print(name, found[name], file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        json.dump(found, sys.stdout)
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
