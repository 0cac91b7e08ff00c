"""The engine under the log-probabilities, without autograd: what it computes, and what it leaves out."""

import pytest
import torch

from warpline.kernels.logit_block import Coefficient, Wanted
from warpline.kernels.token_statistics import (
    NO_TARGET,
    Call,
    Inputs,
    LossTerms,
    Upstream,
    backward,
    coefficients_of,
    cross_entropy_with_gradients,
    forward,
)
from warpline.kernels.vocabulary_sweep import BLOCKING, Blocking, Shard

SMALL = Blocking(rows=4, columns=4, elements=16, backward_columns=5, backward_elements=40, kept_elements=104)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setitem(BLOCKING, "cpu", SMALL)


@pytest.fixture
def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    shapes = [(21, 6), (13, 6), (13,)]
    hidden, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    target = torch.randint(0, 13, (21, 1), generator=generator)
    target[4::5] = -100
    return Inputs(hidden, weight, bias, target)


def call(**changes) -> Call:
    return Call(1.0, None, -100, Wanted(**changes), None, Shard(0, 13))


def test_a_statistic_that_is_not_wanted_is_empty_and_ignored_tokens_are_zero(inputs):
    logprob, lse, entropy, argmax, sum_p2, mean, _, _ = forward(inputs, call(entropy=True))
    assert logprob.shape == (21, 1) and lse.shape == entropy.shape == (21,)
    assert argmax.numel() == sum_p2.numel() == mean.numel() == 0
    assert (logprob[4::5] == 0).all() and (lse[4::5] == 0).all() and (entropy[4::5] == 0).all()
    assert (logprob[:4] < 0).all()


def test_only_needed_gradients_are_formed(inputs):
    values = forward(inputs, call())
    saved, upstream = (values[6], values[7], values[2], values[4]), Upstream(torch.ones(21, 1).double(), None, None, None, None)
    for needed in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        gradients = backward(inputs, saved, upstream, needed, call())
        assert tuple(d is not None for d in gradients) == needed


def test_the_one_pass_cross_entropy_is_the_two_pass_one(inputs):
    terms, needed = LossTerms(z_loss=0.1, label_smoothing=0.2), (True, True, True)
    loss, *gradients = cross_entropy_with_gradients(inputs, needed, call(mean_logit=True), terms)
    logprob, lse, _, _, _, mean, maximum, log_sum = values = forward(inputs, call(mean_logit=True))
    expected = -0.8 * logprob.sum() + 0.1 * lse.square().sum() + 0.2 * (lse - mean).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)
    ones = torch.ones(21, dtype=torch.float64)
    upstream = Upstream(-0.8 * ones[:, None], 0.2 * lse + 0.2, None, None, -0.2 * ones)
    expected_gradients = backward(inputs, (maximum, log_sum, values[2], values[4]), upstream, needed, call())
    for d, expected_d in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(d, expected_d, rtol=1e-12, atol=1e-13)


def test_coefficients_worked_by_hand():
    """d_z = p (a + b lp + c p) + k: from d_logprob 3, d_lse 5, d_entropy 7, d_sum_p2 11, d_mean 13 over 4 entries."""
    one = torch.ones(2, dtype=torch.float64)
    upstream = Upstream(3 * one[:, None], 5 * one, 7 * one, 11 * one, 13 * one)
    saved = (2 * one, 0.5 * one, 1.5 * one, 0.25 * one)  # maximum, log sum, entropy, Σ p²
    table, d_target = coefficients_of(saved, upstream, torch.tensor([[1], [NO_TARGET]]), 4)
    expected = [2, 0.5, 5 - 3 - 7 * 1.5 - 2 * 11 * 0.25, -7, 22, 13 / 4]
    assert table[:, 0].tolist() == expected and d_target[:, 0].tolist() == [3, 0]
    assert table[: Coefficient.A, 1].tolist() == [2, 0.5] and (table[Coefficient.A :, 1] == 0).all()  # an ignored token
