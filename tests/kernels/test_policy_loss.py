"""Policy losses: values by hand, gradients of the plain formulas, the edges of the clip, and half batches."""

import math

import pytest
import torch

from warpline.kernels.linear_logprob import linear_logprob
from warpline.kernels.policy_loss import (
    cispo,
    clipped_surrogate,
    clipped_value_loss,
    dapo,
    dppo,
    dr_grpo,
    gmpo,
    group_advantage,
    grpo,
    gspo,
    kimi,
    kl_k1,
    kl_k2,
    kl_k3,
    luspo,
    ppo,
    pretraining_mix,
    rloo,
    sapo,
    sequence_mean_weight,
    vespo,
    weighted_sum,
)

CU = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
MASK = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 1], dtype=torch.bool)


def same(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def make(spread=0.3):
    generator = torch.Generator().manual_seed(0)
    old_T = -2 * torch.rand(9, generator=generator, dtype=torch.float64)
    logprob_T = (old_T + spread * torch.randn(9, generator=generator, dtype=torch.float64)).requires_grad_()
    advantage_B = torch.tensor([1.0, -0.5, 0.7], dtype=torch.float64)
    return logprob_T, old_T, advantage_B, advantage_B.repeat_interleave(CU.diff().long())


def sequences():
    """Counted positions of each sequence."""
    return [[i for i in range(a, b) if MASK[i]] for a, b in zip(CU[:-1].tolist(), CU[1:].tolist(), strict=True)]


def clipped(ratio, advantage, low=0.2, high=0.2):
    return torch.max(-ratio * advantage, -torch.clip(ratio, 1 - low, 1 + high) * advantage)


def plain(name, logprob_T, old_T, advantage_T):
    """Each loss as a loop over sequences, the way the papers write it."""
    ratio_T = (logprob_T - old_T).exp()
    groups = sequences()
    num_counted = sum(map(len, groups))

    def geometric(s):
        return (logprob_T[s] - old_T[s]).mean().exp()

    def whole(s):
        return (logprob_T[s] - old_T[s]).sum().exp()

    def token(low=0.2, high=0.2):
        return [clipped(ratio_T[s], advantage_T[s], low, high) for s in groups]

    losses = {
        "ppo": lambda: torch.cat(token()).sum() / num_counted,
        "dapo": lambda: torch.cat(token(0.2, 0.28)).sum() / num_counted,
        "grpo": lambda: sum(x.mean() for x in token()) / 3,
        "dr_grpo": lambda: sum(x.sum() for x in token()) / (3 * 16),
        "gspo": lambda: sum(clipped(geometric(s), advantage_T[s[0]], 0.05, 0.06) for s in groups) / 3,
        "rloo": lambda: sum(clipped(whole(s), advantage_T[s[0]]) for s in groups) / 3,
        "cispo": lambda: -(ratio_T.detach().clip(0.0, 1.1) * advantage_T * logprob_T)[MASK].sum() / num_counted,
        "cispo absolute": lambda: -(ratio_T.detach().clip(max=0.9) * advantage_T * logprob_T)[MASK].sum() / num_counted,
        "sapo": lambda: sum(soft(s).mean() for s in groups) / 3,
        "gmpo": lambda: sum(-advantage_T[s[0]] * one_sided(s).mean().exp() for s in groups) / 3,
        "luspo": lambda: sum(len(s) * clipped(geometric(s), advantage_T[s[0]], 0.05, 0.06) for s in groups) / 3,
        "vespo": lambda: -sum((phi(s) * advantage_T[s] * logprob_T[s]).sum() for s in groups) / num_counted,
        "kimi": lambda: -(((ratio_T.log().abs() <= 0.25) * advantage_T * logprob_T)[MASK]).sum() / num_counted,
        "dppo": lambda: sum(trust_region(i) for s in groups for i in s) / num_counted,
    }

    def soft(s):
        tau = torch.where(advantage_T[s] > 0, 1.0, 1.05 * torch.ones(len(s)).double())
        return -advantage_T[s] * torch.sigmoid(tau * (ratio_T[s] - 1)) * 4 / tau

    def one_sided(s):
        log_ratio = logprob_T[s] - old_T[s]
        return log_ratio.clamp(max=0.1) if advantage_T[s[0]] >= 0 else log_ratio.clamp(min=-0.1)

    def phi(s):
        k, lam = (2.0, 3.0) if advantage_T[s[0]] >= 0 else (3.0, 2.0)
        w = whole(s).detach()
        return math.exp(lam) * w**k * torch.exp(-lam * w)

    def trust_region(i):
        moved = (logprob_T[i].exp() - old_T[i].exp()).item()
        is_dropped = moved > 0.05 if advantage_T[i] > 0 else moved < -0.05
        return (0 if is_dropped else -advantage_T[i] * ratio_T[i]) + 1e-3 * (logprob_T[i] - old_T[i]) ** 2

    return losses[name]()


def ours(name, logprob_T, old_T, advantage_T, advantage_B, tokens=slice(0, 9), cu=CU, mask=MASK):
    """The same through the product, on part of the batch but with the whole batch's denominators."""
    mask_T = None if mask is None else mask[tokens]
    weight_T = sequence_mean_weight(cu, len(logprob_T[tokens]), mask_T=mask_T, dtype=torch.float64)
    inputs = (logprob_T[tokens], old_T[tokens], advantage_T[tokens])
    per_sequence, options, num_counted = (*inputs[:2], advantage_B), {"mask_T": mask_T, "cu_seqlens": cu}, int(MASK.sum())
    losses = {
        "ppo": lambda: ppo(*inputs, mask_T=mask_T, denominator=num_counted),
        "dapo": lambda: dapo(*inputs, mask_T=mask_T, denominator=num_counted),
        "grpo": lambda: grpo(*inputs, mask_T=mask_T, weight_T=weight_T, denominator=3),
        "dr_grpo": lambda: dr_grpo(*inputs, mask_T=mask_T, denominator=3 * 16),
        "gspo": lambda: gspo(*inputs, **options, denominator=3, clip_low=0.05, clip_high=0.06),
        "rloo": lambda: rloo(*per_sequence, **options, denominator=3),
        "cispo": lambda: cispo(*inputs, mask_T=mask_T, denominator=num_counted, clip_high=0.1),
        "cispo absolute": lambda: cispo(*inputs, mask_T=mask_T, denominator=num_counted, clip_high=0.9, bound="absolute"),
        "sapo": lambda: sapo(*inputs, mask_T=mask_T, weight_T=weight_T, denominator=3),
        "gmpo": lambda: gmpo(*per_sequence, **options, denominator=3, log_clip_low=0.1, log_clip_high=0.1),
        "luspo": lambda: luspo(*per_sequence, **options, denominator=3, clip_low=0.05, clip_high=0.06),
        "vespo": lambda: vespo(*per_sequence, **options, denominator=num_counted),
        "kimi": lambda: kimi(*inputs, mask_T=mask_T, denominator=num_counted, low=-0.25, high=0.25),
        "dppo": lambda: dppo(*inputs, mask_T=mask_T, denominator=num_counted, limit=0.05),
    }
    return losses[name]()


PER_SEQUENCE = ["rloo", "gmpo", "luspo", "vespo"]
PER_TOKEN = ["ppo", "dapo", "grpo", "dr_grpo", "gspo", "cispo", "cispo absolute", "sapo", "kimi", "dppo"]
NAMES = [*PER_TOKEN, *PER_SEQUENCE]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spread", [0.3, 0.02, 0.0])
def test_loss_and_gradient_are_those_of_the_plain_formula(name, spread):
    logprob_T, old_T, advantage_B, advantage_T = make(spread)
    value, expected = ours(name, logprob_T, old_T, advantage_T, advantage_B), plain(name, logprob_T, old_T, advantage_T)
    same(value, expected)
    same(torch.autograd.grad(value, logprob_T)[0], torch.autograd.grad(expected, logprob_T)[0])


@pytest.mark.parametrize("name", NAMES)
def test_two_halves_with_the_global_denominator_are_the_whole(name):
    logprob_T, old_T, advantage_B, advantage_T = make()
    whole = ours(name, logprob_T, old_T, advantage_T, advantage_B)
    first = ours(name, logprob_T, old_T, advantage_T, advantage_B[:2], slice(0, 4), CU[:3])
    second = ours(name, logprob_T, old_T, advantage_T, advantage_B[2:], slice(4, 9), CU[2:] - 4)
    same(first + second, whole)
    halves = torch.autograd.grad(first + second, logprob_T)[0]
    same(halves, torch.autograd.grad(whole, logprob_T)[0])


@pytest.mark.parametrize("name", NAMES)
def test_masked_tokens_may_hold_anything(name):
    logprob_T, old_T, advantage_B, advantage_T = make()
    expected = ours(name, logprob_T, old_T, advantage_T, advantage_B)
    d_expected = torch.autograd.grad(expected, logprob_T)[0]
    dirty = logprob_T.detach().masked_fill(~MASK, torch.nan).requires_grad_()
    old_T, advantage_T = old_T.masked_fill(~MASK, -torch.inf), advantage_T.masked_fill(~MASK, torch.nan)
    value = ours(name, dirty, old_T, advantage_T, advantage_B)
    same(value, expected)
    same(torch.autograd.grad(value, dirty)[0], d_expected)


def value_and_gradient(name, logprob_T, *inputs, **options):
    leaf_T = logprob_T.detach().clone().requires_grad_()
    value = ours(name, leaf_T, *inputs, **options)
    return value.detach(), torch.autograd.grad(value, leaf_T)[0]


@pytest.mark.parametrize("name", ["grpo", "sapo", "gspo", *PER_SEQUENCE])
def test_tokens_past_the_last_boundary_may_hold_anything_without_a_mask(name):
    logprob_T, old_T, advantage_B, advantage_T = make()
    expected, d_expected = value_and_gradient(name, logprob_T, old_T, advantage_T, advantage_B, mask=None)
    dirty = [torch.cat([x.detach(), torch.tensor([torch.nan, torch.inf])]) for x in (logprob_T, old_T, advantage_T)]
    value, gradient = value_and_gradient(name, *dirty, advantage_B, tokens=slice(0, 11), mask=None)
    same(value, expected)
    same(gradient, torch.cat([d_expected, torch.zeros(2)]))


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_without_a_counted_token_adds_nothing(name):
    logprob_T, old_T, advantage_B, advantage_T = make()
    inputs, mask = (logprob_T, old_T, advantage_T), MASK & (torch.arange(9) != 3)
    first, second = (
        value_and_gradient(name, *inputs, advantage_B[bs], tokens=tokens, cu=cu)
        for bs, tokens, cu in ((slice(0, 1), slice(0, 3), CU[:2]), (slice(2, 3), slice(4, 9), CU[2:] - 4))
    )
    advantage_B[1] = torch.nan
    value, gradient = value_and_gradient(name, *inputs, advantage_B, mask=mask)
    same(value, first[0] + second[0])
    same(gradient, first[1] + second[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cu", [torch.tensor([0]), torch.tensor([0, 0], dtype=torch.int32)], ids=["B0", "B1"])
def test_no_token_gives_a_loss_of_zero_and_an_empty_gradient(name, cu):
    logprob_T, old_T, _, advantage_T = make()
    advantage_B = advantage_T[: len(cu) - 1]
    value, gradient = value_and_gradient(name, logprob_T[:0], old_T, advantage_T, advantage_B, tokens=slice(0, 0), cu=cu)
    assert value == 0 and gradient.shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_broadcast(name):
    logprob_T, old_T, advantage_B, advantage_T = make()
    for reshape in (lambda x: x[:, None], lambda x: x[:1], lambda x: x[:-1], lambda x: x[0]):
        with pytest.raises(ValueError, match=r"advantage.*expected"):
            ours(name, logprob_T, old_T, reshape(advantage_T), reshape(advantage_B), tokens=...)
        with pytest.raises(ValueError, match=r"mask is torch\.bool .*expected torch\.bool \[9\]"):
            ours(name, logprob_T, old_T, advantage_T, advantage_B, tokens=..., mask=reshape(MASK))
    with pytest.raises(ValueError, match=r"old_logprob.*expected one shape"):
        ours(name, logprob_T, old_T[:, None], advantage_T, advantage_B)
    with pytest.raises(ValueError, match=r"mask is torch\.int64 \[9\]; expected torch\.bool"):
        ours(name, logprob_T, old_T, advantage_T, advantage_B, mask=MASK.long())


@pytest.mark.parametrize(
    "cu", [CU.float(), CU[None], CU[:0], CU + 1, CU.flip(0) - 9, CU + (CU > 4)], ids=lambda cu: str(cu.tolist())
)
def test_bad_boundaries_are_refused(cu):
    logprob_T, old_T, advantage_B, advantage_T = make()
    with pytest.raises(ValueError, match=r"cu_seqlens is .*; expected .*: cumulate"):
        sequence_mean_weight(cu, 9, mask_T=MASK)
    options = {"cu_seqlens": cu, "denominator": 3}
    with pytest.raises(ValueError, match="cu_seqlens is"):
        gspo(logprob_T, old_T, advantage_T, **options)
    for function in (rloo, gmpo, luspo, vespo):
        with pytest.raises(ValueError, match="cu_seqlens is"):
            function(logprob_T, old_T, advantage_B, **options)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_on_policy_is_the_policy_gradient(name):
    logprob_T, old_T, advantage_B, advantage_T = make(0.0)
    gradient_T = torch.autograd.grad(ours(name, logprob_T, old_T, advantage_T, advantage_B), logprob_T)[0]
    weight_T = sequence_mean_weight(CU, 9, mask_T=MASK, dtype=torch.float64) / 3
    weights = {
        **dict.fromkeys(("grpo", "gspo", "sapo", "gmpo"), weight_T),
        **dict.fromkeys(("rloo", "luspo"), MASK.double() / 3),
        "dr_grpo": MASK.double() / 48,
        "cispo absolute": 0.9 * MASK.double() / 7,
    }
    same(gradient_T, -advantage_T * weights.get(name, MASK.double() / 7))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.3, 1.0, -1.2, 0.0), (1.3, -1.0, 1.3, 1.0), (0.7, 1.0, -0.7, -1.0),
        (0.7, -1.0, 0.8, 0.0), (1.1, 2.0, -2.2, -2.0), (0.9, -2.0, 1.8, 2.0),
    ],
)  # fmt: skip
def test_clip_stops_the_gradient_only_in_its_direction(ratio, advantage, loss, gradient):
    ratio = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
    value = clipped_surrogate(ratio, torch.tensor(advantage, dtype=torch.float64), 0.2, 0.2)
    assert value.item() == pytest.approx(loss)
    assert torch.autograd.grad(value, ratio)[0].item() == pytest.approx(gradient)


def test_dual_clip_bounds_the_loss_of_bad_tokens_only():
    ratio = torch.tensor([9.0, 2.0, 9.0], requires_grad=True)
    value = clipped_surrogate(ratio, torch.tensor([-1.0, -1.0, 1.0]), 0.2, 0.2, dual_clip=3.0)
    same(value, torch.tensor([3.0, 2.0, -1.2]), 1e-6)
    same(torch.autograd.grad(value.sum(), ratio)[0], torch.tensor([0.0, 1.0, 0.0]))


def test_cispo_keeps_the_gradient_beyond_its_bound():
    logprob_T = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    for old, weight in ((-3.0, 5.0), (3.0, math.exp(-3))):
        loss = cispo(logprob_T, torch.tensor([old], dtype=torch.float64), torch.ones(1), denominator=1)
        assert torch.autograd.grad(loss, logprob_T)[0].item() == pytest.approx(-weight)


@pytest.mark.parametrize("function", [ppo, dapo, dr_grpo, cispo])
def test_absurd_ratios_give_finite_gradients(function):
    logprob_T = torch.tensor([0.0, -1e4, 0.0, -1e4], requires_grad=True)
    old_T = torch.tensor([-1e4, 0.0, -1e4, 0.0])
    loss = function(logprob_T, old_T, torch.tensor([1.0, 1.0, -1.0, -1.0]), denominator=4)
    loss.backward()
    assert loss.isfinite() and logprob_T.grad.isfinite().all()


def test_advantages_are_those_worked_by_hand():
    reward_B = torch.tensor([1.0, 0.0, 0.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    std = math.sqrt((4 / 9 + 1 / 9 + 1 / 9) / 2)
    centred = torch.tensor([2 / 3, -1 / 3, -1 / 3, 0, 0, 0], dtype=torch.float64)
    same(group_advantage(reward_B, 3, normalise="none"), centred)
    same(group_advantage(reward_B, 3), centred / (std + 1e-4))
    same(group_advantage(reward_B, 3, normalise="leave_one_out")[:3], torch.tensor([1.0, -0.5, -0.5]).double())
    same(group_advantage(reward_B, 3, normalise="group_mean")[:3], torch.tensor([2.0, -1.0, -1.0]).double())
    assert (group_advantage(torch.zeros(4), 4, normalise="group_mean") == 0).all()


def test_kl_estimators_have_their_values_and_gradients():
    logprob_T = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    reference_T = torch.tensor([-1.5, -1.2], dtype=torch.float64)
    difference = (logprob_T - reference_T).detach()
    expected = {
        kl_k1: (difference, torch.ones(2).double()),
        kl_k2: (difference**2 / 2, difference),
        kl_k3: ((-difference).exp() + difference - 1, 1 - (-difference).exp()),
    }
    for function, (value, gradient) in expected.items():
        same(function(logprob_T, reference_T), value)
        same(torch.autograd.grad(function(logprob_T, reference_T).sum(), logprob_T)[0], gradient)


def test_k1_and_k3_are_unbiased_estimates_of_the_divergence():
    p, q = (torch.tensor(x, dtype=torch.float64) for x in ([0.2, 0.5, 0.3], [0.4, 0.4, 0.2]))
    divergence = (p * (p / q).log()).sum()
    for function in (kl_k1, kl_k3):
        same((p * function(p.log(), q.log())).sum(), divergence)


@pytest.mark.parametrize("function", [kl_k1, kl_k2, kl_k3])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_a_masked_kl_is_zero_in_value_and_gradient(function, garbage):
    logprob_T, old_T, _, _ = make()
    dirty = logprob_T.detach().masked_fill(~MASK, garbage).requires_grad_()
    value_T, expected_X = function(dirty, old_T, mask_T=MASK), function(logprob_T[MASK], old_T[MASK])
    same(value_T, torch.zeros(9).double().masked_scatter(MASK, expected_X))
    same(torch.autograd.grad(value_T.sum(), dirty)[0], torch.autograd.grad(expected_X.sum(), logprob_T)[0])


def test_tokens_of_weight_zero_may_hold_anything():
    logprob_T, old_T, _, advantage_T = make()
    dirty = logprob_T.detach().masked_fill(~MASK, torch.nan).requires_grad_()
    masked = ppo(logprob_T, old_T, advantage_T, mask_T=MASK, denominator=7)
    d_masked = torch.autograd.grad(masked, logprob_T)[0]
    for weight_T, mask_T in ((MASK.double(), None), (torch.ones(9).masked_fill(~MASK, torch.nan), MASK)):
        weighted = ppo(dirty, old_T, advantage_T, weight_T=weight_T, mask_T=mask_T, denominator=7)
        same(weighted, masked)
        same(torch.autograd.grad(weighted, dirty)[0], d_masked)


def test_options_by_the_advantages_sign_keep_the_precision_of_the_loss():
    logprob_T, old_T, _, _ = make()
    w, options = (logprob_T - old_T).sum().exp(), {"cu_seqlens": torch.tensor([0, 9]), "denominator": 9}
    for sign, (k, lam) in ((1.0, (2.1, 3.3)), (-1.0, (3.1, 1.7))):
        advantage_B = torch.tensor([sign]).double()
        value = vespo(logprob_T, old_T, advantage_B, positive=(2.1, 3.3), negative=(3.1, 1.7), **options)
        same(value, -math.exp(lam) * w**k * torch.exp(-lam * w) * sign * logprob_T.sum() / 9, 1e-14)
    value = sapo(logprob_T, old_T, -torch.ones(9), weight_T=torch.ones(9), denominator=9)
    same(value, (torch.sigmoid(1.05 * ((logprob_T - old_T).exp() - 1)) * 4 / 1.05).mean(), 1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sequence_weights_count_past_256_in_every_dtype(dtype):
    weight_T = sequence_mean_weight(torch.tensor([0, 2053]), 2055, dtype=dtype)
    assert weight_T.dtype == dtype and (weight_T[2053:] == 0).all()
    assert (weight_T[:2053] == torch.tensor(1 / 2053, dtype=torch.float64).to(dtype)).all()


def test_sequence_weights_sum_to_one_per_sequence_and_skip_padding():
    weight_T = sequence_mean_weight(torch.tensor([0, 3, 3, 4]), 6, mask_T=torch.tensor([1, 0, 1, 1, 1, 1]).bool())
    same(weight_T, torch.tensor([0.5, 0.0, 0.5, 1.0, 0.0, 0.0]), 1e-7)
    same(weighted_sum(torch.full((6,), 3.0), weight_T=weight_T, denominator=2), torch.tensor(3.0), 1e-6)


def test_bad_input_is_named_with_its_remedy():
    x_T, bad = torch.zeros(4), [torch.zeros(4, 1), torch.zeros(1), torch.zeros(4).long()]
    cases = [
        (lambda: group_advantage(x_T, 3), "in groups of 3; expected"),
        (lambda: group_advantage(x_T, 2, normalise="std"), "normalise is 'std'; expected one of"),
        (lambda: group_advantage(torch.tensor([1, 0]), 2), r"'reward': 'torch\.int64'.*expected floating-point"),
        (lambda: ppo(x_T, x_T, x_T, denominator=1, clip_low=2, clip_high=0), "clip_low, clip_high are 2, 0"),
        (lambda: ppo(x_T, x_T, x_T, denominator=1, dual_clip=1), "dual_clip is 1"),
        (lambda: sequence_mean_weight(CU, 9, dtype=torch.int64), r"dtype is torch\.int64; expected a floating-point"),
        (lambda: clipped_surrogate(x_T, x_T[:1], 0.2, 0.2), r"ratio \[4\], advantage \[1\]; expected one shape"),
    ]
    for d in (0, -1.0, math.nan, torch.ones(4)):
        cases.append((lambda d=d: weighted_sum(x_T, denominator=d), "denominator is .*; expected one number > 0"))
    cases += [(lambda w=w: weighted_sum(x_T, weight_T=w, denominator=1), "weight.*expected") for w in bad]
    cases += [(lambda kl=kl: kl(x_T, x_T[:, None]), "reference_logprob.*one shape") for kl in (kl_k1, kl_k2, kl_k3)]
    for mask in (torch.ones(4), torch.ones(4).long(), torch.ones(1).bool()):
        for f, n in ((weighted_sum, 1), (pretraining_mix, 1), (clipped_value_loss, 3)):
            call = lambda f=f, n=n, mask=mask: f(*[x_T] * n, mask_T=mask, denominator=1)  # noqa: E731
            cases.append((call, r"mask is .*expected torch\.bool \[4\]"))
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (cispo, {"clip_low": -0.1}, "clip_low is -0.1"),
        (cispo, {"clip_high": -0.1}, "clip_high is -0.1"),
        (cispo, {"clip_high": -2.0, "bound": "absolute"}, "clip_high is -2.0"),
        (ppo, {"clip_high": math.nan}, "clip_low, clip_high are 0.2, nan"),
        (kimi, {"low": 0.5, "high": -0.5}, "low, high are 0.5, -0.5"),
        (dppo, {"limit": -0.1}, "limit is -0.1"),
        (clipped_value_loss, {"clip": -0.1}, "clip is -0.1"),
        (sapo, {"temperature_negative": 0.0, "weight_T": torch.ones(4)}, r"temperatures are \(1.0, 0.0\)"),
        (gmpo, {"log_clip_low": -0.4, "cu_seqlens": torch.arange(5)}, "log_clip_low is -0.4"),
        (vespo, {"positive": (2.0, -3.0), "cu_seqlens": torch.arange(5)}, "λ is -3.0"),
    ],
)
def test_bounds_that_are_negative_or_inverted_are_refused(function, options, message):
    with pytest.raises(ValueError, match=f"{message}; expected"):
        function(torch.zeros(4), torch.zeros(4), torch.zeros(4), denominator=1, **options)


def test_the_value_loss_takes_the_worse_of_clipped_and_free():
    value = torch.tensor([1.0, 1.0, 1.0, 9.0], requires_grad=True)
    old, returns = torch.tensor([0.5, 1.1, 0.5, 0.0]), torch.tensor([2.0, 2.0, 0.0, 0.0])
    mask = torch.tensor([1, 1, 1, 0]).bool()
    loss = clipped_value_loss(value, old, returns, denominator=3, mask_T=mask, clip=0.2)
    same(loss, torch.tensor(0.5 * (1.3**2 + 1.0 + 1.0) / 3), 1e-6)
    same(torch.autograd.grad(loss, value)[0], torch.tensor([0.0, -1 / 3, 1 / 3, 0.0]), 1e-6)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_masked_values_reach_neither_the_value_loss_nor_its_gradient(garbage):
    value_T, old_T, _, return_T = make()
    expected = clipped_value_loss(value_T, old_T, return_T, denominator=7, mask_T=MASK)
    dirty, *others = (x.detach().masked_fill(~MASK, garbage) for x in (value_T, old_T, return_T))
    value = clipped_value_loss(dirty.requires_grad_(), *others, denominator=7, mask_T=MASK)
    same(value, expected)
    same(torch.autograd.grad(value, dirty)[0], torch.autograd.grad(expected, value_T)[0])


def test_the_pretraining_mix_is_gamma_times_the_nll_over_what_is_said():
    logprob_T = torch.tensor([-1.0, -2.0, torch.nan]).double()
    mask_T = torch.tensor([True, True, False])
    same(pretraining_mix(logprob_T, denominator=2, mask_T=mask_T), torch.tensor(27.8 * 1.5, dtype=torch.float64))


# ---- Against Liger's chunked GRPO, from hidden states to gradients ----

LIGER = {
    "grpo": {"loss_type": "grpo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 11},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "cispo absolute": {"loss_type": "cispo", "epsilon_high": 1.1},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo"},
}


@pytest.mark.parametrize("name", LIGER)
@pytest.mark.parametrize("kl", [0.0, 0.04])
def test_policy_losses_are_ligers(name, kl):
    """Three completions of up to 7 tokens; the KL term is k3 against a reference, under each loss's own aggregation."""
    chunked = pytest.importorskip("liger_kernel.chunked_loss")

    def random(*shape, seed, scale=1.0):
        return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    hidden, weight = random(3, 7, 5, seed=1).requires_grad_(), random(13, 5, seed=2, scale=0.5).requires_grad_()
    target = torch.randint(0, 13, (3, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(3, 7)
    mask[0, 5:], mask[2, 3:] = 0, 0
    advantage_B, is_counted_T = torch.tensor([1.0, -0.7, 0.4]), mask.reshape(-1).bool()
    logprob_T = linear_logprob(hidden.reshape(-1, 5), weight, target.reshape(-1)).logprob_T
    old_T = (logprob_T + random(21, seed=4, scale=0.15)).detach()
    reference_T = (logprob_T + random(21, seed=5, scale=0.2)).detach()
    theirs = chunked.LigerFusedLinearGRPOLoss(beta=kl, compiled=False, use_ref_model=kl > 0, **LIGER[name])
    frozen = {"ref_per_token_logps": reference_T.view(3, 7), "old_per_token_logps": old_T.view(3, 7)}
    expected, _ = theirs(hidden, weight, target, mask, advantage_B, **frozen)
    cu = torch.arange(0, 22, 7)
    weight_T = sequence_mean_weight(cu, 21, mask_T=is_counted_T)
    num_counted, advantage_T = int(mask.sum()), advantage_B.repeat_interleave(7)
    token = {"mask_T": is_counted_T, "denominator": num_counted}
    per_sequence = {"mask_T": is_counted_T, "cu_seqlens": cu, "denominator": 3}
    length_T = is_counted_T * mask.sum(1).repeat_interleave(7)
    pair = (logprob_T, old_T)
    ours, kl_options = {
        "grpo": (lambda: grpo(*pair, advantage_T, weight_T=weight_T, mask_T=is_counted_T, denominator=3), (weight_T, 3)),
        "gspo": (lambda: gspo(*pair, advantage_T, clip_low=0.2, clip_high=0.2, **per_sequence), (weight_T, 3)),
        "dr_grpo": (lambda: dr_grpo(*pair, advantage_T, mask_T=is_counted_T, denominator=33), (None, 33)),
        "dapo": (lambda: dapo(*pair, advantage_T, **token), (None, num_counted)),
        "cispo absolute": (lambda: cispo(*pair, advantage_T, clip_high=1.1, bound="absolute", **token), (None, num_counted)),
        "sapo": (lambda: sapo(*pair, advantage_T, weight_T=weight_T, mask_T=is_counted_T, denominator=3), (weight_T, 3)),
        # Liger's LUSPO spreads a sequence's loss over S = 7 columns, and takes their mean.
        "luspo": (lambda: luspo(*pair, advantage_B, clip_low=0.2, clip_high=0.2, **per_sequence), (length_T / 7, 3)),
        "vespo": (lambda: vespo(*pair, advantage_B, cu_seqlens=cu, **token), (None, num_counted)),
    }[name]
    loss = ours()
    if kl and name == "luspo":
        pytest.skip("Liger's LUSPO adds the KL of padding tokens too: it is not a sum over counted tokens")
    if kl:
        term_T = kl_k3(logprob_T, reference_T)
        loss = loss + kl * weighted_sum(term_T, mask_T=is_counted_T, weight_T=kl_options[0], denominator=kl_options[1])
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=2e-6)
    gradients = [torch.autograd.grad(x, (hidden, weight), retain_graph=True) for x in (loss, expected)]
    for d, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(d, wanted, rtol=1e-4, atol=1e-5)
