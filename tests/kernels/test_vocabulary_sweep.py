"""The walk over the vocabulary: memory, bits that depend on nobody else, gradients asked for apart, compilers, and ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from products import Products
from torch.profiler import ProfilerActivity, profile

from warpline.kernels.linear_divergence import linear_divergence, linear_topk, linear_topk_divergence
from warpline.kernels.linear_logprob import linear_cross_entropy, linear_logprob
from warpline.kernels.logit_block import LogitMap
from warpline.kernels.vocabulary_sweep import BLOCKING, Blocking, Chunk, Form, combine_statistics, operand

SMALL = Blocking(rows=8, columns=4, elements=32, backward_columns=5, backward_elements=80, kept_elements=208)
ALL = {"entropy": True, "argmax": True, "sum_p2": True, "mean_logit": True}
WORKER = Path(__file__).parent / "vocab_parallel_worker.py"


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def head_of(num_tokens, width=24, num_entries=50, dtype=torch.float32):
    hidden, weight, bias = (
        random(*s, seed=i, dtype=dtype) for i, s in enumerate([(num_tokens, width), (num_entries, width), (num_entries,)])
    )
    target = torch.randint(0, num_entries, (num_tokens,), generator=torch.Generator().manual_seed(7))
    return hidden.requires_grad_(), (0.3 * weight).requires_grad_(), bias.requires_grad_(), target


LOSSES = {
    "logprob": lambda h, w, b, y, t: -linear_logprob(h, w, y, bias_V=b, temperature=0.9, softcap=8.0, **ALL).logprob_T,
    "entropy": lambda h, w, b, y, t: linear_logprob(h, w, y, bias_V=b, **ALL).entropy_T,
    "cross-entropy": lambda h, w, b, y, t: linear_cross_entropy(h, w, y, bias_V=b, label_smoothing=0.1, reduction="sum")[None],
    "forward KL": lambda h, w, b, y, t: linear_divergence(h, w, *t, bias_V=b),
    "jsd": lambda h, w, b, y, t: linear_divergence(h, w, *t, bias_V=b, kind="jsd"),
}


# ---- Memory ----


def peak_bytes(function) -> int:
    """The most that torch's CPU allocator held for `function` beyond what it held before."""
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("name", LOSSES)
def test_memory_beyond_the_gradients_has_a_ceiling_that_tokens_do_not_raise(name):
    """Blocks are sized so that 2,048 and 8,192 tokens need several chunks; T·V fp32 numbers would be 32 and 128 MiB."""
    BLOCKING_BEFORE, width, entries = BLOCKING["cpu"], 16, 4096
    blocking = Blocking(64, 512, 2**16, 512, 2**17, 2**19)
    try:
        BLOCKING["cpu"] = blocking
        extra = {}
        for num_tokens in (2048, 8192):
            hidden, weight, bias, target = head_of(num_tokens, width, entries)
            teacher = (random(num_tokens, 8, seed=5), random(entries, 8, seed=6))

            def both_ways(hidden=hidden, weight=weight, bias=bias, target=target, teacher=teacher):
                return torch.autograd.grad(LOSSES[name](hidden, weight, bias, target, teacher).sum(), (hidden, weight, bias))

            gradients = 4 * (hidden.numel() + weight.numel() + bias.numel())
            extra[num_tokens] = peak_bytes(both_ways) - gradients
    finally:
        BLOCKING["cpu"] = BLOCKING_BEFORE
    # Per token at most 64 numbers remain (statistics, coefficients, their copies): nothing near V = 4,096.
    assert extra[8192] - extra[2048] <= 4 * 64 * (8192 - 2048)
    # d_weight's accumulator is scaled into d_weight itself, and the step's temporaries are of the size of its block.
    ceiling = 4 * (2 * weight.numel() + blocking.kept_elements + 6 * blocking.backward_elements + 64 * 2048)
    assert extra[2048] <= ceiling < 4 * 2048 * entries


@pytest.mark.slow
def test_cross_entropy_takes_an_eighth_of_the_memory_of_full_logits():
    """T=4096, D=512, V=32768 in fp32, forward and backward; both hold the gradients' 72 MiB as well."""
    hidden, weight, _, target = head_of(4096, 512, 32768)
    ours = peak_bytes(lambda: torch.autograd.grad(linear_cross_entropy(hidden, weight, target), (hidden, weight)))
    full = peak_bytes(lambda: torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight), target), (hidden, weight)))
    assert ours <= full / 8, (ours / 2**20, full / 2**20)


# ---- The same bits ----


@pytest.mark.parametrize("name", ["logprob", "entropy", "forward KL", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tokens_numbers_do_not_depend_on_the_other_tokens(name, dtype):
    """Bitwise, through the value and d_hidden, while the others are permuted, replaced and removed."""
    hidden, weight, bias, target = head_of(300, dtype=dtype)
    teacher = (random(300, 8, seed=5, dtype=dtype), random(50, 8, seed=6, dtype=dtype))

    def run(rows, hidden_TD):
        hidden_RD = hidden_TD.detach()[rows].requires_grad_()
        value = LOSSES[name](hidden_RD, weight, bias, target[rows], (teacher[0][rows], teacher[1]))
        return value.detach(), torch.autograd.grad((value * (rows + 1.0)).sum(), hidden_RD)[0]

    everyone = torch.arange(300)
    value, d_hidden = run(everyone, hidden)
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    replaced = hidden.detach().clone()
    replaced[100:] = random(200, 24, seed=9, dtype=dtype)
    subsets = [(shuffled, hidden), (everyone, replaced), *((torch.arange(17, 17 + n), hidden) for n in (1, 2, 7, 17, 33, 83))]
    for rows, hidden_TD in subsets:
        again, d_again = run(rows, hidden_TD)
        same = (hidden_TD[rows] == hidden[rows]).all(1)
        assert torch.equal(again[same], value[rows][same])
        assert torch.equal(d_again[same], d_hidden[rows][same])


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_input_gives_the_same_bits_twice(name):
    hidden, weight, bias, target = head_of(300)
    teacher = (random(300, 8, seed=5), random(50, 8, seed=6))
    runs = []
    for _ in range(2):
        value = LOSSES[name](hidden, weight, bias, target, teacher)
        runs.append([value, *torch.autograd.grad(value.sum(), (hidden, weight, bias))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- Gradients asked for apart ----


@pytest.mark.parametrize("name", ["logprob", "forward KL"])
def test_a_schedule_that_splits_the_two_gradients_pays_for_each_once(name):
    """As zero-bubble pipelines do: first the inputs' gradients, then the weights', through torch's own helpers."""
    from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

    hidden, weight, bias, target = head_of(256)
    teacher = (random(256, 8, seed=5), random(50, 8, seed=6))
    one, of_teacher = 256 * 24 * 50, (256 * 8 * 50 if name == "forward KL" else 0)
    before = hidden.detach().requires_grad_()
    value = LOSSES[name](before * 1.0, weight, bias, target, teacher)
    expected = torch.autograd.grad(value.sum(), (before, weight, bias), retain_graph=True)
    loss = value.sum()
    with Products() as inputs_pass:
        d_inputs, groups = stage_backward_input([loss], None, [before], iter([weight, bias]))
    with Products() as weights_pass:
        stage_backward_weight(iter([weight, bias]), groups)
    assert inputs_pass.count == 2 * one + of_teacher  # the logits again, and d_hidden
    assert weights_pass.count == 2 * one + of_teacher  # the logits again, and d_weight
    for actual, wanted in zip((d_inputs[0], weight.grad, bias.grad), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


# ---- Compilers ----


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_losses_are_one_graph_and_take_any_number_of_tokens(name):
    torch._dynamo.reset()
    compilations = []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(LOSSES[name], fullgraph=True, backend=backend)
    for num_tokens in (300, 17, 90, 256):
        inputs = head_of(num_tokens)
        teacher = (random(num_tokens, 8, seed=5), random(50, 8, seed=6))
        value = compiled(*inputs, teacher)
        expected = LOSSES[name](*inputs, teacher)
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
        for d, wanted in zip(*(torch.autograd.grad(v.sum(), inputs[:3]) for v in (value, expected)), strict=True):
            torch.testing.assert_close(d, wanted)
    assert len(compilations) <= 2


def op_calls():
    """Every registered operator with arguments that opcheck can vary: (operator, arguments)."""
    ops = torch.ops.warpline
    hidden, weight, bias, target = head_of(9, 4, 10)
    options = (0.9, 5.0, -100, [True, True, True, True], None, 0, 10, None, True)
    teacher = (random(9, 3, seed=5), random(10, 3, seed=6))
    mask = torch.arange(9) % 3 != 0
    yield ops.linear_logprob, (hidden, weight, bias, target[:, None], *options)
    yield (
        ops.linear_logprob,
        (hidden, weight, None, target[:, None].expand(9, 2).contiguous(), 1.0, None, -100, [False] * 4, *options[4:]),
    )
    yield ops.linear_cross_entropy, (hidden, weight, bias, target[:, None], [True, True, True], None, -100, None, 10, 0.1, 0.1)
    yield (
        ops.linear_divergence,
        (hidden, weight, bias, *teacher, None, mask, "jsd", 0.3, 1.0, None, None, None, 0, 10, None, True),
    )
    yield ops.linear_topk, (hidden.detach(), weight.detach(), None, 3, 1.0, None, None, 0, 10, None)


@pytest.mark.parametrize("number", range(5))
def test_registered_operators_pass_opcheck(number):
    operator, arguments = list(op_calls())[number]
    torch.library.opcheck(operator, arguments)


# ---- Sharding ----


class FakeShard(torch.Tensor):
    device_mesh = "a mesh"


@pytest.mark.parametrize("function", [linear_logprob, linear_cross_entropy])
def test_a_sharded_parameter_is_refused_with_the_remedy(function):
    hidden, weight, _, target = head_of(4)
    with pytest.raises(ValueError, match=r"DTensor, expected plain tensors; .*inside forward.*full_tensor.*to_local"):
        function(hidden, weight.detach().as_subclass(FakeShard), target)


def test_an_fsdp_parameter_works_inside_forward_and_is_refused_outside(tmp_path):
    """The forward of an FSDP2 module sees the whole matrix; outside, the parameter is a DTensor."""
    code = f"""
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from warpline.kernels.linear_logprob import linear_cross_entropy
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
class Head(torch.nn.Linear):
    def forward(self, hidden, target):
        return linear_cross_entropy(hidden, self.weight, target)
torch.manual_seed(0)
head, hidden, target = Head(8, 20, bias=False), torch.randn(6, 8), torch.arange(6)
expected = linear_cross_entropy(hidden, head.weight, target)
gradient = torch.autograd.grad(expected, head.weight)[0]
loss = fully_shard(head)(hidden, target)
loss.backward()
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(head.weight.grad.full_tensor(), gradient)
try:
    linear_cross_entropy(hidden, head.weight, target)
except ValueError as error:
    print("refused:", "DTensor" in str(error))
dist.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "refused: True"


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_that_share_the_vocabulary_compute_what_one_process_does(num_ranks):
    """26 entries: equal shares on 2 ranks, uneven ones on 3 and 4, and with padding on all; fp64 to 1e-9."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), str(WORKER)]
    done = subprocess.run(launch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["errors"]) == 18
    assert max(found["errors"].values()) <= 1e-9, found["errors"]
    gathers = {name: counts["forward"] for name, counts in found["collectives"].items()}
    assert gathers == {name: {"_allgather_base_": 2 if name == "jsd" else 1} for name in gathers}
    assert all(counts["backward"] == {"allreduce_": 1} for counts in found["collectives"].values())


def test_a_group_needs_the_whole_story_of_its_shares():
    hidden, weight, _, target = head_of(4)
    with pytest.raises(ValueError, match=r"vocab_start is 3 and vocab_size 50 for 50 rows; expected .* vocab_start 0"):
        linear_logprob(hidden, weight, target, vocab_start=3, vocab_size=50)


def test_rows_past_the_vocabulary_are_padding_without_a_group_too():
    hidden, weight, _, target = head_of(6)
    padded = torch.cat([weight.detach(), torch.full((3, 24), torch.nan)]).requires_grad_()
    stats = linear_logprob(hidden, padded, target, vocab_size=50, mean_logit=True)
    plain = linear_logprob(hidden, weight, target, mean_logit=True)
    assert torch.equal(stats.logprob_T, plain.logprob_T) and torch.equal(stats.mean_logit_T, plain.mean_logit_T)
    (d_padded,) = torch.autograd.grad(stats.logprob_T.sum(), padded)
    assert torch.equal(d_padded[:50], torch.autograd.grad(plain.logprob_T.sum(), weight)[0]) and (d_padded[50:] == 0).all()


# ---- Parts ----


def test_statistics_of_parts_combine_to_those_of_the_whole():
    from warpline.kernels.logit_block import Side, Targets, Wanted, logit_block, new_statistics

    steps, wanted, product = (
        logit_block(torch.device("cpu")),
        Wanted(True, True, True, True),
        random(5, 12, dtype=torch.float64),
    )
    product[:, 8:] += 30
    ids = torch.tensor([[0], [4], [11], [7], [9]])

    def statistics(start, stop):
        table, picked = new_statistics(5, 1, product)
        steps.statistics(Side(product[:, start:stop], None, LogitMap()), Targets(ids, start), table, picked, wanted)
        return torch.cat([table, picked.t()])

    empty = torch.cat([x if x.dim() == 2 and len(x) == 6 else x.t() for x in new_statistics(5, 1, product)])
    parts = torch.stack([statistics(0, 4), empty, statistics(4, 8), statistics(8, 12)])
    torch.testing.assert_close(combine_statistics(parts, wanted), statistics(0, 12))


def test_a_chunk_gives_products_exactly_the_rows_they_ask_for():
    form = Form(LogitMap(), torch.float32, torch.float32, SMALL)
    chunk = Chunk(random(29, 3), slice(5, 26), form)  # 21 tokens in products of 8
    assert (chunk.size, chunk.num_padded) == (21, 24)
    assert chunk.tail_RD.shape == (8, 3) and (chunk.tail_RD[5:] == 0).all()
    assert [chunk.of_batch(rows) for rows in chunk.rows(slice(0, 4), form)] == [slice(5, 13), slice(13, 21), slice(21, 26)]


def test_operands_are_rounded_once_and_kept_wide_on_the_cpu():
    form = Form(LogitMap(), torch.bfloat16, torch.float32, SMALL)
    x = random(4, 4)
    assert torch.equal(operand(x, form), x.bfloat16().float())


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_a_top_k_cache_may_have_any_integer_ids(index_dtype):
    hidden, weight, _, _ = head_of(5)
    ids, logprobs = linear_topk(hidden, weight, 3)
    value = linear_topk_divergence(hidden, weight, ids.to(index_dtype), logprobs)
    assert value.abs().max() < 1e-5
