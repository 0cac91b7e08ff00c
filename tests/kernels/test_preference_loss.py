"""Every preference loss against a value and a gradient worked from its published formula."""

import math
from decimal import Decimal, localcontext
from functools import partial

import pytest
import torch
from torch.nn.functional import logsigmoid

from warpline.kernels.linear_logprob import linear_logprob
from warpline.kernels.preference_loss import (
    CERTAIN_LOGPROB,
    aot,
    apo_down,
    apo_zero,
    bco_pair,
    bradley_terry,
    cpo,
    discopop,
    dpo,
    exo_pair,
    f_dpo,
    hinge,
    ipo,
    kto,
    kto_baseline,
    length_desensitised,
    nca_pair,
    orpo,
    ranking,
    robust_dpo,
    simpo,
    sppo_hard,
    wpo_weight,
)
from warpline.kernels.sequence_sum import sequence_sum

CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = -12.0, -15.0, -13.5, -14.0
H_W, H_L = CHOSEN - REF_CHOSEN, REJECTED - REF_REJECTED
DELTA = H_W - H_L


def sigma(x):
    return 1 / (1 + math.exp(-x))


QW = sigma(0.3 * DELTA)


def number(x):
    return torch.tensor([x], dtype=torch.float64, requires_grad=True)


def four():
    return [number(x) for x in (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)]


CASES = {
    "dpo": (lambda *a: dpo(*a, beta=0.3), -math.log(sigma(0.3 * DELTA)), -0.3 * sigma(-0.3 * DELTA)),
    "conservative": (
        lambda *a: dpo(*a, beta=0.3, label_smoothing=0.2),
        -0.8 * math.log(sigma(0.3 * DELTA)) - 0.2 * math.log(sigma(-0.3 * DELTA)),
        -0.3 * (0.8 * sigma(-0.3 * DELTA) - 0.2 * sigma(0.3 * DELTA)),
    ),
    "robust": (
        lambda *a: robust_dpo(*a, beta=0.3, label_smoothing=0.2),
        (-0.8 * math.log(sigma(0.3 * DELTA)) + 0.2 * math.log(sigma(-0.3 * DELTA))) / 0.6,
        -0.3 * (0.8 * sigma(-0.3 * DELTA) + 0.2 * sigma(0.3 * DELTA)) / 0.6,
    ),
    "hinge inside": (lambda *a: hinge(*a, beta=0.3), 1 - 0.3 * DELTA, -0.3),
    "hinge satisfied": (lambda *a: hinge(*a, beta=0.5), 0.0, 0.0),
    "ipo summed": (lambda *a: ipo(*a, beta=0.5), (DELTA - 1) ** 2, 2 * (DELTA - 1)),
    "ipo averaged": (
        lambda *a: ipo(*a, beta=0.5, chosen_length_B=torch.tensor([4]), rejected_length_B=torch.tensor([5])),
        (H_W / 4 - H_L / 5 - 1) ** 2,
        2 * (H_W / 4 - H_L / 5 - 1) / 4,
    ),
    # From here on TRL's names and formulas, derived again by hand; β is 0.3, ε 0.1.
    "exo": (
        lambda *a: exo_pair(*a, beta=0.3, label_smoothing=0.1),
        QW * math.log(QW / 0.9) + (1 - QW) * math.log((1 - QW) / 0.1),
        0.3 * QW * (1 - QW) * (math.log(QW / 0.9) - math.log((1 - QW) / 0.1)),
    ),
    "nca": (
        lambda *a: nca_pair(*a, beta=0.3),
        -math.log(sigma(0.3 * H_W)) - 0.5 * math.log(sigma(-0.3 * H_W)) - 0.5 * math.log(sigma(-0.3 * H_L)),
        0.3 * (-sigma(-0.3 * H_W) + 0.5 * sigma(0.3 * H_W)),
    ),
    "bco": (
        lambda *a: bco_pair(*a, beta=0.3, shift=0.2),
        -math.log(sigma(0.3 * H_W - 0.2)) - math.log(sigma(0.2 - 0.3 * H_L)),
        -0.3 * sigma(0.2 - 0.3 * H_W),
    ),
    "sppo": (lambda *a: sppo_hard(*a, beta=0.5), (H_W - 1) ** 2 + (H_L + 1) ** 2, 2 * (H_W - 1)),
    "apo zero": (
        lambda *a: apo_zero(*a, beta=0.3),
        1 - sigma(0.3 * H_W) + sigma(0.3 * H_L),
        -0.3 * sigma(0.3 * H_W) * sigma(-0.3 * H_W),
    ),
    "apo down": (
        lambda *a: apo_down(*a, beta=0.3),
        sigma(0.3 * H_W) + 1 - sigma(0.3 * DELTA),
        0.3 * sigma(0.3 * H_W) * sigma(-0.3 * H_W) - 0.3 * sigma(0.3 * DELTA) * sigma(-0.3 * DELTA),
    ),
    "f-DPO, reverse KL": (
        lambda *a: f_dpo(*a, divergence="reverse_kl", beta=0.3),
        -math.log(sigma(0.3 * DELTA)),
        -0.3 * sigma(-0.3 * DELTA),
    ),
    "f-DPO, forward KL": (
        lambda *a: f_dpo(*a, divergence="forward_kl", beta=0.3),
        -math.log(sigma(0.3 * (math.exp(-H_L) - math.exp(-H_W)))),
        -0.3 * sigma(-0.3 * (math.exp(-H_L) - math.exp(-H_W))) * math.exp(-H_W),
    ),
    "f-DPO, Jensen-Shannon": (
        lambda *a: f_dpo(*a, divergence="js", beta=0.3),
        -math.log(sigma(0.3 * math.log(sigma(H_W) / sigma(H_L)))),
        -0.3 * sigma(-0.3 * math.log(sigma(H_W) / sigma(H_L))) * sigma(-H_W),
    ),
    "f-DPO, alpha": (
        lambda *a: f_dpo(*a, divergence="alpha", beta=0.3, alpha=0.5),
        -math.log(sigma(0.3 * -2 * (math.exp(-0.5 * H_W) - math.exp(-0.5 * H_L)))),
        -0.3 * sigma(0.3 * 2 * (math.exp(-0.5 * H_W) - math.exp(-0.5 * H_L))) * math.exp(-0.5 * H_W),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_formula(name):
    function, value, d_chosen = CASES[name]
    inputs = four()
    loss_B = function(*inputs)
    assert loss_B.shape == (1,)
    assert loss_B.item() == pytest.approx(value, abs=1e-12)
    assert torch.autograd.grad(loss_B.sum(), inputs[0])[0].item() == pytest.approx(d_chosen, abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_the_numerical_one(name):
    assert torch.autograd.gradcheck(CASES[name][0], four())


def test_reference_free_losses_are_those_of_their_formulas():
    chosen, rejected, nll = number(-0.7), number(-1.1), number(0.9)
    odds = [x - math.log(1 - math.exp(x)) for x in (-0.7, -1.1)]
    expected = 0.9 - 0.2 * math.log(sigma(odds[0] - odds[1]))
    assert orpo(chosen, rejected, nll, beta=0.2).item() == pytest.approx(expected, abs=1e-12)
    assert simpo(chosen, rejected, beta=2.0, gamma=0.5).item() == pytest.approx(-math.log(sigma(0.8 - 0.5)), abs=1e-12)
    expected = -math.log(sigma(0.3 * 0.4)) + 0.5 * 0.9
    assert cpo(chosen, rejected, nll, beta=0.3, alpha=0.5).item() == pytest.approx(expected, abs=1e-12)
    for function in (orpo, cpo, lambda a, b, _: simpo(a, b)):
        assert torch.autograd.gradcheck(function, (chosen, rejected, nll))


def test_log_odds_of_a_nearly_certain_response_stay_finite():
    chosen = torch.tensor([-1e-6], requires_grad=True)
    loss_B = orpo(chosen, torch.tensor([-1.0]), torch.zeros(1))
    loss_B.sum().backward()
    assert loss_B.isfinite().all() and chosen.grad.isfinite().all()


def test_kto_treats_both_sides_and_its_baseline_by_the_formula():
    policy, reference = (torch.tensor(x, dtype=torch.float64) for x in ([-3.0, -4.0], [-5.0, -3.5]))
    policy.requires_grad_()
    baseline = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    loss_B = kto(policy, reference, torch.tensor([True, False]), baseline, beta=0.4, **weights)
    assert loss_B[0].item() == pytest.approx(1.3 * (1 - sigma(0.4 * (2.0 - 0.25))), abs=1e-12)
    assert loss_B[1].item() == pytest.approx(0.7 * (1 - sigma(0.4 * (0.25 + 0.5))), abs=1e-12)
    loss_B.sum().backward()
    assert policy.grad[0] < 0 < policy.grad[1]
    assert baseline.grad is None


def test_kto_baseline_is_the_mean_ratio_never_below_zero_and_constant():
    policy = torch.tensor([-1.0, -2.0], requires_grad=True)
    value = kto_baseline(policy, torch.tensor([-3.0, -3.0]))
    assert value == 1.5 and not value.requires_grad
    assert kto_baseline(policy, torch.zeros(2)) == 0


def test_losses_are_per_pair_and_independent_of_the_batch():
    generator = torch.Generator().manual_seed(0)
    inputs = [-10 * torch.rand(6, generator=generator, dtype=torch.float64) for _ in range(4)]
    for function in (dpo, robust_dpo, hinge, ipo):
        whole = function(*inputs)
        alone = torch.cat([function(*(x[i : i + 1] for x in inputs)) for i in range(6)])
        torch.testing.assert_close(whole, alone, rtol=1e-14, atol=0)


def test_huge_margins_stay_finite():
    far, near = torch.tensor([1e4], requires_grad=True), torch.zeros(1)
    for loss_B in (dpo(far, near, near, near), dpo(near, far, near, near), robust_dpo(near, far, near, near)):
        gradient = torch.autograd.grad(loss_B.sum(), far)[0]
        assert loss_B.isfinite().all() and gradient.isfinite().all()


def test_bad_options_are_named():
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.5; expected"):
        robust_dpo(*four(), label_smoothing=0.5)
    with pytest.raises(ValueError, match="length of one side"):
        ipo(*four(), chosen_length_B=torch.ones(1))
    with pytest.raises(ValueError, match=r"is_desirable is torch\.int64"):
        kto(number(0.0), number(0.0), torch.ones(1, dtype=torch.int64), 0.0)


def test_discopop_blends_the_logistic_and_the_exponential_loss():
    inputs = four()
    loss = discopop(*inputs, beta=0.3, tau=0.5)
    mix, logistic, exponential = sigma(0.3 * DELTA / 0.5), -math.log(sigma(0.3 * DELTA)), math.exp(-0.3 * DELTA)
    assert loss.item() == pytest.approx((1 - mix) * logistic + mix * exponential, abs=1e-12)
    assert torch.autograd.gradcheck(lambda x: discopop(x, *inputs[1:], beta=0.3, tau=0.5), inputs[0])


def test_aot_compares_sorted_values_of_the_whole_batch():
    chosen, rejected = torch.tensor([-3.0, -1.0, -2.0]), torch.tensor([-4.0, -4.5, -2.5])
    reference = torch.tensor([-2.0, -2.0, -3.0]), torch.tensor([-3.0, -5.0, -2.0])
    paired = sorted([1.0, 3.5, 0.5]), sorted([1.0, 3.0, -1.0])
    unpaired = sorted([-1.0, 1.0, 1.0]), sorted([-1.0, 0.5, -0.5])
    for is_paired, (one, other) in ((True, paired), (False, unpaired)):
        expected = [-math.log(sigma(0.4 * (a - b))) for a, b in zip(one, other, strict=True)]
        assert aot(chosen, rejected, *reference, beta=0.4, is_paired=is_paired).tolist() == pytest.approx(expected, abs=1e-6)


def test_length_desensitised_sums_weigh_what_is_behind_the_shorter_answer():
    logprob_T = torch.tensor([9.0, -1.0, -2.0, -3.0, -4.0, 9.0, -5.0, -6.0]).double()
    mask_T = torch.tensor([0, 1, 1, 1, 1, 0, 1, 1]).bool()
    cu_seqlens = torch.tensor([0, 5, 8])
    sums = length_desensitised(logprob_T, cu_seqlens, torch.tensor([2, 2]), alpha=0.25, mask_T=mask_T)
    assert sums.tolist() == [-1 - 2 - 0.25 * 7, -11]
    dirty = logprob_T.masked_fill(~mask_T, torch.nan)
    assert torch.equal(length_desensitised(dirty, cu_seqlens, torch.tensor([2, 2]), alpha=0.25, mask_T=mask_T), sums)


def test_wpo_weighs_an_answer_by_how_likely_it_is_against_what_was_to_be_expected():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]).double()
    said = torch.tensor([0, 1, 2])
    logprob_T = p.gather(1, said[:, None])[:, 0].log().requires_grad_()
    weight = wpo_weight(logprob_T, p.square().sum(1), torch.tensor([0, 2, 3]))
    expected = [math.sqrt(0.5 / 0.375 * 0.2 / 0.54), 0.8 / 0.66]
    assert weight.tolist() == pytest.approx(expected, abs=1e-6) and not weight.requires_grad


def test_reward_model_losses_are_those_of_their_papers():
    better, worse = torch.tensor([2.0, 0.5]).double(), torch.tensor([1.0, 1.5]).double()
    loss = bradley_terry(better, worse, margin_B=0.5, centring=0.01)
    assert loss.tolist() == pytest.approx([-math.log(sigma(0.5)) + 0.09, -math.log(sigma(-1.5)) + 0.04], abs=1e-12)
    reward = torch.tensor([3.0, 1.0, 2.0, 0.0, 5.0, 1.0]).double()
    loss = ranking(reward, torch.tensor([1, 2, 2, 3, 2, 1]), torch.tensor([0, 4, 6]))
    gaps = [2.0, 1.0, 3.0, 1.0, 2.0]  # every pair but the tie of completions 2 and 3, of 4 over 2 = 6
    expected = [sum(-math.log(sigma(gap)) for gap in gaps) / 6, -math.log(sigma(-4.0))]
    assert loss.tolist() == pytest.approx(expected, abs=1e-12)
    assert ranking(reward[:1], torch.tensor([1]), torch.tensor([0, 1])).tolist() == [0.0]


# ---- Edges: far exponents, certain answers, nothing to sum, and what is refused ----

PAIRWISE = {
    **{function.__name__: function for function in (dpo, robust_dpo, hinge, ipo, exo_pair, nca_pair, bco_pair, sppo_hard)},
    **{function.__name__: function for function in (aot, apo_zero, apo_down, discopop)},
    **{f"f_dpo {name}": partial(f_dpo, divergence=name) for name in ("reverse_kl", "forward_kl", "js", "alpha")},
    "ipo averaged": lambda *a: ipo(*a, chosen_length_B=torch.full_like(a[0], 4), rejected_length_B=torch.full_like(a[0], 5)),
    "aot unpaired": partial(aot, is_paired=False),
    "discopop tau 2": partial(discopop, tau=2.0),
}


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_log_ratios_give_finite_losses_and_gradients(name, dtype):
    far = torch.tensor([-2e4, -900.0, -90.0, 0.0, 90.0, 900.0, 2e4], dtype=dtype)
    chosen, rejected = (x.reshape(-1).requires_grad_() for x in torch.meshgrid(far, far, indexing="ij"))
    loss_B = PAIRWISE[name](chosen, rejected, torch.zeros_like(chosen), torch.zeros_like(chosen))
    gradients = torch.autograd.grad(loss_B.sum(), (chosen, rejected))
    assert loss_B.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


def test_the_forward_kl_is_its_formula_up_to_the_limit_of_the_exponent():
    h_w, h_l = torch.tensor([-79.0, -3.0, -200.0]).double().requires_grad_(), torch.tensor([-60.0, 5.0, -100.0]).double()
    loss_B = f_dpo(h_w, h_l, torch.zeros(3).double(), torch.zeros(3).double(), divergence="forward_kl", beta=0.1)
    formula = [-logsigmoid(0.1 * (torch.exp(-b) - torch.exp(-a))).item() for a, b in ((h_w[i], h_l[i]) for i in (0, 1))]
    assert loss_B.tolist() == pytest.approx([*formula, math.log(2)], rel=1e-12)
    assert torch.autograd.grad(loss_B.sum(), h_w)[0][2] == 0


@pytest.mark.parametrize("margin", [-2e4, -900.0, -88.0, -5.0, -0.1, 0.0, 0.1, 5.0, 900.0])
def test_discopop_is_its_formula_at_every_margin(margin):
    """In decimal numbers, whose exponents reach a million: the factors of m exp(−x) leave the range of floats."""
    x, zero = number(margin), torch.zeros(1).double()
    loss_B = discopop(x, zero, zero, zero, beta=1.0, tau=0.05)
    with localcontext(prec=60):
        far, tau = Decimal(margin), Decimal("0.05")
        mix, rest, exponential = 1 / (1 + (-far / tau).exp()), 1 / (1 + (far / tau).exp()), (-far).exp()
        logistic = (1 + exponential).ln()
        value = rest * logistic + mix * exponential
        slope = mix * rest / tau * (exponential - logistic) - rest / (1 + far.exp()) - mix * exponential
    assert loss_B.item() == pytest.approx(float(value), rel=1e-12)
    assert torch.autograd.grad(loss_B.sum(), x)[0].item() == pytest.approx(float(slope), rel=1e-12)


def test_log_odds_of_certain_answers_are_limited_and_finite_in_gradient():
    certain, nll = torch.tensor([0.0, 0.0, -1.0, 1e-9], requires_grad=True), torch.zeros(())
    rejected = torch.tensor([-1.0, 0.0, 0.0, 0.0], requires_grad=True)
    loss_B = orpo(certain, rejected, nll, beta=1.0)
    limit = orpo(torch.tensor([CERTAIN_LOGPROB, 0, -1, 0]), torch.tensor([-1, 0, CERTAIN_LOGPROB, 0]), nll, beta=1.0)
    assert torch.equal(loss_B, limit)
    odds = -math.log(math.e - 1)
    far = -math.log(1e-7)
    assert loss_B.tolist() == pytest.approx([math.exp(odds - far), math.log(2), far - odds, math.log(2)], rel=1e-4)
    gradients = torch.autograd.grad(loss_B.sum(), (certain, rejected))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0][[0, 1, 3]].tolist() == [0, 0, 0] and gradients[1][1:].tolist() == [0, 0, 0]


def test_no_pair_gives_an_empty_loss():
    for function in PAIRWISE.values():
        assert function(*[torch.zeros(0)] * 4).shape == (0,)
    empty = torch.zeros(0)
    assert kto_baseline(empty, empty) == 0 and kto(empty, empty, empty.bool(), 0.0).shape == (0,)
    assert orpo(empty, empty, empty).shape == simpo(empty, empty).shape == cpo(empty, empty, empty).shape == (0,)
    assert bradley_terry(empty, empty).shape == ranking(empty, empty, torch.tensor([0])).shape == (0,)
    none = torch.zeros(1)
    assert ipo(none, none, none, none, beta=0.5, chosen_length_B=none, rejected_length_B=none).tolist() == [1.0]
    cu = torch.tensor([0])
    assert length_desensitised(empty, cu, empty, alpha=0.5).shape == wpo_weight(empty, empty, cu).shape == (0,)


@pytest.mark.parametrize("name", PAIRWISE)
def test_nothing_is_broadcast_in_a_pair(name):
    for position in range(4):
        for bad in (torch.zeros(8, 1), torch.zeros(1), torch.zeros(())):
            inputs = [torch.zeros(8)] * 4
            inputs[position] = bad
            with pytest.raises(ValueError, match="expected one shape of one dimension"):
                PAIRWISE[name](*inputs)
    with pytest.raises(ValueError, match="expected floating-point"):
        PAIRWISE[name](*[torch.zeros(8).long()] * 4)


def test_nothing_is_broadcast_in_the_other_losses():
    x, column, one = torch.zeros(8), torch.zeros(8, 1), torch.zeros(1)
    labels, cu = torch.ones(8).bool(), torch.tensor([0, 3, 8])
    for bad in (column, one):
        cases = [
            (lambda bad=bad: kto(x, x, labels, bad), r"baseline is .*; expected a float or \[\]"),
            (lambda bad=bad: kto(x, x, bad.bool(), 0.0), r"is_desirable is .*; expected \[8\]"),
            (lambda bad=bad: kto(x, bad, labels, 0.0), "expected one shape"),
            (lambda bad=bad: kto_baseline(x, bad), "expected one shape"),
            (lambda bad=bad: ipo(x, x, x, x, chosen_length_B=x, rejected_length_B=bad), r"rejected_length is .*expected \[8\]"),
            (lambda bad=bad: orpo(x, x, bad), r"nll_chosen is .*expected \[8\] or \[\]"),
            (lambda bad=bad: cpo(x, x, bad), r"nll_chosen is .*expected \[8\] or \[\]"),
            (lambda bad=bad: simpo(x, bad), "expected one shape"),
            (lambda bad=bad: bradley_terry(x, bad), "expected one shape"),
            (lambda bad=bad: bradley_terry(x, x, margin_B=bad), r"margin is .*expected \[8\] or \[\]"),
            (lambda bad=bad: ranking(x, bad, cu), r"rank is .*expected \[8\]"),
            (lambda bad=bad: length_desensitised(x, cu, bad, alpha=0.5), r"shared_length is .*expected \[2\]"),
            (lambda bad=bad: length_desensitised(x, cu, x[:2], alpha=0.5, mask_T=bad.bool()), r"mask is .*expected"),
            (lambda bad=bad: wpo_weight(x, bad, cu), "expected one shape"),
        ]
        for call, message in cases:
            with pytest.raises(ValueError, match=message):
                call()


def test_masks_boundaries_and_divisors_that_cannot_be_are_refused():
    x, cu = torch.zeros(8), torch.tensor([0, 3, 8])
    cases = [
        (lambda: ipo(x, x, x, x, beta=0.0), r"beta is 0\.0; expected a number > 0"),
        (lambda: sppo_hard(x, x, x, x, beta=0.0), r"beta is 0\.0; expected a number > 0"),
        (lambda: discopop(x, x, x, x, tau=0.0), r"tau is 0\.0; expected a number > 0"),
        (lambda: ranking(x, x, torch.tensor([0, 3, 7])), "cu_seqlens ends at 7; expected 8"),
        (lambda: ranking(x, x, torch.tensor([0, 3, 9])), r"cu_seqlens is \[0, 3, 9\]; expected"),
        (lambda: length_desensitised(x, cu, x[:2], alpha=0.5, mask_T=x), r"mask is torch\.float32"),
        (lambda: length_desensitised(x, cu + 1, x[:2], alpha=0.5), r"cu_seqlens is \[1, 4, 9\]"),
        (lambda: wpo_weight(x, x, cu, mask_T=x.long()), r"mask is torch\.int64"),
        (lambda: wpo_weight(x, x, cu + 1), r"cu_seqlens is \[1, 4, 9\]"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tokens_are_counted_exactly_in_every_dtype(dtype):
    """1000 tokens of −1 of which 700 are shared, behind 2 of another sequence, then garbage; half of 300 is 150."""
    logprob_T = torch.cat([-torch.ones(1002), torch.full((3,), torch.nan)]).to(dtype)
    cu = torch.tensor([0, 2, 1002])
    sums = length_desensitised(logprob_T, cu, torch.tensor([5, 700]), alpha=0.5)
    assert sums.tolist() == [-2, -850]
    weight_B = wpo_weight(logprob_T, torch.ones(1005, dtype=dtype), cu)
    assert weight_B.tolist() == pytest.approx([math.exp(-1)] * 2, rel=1e-6)


def test_alpha_keeps_the_precision_of_the_sums_and_reaches_the_gradient():
    logprob_T = -torch.ones(3, dtype=torch.float64, requires_grad=True)
    sums = length_desensitised(logprob_T, torch.tensor([0, 3]), torch.tensor([1]), alpha=0.1)
    assert sums.item() == pytest.approx(-1.2, abs=1e-15)
    assert torch.autograd.grad(sums, logprob_T)[0].tolist() == [1, 0.1, 0.1]


# ---- Against Liger's chunked losses, from hidden states to gradients ----


LIGER = {
    "sigmoid": lambda *a: dpo(*a),
    "hinge": lambda *a: hinge(*a),
    "exo_pair": lambda *a: exo_pair(*a, label_smoothing=0.1),
    "nca_pair": lambda *a: nca_pair(*a),
    "robust": lambda *a: robust_dpo(*a, label_smoothing=0.1),
    "bco_pair": lambda *a: bco_pair(*a),
    "sppo_hard": lambda *a: sppo_hard(*a),
    "apo_zero": lambda *a: apo_zero(*a),
    "apo_down": lambda *a: apo_down(*a),
    "discopop": lambda *a: discopop(*a),
}


class Pairs:
    """Hidden states of 3 pairs as Liger wants them, chosen first, [6, S, D], with prompts and padding ignored."""

    def __init__(self):
        def random(*shape, seed):
            return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

        self.hidden, self.weight = random(6, 7, 5, seed=1).requires_grad_(), random(13, 5, seed=2).requires_grad_()
        self.reference = random(6, 7, 5, seed=3), random(13, 5, seed=4)
        self.target = torch.randint(0, 13, (6, 7), generator=torch.Generator().manual_seed(5))
        self.target[:, :2], self.target[1, 5:], self.target[4, 6:] = -100, -100, -100
        self.cu_seqlens = torch.arange(0, 43, 7)
        self.length = (self.target != -100).sum(1)

    def sums(self, hidden, weight):
        """Of every sequence's counted log-probabilities, chosen and rejected."""
        logprob_T = linear_logprob(hidden.reshape(-1, 5), weight, self.target.reshape(-1)).logprob_T
        return sequence_sum(logprob_T, self.cu_seqlens).chunk(2)

    def all_sums(self):
        with torch.no_grad():
            reference = self.sums(*self.reference)
        return *self.sums(self.hidden, self.weight), *reference

    def compare(self, ours, theirs):
        gradients = [torch.autograd.grad(loss, (self.hidden, self.weight)) for loss in (ours, theirs)]
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
        for d, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(d, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LIGER)
def test_the_dpo_family_is_ligers(name):
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    pairs = Pairs()
    theirs = chunked.LigerFusedLinearDPOLoss(loss_type=name, label_smoothing=0.1, compiled=False)
    loss, *_ = theirs(pairs.weight, pairs.hidden, pairs.target, None, *pairs.reference)
    pairs.compare(LIGER[name](*pairs.all_sums()).mean(), loss)


@pytest.mark.parametrize("name", ["orpo", "cpo", "simpo"])
def test_losses_without_a_reference_are_ligers(name):
    """ORPO and SimPO on averages, CPO on sums; the NLL is over the chosen tokens of the whole batch."""
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    pairs = Pairs()
    chosen, rejected = pairs.sums(pairs.hidden, pairs.weight)
    length, other_length = pairs.length.chunk(2)
    nll = -chosen.sum() / length.sum()
    averages = chosen / length, rejected / other_length
    ours, theirs = {
        "orpo": (lambda: orpo(*averages, nll).mean(), chunked.LigerFusedLinearORPOLoss),
        "cpo": (lambda: cpo(chosen, rejected, nll).mean(), chunked.LigerFusedLinearCPOLoss),
        "simpo": (lambda: (simpo(*averages, beta=0.1, gamma=0.5) + nll).mean(), chunked.LigerFusedLinearSimPOLoss),
    }[name]
    loss, *_ = theirs(compiled=False)(pairs.weight, pairs.hidden, pairs.target)
    pairs.compare(ours(), loss)


def test_kto_is_ligers():
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    pairs, labels, baseline = Pairs(), torch.tensor([1, 0, 0, 1, 1, 0]).bool(), torch.tensor(0.3)
    policy = torch.cat(pairs.sums(pairs.hidden, pairs.weight))
    with torch.no_grad():
        reference = torch.cat(pairs.sums(*pairs.reference))
    theirs = chunked.LigerFusedLinearKTOLoss(compiled=False, use_ref_model=True)
    arguments = {"preference_labels": labels, "ref_input": pairs.reference[0], "ref_weight": pairs.reference[1], "kl": baseline}
    loss, *_ = theirs(pairs.hidden, pairs.weight, pairs.target, **arguments)
    pairs.compare(kto(policy, reference, labels, baseline).mean(), loss)
