"""One rank of a pipeline: a decoder's loss and gradients against one process, in fp64, under every schedule.

Run     torchrun --nproc-per-node N tests/parallel/pipeline_worker.py
Prints  on rank 0, one JSON object: for each case the error of the loss, of what is evaluated and the largest of a parameter's
        gradient; the last also before the tied ones are added up; and the products of a step
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from products import Products
from tensor_worker import CONFIGS, build

from warpline.kernels.linear_logprob import linear_cross_entropy
from warpline.parallel import pipeline

NUM_ROWS, NUM_TOKENS = 8, 17
CASES = {
    "gpipe": ("tied", 1),
    "1f1b": ("Gemma with sinks", 1),
    "interleaved": ("tied", 2),
    "zero_bubble": ("Gemma with sinks", 2),
    "zbv": ("tied", 2),
    "1f1b, untied": ("K=1, biases, untied", 1),
    "zbv, untied": ("K=1, biases, untied", 2),
}


class Row(NamedTuple):
    tokens: torch.Tensor
    target: torch.Tensor
    cu_seqlens: torch.Tensor
    shared: None = None


def rows():
    """Documents of uneven length, and tokens past the last, in every row."""
    generator = torch.Generator().manual_seed(1)
    tokens, target = (torch.randint(0, 37, (NUM_ROWS, NUM_TOKENS), generator=generator) for _ in range(2))
    bounds = torch.tensor([[0, 4 + m % 3, 9 + m % 2, 15 + m % 3] for m in range(NUM_ROWS)], dtype=torch.int32)
    for m in range(NUM_ROWS):
        target[m, bounds[m, -1] :] = -100
    return [Row(*row) for row in zip(tokens, target, bounds, strict=True)]


class Rank:
    """This rank's stages of a decoder, and the losses that its head made."""

    def __init__(self, config_name: str, schedule: str, stages_per_rank: int):
        config, self.rows, self.losses = CONFIGS[config_name], rows(), []
        self.decoder, self.softcap, group = build(config), config.logit_softcap, dist.group.WORLD
        self.stages = pipeline.split(self.decoder, group, schedule, stages_per_rank)
        self.hidden = torch.empty(1, NUM_TOKENS, config.width, dtype=torch.float64)
        self.runner = pipeline.Pipeline(self.stages, group, schedule, NUM_ROWS, self.hidden)
        held = [pipeline.stages_of(schedule, rank, group.size(), len(self.stages)) for rank in range(group.size())]
        owner = {stage: rank for rank, stages in enumerate(held) for stage in stages}
        self.owners = [owner[stage] for stage in sorted(owner)]

    def head(self, index, hidden_TD, weight_VD):
        target = self.rows[index].target
        loss = linear_cross_entropy(hidden_TD, weight_VD, target, reduction="sum", softcap=self.softcap)
        self.losses.append(loss.item())
        return loss

    def step(self):
        self.runner.step(self.rows, self.head)

    def evaluate(self):
        """(row, loss) of each, on the rank of the last stage."""
        with torch.no_grad():
            group, head = dist.group.WORLD, lambda index, *given: (index, self.head(index, *given).item())
            return pipeline.forward(self.stages, group, self.rows, head, self.hidden, self.owners)


def total(value: float) -> float:
    x = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(x)
    return x.item()


def largest(value: float) -> float:
    x = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x.item()


def worst(decoder, truth) -> float:
    """The largest error of a gradient, over all ranks' parameters."""
    norm = torch.stack([p.grad.norm() for p in truth.values()]).norm()
    errors = [0.0]
    for name, parameter in decoder.named_parameters():
        d = truth[name].grad
        errors.append(((parameter.grad - d).norm() / d.norm().clamp(min=1e-6 * norm)).item())
    return largest(max(errors))


def compare(name):
    """Errors, over all ranks, of the loss, of what is evaluated, and of gradients before and after tied ones are added up."""
    config_name, stages_per_rank = CASES[name]
    schedule, config, whole = name.partition(",")[0], CONFIGS[config_name], build(CONFIGS[config_name])
    expected = []
    for row in rows():

        def head(hidden_BSD, weight_VD, target=row.target):
            softcap = config.logit_softcap
            return linear_cross_entropy(hidden_BSD[0], weight_VD, target, reduction="sum", softcap=softcap)

        loss = whole(row.tokens[None], cu_seqlens=row.cu_seqlens, head=head)
        loss.backward()
        expected.append(loss.item())
    rank = Rank(config_name, schedule, stages_per_rank)
    evaluated = rank.evaluate()
    assert [index for index, _ in evaluated] in ([], list(range(NUM_ROWS)))
    of_rows = [abs(loss - expected[index]) / expected[index] for index, loss in evaluated]
    assert total(len(of_rows)) == NUM_ROWS
    rank.losses.clear()
    rank.step()
    loss, truth = total(sum(rank.losses)), dict(whole.named_parameters())
    here = dict(rank.decoder.named_parameters())
    held = torch.tensor([float(key in here) for key in truth])
    dist.all_reduce(held)
    assert (held >= 1).all(), "a parameter is on no rank"
    before = worst(rank.decoder, truth)
    for key, count in zip(truth, held.tolist(), strict=True):
        if count > 1:
            assert key == "embed_tokens.weight" and count == 2 and config.tie_embeddings
            part = here[key].grad if key in here else torch.zeros_like(truth[key])
            dist.all_reduce(part)
    return {
        "loss": abs(loss - sum(expected)) / abs(sum(expected)),
        "evaluated": largest(max(of_rows, default=0.0)),
        "gradients": worst(rank.decoder, truth),
        "apart": before,
    }


def products(schedule: str) -> int:
    """Of one step on this rank, two stages each: splitting a backward in two must not make any product twice."""
    rank = Rank("tied", schedule, 2)
    rank.step()  # the first step also settles shapes
    with Products() as counted:
        rank.step()
    return counted.count


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    cases = CASES if size == 2 else {name: case for name, case in CASES.items() if case[1] == 1}
    results = {"errors": {name: compare(name) for name in cases}}
    if size == 2:
        results["products"] = {schedule: products(schedule) for schedule in ("interleaved", "zero_bubble")}
    if dist.get_rank() == 0:
        json.dump(results, sys.stdout)
        sys.stdout.flush()
    dist.destroy_process_group()


assert pipeline.SCHEDULES.keys() == {name.partition(",")[0] for name in CASES}

if __name__ == "__main__":
    main()
