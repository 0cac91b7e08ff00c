"""One rank of a pipeline: a decoder's loss and gradients against one process, in fp64, under every schedule.

Run     torchrun --nproc-per-node N tests/parallel/pipeline_worker.py
Prints  on rank 0, one JSON object: for each case the error of the loss and the largest of a parameter's gradient, and the
        products of a step
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from products import Products
from tensor_worker import CONFIGS, build

from warpline.kernels.linear_logprob import linear_cross_entropy
from warpline.parallel import pipeline
from warpline.parallel.pipeline import Batch, Pipeline

NUM_MICROBATCHES, NUM_TOKENS = 8, 17
CASES = {
    "gpipe": ("tied", 1),
    "1f1b": ("Gemma with sinks", 1),
    "interleaved": ("tied", 2),
    "zero_bubble": ("Gemma with sinks", 2),
    "zbv": ("tied", 2),
    "1f1b, untied": ("K=1, biases, untied", 1),
    "zbv, untied": ("K=1, biases, untied", 2),
}


def batch():
    """Documents of uneven length, and tokens past the last, in every microbatch."""
    generator = torch.Generator().manual_seed(1)
    tokens, target = (torch.randint(0, 37, (NUM_MICROBATCHES, NUM_TOKENS), generator=generator) for _ in range(2))
    cu_seqlens = torch.tensor([[0, 4 + m % 3, 9 + m % 2, 15 + m % 3] for m in range(NUM_MICROBATCHES)], dtype=torch.int32)
    for m in range(NUM_MICROBATCHES):
        target[m, cu_seqlens[m, -1] :] = -100
    return Batch(tokens, target, cu_seqlens)


def head_of(config):
    def head(hidden_TD, weight_VD, target_T):
        return linear_cross_entropy(hidden_TD, weight_VD, target_T, reduction="sum", softcap=config.logit_softcap)

    return head


def compare(name):
    """(error of the loss, largest error of a gradient of this rank's)."""
    config_name, stages_per_rank = CASES[name]
    config, whole = CONFIGS[config_name], build(CONFIGS[config_name])
    given, head = batch(), head_of(config)
    expected = 0.0
    for m in range(NUM_MICROBATCHES):

        def whole_head(hidden_BSD, weight_VD, m=m):
            return head(hidden_BSD[0], weight_VD, given.target[m])

        loss = whole(given.tokens[m : m + 1], cu_seqlens=given.cu_seqlens[m], head=whole_head)
        loss.backward()
        expected += loss.item()
    decoder = build(config)
    schedule = name.partition(",")[0]
    runner = Pipeline(
        decoder, dist.group.WORLD, head, schedule=schedule, num_microbatches=NUM_MICROBATCHES, stages_per_rank=stages_per_rank
    )
    loss = runner.step(given)
    dist.all_reduce(loss)
    mine = {id(p) for module in runner.modules for p in module.parameters()}
    truth = dict(whole.named_parameters())
    norm = torch.stack([p.grad.norm() for p in truth.values()]).norm()
    errors, seen = [0.0], torch.zeros(len(truth))
    for index, (key, parameter) in enumerate(decoder.named_parameters()):
        if id(parameter) in mine:
            seen[index] += 1
            d = truth[key].grad
            errors.append(((parameter.grad - d).norm() / d.norm().clamp(min=1e-6 * norm)).item())
        else:
            assert parameter.grad is None
    worst = torch.tensor(max(errors))
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    dist.all_reduce(seen)
    assert (seen >= 1).all(), "a parameter is on no rank"
    return {"loss": abs(loss.item() - expected) / abs(expected), "gradients": worst.item()}


def products(schedule: str) -> int:
    """Of one step on this rank, two stages each: splitting a backward in two must not make any product twice."""
    config = CONFIGS["tied"]
    runner = Pipeline(
        build(config),
        dist.group.WORLD,
        head_of(config),
        schedule=schedule,
        num_microbatches=NUM_MICROBATCHES,
        stages_per_rank=2,
    )
    runner.step(batch())  # the first step also settles shapes
    with Products() as counted:
        runner.step(batch())
    return counted.count


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    cases = CASES if size == 2 else {name: case for name, case in CASES.items() if case[1] == 1}
    found = {name: compare(name) for name in cases}
    plain = Pipeline._add_tied_gradients
    Pipeline._add_tied_gradients = lambda self: None
    removed = compare("gpipe")
    Pipeline._add_tied_gradients = plain
    results = {"errors": found, "without tied gradients": removed}
    if size == 2:
        results["products"] = {schedule: products(schedule) for schedule in ("interleaved", "zero_bubble")}
    if dist.get_rank() == 0:
        json.dump(results, sys.stdout)
        sys.stdout.flush()
    dist.destroy_process_group()


assert pipeline.SCHEDULES.keys() == {name.partition(",")[0] for name in CASES}

if __name__ == "__main__":
    main()
