"""Attention against its fp64 reference, its memory, and what must not leak."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from warpline.kernels import attention_torch as module
from warpline.kernels.attention import attention, attention_part_backward, attention_reference


def boundaries(*lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def random_inputs(shape_q, shape_k, v_width=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (shape_q, shape_k, (*shape_k[:-1], v_width or shape_k[-1]))
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def results(function, tensors, **keywords):
    """Outputs, and the gradients of a fixed random function of them."""
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    outputs = function(*(leaves[name] for name in "qkv"), sinks_N=leaves.get("sinks"), **keywords)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(7)
    loss = 0.0
    for output in outputs:
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
        loss = loss + (torch.where(output.isfinite(), output, 0.0) * weight).sum()
    return [x.detach() for x in (*outputs, *torch.autograd.grad(loss, tuple(leaves.values())))]


def assert_equals_reference(tensors, tolerance=1e-12, **keywords):
    mine, truth = results(attention, tensors, **keywords), results(attention_reference, tensors, **keywords)
    for received, expected in zip(mine, truth, strict=True):
        torch.testing.assert_close(received, expected, rtol=0, atol=tolerance)


FEATURES = list(itertools.product((True, False), (None, 3), (None, 1.5), (False, True), (False, True)))
OFFSETS = (0, -3, 2, (1, -2, -30, 0, 4))


@pytest.fixture(params=[2**19, 300], ids=["one tile", "many ragged tiles"])
def block_elements(request, monkeypatch):
    monkeypatch.setattr(module, "MAX_BLOCK_ELEMENTS", request.param)


@pytest.mark.parametrize(("offset", "has_cross"), [(0, False), (2, False), *((x, True) for x in OFFSETS)], ids=str)
def test_packed_equals_reference_for_every_combination_of_features(offset, has_cross, block_elements):
    cu, cu_k = boundaries(5, 0, 17, 7, 1), boundaries(0, 7, 6, 17, 1)
    q, k, v = random_inputs((33, 4, 8), (33, 2, 8), 6)
    offset = torch.tensor(offset, dtype=torch.int32) if isinstance(offset, tuple) else offset
    for causal, window, softcap, has_sinks, return_lse in FEATURES:
        tensors = {"q": q, "k": k, "v": v} | ({"sinks": torch.linspace(-1, 1, 4).double()} if has_sinks else {})
        features = {"causal": causal, "window": window, "softcap": softcap, "return_lse": return_lse}
        boundary = {"cu_seqlens": cu, "cu_seqlens_k": cu_k if has_cross else None, "query_offset": offset}
        assert_equals_reference(tensors, **features, **boundary)


@pytest.mark.parametrize("offset", [0, 4, -2, (3, -9)], ids=str)
def test_dense_equals_reference_for_every_combination_of_features(offset, block_elements):
    q, k, v = random_inputs((2, 5, 6, 4), (2, 9, 2, 4))
    offset = torch.tensor(offset, dtype=torch.int32) if isinstance(offset, tuple) else offset
    for causal, window, softcap, has_sinks, return_lse in FEATURES:
        tensors = {"q": q, "k": k, "v": v} | ({"sinks": torch.linspace(-1, 1, 6).double()} if has_sinks else {})
        features = {"causal": causal, "window": window, "softcap": softcap, "return_lse": return_lse}
        assert_equals_reference(tensors, query_offset=offset, scale=0.7, **features)


@pytest.mark.parametrize("return_lse", [False, True], ids=["fused", "blocks"])
@pytest.mark.parametrize("causal", [True, False])
def test_fused_and_block_paths_equal_reference(return_lse, causal):
    q, k, v = random_inputs((150, 4, 8), (150, 2, 8))
    tensors = {"q": q, "k": k, "v": v}
    assert_equals_reference(tensors, causal=causal, return_lse=return_lse, cu_seqlens=boundaries(40, 3, 0, 70, 35))
    assert_equals_reference(tensors, causal=causal, return_lse=return_lse, cu_seqlens=boundaries(40, 3, 0, 70, 35), window=70)
    assert_equals_reference({name: x.view(3, 50, -1, 8) for name, x in tensors.items()}, causal=causal, return_lse=return_lse)


@pytest.mark.parametrize("num_queries", [1, 3])
def test_cached_decoding_equals_reference(num_queries):
    q, k, v = random_inputs((5, num_queries, 4, 8), (5, 40, 2, 8))
    offset = torch.tensor([0, 7, 36, 12, 1], dtype=torch.int32)
    with torch.no_grad():
        received = attention(q, k, v, query_offset=offset)
    torch.testing.assert_close(received, attention_reference(q, k, v, query_offset=offset), rtol=0, atol=1e-12)


def test_reference_passes_gradcheck_with_everything_on():
    q, k, v = random_inputs((9, 2, 3), (9, 1, 3), 2)
    sinks_N = torch.tensor([0.3, -0.4], dtype=torch.float64)
    keywords = {"cu_seqlens": boundaries(3, 0, 4), "window": 2, "softcap": 2.0, "query_offset": 1, "return_lse": True}

    def finite(q, k, v, sinks_N):
        out, lse = attention_reference(q, k, v, sinks_N=sinks_N, **keywords)
        return out, lse[:, :7]

    assert torch.autograd.gradcheck(finite, [x.requires_grad_() for x in (q, k, v, sinks_N)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keywords", [{}, {"softcap": 2.0, "window": 9, "return_lse": True}], ids=["plain", "rich"])
def test_error_is_at_most_twice_the_eager_references_error(dtype, keywords):
    q, k, v = random_inputs((200, 4, 16), (200, 2, 16), dtype=torch.float32)
    tensors = {name: x.to(dtype) for name, x in {"q": q, "k": k, "v": v}.items()}
    keywords = {"cu_seqlens": boundaries(30, 33, 100, 7), **keywords}
    mine, eager = results(attention, tensors, **keywords), results(attention_reference, tensors, **keywords)
    truth = results(attention_reference, {name: x.double() for name, x in tensors.items()}, **keywords)
    for received, plain, exact in zip(mine, eager, truth, strict=True):
        keep = exact.isfinite()
        assert torch.equal(keep, received.isfinite())
        error, allowed = (received[keep] - exact[keep]).abs().max(), (plain[keep] - exact[keep]).abs().max()
        assert error <= 2 * allowed + 2 * torch.finfo(received.dtype).eps * exact[keep].abs().max()


@pytest.mark.parametrize("keywords", [{}, {"window": 3, "return_lse": True}, {"causal": False}], ids=str)
def test_nan_past_the_last_boundary_leaks_nowhere(keywords):
    length = 9
    q, k, v = random_inputs((length + 24, 4, 8), (length + 24, 2, 8))
    keywords = {"cu_seqlens": boundaries(length, 0, 14), **keywords}
    used = length + 14
    clean = results(attention, {"q": q[:used], "k": k[:used], "v": v[:used]}, **keywords)
    for x in (q, k, v):
        x[used:] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, **keywords)
    out, lse = out if isinstance(out, tuple) else (out, None)
    assert torch.equal(out[:used], clean[0]) and (out[used:] == 0).all()
    if lse is not None:
        assert (lse[:, used:] == -torch.inf).all() and lse[:, :used].isfinite().all()
    poisoned_d_out = torch.ones_like(out).index_fill_(0, torch.arange(used, length + 24), torch.nan)
    for gradient in torch.autograd.grad(out, leaves, poisoned_d_out):
        assert gradient[:used].isfinite().all() and (gradient[used:] == 0).all()


def test_a_row_that_sees_nothing_gives_zero_and_no_gradient():
    q, k, v = random_inputs((2, 4, 2, 8), (2, 4, 2, 8))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, query_offset=-2, return_lse=True)
    assert (out[:, :2] == 0).all() and (lse[:, :, :2] == -torch.inf).all() and lse[:, :, 2:].isfinite().all()
    d_q, d_k, d_v = torch.autograd.grad(out.sum() + lse[:, :, 2:].sum(), leaves)
    assert (d_q[:, :2] == 0).all() and (d_k[:, 2:] == 0).all() and (d_v[:, 2:] == 0).all()
    assert (d_v[:, :2] != 0).all()
    no_keys = attention(q, k[:, :0], v[:, :0], query_offset=0)
    assert torch.equal(no_keys, torch.zeros_like(q))
    nothing = attention(q[0, :0], k[0, :0], v[0, :0], cu_seqlens=boundaries(0, 0))
    assert nothing.shape == (0, 2, 8) and torch.equal(attention(q[0], k[0], v[0], cu_seqlens=boundaries()), 0 * q[0])


def test_a_document_does_not_see_its_neighbours():
    q, k, v = random_inputs((60, 4, 8), (60, 2, 8), dtype=torch.float32)
    together = attention(q, k, v, cu_seqlens=boundaries(20, 40))
    torch.testing.assert_close(together[:20], attention(q[None, :20], k[None, :20], v[None, :20])[0])
    changed = attention(q, k.index_fill(0, torch.arange(20), 9.0), v, cu_seqlens=boundaries(20, 40))
    assert torch.equal(together[20:], changed[20:])


def test_autocast_changes_nothing_inside():
    q, k, v = random_inputs((30, 4, 8), (30, 2, 8), dtype=torch.float32)
    for keywords in ({}, {"softcap": 3.0}):
        keywords = {"cu_seqlens": boundaries(9, 21), **keywords}
        plain = results(attention, {"q": q, "k": k, "v": v}, **keywords)
        with torch.autocast("cpu", torch.bfloat16):
            cast = results(attention, {"q": q, "k": k, "v": v}, **keywords)
        assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_output_dtype_is_the_one_asked_for_and_not_rounded_on_the_way():
    q, k, v = random_inputs((30, 4, 8), (30, 2, 8), dtype=torch.bfloat16)
    out = attention(q, k, v, cu_seqlens=boundaries(30), out_dtype=torch.float32)
    truth = attention_reference(q.double(), k.double(), v.double(), cu_seqlens=boundaries(30))
    torch.testing.assert_close(out, truth.float(), rtol=0, atol=2e-6)


def test_equal_calls_give_equal_bits():
    q, k, v = random_inputs((200, 4, 16), (200, 2, 16), dtype=torch.float32)
    cu = boundaries(30, 33, 100, 37)
    first, second = (results(attention, {"q": q, "k": k, "v": v}, cu_seqlens=cu) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


BAD_CALLS = {
    "backend.*'flash'.*one of triton, torch": {"backend": "flash"},
    "query_offset.*None.*equal lengths": {"k": torch.zeros(1, 5, 2, 8), "v": torch.zeros(1, 5, 2, 8)},
    r"query_offset.*int64.*int32 \[1\]": {"query_offset": torch.tensor([0])},
    "sinks_N": {"sinks_N": torch.zeros(3)},
    "K dividing N": {"k": torch.zeros(1, 4, 3, 8), "v": torch.zeros(1, 4, 3, 8)},
    "dtypes.*float64": {"k": torch.zeros(1, 4, 2, 8).double()},
    "window": {"window": 0},
    "3 dimensions": {"cu_seqlens": boundaries(4)},
    "cu_seqlens_k.*both": {"cu_seqlens_k": boundaries(4)},
}
BAD_BOUNDARIES = {"int32": boundaries(4).long(), "cumulative": boundaries(5), "from 0": boundaries(4)[1:]}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_a_bad_call_is_refused_with_received_and_expected(message):
    call = {"q": torch.zeros(1, 4, 4, 8), "k": torch.zeros(1, 4, 2, 8), "v": torch.zeros(1, 4, 2, 8)}
    with pytest.raises(ValueError, match=message):
        attention(**(call | BAD_CALLS[message]))


@pytest.mark.parametrize("message", BAD_BOUNDARIES)
def test_bad_boundaries_are_refused(message):
    q, k = torch.zeros(4, 4, 8), torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match=message):
        attention(q, k, k, cu_seqlens=BAD_BOUNDARIES[message])


def test_an_unknown_device_is_named():
    q = torch.zeros(1, 4, 4, 8, device="meta")
    with pytest.raises(ValueError, match=r"device.*meta.*cpu or cuda"):
        attention(q, q, q)


def test_no_document_at_all_gives_zero_output_and_zero_gradient():
    q, k, v = (torch.full((4, 2, 8), float("nan"), dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, cu_seqlens=torch.tensor([0], dtype=torch.int32))
    out.sum().backward()
    assert (out == 0).all() and (q.grad == 0).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("is_packed", [False, True])
def test_gradients_through_parts_of_the_keys_add_up_to_the_whole(is_packed, interprets):
    """As ring attention makes them: keys 0–19 and 20–36 of each of two sequences apart, sinks only in the merge."""
    dtype = torch.float32 if interprets else torch.float64
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 37, heads, 8, generator=generator, dtype=torch.float64).to(dtype) for heads in (4, 2, 2))
    sinks = torch.randn(4, generator=generator, dtype=torch.float64).to(dtype)
    d_out = torch.randn(2, 37, 4, 8, generator=generator, dtype=torch.float64).to(dtype)
    d_lse = torch.randn(2, 4, 37, generator=generator, dtype=torch.float64).to(dtype)
    options = {"window": 18, "softcap": 2.0, "scale": 0.4}
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, sinks_N=sinks, return_lse=True, **options)
    expected = torch.autograd.grad((out, lse), leaves, (d_out, d_lse))
    out, lse = out.detach(), lse.detach()
    total_q, parts = torch.zeros_like(q), []
    for a, b in ((0, 20), (20, 37)):
        tensors, keywords = [q, k[:, a:b], v[:, a:b], out, lse, d_out, d_lse], {"query_offset": -a, **options}
        if is_packed:
            tensors = [x.transpose(0, 1).flatten(1, 2) if x.dim() == 3 else x.flatten(0, 1) for x in tensors]
            bounds = (torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (37, b - a))
            keywords |= dict(zip(("cu_seqlens", "cu_seqlens_k"), bounds, strict=True))
        d_q, d_k, d_v = attention_part_backward(*tensors, **keywords)
        total_q += d_q.view(q.shape)
        parts.append([x.view(2, b - a, 2, 8) for x in (d_k, d_v)])
    received = [total_q, *(torch.cat(x, 1) for x in zip(*parts, strict=True))]
    for a, b in zip(received, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 if interprets else 1e-12)


@pytest.mark.parametrize("options", [{}, {"window": 3, "softcap": 2.0}], ids=str)
def test_a_checkpoint_that_recomputes_lets_the_backward_read_what_it_saved(options):
    leaves = [torch.randn(1, 9, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    results = []
    for call in (attention, lambda *tensors, **keywords: checkpoint(attention, *tensors, use_reentrant=False, **keywords)):
        results.append(torch.autograd.grad(call(*leaves, **options).square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.interpreter
def test_the_gradient_of_a_merge_of_rows_that_see_nothing_is_zero():
    """logaddexp of two −inf has a NaN gradient; queries 0–2 of 7 stand before the first key."""
    q, k, v = (torch.randn(1, 7, 2, 16, requires_grad=True) for _ in range(3))
    parts = [attention(q, k, v, query_offset=-3, return_lse=True) for _ in range(2)]
    merged = torch.logaddexp(parts[0][1], parts[1][1])
    gradients = torch.autograd.grad(merged[..., 3:].sum() + merged[..., :3].clamp(min=-1).sum(), (q, k))
    assert all(d.isfinite().all() for d in gradients) and (gradients[0][:, :3] == 0).all()


@pytest.mark.parametrize(("dtype", "out_dtype"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_gradients_of_an_output_of_another_precision_are_made_in_the_inputs(dtype, out_dtype):
    leaves = [torch.randn(1, 9, 2, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    gradients = [
        torch.autograd.grad(function(*leaves, window=4, out_dtype=out_dtype).square().sum(), leaves)
        for function in (attention, attention_reference)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
