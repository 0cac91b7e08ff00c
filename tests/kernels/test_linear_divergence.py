"""The divergences against the full logits of both sides, in value and every gradient."""

import math

import pytest
import torch
from products import Products
from torch.utils.checkpoint import checkpoint

from warpline.kernels.linear_divergence import (
    linear_divergence,
    linear_divergence_reference,
)
from warpline.kernels.vocabulary_sweep import BLOCKING, Blocking

KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)]


SMALL = Blocking(rows=8, columns=4, elements=32, backward_columns=5, backward_elements=80, kept_elements=176)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Products of 8 rows; three blocks of columns or more in each direction, the last ragged; chunks of 16 tokens."""
    monkeypatch.setitem(BLOCKING, "cpu", SMALL)


def make(num_tokens=27, width=5, teacher_width=7, num_entries=11, dtype=torch.float64, scale=1.0):
    """Student (hidden, weight, bias), which need gradients, and the teacher's."""
    generator = torch.Generator().manual_seed(0)

    def side(d):
        shapes = [(num_tokens, d), (num_entries, d), (num_entries,)]
        return [(scale * torch.randn(s, generator=generator, dtype=torch.float64)).to(dtype) for s in shapes]

    return [x.requires_grad_() for x in side(width)], side(teacher_width)


def run(function, student, teacher, **options):
    """The divergences, and the student's gradients against arbitrary upstream gradients."""
    value_T = function(*student[:2], *teacher[:2], bias_V=student[2], teacher_bias_V=teacher[2], **options)
    upstream_T = torch.randn(len(value_T), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [value_T, *torch.autograd.grad(value_T, student, upstream_T.to(value_T.dtype))]


def same(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_reference_gradient_is_the_numerical_one(kind, beta):
    student, teacher = make(3, 2, 3, 4)

    def value(h, w, b):
        return linear_divergence_reference(h, w, *teacher[:2], bias_V=b, kind=kind, beta=beta, softcap=2.0)

    assert torch.autograd.gradcheck(value, student)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("caps", [{}, {"softcap": 3.0, "teacher_softcap": 2.0}])
@pytest.mark.parametrize("is_masked", [True, False])
def test_divergence_and_its_gradients_are_those_of_full_logits(kind, beta, temperature, caps, is_masked):
    student, teacher = make()
    mask_T = torch.arange(27) % 3 != 1 if is_masked else None
    options = {"kind": kind, "beta": beta, "temperature": temperature, "mask_T": mask_T, **caps}
    pairs = zip(
        run(linear_divergence, student, teacher, **options),
        run(linear_divergence_reference, student, teacher, **options),
        strict=True,
    )
    for value, expected in pairs:
        same(value, expected)


def test_values_worked_by_hand():
    def logits_of(*p):
        return torch.tensor([p], dtype=torch.float64).log()

    one = torch.eye(2, dtype=torch.float64)
    student, teacher = (logits_of(0.25, 0.75), one), (logits_of(0.5, 0.5), one)
    forward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    reverse = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    mixed = [0.3 * 0.5 + 0.7 * 0.25, 0.3 * 0.5 + 0.7 * 0.75]
    jsd = 0.3 * sum(0.5 * math.log(0.5 / m) for m in mixed)
    jsd += 0.7 * (0.25 * math.log(0.25 / mixed[0]) + 0.75 * math.log(0.75 / mixed[1]))
    for kind, expected in (("forward_kl", forward), ("reverse_kl", reverse), ("jsd", jsd)):
        value_T = linear_divergence(*student, *teacher, kind=kind, beta=0.3)
        assert value_T.item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_equal_sides_have_no_divergence_and_no_gradient(kind, beta):
    student, _ = make()
    value_T, *gradients = run(linear_divergence, student, [x.detach() for x in student], kind=kind, beta=beta)
    assert value_T.abs().max() < 1e-14
    assert all(d.abs().max() < 1e-13 for d in gradients)


def test_teacher_gets_no_gradient():
    student, teacher = make()
    teacher = [x.requires_grad_() for x in teacher]
    value_T = linear_divergence(*student[:2], *teacher[:2], bias_V=student[2], teacher_bias_V=teacher[2])
    value_T.sum().backward()
    assert all(x.grad is None for x in teacher)
    assert all(x.grad.abs().max() > 0 for x in student)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("num_tokens", [9, 0])
def test_gradient_survives_a_batch_without_counted_tokens(kind, beta, num_tokens):
    student, teacher = make(num_tokens)
    mask_T = torch.zeros(num_tokens, dtype=torch.bool)
    value_T, *gradients = run(linear_divergence, student, teacher, kind=kind, beta=beta, mask_T=mask_T)
    assert value_T.shape == (num_tokens,) and (value_T == 0).all()
    assert all(d is not None and (d == 0).all() for d in gradients)


def test_masked_tokens_never_reach_a_product():
    student, teacher = make()
    mask_T = torch.arange(27) < 8
    expected = run(linear_divergence, student, teacher, mask_T=mask_T)
    poisoned = [x.detach().clone().requires_grad_() for x in student]
    with torch.no_grad():
        poisoned[0][8:] = torch.nan
    teacher[0][8:] = torch.nan
    with Products() as watch:
        actual = run(linear_divergence, poisoned, teacher, mask_T=mask_T)
    one, other = 8 * 5 * 11, 8 * 7 * 11
    assert watch.count == 4 * one + 2 * other
    for a, b in zip(actual, expected, strict=True):
        same(a, b)


@pytest.mark.parametrize(("needs", "num_products"), [((1, 1), 4), ((1, 0), 3), ((0, 1), 3), ((0, 0), 1)])
def test_products_that_no_input_needs_are_skipped(needs, num_products):
    student, teacher = make(8)
    inputs = [x.detach().requires_grad_(bool(n)) for x, n in zip(student[:2], needs, strict=True)]
    with Products() as watch:
        value = linear_divergence(*inputs, *teacher[:2]).sum()
        if any(needs):
            value.backward()
    num_teacher_products = 2 if any(needs) else 1
    assert watch.count == num_products * 8 * 5 * 11 + num_teacher_products * 8 * 7 * 11


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_strongly_shifted_logits_keep_their_divergence(kind, beta):
    student, teacher = make(dtype=torch.float32)
    with torch.no_grad():
        student[2] -= 1e4
        teacher[2] += 1e4
    actual = run(linear_divergence, student, teacher, kind=kind, beta=beta)
    doubled = [x.detach().double().requires_grad_() for x in student]
    truth = run(linear_divergence_reference, doubled, [x.double() for x in teacher], kind=kind, beta=beta)
    for value, expected in zip(actual, truth, strict=True):
        assert value.isfinite().all()
        assert (value.double() - expected).abs().max() <= 5e-3 * expected.abs().max()


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_nearly_certain_sides_give_finite_numbers(kind, beta):
    student, teacher = make(dtype=torch.float32, scale=20.0)
    value_T, *gradients = run(linear_divergence, student, teacher, kind=kind, beta=beta)
    truth_T = run(linear_divergence_reference, student, teacher, kind=kind, beta=beta)[0]
    torch.testing.assert_close(value_T, truth_T, rtol=1e-5, atol=1e-3)
    assert all(d.isfinite().all() for d in gradients)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_an_entry_turned_off_on_both_sides_counts_for_nothing(kind, beta):
    student, teacher = make()
    off_V = torch.zeros(11, dtype=torch.float64).index_fill(0, torch.tensor(4), -torch.inf)
    options = {"kind": kind, "beta": beta}
    value_T = linear_divergence(*student[:2], *teacher[:2], bias_V=off_V, teacher_bias_V=off_V, **options)
    d_weight_VD = torch.autograd.grad(value_T.sum(), student[1])[0]
    keep = [i for i in range(11) if i != 4]
    same(value_T, linear_divergence(student[0], student[1][keep], teacher[0], teacher[1][keep], **options))
    assert d_weight_VD.isfinite().all() and (d_weight_VD[4] == 0).all()


@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_eager_torch(kind, beta, dtype):
    student, teacher = make(40, 32, 24, 96, dtype, 0.5)

    def eager(h, w, th, tw, bias_V, teacher_bias_V, **options):
        linear = torch.nn.functional.linear
        eye = torch.eye(96)
        return linear_divergence_reference(
            linear(h, w, bias_V).float(), eye, linear(th, tw, teacher_bias_V).float(), eye, **options
        )

    options = {"kind": kind, "beta": beta}
    doubled = [x.detach().double().requires_grad_() for x in student]
    actual = run(linear_divergence, student, teacher, **options)
    eager_result = run(eager, student, teacher, **options)
    truth = run(linear_divergence_reference, doubled, [x.double() for x in teacher], **options)
    for value, eager_value, true_value in zip(actual, eager_result, truth, strict=True):
        error, eager_error = ((x.double() - true_value).abs().max() for x in (value, eager_value))
        assert error <= 2 * eager_error + 2 * torch.finfo(value.dtype).eps * true_value.abs().max()


def test_noncontiguous_inputs_and_autocast_change_nothing():
    student, teacher = make(dtype=torch.float32)
    expected = run(linear_divergence, student, teacher, kind="jsd")
    strided = [x.detach().repeat_interleave(2, 0)[::2].requires_grad_() for x in student]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(linear_divergence, strided, [x.repeat_interleave(2, 0)[::2] for x in teacher], kind="jsd")
    for a, b in zip(actual, expected, strict=True):
        same(a, b, 1e-6)


def test_products_in_another_dtype_are_those_of_rounded_operands():
    student, teacher = make(dtype=torch.float32)
    rounded = [[x.detach().bfloat16().float() for x in side[:2]] for side in (student, teacher)]
    mine = linear_divergence(*student[:2], *teacher[:2], product_dtype=torch.bfloat16)
    assert torch.equal(mine, linear_divergence(*rounded[0], *rounded[1]))
    compiled = torch.compile(linear_divergence, fullgraph=True, backend="aot_eager")
    assert torch.equal(mine, compiled(*student[:2], *teacher[:2], product_dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"product_dtype torch.int32; expected fp16"):
        linear_divergence(*student[:2], *teacher[:2], product_dtype=torch.int32)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_biases_with_gaps_are_read_where_they_are(kind):
    student, teacher = make(9, dtype=torch.float32)

    def with_gaps(bias):
        gaps = bias.detach().repeat_interleave(2)
        gaps[1::2] = torch.nan
        return gaps[::2]

    strided = [*student[:2], with_gaps(student[2]).requires_grad_()], [*teacher[:2], with_gaps(teacher[2])]
    for a, b in zip(*(run(linear_divergence, *sides, kind=kind) for sides in ((student, teacher), strided)), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_that_recomputes_lets_the_backward_read_what_it_saved():
    student, teacher = make()
    value_T = checkpoint(linear_divergence, *student[:2], *teacher[:2], use_reentrant=False)
    expected_T = linear_divergence(*student[:2], *teacher[:2])
    gradients = (torch.autograd.grad(x.sum(), student[:2]) for x in (value_T, expected_T))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bad_input_is_named_with_its_remedy():
    (hidden, weight, _), (teacher_hidden, teacher_weight, _) = make()
    sides = (hidden, weight, teacher_hidden, teacher_weight)
    with pytest.raises(ValueError, match="kind is 'kl'; expected one of"):
        linear_divergence(*sides, kind="kl")
    with pytest.raises(ValueError, match=r"beta is 1\.0; jsd expects 0 < beta < 1"):
        linear_divergence(*sides, kind="jsd", beta=1.0)
    with pytest.raises(ValueError, match=r"the teacher has \(T, V\) = \(27, 10\)"):
        linear_divergence(hidden, weight, teacher_hidden, teacher_weight[1:])
    with pytest.raises(ValueError, match=r"mask is torch\.int64"):
        linear_divergence(*sides, mask_T=torch.ones(27, dtype=torch.int64))
    with pytest.raises(ValueError, match="temperature is -1"):
        linear_divergence(*sides, temperature=-1.0)
