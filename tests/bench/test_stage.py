"""Stage benches: the clock's split, the padding of the plain loops, and a bench that trains as its plain loop does."""

import json

import pytest
import torch
from torch import nn

from warpline.bench.rows import load
from warpline.bench.stage import CHECKPOINT, StepClock, forward_flops, padded, sequence_logprobs, size_of
from warpline.bench.suite import main
from warpline.data.packing import Sample, pack

CPU = torch.device("cpu")


def test_the_clock_sees_every_part_of_a_step_and_its_sum_is_the_steps():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1))
    adamw = torch.optim.AdamW(model.parameters())
    clock = StepClock(CPU)
    with clock.installed():
        for _ in range(4):
            with torch.no_grad():
                model(torch.ones(256, 64))
            model(torch.ones(256, 64)).sum().backward()
            adamw.step()
    split = clock.split()
    assert set(split) == {"data and host", "forward", "without gradient", "backward", "optimiser", CHECKPOINT}
    marks = [time for kind, time in clock.marks if kind == "end of optimiser"]
    parts = sum(seconds for name, seconds in split.items() if name != CHECKPOINT)
    assert parts == pytest.approx((marks[-1] - marks[0]) / 3)
    forwards = [kind for kind, _ in clock.marks if kind == "forward"]
    assert len(forwards) == 4, "modules inside a module are not counted again"


def test_hooks_are_gone_afterwards():
    clock = StepClock(CPU)
    with clock.installed():
        pass
    before = len(clock.marks)
    nn.Linear(2, 2)(torch.ones(1, 2))
    assert len(clock.marks) == before


def test_padding_keeps_every_token_and_target():
    samples = [Sample([5, 6, 7], [False, True, True], "a"), Sample([8, 9], [False, True], "b")]
    tokens, targets, mask = padded(pack(samples), CPU)
    assert tokens.tolist() == [[5, 6, 7], [8, 9, 0]] and mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert targets.tolist() == [[6, 7, -100], [9, -100, -100]]


def test_sequence_logprobs_sum_the_counted_targets():
    logits = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    logp = logits.log_softmax(-1)
    found = sequence_logprobs(logits, torch.tensor([[2, -100, 1]]))
    assert found.item() == pytest.approx((logp[0, 0, 2] + logp[0, 2, 1]).item(), rel=1e-6)


def test_flops_of_a_forward_are_the_matrices_and_the_attention_by_hand():
    size = size_of(CPU, True)  # width 64, 2 layers, 2 heads and 1 key head of 32, F 192, V 1024, windows of 128
    matrices = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 192) + 64 * 1024
    assert forward_flops(size, 10) == 10 * (2 * matrices + 2 * 2 * 2 * 32 * 128)


@pytest.mark.slow
def test_every_stage_bench_starts_from_the_plain_loops_loss(tmp_path):
    names = ["pretrain", "sft", "preference", "rl", "distill"]
    assert main([*names, "--quick", "--no-pictures", "--out", str(tmp_path)]) == 0
    path = next(tmp_path.glob("*/*.json"))
    results = load(path)
    assert json.loads(path.read_text())["benches"].keys() == set(names)
    for name in names:
        ours, plain = (row for row in results.rows if row.bench == name)
        assert (ours.candidate, plain.candidate) == ("warpline", "transformers + torch")
        assert ours.tokens and plain.tokens and ours.tflops and (ours.of_ceiling or 0) > 0
        assert {"forward", "backward", "optimiser"} <= set(ours.split)
        assert ours.check == ("passed" if name in ("sft", "preference", "distill") else "")
        if ours.check:
            assert ours.error is not None and ours.error < 1e-5 and ours.tokens == plain.tokens
