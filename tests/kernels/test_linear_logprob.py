"""The statistics and the cross-entropy against the full logits, in value and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from products import Products
from torch.utils.checkpoint import checkpoint

from warpline.kernels.linear_logprob import (
    TokenStats,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_logprob,
    linear_logprob_reference,
)
from warpline.kernels.vocabulary_sweep import BLOCKING, Blocking

ALL = {"entropy": True, "argmax": True, "sum_p2": True, "mean_logit": True}


SMALL = Blocking(rows=8, columns=4, elements=32, backward_columns=5, backward_elements=80, kept_elements=176)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Products of 8 rows; three blocks of columns or more in each direction, the last ragged; chunks of 16 tokens."""
    monkeypatch.setitem(BLOCKING, "cpu", SMALL)


def make(num_tokens=27, width=5, num_entries=11, dtype=torch.float64, scale=1.0, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_tokens, width), (num_entries, width)] + [(num_entries,)] * bias
    tensors = [(scale * torch.randn(s, generator=generator, dtype=torch.float64)).to(dtype) for s in shapes]
    target_T = torch.randint(num_entries, (num_tokens,), generator=generator)
    target_T[1::4] = -100
    return [t.requires_grad_() for t in tensors], target_T


def gradients(outputs, inputs, seed=1):
    """Gradients of every differentiable output against arbitrary upstream gradients."""
    generator = torch.Generator().manual_seed(seed)
    used = [x for x in outputs if x is not None and x.requires_grad]
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in used]
    return torch.autograd.grad(used, inputs, upstream)


def same(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_reference_gradients_are_the_numerical_ones():
    inputs, target_T = make(3, 2, 4)
    target_T[0] = 2

    def statistics(h, w, b):
        stats = linear_logprob_reference(h, w, target_T, bias_V=b, temperature=0.8, softcap=2.0)
        return [x for x in stats if x.is_floating_point()]

    def loss(h, w, b):
        return linear_cross_entropy_reference(h, w, target_T, bias_V=b, softcap=2.0, z_loss=0.1, label_smoothing=0.2)

    assert torch.autograd.gradcheck(statistics, inputs)
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("asked", [{}, *({k: True} for k in ALL), ALL], ids=lambda d: "+".join(d) or "logprob")
def test_statistics_and_their_gradients_are_those_of_full_logits(temperature, softcap, bias, asked):
    inputs, target_T = make(bias=bias)
    options = {"temperature": temperature, "softcap": softcap, "bias_V": inputs[2] if bias else None}
    stats = linear_logprob(*inputs[:2], target_T, **options, **asked)
    truth = linear_logprob_reference(*inputs[:2], target_T, **options)
    truth = truth._replace(**{f"{k}_T": None for k in ALL if k not in asked})
    for value, expected in zip(stats, truth, strict=True):
        assert (value is None) == (expected is None)
        if value is not None:
            same(value, expected)
    for value, expected in zip(gradients(stats, inputs), gradients(truth, inputs), strict=True):
        same(value, expected)


def test_several_targets_per_token_give_each_its_gradient():
    inputs, _ = make()
    target_TC = torch.randint(11, (27, 4), generator=torch.Generator().manual_seed(3))
    target_TC[::3, 1] = -100
    target_TC[4] = -100
    target_TC[5] = 7
    stats, truth = (f(*inputs[:2], target_TC, bias_V=inputs[2]) for f in (linear_logprob, linear_logprob_reference))
    same(stats.logprob_T, truth.logprob_T)
    same(stats.lse_T, truth.lse_T)
    assert (stats.logprob_T[target_TC == -100] == 0).all() and stats.lse_T[4] == 0
    ours, theirs = gradients(stats[:2], inputs), gradients(truth[:2], inputs)
    for value, expected in zip(ours, theirs, strict=True):
        same(value, expected)


@pytest.mark.parametrize("target", [torch.full((9,), -100), torch.zeros(0, dtype=torch.int64)], ids=["ignored", "empty"])
def test_gradient_survives_a_batch_without_counted_tokens(target):
    inputs, _ = make(len(target))
    stats = linear_logprob(*inputs[:2], target, bias_V=inputs[2], **ALL)
    assert all((x == 0).all() and x.shape == target.shape for x in stats)
    losses = [linear_cross_entropy(*inputs[:2], target, bias_V=inputs[2], reduction=r) for r in ("mean", "sum", "none")]
    assert losses[0] == 0 and losses[1] == 0
    for d in (*gradients(stats, inputs), *(d for loss in losses for d in gradients([loss], inputs))):
        assert d is not None and (d == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("terms", [{}, {"z_loss": 0.1}, {"label_smoothing": 0.2}, {"z_loss": 0.1, "label_smoothing": 0.3}])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_cross_entropy_and_its_gradients_are_torchs(reduction, terms, softcap):
    inputs, target_T = make()
    options = {"reduction": reduction, "softcap": softcap, "bias_V": inputs[2], **terms}
    loss = linear_cross_entropy(*inputs[:2], target_T, **options)
    truth = linear_cross_entropy_reference(*inputs[:2], target_T, **options)
    same(loss, truth)
    for value, expected in zip(gradients([loss], inputs), gradients([truth], inputs), strict=True):
        same(value, expected)


def test_cross_entropy_reference_is_torchs_function():
    (hidden, weight, bias), target_T = make()
    ours = linear_cross_entropy_reference(hidden, weight, target_T, bias_V=bias, label_smoothing=0.1)
    same(ours, F.cross_entropy(F.linear(hidden, weight, bias), target_T, label_smoothing=0.1))


def test_cross_entropy_can_be_differentiated_twice_over_a_retained_graph():
    inputs, target_T = make()
    loss = linear_cross_entropy(*inputs[:2], target_T, bias_V=inputs[2])
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(3 * loss, inputs)
    for a, b in zip(first, second, strict=True):
        same(3 * a, b)


def test_noncontiguous_inputs_change_nothing():
    inputs, target_T = make()
    strided = [x.detach().repeat_interleave(2, 0)[::2].t().contiguous().t().requires_grad_() for x in inputs[:2]]
    strided_target_T = target_T.repeat_interleave(2)[::2]
    for function in (lambda *a: linear_logprob(*a, **ALL), lambda *a: [linear_cross_entropy(*a)]):
        ours, theirs = function(*strided, strided_target_T), function(*inputs[:2], target_T)
        for a, b in zip(gradients(ours, strided), gradients(theirs, inputs[:2]), strict=True):
            same(a, b)


@pytest.mark.interpreter
def test_a_bias_and_targets_with_gaps_are_read_where_they_are():
    inputs, target_T = make(9, dtype=torch.float32)
    target_TC = torch.stack([target_T, target_T.roll(1)], 1)
    gaps = inputs[2].detach().repeat_interleave(2)
    gaps[1::2] = torch.nan
    strided = [*inputs[:2], gaps[::2].requires_grad_()]
    results = []
    for tensors, target in ((inputs, target_TC), (strided, target_TC.t().contiguous().t())):
        stats = linear_logprob(*tensors[:2], target, bias_V=tensors[2], **ALL)
        results.append([*stats, *gradients(stats, tensors)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_that_recomputes_lets_the_backward_read_what_it_saved():
    inputs, target_T = make()

    def losses(h, w, b):
        return linear_logprob(h, w, target_T, bias_V=b).lse_T, linear_cross_entropy(h, w, target_T, bias_V=b)

    recomputed = checkpoint(losses, *inputs, use_reentrant=False)
    for a, b in zip(gradients(recomputed, inputs), gradients(losses(*inputs), inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_extreme_logits_stay_finite_and_exact(shift):
    inputs, target_T = make(dtype=torch.float32, scale=30.0)
    bias_V = inputs[2].detach() + shift
    stats = linear_logprob(*inputs[:2], target_T, bias_V=bias_V, **ALL)
    doubled = [x.detach().double().requires_grad_() for x in inputs[:2]]
    truth = linear_logprob_reference(*doubled, target_T, bias_V=bias_V.double())
    names = ("logprob_T", "lse_T", "entropy_T", "sum_p2_T")
    for name in names:
        torch.testing.assert_close(getattr(stats, name).double(), getattr(truth, name), rtol=1e-5, atol=4e-3)
    pairs = [gradients([getattr(s, n) for n in names], i) for s, i in ((stats, inputs[:2]), (truth, doubled))]
    for value, expected in zip(*pairs, strict=True):
        assert value.isfinite().all()
        assert (value.double() - expected).abs().max() <= 0.01 * expected.abs().max()
    assert (stats.logprob_T <= 0).all()


def test_a_vocabulary_entry_turned_off_by_minus_infinity_has_no_gradient():
    inputs, target_T = make()
    bias_V = torch.zeros(11, dtype=torch.float64)
    bias_V[3] = -torch.inf
    target_T[target_T == 3] = 4
    stats = linear_logprob(*inputs[:2], target_T, bias_V=bias_V, entropy=True)
    keep = [i for i in range(11) if i != 3]
    smaller = inputs[1].detach()[keep].requires_grad_()
    truth = linear_logprob_reference(inputs[0], smaller, target_T - (target_T > 3).long())
    same(stats.entropy_T, truth.entropy_T)
    same(stats.logprob_T, truth.logprob_T)
    pair = [(s.logprob_T, s.entropy_T) for s in (stats, truth)]
    d_hidden, d_weight = gradients(pair[0], inputs[:2])
    d_hidden_truth, d_weight_truth = gradients(pair[1], [inputs[0], smaller])
    same(d_hidden, d_hidden_truth)
    same(d_weight[keep], d_weight_truth)
    assert (d_weight[3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", ["cross_entropy", "statistics"])
def test_error_is_at_most_twice_that_of_eager_torch(dtype, operation):
    inputs, target_T = make(64, 32, 96, dtype, 0.5)

    def run(function, tensors):
        if operation == "cross_entropy":
            return [function[0](*tensors[:2], target_T, bias_V=tensors[2])]
        stats = function[1](*tensors[:2], target_T, bias_V=tensors[2])
        return [stats.logprob_T, stats.lse_T]

    def eager_statistics(h, w, target, bias_V):
        logits = F.linear(h, w, bias_V)
        kept = target != -100
        logp = logits.float().log_softmax(-1).gather(1, target.clamp(min=0)[:, None])[:, 0]
        return TokenStats(logp * kept, logits.float().logsumexp(-1) * kept)

    ours = (linear_cross_entropy, linear_logprob)
    eager = (lambda h, w, t, bias_V: F.cross_entropy(F.linear(h, w, bias_V).float(), t), eager_statistics)
    truth = (linear_cross_entropy_reference, linear_logprob_reference)
    results = []
    for function, tensors in ((ours, inputs), (eager, inputs), (truth, [x.detach().double() for x in inputs])):
        tensors = [x.requires_grad_() for x in tensors]
        outputs = run(function, tensors)
        results.append([*outputs, *gradients(outputs, tensors)])
    for value, eager_value, true_value in zip(*results, strict=True):
        error, eager_error = ((x.double() - true_value).abs().max() for x in (value, eager_value))
        assert error <= 2 * eager_error + 2 * torch.finfo(value.dtype).eps * true_value.abs().max()


def test_dtypes_of_statistics_and_gradients_follow_the_rules():
    inputs, target_T = make(dtype=torch.bfloat16)
    stats = linear_logprob(*inputs[:2], target_T, **ALL)
    assert all(x.dtype == torch.float32 for n, x in stats._asdict().items() if n != "argmax_T")
    assert all(d.dtype == torch.bfloat16 for d in gradients(stats, inputs[:2]))
    mixed = linear_logprob(inputs[0], inputs[1].detach().float(), target_T)
    same(mixed.logprob_T, stats.logprob_T, 0)
    hidden_TD, weight_VD = inputs[0].detach().float() + 0.01, inputs[1].detach().float()
    low = linear_logprob(hidden_TD, weight_VD, target_T, product_dtype=torch.bfloat16)
    same(low.logprob_T, linear_logprob(hidden_TD.bfloat16(), weight_VD.bfloat16(), target_T).logprob_T, 0)


def test_autocast_changes_nothing_inside():
    inputs, target_T = make(dtype=torch.float32)

    def run():
        stats = linear_logprob(*inputs[:2], target_T, entropy=True)
        loss = linear_cross_entropy(*inputs[:2], target_T)
        return [*stats[:3], loss, *gradients([*stats[:3], loss], inputs[:2])]

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run()
    for a, b in zip(plain, cast, strict=True):
        same(a, b, 0)


@pytest.mark.parametrize(("needs", "num_products"), [((1, 1), 4), ((1, 0), 3), ((0, 1), 3), ((0, 0), 1)])
def test_products_that_no_input_needs_are_skipped(needs, num_products):
    (hidden, weight), target_T = make(8, bias=False)
    hidden.requires_grad_(bool(needs[0]))
    weight.requires_grad_(bool(needs[1]))
    target_T = target_T.clamp(min=0)
    with Products() as statistics:
        value = linear_logprob(hidden, weight, target_T).logprob_T.sum()
        if any(needs):
            value.backward()
    with Products() as cross_entropy:
        loss = linear_cross_entropy(hidden, weight, target_T)
        if any(needs):
            loss.backward()
    one = hidden.numel() * len(weight)
    assert statistics.count == num_products * one
    assert cross_entropy.count == (1 + sum(needs)) * one


def test_no_gradient_is_formed_without_autograd():
    (hidden, weight), target_T = make(8, bias=False)
    with torch.no_grad(), Products() as watch:
        linear_cross_entropy(hidden, weight, target_T)
    assert watch.count == hidden.numel() * len(weight)


def test_ignored_tokens_never_reach_a_product():
    (hidden, weight), target_T = make(64, bias=False)
    target_T[:8], target_T[8:] = 3, -100
    poisoned = hidden.detach().clone()
    poisoned[target_T == -100] = torch.nan
    poisoned.requires_grad_()
    with Products() as watch:
        loss = linear_cross_entropy(poisoned, weight, target_T)
    assert watch.count == 3 * hidden[:8].numel() * len(weight)
    d_hidden, d_weight = torch.autograd.grad(loss, [poisoned, weight])
    truth = torch.autograd.grad(linear_cross_entropy_reference(hidden, weight, target_T), [hidden, weight])
    same(d_hidden, truth[0])
    same(d_weight, truth[1])


@pytest.mark.parametrize(
    "blocking", [Blocking(1, 1, 1, 1, 1, 1), Blocking(5, 3, 15, 2, 20, 60), Blocking(64, 64, 4096, 64, 4096, 4096)]
)
def test_block_sizes_do_not_change_the_numbers(blocking, monkeypatch):
    inputs, target_T = make()
    before = linear_logprob(*inputs[:2], target_T, bias_V=inputs[2], **ALL)
    expected = [*before, *gradients(before, inputs)]
    monkeypatch.setitem(BLOCKING, "cpu", blocking)
    after = linear_logprob(*inputs[:2], target_T, bias_V=inputs[2], **ALL)
    for a, b in zip([*after, *gradients(after, inputs)], expected, strict=True):
        same(a, b)


@pytest.mark.parametrize("function", [linear_logprob, linear_cross_entropy])
def test_bad_input_is_named_with_its_remedy(function):
    (hidden, weight), target_T = make(bias=False)
    bad_T = target_T.clone()
    bad_T[6], bad_T[9] = 11, -3
    with pytest.raises(ValueError, match=r"position 6 is 11; expected 0 to 10, or ignore_index -100"):
        function(hidden, weight, bad_T)
    with pytest.raises(ValueError, match=r"expected \[T, D\] and \[V, D\]"):
        function(hidden[None], weight, target_T)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\); expected \(11,\)"):
        function(hidden, weight, target_T, bias_V=torch.zeros(3))
    with pytest.raises(ValueError, match=r"target is torch.int64 of shape \(26,\)"):
        function(hidden, weight, target_T[1:])
    for no_targets in (torch.zeros(27, 0).long(), target_T.to("meta")):
        with pytest.raises(ValueError, match=r"target is .* on (cpu|meta); expected|target has shape \(27, 0\); expected"):
            function(hidden, weight, no_targets)
    with pytest.raises(ValueError, match=r"are torch.int64, torch.float64 with product_dtype None; expected fp16"):
        function(hidden.long(), weight, target_T)
    with pytest.raises(ValueError, match=r"product_dtype torch.int8; expected fp16"):
        function(hidden, weight, target_T, product_dtype=torch.int8)
    with pytest.raises(ValueError, match="product_dtype is fp64, but hidden, weight and bias are not"):
        function(hidden.float(), weight.float(), target_T, product_dtype=torch.float64)
    with pytest.raises(ValueError, match="softcap is inf; expected > 0 and finite"):
        function(hidden, weight, target_T, softcap=float("inf"))
    with pytest.raises(ValueError, match="softcap is 0"):
        function(hidden, weight, target_T, softcap=0)


def test_bad_options_are_named():
    (hidden, weight), target_T = make(bias=False)
    with pytest.raises(ValueError, match="temperature is 0"):
        linear_logprob(hidden, weight, target_T, temperature=0)
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.5; expected 0 <="):
        linear_cross_entropy(hidden, weight, target_T, label_smoothing=1.5)
    with pytest.raises(ValueError, match="reduction is 'avg'"):
        linear_cross_entropy(hidden, weight, target_T, reduction="avg")
    with pytest.raises(ValueError, match=r"position \(2, 1\) is 99"):
        linear_logprob(hidden, weight, torch.stack([target_T, target_T.index_fill(0, torch.tensor(2), 99)], 1))
