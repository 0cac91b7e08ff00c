"""Advantages along sequences against a step-by-step walk, numbers worked by hand, and whole batches split in two."""

import pytest
import torch

from warpline.kernels.gae import BLOCK, gae, gae_reference, moments, reward_per_token, whiten


def make(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    reward, value = (torch.randn(total, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(total, generator=generator) > 0.3
    return reward, value, torch.tensor([0, *lengths]).cumsum(0), mask


@pytest.mark.parametrize("lengths", [[5, 0, 1, 12], [BLOCK], [BLOCK + 1, 3 * BLOCK - 1], [1], [0]])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (1.0, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("is_masked", [True, False])
def test_blocks_compute_what_a_step_a_token_does(lengths, gamma, lam, is_masked):
    reward, value, cu, mask = make(lengths)
    options = {"gamma": gamma, "lam": lam, "mask_T": mask if is_masked else None}
    for actual, expected in zip(gae(reward, value, cu, **options), gae_reference(reward, value, cu, **options), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_an_observation_between_two_tokens_is_stepped_over():
    """γ 0.5, λ 0.5: the tool's answer in the middle neither pays nor is paid, whatever it holds."""
    reward = torch.tensor([0.0, torch.nan, torch.nan, 1.0]).double()
    value = torch.tensor([0.2, torch.nan, torch.nan, 0.6]).double()
    mask = torch.tensor([True, False, False, True])
    advantage, returns = gae(reward, value, torch.tensor([0, 4]), gamma=0.5, lam=0.5, mask_T=mask)
    assert advantage.tolist() == pytest.approx([0.5 * 0.6 - 0.2 + 0.25 * 0.4, 0, 0, 0.4])
    assert returns.tolist() == pytest.approx([0.5 * 0.6 + 0.25 * 0.4, 0, 0, 1.0])


def test_tokens_past_the_last_boundary_get_nothing():
    reward, value, _, _ = make([6])
    advantage, returns = gae(reward, value, torch.tensor([0, 4]), gamma=1.0, lam=1.0)
    assert (advantage[4:] == 0).all() and (returns[4:] == 0).all() and (advantage[:4] != 0).all()


def test_the_reward_stands_at_the_last_counted_token_and_the_kl_at_each():
    logprob = torch.tensor([-1.0, -2.0, torch.nan, -1.0, -1.0, -3.0], requires_grad=True)
    reference = torch.tensor([-1.5, -1.0, 0.0, -1.0, -2.0, -3.0])
    mask = torch.tensor([1, 1, 0, 1, 1, 0]).bool()
    cu = torch.tensor([0, 3, 5, 6])
    reward = reward_per_token(torch.tensor([10.0, 20.0, 30.0]), logprob, reference, cu, beta=0.1, mask_T=mask)
    assert reward.tolist() == pytest.approx([-0.05, 10.1, 0.0, 0.0, 19.9, 0.0])
    assert not reward.requires_grad


def test_whitening_takes_moments_of_the_whole_batch():
    x, mask = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.arange(50) % 4 != 0
    total = moments(x[:20], mask[:20]) + moments(x[20:], mask[20:])
    whitened = whiten(x, total, eps=0.0)
    expected = (x - x[mask].mean()) / x[mask].std()
    torch.testing.assert_close(whitened, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whiten(x, total, shift=False, eps=0.0), expected + x[mask].mean(), rtol=1e-12, atol=1e-12)


def test_bad_input_is_named_with_its_remedy():
    reward, value, cu, _ = make([4])
    with pytest.raises(ValueError, match=r"gamma, lam are 1\.5, 1\.0; expected numbers from 0 to 1"):
        gae(reward, value, cu, gamma=1.5, lam=1.0)
    for bad in (reward[:3], reward[:1], reward[:, None]):
        with pytest.raises(ValueError, match="expected one shape"):
            gae(bad, value, cu, gamma=1.0, lam=1.0)
        with pytest.raises(ValueError, match="expected one shape"):
            reward_per_token(reward[:1], bad, value, cu, beta=0.1)
    with pytest.raises(ValueError, match=r"reward torch\.float64, value torch\.float32; expected one dtype"):
        gae(reward, value.float(), cu, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="expected floating-point"):
        gae(reward.long(), value.long(), cu, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match=r"reward is \[4\]; expected \[1\]"):
        reward_per_token(reward, reward, value, cu, beta=0.1)
    with pytest.raises(ValueError, match=r"total is \[2\]; expected \[3\]"):
        whiten(value, torch.ones(2))


@pytest.mark.parametrize("cu", [[0, 5], [1, 4], [0, 3, 2], [], [[0, 4]], [0.0, 4.0]], ids=str)
def test_bad_boundaries_are_refused(cu):
    reward, value, _, _ = make([4])
    cu = torch.tensor(cu, dtype=None if cu == [0.0, 4.0] else torch.int64)
    for function in (lambda: gae(reward, value, cu, gamma=1.0, lam=1.0), lambda: reward_per_token(*[value] * 3, cu, beta=0.1)):
        with pytest.raises(ValueError, match=r"cu_seqlens is .*; expected .*: cumulate"):
            function()


@pytest.mark.parametrize("mask", [torch.ones(4), torch.ones(4).long(), torch.ones(4, 1).bool(), torch.ones(1).bool()], ids=str)
def test_masks_that_are_not_bool_of_one_shape_are_refused(mask):
    reward, value, cu, _ = make([4])
    for function in (
        lambda: gae(reward, value, cu, gamma=1.0, lam=1.0, mask_T=mask),
        lambda: reward_per_token(reward[:1], reward, value, cu, beta=0.1, mask_T=mask),
        lambda: moments(value, mask),
    ):
        with pytest.raises(ValueError, match=r"mask is .*; expected torch\.bool \[4\]"):
            function()


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_token_gives_empty_results(lengths):
    reward, value, cu, _ = make(lengths)
    assert all(x.shape == (0,) for x in gae(reward, value, cu, gamma=1.0, lam=1.0))
    assert reward_per_token(torch.full((len(lengths),), torch.nan), reward, value, cu, beta=0.1).shape == (0,)
    nothing = moments(torch.ones(3), torch.zeros(3).bool())
    assert nothing.tolist() == [0, 0, 0] and whiten(torch.ones(3), nothing).isfinite().all()
    assert moments(value).tolist() == [0, 0, 0] and whiten(value, moments(value)).shape == (0,)


def test_a_sequence_without_a_counted_token_is_not_rewarded_and_what_is_past_the_last_boundary_neither():
    logprob = torch.tensor([-1.0, torch.nan, -3.0, torch.nan])
    mask = torch.tensor([1, 0, 1, 1]).bool()
    reward = reward_per_token(
        torch.tensor([1.0, torch.nan, 3.0]), logprob, logprob, torch.tensor([0, 1, 2, 3]), beta=0.1, mask_T=mask
    )
    assert reward.tolist() == [1, 0, 3, 0]
    assert reward_per_token(torch.zeros(0), logprob, logprob, torch.tensor([0]), beta=0.1).tolist() == [0, 0, 0, 0]
