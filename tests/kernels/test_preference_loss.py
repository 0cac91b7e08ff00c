"""Every preference loss against a value and a gradient worked from its published formula."""

import math

import pytest
import torch

from warpline.kernels.preference_loss import cpo, dpo, hinge, ipo, kto, kto_baseline, orpo, robust_dpo, simpo

CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = -12.0, -15.0, -13.5, -14.0
H_W, H_L = CHOSEN - REF_CHOSEN, REJECTED - REF_REJECTED
DELTA = H_W - H_L


def sigma(x):
    return 1 / (1 + math.exp(-x))


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
