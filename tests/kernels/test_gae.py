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
    with pytest.raises(ValueError, match="expected one shape"):
        gae(reward[:3], value, cu, gamma=1.0, lam=1.0)
