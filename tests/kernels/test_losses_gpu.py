"""The losses over a vocabulary on a GPU: values and gradients against fp64, bits, memory, host syncs, compilers, sizes."""

import math

import pytest
import torch
import torch.nn.functional as F

from warpline.kernels.linear_divergence import (
    linear_divergence,
    linear_divergence_reference,
    linear_topk,
    linear_topk_divergence,
)
from warpline.kernels.linear_logprob import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_logprob,
    linear_logprob_reference,
)
from warpline.kernels.sequence_sum import sequence_sum

pytestmark = pytest.mark.gpu
ALL = {"entropy": True, "argmax": True, "sum_p2": True, "mean_logit": True}
# T, D, V: nothing a multiple of anything, several blocks of rows and columns, one token, and widths that are.
SHAPES = [(1301, 200, 9001), (1, 64, 513), (2048, 256, 8192)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def random(*shape, seed, dtype=torch.float32, scale=1.0):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, device="cuda")).to(dtype)


class Problem:
    """Hidden states, matrix and bias with logits of a few nats, targets with ignored ones, and a narrower teacher."""

    def __init__(self, shape, dtype, weight_dtype=None):
        tokens, width, entries = shape
        scale = 2.0 / math.sqrt(width)
        self.hidden = random(tokens, width, seed=1, dtype=dtype)
        self.weight = random(entries, width, seed=2, dtype=weight_dtype or dtype, scale=scale)
        self.bias = random(entries, seed=3, dtype=weight_dtype or dtype)
        self.target = torch.randint(0, entries, (tokens,), device="cuda", generator=torch.Generator("cuda").manual_seed(4))
        self.target[3::5] = -100
        self.teacher = (random(tokens, 96, seed=5, dtype=dtype), random(entries, 96, seed=6, dtype=dtype, scale=0.2))

    def inputs(self, dtype=None):
        tensors = (self.hidden, self.weight, self.bias)
        return [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]

    def in_double(self):
        return [x.double() for x in self.teacher]


def outputs_and_gradients(outputs, inputs):
    used = [x for x in outputs if x is not None and x.requires_grad]
    upstream = [random(*x.shape, seed=20 + i).to(x.dtype) for i, x in enumerate(used)]
    return [x.detach() for x in used] + list(torch.autograd.grad(used, inputs, upstream))


def check(actual, eager, truth):
    """‖error‖∞ ≤ 2 · ‖eager's error‖∞ + 2 · eps(output) · ‖truth‖∞, per tensor."""
    for a, e, t in zip(actual, eager, truth, strict=True):
        error, eager_error = ((x.double() - t.double()).abs().max() for x in (a, e))
        assert a.isfinite().all()
        assert error <= 2 * eager_error + 2 * torch.finfo(a.dtype).eps * t.abs().max(), (error, eager_error)


def eager_logits(hidden, weight, bias, temperature=1.0, softcap=None):
    """As a trainer writes them: the product in the hidden states' dtype, the rest in fp32."""
    logits = F.linear(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype)).float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits / temperature


def identity(logits):
    return torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 10.0}])
def test_statistics_and_their_gradients_are_as_good_as_eagers(shape, dtype, options):
    problem = Problem(shape, dtype)

    def ours(inputs):
        stats = linear_logprob(*inputs[:2], problem.target, bias_V=inputs[2], **options, **ALL)
        return outputs_and_gradients(stats, inputs)

    def eager(inputs):
        logits = eager_logits(*inputs, **options)
        logp, kept = logits.log_softmax(-1), (problem.target != -100).float()
        logprob = logp.gather(1, problem.target.clamp(min=0)[:, None])[:, 0]
        values = (logprob, logits.logsumexp(-1), -(logp.exp() * logp).sum(-1), logp.exp().square().sum(-1), logits.mean(-1))
        return outputs_and_gradients([value * kept for value in values], inputs)

    doubled = problem.inputs(torch.float64)
    truth = linear_logprob_reference(*doubled[:2], problem.target, bias_V=doubled[2], **options)
    check(ours(problem.inputs()), eager(problem.inputs()), outputs_and_gradients(truth, doubled))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_and_its_gradients_are_as_good_as_eagers(shape, dtype, reduction):
    problem, terms = Problem(shape, dtype), {"z_loss": 1e-3, "label_smoothing": 0.1, "reduction": reduction}

    def ours(inputs):
        return outputs_and_gradients([linear_cross_entropy(*inputs[:2], problem.target, bias_V=inputs[2], **terms)], inputs)

    def eager(inputs):
        logits = eager_logits(*inputs)
        loss = F.cross_entropy(logits, problem.target, label_smoothing=0.1, reduction="none")
        loss = loss + 1e-3 * logits.logsumexp(-1).square() * (problem.target != -100)
        divisor = (problem.target != -100).sum() if reduction == "mean" else 1
        return outputs_and_gradients([loss if reduction == "none" else loss.sum() / divisor], inputs)

    doubled = problem.inputs(torch.float64)
    truth = linear_cross_entropy_reference(*doubled[:2], problem.target, bias_V=doubled[2], **terms)
    check(ours(problem.inputs()), eager(problem.inputs()), outputs_and_gradients([truth], doubled))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_divergences_and_their_gradients_are_as_good_as_eagers(shape, dtype, kind):
    problem, options = Problem(shape, dtype), {"kind": kind, "beta": 0.3, "temperature": 0.8}

    def ours(inputs):
        value = linear_divergence(*inputs[:2], *problem.teacher, bias_V=inputs[2], **options)
        return outputs_and_gradients([value], inputs)

    def eager(inputs):
        student, teacher = eager_logits(*inputs), F.linear(*problem.teacher).float()
        value = linear_divergence_reference(student, identity(student), teacher, identity(student), **options)
        return outputs_and_gradients([value], inputs)

    doubled = problem.inputs(torch.float64)
    truth = linear_divergence_reference(*doubled[:2], *problem.in_double(), bias_V=doubled[2], **options)
    check(ours(problem.inputs()), eager(problem.inputs()), outputs_and_gradients([truth], doubled))


def test_hidden_states_in_bf16_with_a_matrix_in_fp32_and_an_fp32_head():
    problem = Problem(SHAPES[0], torch.bfloat16, torch.float32)
    doubled = problem.inputs(torch.float64)
    truth = outputs_and_gradients(linear_logprob_reference(*doubled[:2], problem.target, bias_V=doubled[2])[:2], doubled)
    errors = []
    for product_dtype in (None, torch.float32):
        inputs = problem.inputs()
        stats = linear_logprob(*inputs[:2], problem.target, bias_V=inputs[2], product_dtype=product_dtype)
        actual = outputs_and_gradients(stats[:2], inputs)
        assert [d.dtype for d in actual[2:]] == [torch.bfloat16, torch.float32, torch.float32]
        errors.append([(a.double() - t).abs().max().item() for a, t in zip(actual, truth, strict=True)])
    assert errors[1][0] < errors[0][0] / 10 and errors[1][3] < errors[0][3] / 10


def test_top_k_and_its_divergence_agree_with_full_logits():
    problem = Problem(SHAPES[0], torch.float32)
    ids, logprobs = linear_topk(problem.hidden, problem.weight, 20)
    expected = F.linear(problem.hidden.double(), problem.weight.double()).log_softmax(-1).topk(20)
    assert (ids == expected.indices).float().mean() > 0.999
    assert (logprobs.double() - expected.values).abs().max() < 1e-4
    cache = linear_topk(*problem.teacher, 64)
    inputs = problem.inputs()
    value = linear_topk_divergence(*inputs[:2], *cache)
    gradients = torch.autograd.grad(value.sum(), inputs[:2])
    assert value.isfinite().all() and all(d.isfinite().all() and d.abs().max() > 0 for d in gradients)


LOSSES = {
    "logprob": lambda p, h, w, y: -linear_logprob(h, w, y, entropy=True).logprob_T,
    "cross-entropy": lambda p, h, w, y: linear_cross_entropy(h, w, y)[None],
    "forward KL": lambda p, h, w, y: linear_divergence(h, w, p.teacher[0][: len(h)], p.teacher[1]),
    "jsd": lambda p, h, w, y: linear_divergence(h, w, p.teacher[0][: len(h)], p.teacher[1], kind="jsd"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_input_gives_the_same_bits_twice_without_a_host_sync(name):
    problem = Problem(SHAPES[0], torch.bfloat16)

    def run():
        hidden, weight, _ = problem.inputs()
        value = LOSSES[name](problem, hidden, weight, problem.target)
        return [value, *torch.autograd.grad(value.sum(), (hidden, weight))]

    first = run()  # also compiles the kernels, which syncs
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_tokens_bits_do_not_depend_on_the_other_tokens():
    problem = Problem(SHAPES[0], torch.bfloat16)

    def run(rows):
        hidden = problem.hidden[rows].requires_grad_()
        stats = linear_logprob(hidden, problem.weight, problem.target[rows], entropy=True)
        loss = ((stats.logprob_T + stats.entropy_T) * (rows + 1.0)).sum()
        return stats.logprob_T.detach(), stats.entropy_T.detach(), torch.autograd.grad(loss, hidden)[0]

    everyone = run(torch.arange(1301, device="cuda"))
    for rows in (torch.randperm(1301, device="cuda"), torch.arange(5, 6, device="cuda"), torch.arange(40, 700, device="cuda")):
        assert all(torch.equal(a, b[rows]) for a, b in zip(run(rows), everyone, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_memory_does_not_grow_with_the_number_of_tokens(name):
    """Beyond inputs and gradients, at T and 4T; less than a tenth of T·V in bf16."""
    extra = {}
    for num_tokens in (16384, 65536):
        problem = Problem((num_tokens, 64, 32768), torch.bfloat16)
        hidden, weight, _ = problem.inputs()
        for measured in (False, True):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            value = LOSSES[name](problem, hidden, weight, problem.target)
            gradients = torch.autograd.grad(value.sum(), (hidden, weight))
            if measured:
                extra[num_tokens] = torch.cuda.max_memory_allocated() - before - sum(d.nbytes for d in gradients)
            del value, gradients
    assert extra[65536] - extra[16384] <= 4 * 128 * (65536 - 16384)  # statistics per token
    assert extra[65536] < 65536 * 32768 * 2 / 2


def test_more_logits_than_32_bits_can_count():
    """T·V = 2^32: every tenth of a percent of the tokens against fp64."""
    problem = Problem((32768, 64, 131072), torch.bfloat16)
    hidden, weight, _ = problem.inputs()
    stats = linear_logprob(hidden, weight, problem.target, **ALL)
    d_hidden, d_weight = torch.autograd.grad((stats.logprob_T + stats.entropy_T).sum(), (hidden, weight))
    rows = torch.arange(1, 32768, 1024, device="cuda")
    some = hidden[rows].detach().double().requires_grad_()
    truth = linear_logprob_reference(some, weight.detach().double(), problem.target[rows])
    (d_some,) = torch.autograd.grad((truth.logprob_T + truth.entropy_T).sum(), some)
    assert (stats.logprob_T[rows].double() - truth.logprob_T).abs().max() < 1e-4
    assert (stats.entropy_T[rows].double() - truth.entropy_T).abs().max() < 1e-4
    assert (stats.argmax_T[rows] == truth.argmax_T).float().mean() > 0.9
    assert (d_hidden[rows].double() - d_some).abs().max() < 0.02 * d_some.abs().max()
    assert d_weight.isfinite().all() and d_weight[-1].abs().max() > 0


def test_targets_outside_the_vocabulary_read_nothing_and_are_loud():
    problem = Problem(SHAPES[0], torch.bfloat16)
    problem.target[10], problem.target[11], problem.target[12] = 9001, -7, -1
    stats = linear_logprob(problem.hidden, problem.weight, problem.target)
    assert (stats.logprob_T[10:13] == -torch.inf).all() and stats.logprob_T[13:].isfinite().all()


def test_what_an_ignored_token_holds_does_not_matter():
    problem = Problem(SHAPES[0], torch.bfloat16)
    problem.hidden[problem.target == -100] = torch.nan
    hidden, weight, bias = problem.inputs()
    loss = linear_cross_entropy(hidden, weight, problem.target, bias_V=bias)
    loss = loss + linear_logprob(hidden, weight, problem.target, bias_V=bias, entropy=True).entropy_T.sum()
    mask_T = problem.target != -100
    loss = loss + linear_divergence(hidden, weight, *problem.teacher, mask_T=mask_T).sum()
    gradients = torch.autograd.grad(loss, (hidden, weight, bias))
    assert loss.isfinite() and all(d.isfinite().all() for d in gradients) and (gradients[0][~mask_T] == 0).all()


def test_small_upstream_gradients_survive_fp16():
    problem = Problem(SHAPES[0], torch.float16)
    hidden, weight, _ = problem.inputs()
    gradients = [
        torch.autograd.grad((linear_logprob(hidden, weight, problem.target).logprob_T * scale).sum(), (hidden, weight))
        for scale in (1.0, 2.0**-10)
    ]
    for large, small in zip(*gradients, strict=True):
        torch.testing.assert_close(small.float() * 2**10, large.float(), rtol=2e-3, atol=2.0**-13)


def test_sums_of_sequences_have_the_same_bits_twice():
    values_T = random(2**20, seed=0)
    cu_seqlens = torch.arange(0, 2**20 + 1, 2**12, device="cuda")
    once, again = (sequence_sum(values_T, cu_seqlens) for _ in range(2))
    assert torch.equal(once, again)
    torch.testing.assert_close(once.double(), values_T.double().view(-1, 2**12).sum(1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("num_tokens", [0, 5])
def test_gradient_survives_no_tokens_and_tokens_all_ignored(num_tokens):
    hidden, weight, _ = Problem((num_tokens, 64, 513), torch.bfloat16).inputs()
    target = torch.full((num_tokens,), -100, device="cuda")
    for loss in (linear_cross_entropy(hidden, weight, target), linear_logprob(hidden, weight, target).logprob_T.sum()):
        gradients = torch.autograd.grad(loss, (hidden, weight))
        assert loss == 0 and all((d == 0).all() for d in gradients)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_extreme_logits_stay_finite(shift):
    problem = Problem(SHAPES[0], torch.float32)
    inputs = [x.detach() for x in problem.inputs()]
    stats = linear_logprob(*inputs[:2], problem.target, bias_V=inputs[2] + shift, **ALL)
    truth = linear_logprob_reference(*(x.double() for x in inputs[:2]), problem.target, bias_V=(inputs[2] + shift).double())
    assert (stats.entropy_T.double() - truth.entropy_T).abs().max() < 0.05
    assert (stats.logprob_T <= 0).all() and stats.logprob_T.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_by_inductor_in_one_graph(name):
    torch._dynamo.reset()
    compiled = torch.compile(LOSSES[name], fullgraph=True)
    for num_tokens in (1301, 700):
        problem = Problem((num_tokens, 200, 9001), torch.bfloat16)
        hidden, weight, _ = problem.inputs()
        runs = []
        for function in (compiled, LOSSES[name]):
            value = function(problem, hidden, weight, problem.target)
            runs.append([value, *torch.autograd.grad(value.sum(), (hidden, weight))])
        for a, b in zip(*runs, strict=True):
            torch.testing.assert_close(a, b, rtol=0.02, atol=1e-5)


def test_operators_pass_opcheck_on_the_gpu():
    hidden, weight, bias = Problem((9, 16, 33), torch.float32).inputs()
    target = torch.arange(9, device="cuda")[:, None]
    options = (0.9, 5.0, -100, [True, True, True, True], None, 0, 33, None, True)
    torch.library.opcheck(torch.ops.warpline.linear_logprob, (hidden, weight, bias, target, *options))
    teacher = (random(9, 8, seed=5), random(33, 8, seed=6))
    arguments = (hidden, weight, bias, *teacher, None, None, "jsd", 0.3, 1.0, None, None, None, 0, 33, None, True)
    torch.library.opcheck(torch.ops.warpline.linear_divergence, arguments)
