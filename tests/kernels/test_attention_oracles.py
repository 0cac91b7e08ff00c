"""Attention against other people's: torch's SDPA and flex_attention, gpt-oss's and Gemma 2's eager attention in transformers.

Each runs on the same numbers in fp64 (Gemma 2, which rounds its probabilities to fp32, in fp32), values and every gradient.
Where conventions differ, the adapter of an oracle says so and converts. In the interpreter the Triton kernels are compared.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from attention_cases import boundaries, random
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from warpline.kernels.attention import attention, attention_reference

# fp64 takes the torch path everywhere; fp32 takes Triton's kernels in the interpreter.
DTYPES = [torch.float64, pytest.param(torch.float32, marks=[pytest.mark.interpreter, pytest.mark.slow])]


def tensors(rows=(1, 37), keys=None, heads=2, key_heads=1, width=16, value_width=16, has_sinks=False):
    """q, k, v and the sinks, fp64; [*rows, N, H]: two sizes make a dense batch, one a packed row of tokens."""
    keys = keys or rows
    shapes = {"q": (*rows, heads, width), "k": (*keys, key_heads, width), "v": (*keys, key_heads, value_width)}
    made = {name: random(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    return made | ({"sinks_N": random(heads, seed=3)} if has_sinks else {})


def outputs_and_gradients(function, inputs, dtype):
    """What `function(q, k, v[, sinks_N])` gives, and gradients of every input under random upstream gradients."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.where(x.isfinite(), random(*x.shape, seed=9 + i).to(x.dtype), 0.0) for i, x in enumerate(outputs)]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, list(leaves.values()), upstream))


def assert_agree(oracle, inputs, dtype, **keywords):
    """In fp64 to 1e-13 of the largest number; in fp32 ‖error‖∞ ≤ 2·‖the oracle's error‖∞ + 2·eps·‖truth‖∞, its fp64 the truth.

    d_q of a query that sees one key is exactly 0 in an oracle that keeps its probabilities, and here do·v − do·o, summed in two
    orders: up to 1.4e-6 for 16 fp32 terms. So no case is made of such queries, as a window of 1 would be.
    """
    mine = outputs_and_gradients(lambda **x: attention(**x, **keywords), inputs, dtype)
    truth = outputs_and_gradients(oracle, inputs, torch.float64)
    theirs = truth if dtype == torch.float64 else outputs_and_gradients(oracle, inputs, dtype)
    for a, o, t in zip(mine, theirs, truth, strict=True):
        assert a.dtype == dtype and a.shape == t.shape and torch.equal(a.isfinite(), t.isfinite())
        error, oracle_error = (torch.where(t.isfinite(), x.double() - t, 0.0).abs().max() for x in (a, o))
        largest = torch.where(t.isfinite(), t, 0.0).abs().max()
        allowed = 1e-13 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
        assert error <= 2 * oracle_error + allowed * largest, f"error {error:.3g}, oracle's {oracle_error:.3g}"


def band(num_queries, num_keys, causal=True, window=None, offset=0):
    """Whether query i sees key j, by diagonals: j − i ≤ offset, and fewer than `window` keys apart."""
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
    seen = seen.tril(offset) if causal else seen
    return seen if window is None else seen.triu(offset - window + 1).tril(offset + window - 1)


def block_diagonal(lengths, **options):
    """Documents one after the other: what is off the blocks is not seen."""
    return torch.block_diag(*(band(n, n, **options).double() for n in lengths)).bool()


# ---- torch's scaled_dot_product_attention ----


def sdpa(mask=None, **options):
    """Heads before positions; a boolean mask is True where a key is seen; a row that sees nothing is 0, as here.

    Its own causal mask is aligned to the first key, which is our query_offset = 0. Its plainest kernel is asked for, since the
    CPU path here may use its fused one.
    """

    def run(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **options).transpose(1, 2)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (4, 2), (4, 1)], ids=["own keys", "grouped", "one key head"])
def test_plain_attention_is_sdpas(causal, heads, key_heads, dtype):
    inputs = tensors(heads=heads, key_heads=key_heads)
    assert_agree(sdpa(is_causal=causal), inputs, dtype, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_and_values_narrower_than_keys_are_sdpas(dtype):
    assert_agree(sdpa(is_causal=True, scale=0.3), tensors(width=24), dtype, scale=0.3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [2, 9])
def test_a_window_is_sdpa_with_a_band(causal, window, dtype):
    mask = band(37, 37, causal, window)
    assert mask[20].sum() == (window if causal else 2 * window - 1)  # the window counts the keys seen, itself included
    assert_agree(sdpa(mask), tensors(), dtype, causal=causal, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [10, 0, -5], ids=["behind", "at the first", "before: rows that see nothing"])
def test_queries_elsewhere_than_their_keys_are_sdpa_with_a_shifted_band(offset, dtype):
    mask = band(37, 47, offset=offset)
    assert (offset >= 0) == mask.any(-1).all()
    assert_agree(sdpa(mask), tensors((2, 37), (2, 47), 4, 2), dtype, query_offset=offset)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_sequence_has_the_offset_of_its_own(dtype):
    offsets = (30, -4)
    mask = torch.stack([band(17, 47, offset=offset, window=12) for offset in offsets])[:, None]
    query_offset = torch.tensor(offsets, dtype=torch.int32)
    assert_agree(sdpa(mask), tensors((2, 17), (2, 47)), dtype, query_offset=query_offset, window=12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 4}], ids=str)
def test_packed_documents_are_sdpa_with_blocks(options, dtype):
    lengths = (5, 1, 0, 23, 8)
    run = sdpa(block_diagonal(lengths, **options))

    def oracle(q, k, v):
        return run(q[None], k[None], v[None])[0]

    assert_agree(oracle, tensors((sum(lengths),)), dtype, cu_seqlens=boundaries(*lengths), **options)


# ---- torch's flex_attention ----


def flex(mask_mod, score_mod=None, has_lse=False, is_trained=True):
    """Heads before positions; scores reach `score_mod` scaled, as our softcap; the mask is a function of indices.

    Its public function refuses gradients on the CPU, so those come from the operator under it, which gives the log-sum-exp in
    powers of two. It knows no sinks: one more key of score `sink` and value 0 scales the output by sigmoid(lse − sink).
    """

    def run(q, k, v, sinks_N=None):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        blocks = create_block_mask(mask_mod, None, None, q.shape[2], k.shape[2], device="cpu")
        if is_trained:
            score = score_mod or (lambda score, *index: score)
            operator = torch.ops.higher_order.flex_attention
            out, log2_lse, _ = operator(q, k, v, score, blocks.as_tuple(), q.shape[-1] ** -0.5, {})
            lse = log2_lse * math.log(2)
        else:
            options = {"score_mod": score_mod, "block_mask": blocks, "enable_gqa": True}
            out, aux = flex_attention(q, k, v, **options, return_aux=AuxRequest(lse=True))
            lse = aux.lse
        if sinks_N is not None:
            out = out * torch.sigmoid(lse - sinks_N[:, None])[..., None]
            lse = torch.logaddexp(lse, sinks_N[:, None])
        out = out.transpose(1, 2)
        return (out, lse) if has_lse else out

    return run


def causal_window(batch, head, query, key):
    return (key <= query) & (query - key < 9)


def causal(batch, head, query, key):
    return key <= query


def capped(score, batch, head, query, key):
    return 2.0 * torch.tanh(score / 2.0)


FLEX = {
    "causal": (flex(causal, has_lse=True), {}, {}),
    "softcap": (flex(causal, capped, has_lse=True), {"softcap": 2.0}, {}),
    "a window": (flex(causal_window, has_lse=True), {"window": 9}, {}),
    "softcap, window and sinks": (
        flex(causal_window, capped, has_lse=True), {"softcap": 2.0, "window": 9}, {"has_sinks": True},
    ),
    "queries before their keys": (
        flex(lambda b, h, query, key: key <= query - 5, has_lse=True), {"query_offset": -5}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FLEX)
def test_softcap_windows_sinks_and_the_log_sum_exp_are_flex_attentions(name, dtype):
    oracle, options, shapes = FLEX[name]
    assert_agree(oracle, tensors(**shapes), dtype, return_lse=True, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 6])
def test_packed_documents_are_flex_attentions_by_document(window, dtype):
    lengths = (5, 1, 0, 23, 8)
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def mask(batch, head, query, key):
        return (document_T[query] == document_T[key]) & (key <= query) & (query - key < (window or 99))

    run = flex(mask, capped, has_lse=True)

    def oracle(q, k, v):
        out, lse = run(q[None], k[None], v[None])
        return out[0], lse[0]

    options = {"cu_seqlens": boundaries(*lengths), "window": window, "softcap": 2.0, "return_lse": True}
    assert_agree(oracle, tensors((sum(lengths),)), dtype, **options)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attentions_public_function_gives_the_values_of_its_operator():
    """That the oracle with gradients is the one that people call; its log-sum-exp is in nats."""
    inputs = tensors()
    public, operator = (flex(causal_window, capped, has_lse=True, is_trained=x)(**inputs) for x in (False, True))
    mine = attention(**inputs, softcap=2.0, window=9, return_lse=True)
    for ours, a, b in zip(mine, public, operator, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
        torch.testing.assert_close(ours, a, rtol=0, atol=1e-14)


# ---- The eager attention of models in transformers ----


def eager(family, mask, num_groups, **options):
    """`eager_attention_forward` of a model: heads before positions coming in, after them going out; an additive mask."""
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.gpt_oss import modeling_gpt_oss

    function = {"gpt-oss": modeling_gpt_oss, "gemma 2": modeling_gemma2}[family].eager_attention_forward

    def run(q, k, v, sinks_N=None):
        module = SimpleNamespace(num_key_value_groups=num_groups, sinks=sinks_N, training=True)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        additive = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)[None, None]
        return function(module, q, k, v, additive, **options)[0]

    return run


def sliding_mask(window):
    """The mask that transformers gives a layer with `sliding_window`: it counts the keys seen, as ours."""
    from transformers.masking_utils import sliding_window_causal_mask_function

    index = torch.arange(37)
    return sliding_window_causal_mask_function(window)(0, 0, index[:, None], index[None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 9])
def test_sinks_are_gpt_oss(window, dtype):
    mask = band(37, 37) if window is None else sliding_mask(window)
    oracle = eager("gpt-oss", mask, 2, scaling=0.25)
    assert_agree(oracle, tensors(heads=4, key_heads=2, has_sinks=True), dtype, scale=0.25, window=window)


@pytest.mark.interpreter
@pytest.mark.parametrize("window", [None, 9])
def test_softcap_is_gemma_2s(window):
    """It makes its probabilities in fp32 whatever comes in: so it is compared in fp32, and the truth is our fp64 reference."""
    mask = band(37, 37) if window is None else sliding_mask(window)
    run, inputs = eager("gemma 2", mask, 2, scaling=0.25, softcap=2.0), tensors(heads=4, key_heads=2)
    options = {"scale": 0.25, "softcap": 2.0, "window": window}
    truth = outputs_and_gradients(lambda **x: attention_reference(**x, **options), inputs, torch.float64)
    theirs = outputs_and_gradients(run, inputs, torch.float32)
    mine = outputs_and_gradients(lambda **x: attention(**x, **options), inputs, torch.float32)
    for a, o, t in zip(mine, theirs, truth, strict=True):
        error, oracle_error = ((x.double() - t).abs().max() for x in (a, o))
        limit = 2 * torch.finfo(torch.float32).eps * t.abs().max()
        assert oracle_error <= 8 * limit, "Gemma 2 computes something else"
        assert error <= 2 * oracle_error + limit
