"""Tokens that do not count, in the design that cannot leave them out of the products (CUDA's, run on the CPU here)."""

import pytest
import torch

from warpline.kernels import token_statistics
from warpline.kernels.linear_divergence import linear_divergence
from warpline.kernels.linear_logprob import linear_cross_entropy, linear_logprob
from warpline.kernels.vocabulary_sweep import BLOCKING, Blocking

COUNTED_T = torch.arange(27) % 4 != 1


@pytest.fixture(autouse=True)
def products_of_all_tokens(monkeypatch):
    monkeypatch.setitem(BLOCKING, "cpu", Blocking(8, 4, 32, 5, 80, 176, leaves_out=False))


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def losses(name, hidden, weight, teacher):
    target_T = (torch.arange(27) % 11).masked_fill(~COUNTED_T, -100)
    if name == "statistics":
        stats = linear_logprob(hidden, weight, target_T, entropy=True, sum_p2=True, mean_logit=True)
        return torch.stack([x for x in stats if x is not None]).sum(0)
    if name == "cross-entropy":
        return linear_cross_entropy(hidden, weight, target_T, z_loss=0.1, label_smoothing=0.1)
    return linear_divergence(hidden, weight, *teacher, kind=name, mask_T=COUNTED_T)


@pytest.mark.parametrize("name", ["statistics", "cross-entropy", "forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e300])
def test_what_a_token_that_does_not_count_holds_never_matters(name, garbage, monkeypatch):
    results = []
    for leaves_out in (True, False):
        monkeypatch.setitem(BLOCKING, "cpu", BLOCKING["cpu"]._replace(leaves_out=leaves_out))
        hidden, teacher_hidden = (random(27, width, seed=0) for width in (5, 7))
        for x in (hidden, teacher_hidden):
            x[~COUNTED_T] = garbage
        inputs = [hidden.requires_grad_(), random(11, 5, seed=1).requires_grad_()]
        value = losses(name, *inputs, (teacher_hidden, random(11, 7, seed=2)))
        assert value.dim() == 0 or (value[~COUNTED_T] == 0).all()
        results.append([value, *torch.autograd.grad(value.sum(), inputs)])
        assert (results[-1][1][~COUNTED_T] == 0).all()
    for left_out, computed in zip(*results, strict=True):
        torch.testing.assert_close(computed, left_out, rtol=1e-12, atol=1e-12)


def test_a_target_outside_of_the_vocabulary_has_no_probability(monkeypatch):
    """Where the device is not read, it is not refused; it is not taken for an ignored one either."""
    monkeypatch.setattr(token_statistics, "_check_range", lambda *_: None)
    target_T = torch.tensor([3, -1, 11, -100, 2**40])
    stats = linear_logprob(random(5, 5, seed=0), random(11, 5, seed=1), target_T)
    assert stats.logprob_T.isneginf().tolist() == [False, True, True, False, True]
    assert stats.lse_T.isfinite().all() and (stats.lse_T != 0).tolist() == [True, True, True, False, True]
