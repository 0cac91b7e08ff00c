"""Attention on a GPU: values and gradients against fp64 with the tiles that ship; bits, syncs, memory, offsets, compilers.

Every test takes its device. On "cuda" it is what it says; with "cpu" the same lines run small in Triton's interpreter, so that
no slip in them waits for a GPU.
"""

import contextlib
import itertools

import pytest
import torch
from attention_cases import CASES, Case, boundaries, check, outputs_and_gradients, random
from error_rule import check as check_function
from torch.profiler import ProfilerActivity, profile

from warpline.kernels.attention import attention, attention_reference
from warpline.kernels.attention_backend import TABLE

REHEARSAL = [pytest.mark.interpreter, pytest.mark.interpreter_only, pytest.mark.slow]


def places(on_gpu=((),), rehearsed=((),)):
    """Parameters that begin with the device: `on_gpu` for a GPU, `rehearsed` for the interpreter."""
    gpu = [pytest.param("cuda", *values, marks=pytest.mark.gpu) for values in on_gpu]
    return gpu + [pytest.param("cpu", *values, marks=REHEARSAL) for values in rehearsed]


def half(device):
    """bf16; in the interpreter, whose products of bf16 are wrong, fp16."""
    return torch.bfloat16 if device == "cuda" else torch.float16


# ---- Values and gradients ----


def grown(case, factor):
    """The case with lengths (but those of 1), offsets and windows `factor` times as large: several tiles of 128."""

    def times(x):
        if isinstance(x, tuple):
            return tuple(times(number) for number in x)
        return x if x is None or x == 1 else x * factor

    options = case.options | ({"window": case.options["window"] * factor} if "window" in case.options else {})
    sizes = {name: times(getattr(case, name)) for name in ("lengths", "key_lengths", "offset", "tail")}
    return case._replace(options=options, **sizes)


# Triton compiles an integer of 1 into the code.
ONES = {
    "everything is one": Case(1, 1, 16, 16, 1, options={"window": 1}, batch=1),
    "one key, seen by no query": Case(1, 1, 16, 16, 1, 1, -1, batch=1),
    "one key, seen from afar": Case(1, 1, 16, 16, 1, 1, 1, options={"causal": False}, batch=1),
    "one document of one token": Case(1, 1, 16, 16, (1,), (1,), 1),
}
EVERYTHING = Case(4, 2, 64, 64, (301, 0, 200, 1), options={"window": 90, "softcap": 20.0}, sinks=(0.5, -1.0, 2.0, 0.0), tail=9)
LARGE = {"everything": EVERYTHING, "a long one": grown(CASES["causal"], 20)}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALL = [("documents and other keys", torch.float16, 2), ("sinks", torch.float32, 2)]


@pytest.mark.parametrize(("device", "name", "dtype", "factor"), places(itertools.product(CASES, DTYPES, (7,)), SMALL))
def test_every_feature_is_as_good_as_eagers_in_value_and_gradient(device, name, dtype, factor):
    case = grown(CASES[name], factor)
    check(case.inputs(dtype, device), case.keywords(device))


WIDTHS = [(16, 16), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)]


@pytest.mark.parametrize(("device", "name"), places(((name,) for name in ONES), [(name,) for name in ONES]))
def test_sizes_and_options_of_one_are_right(device, name):
    check(ONES[name].inputs(half(device), device), ONES[name].keywords(device))


@pytest.mark.parametrize(("device", "widths", "length"), places(itertools.product(WIDTHS, [301]), [((80, 64), 60)]))
def test_every_head_width_is_right_with_aligned_rows(device, widths, length):
    options = {"window": length // 2, "softcap": 20.0}
    case = Case(4, 2, *widths, (length, 1, length // 3), options=options, sinks=(0.5, -1.0, 2.0, 0.0))
    *qkv, sinks = case.inputs(half(device), device)
    check((*(x.contiguous() for x in qkv), sinks), case.keywords(device))


@pytest.mark.parametrize(("device", "width", "length"), places([(64, 700), (128, 700)], [(16, 70)]))
def test_plain_causal_attention_is_right(device, width, length):
    *qkv, _ = Case(4, 1, width, width, length).inputs(half(device), device)
    check((*(x.contiguous() for x in qkv), None), {})


@pytest.mark.parametrize("device", places())
def test_rows_that_see_nothing_and_what_lies_past_the_last_boundary_are_zero(device):
    """With memory that is NaN until written, and NaN in every token that is nobody's, gradients upstream included."""
    case = Case(4, 2, 16, 16, (40, 0, 30), (20, 5, 33), (-15, 0, 2), sinks=(0.5, float("-inf"), 0.0, 1.0), tail=20)
    *qkv, sinks = case.inputs(half(device), device)
    keywords, length, key_length = case.keywords(device), 70, 58
    clean = outputs_and_gradients(attention, (*qkv, sinks), keywords)
    qkv[0][length:] = torch.nan
    qkv[1][key_length:], qkv[2][key_length:] = torch.nan, torch.nan
    leaves = [x.requires_grad_() for x in (*qkv, sinks)]
    torch.use_deterministic_algorithms(True)
    try:
        out, lse = attention(*leaves[:3], sinks_N=sinks, return_lse=True, **keywords)
        d_out, d_lse = (random(*x.shape, seed=9, device=device).to(x.dtype) for x in (out, lse))
        d_out[length:], d_lse = torch.nan, torch.where(lse.isfinite(), d_lse, 0.0)
        d_lse[:, length:] = torch.nan
        dirty = [out, lse, *torch.autograd.grad((out, lse), leaves, (d_out, d_lse))]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(dirty, clean, strict=True))
    out, lse, d_q, d_k, d_v, d_sinks = dirty
    assert all((x[length:] == 0).all() for x in (out, d_q)) and all((x[key_length:] == 0).all() for x in (d_k, d_v))
    assert (out[:15] == 0).all() and (d_q[:15] == 0).all() and (lse[1, :15] == -torch.inf).all() and d_sinks[1] == 0
    assert (lse[:, length:] == -torch.inf).all()


# ---- Bits, syncs, memory ----


@contextlib.contextmanager
def no_host_sync(device):
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("device", "name"), places(((name,) for name in LARGE), [("documents",)]))
def test_equal_calls_give_equal_bits_without_a_host_sync(device, name):
    case = (LARGE | CASES)[name]
    inputs, keywords = case.inputs(half(device), device), case.keywords(device)
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    *qkv, sinks = leaves

    def run():
        out = attention(*qkv, sinks_N=sinks, **keywords)
        return [out, *torch.autograd.grad(out, [x for x in leaves if x is not None], torch.ones_like(out))]

    first = run()  # also compiles the kernels, which syncs
    with no_host_sync(device):
        second = run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def peak_bytes(device, function):
    """The most that torch held for `function` beyond what it held before, and the bytes of what it returns."""
    returned = sum(x.nbytes for x in function())
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before, returned
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    sizes = [event.nbytes() for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(sizes)), returned


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(("device", "lengths", "width"), places([((8192, 32768), 64)], [((64, 256), 16)]))
def test_memory_is_linear_in_the_number_of_tokens(device, lengths, width, is_packed):
    """Inputs aside, less than 6 tensors of the output's size at any time, it and gradients of q, k and v included."""
    for length in lengths:
        rows = (length,) if is_packed else (1, length)
        q, k, v = (
            random(*rows, heads, width, seed=heads, device=device).to(half(device)).requires_grad_() for heads in (4, 4, 4)
        )
        keywords = {"cu_seqlens": boundaries(*[length // 4] * 4, device=device)} if is_packed else {}

        def run(q=q, k=k, v=v, keywords=keywords):
            out = attention(q, k, v, **keywords)
            return out, *torch.autograd.grad(out, (q, k, v), q.detach())

        peak, returned = peak_bytes(device, run)
        assert returned == 4 * q.nbytes and peak < 6 * q.nbytes + (100_000 if is_packed else 0)


# ---- More elements than 32 bits can count ----


@pytest.mark.parametrize(("device", "steps"), places([((2**30, 2**32),)], [((2**10, 2**12),)]))
def test_rows_and_heads_far_apart_are_reached(device, steps):
    """Tokens 2^30 and heads 2^32 numbers apart: 13 GB in bf16, of which little is touched."""
    near = random(1, 3, 2, 16, seed=1, device=device).to(half(device))
    memory = torch.empty(2 * steps[0] + steps[1] + 16, dtype=near.dtype, device=device)
    far = memory.as_strided(near.shape, (0, *steps, 1)).copy_(near)
    runs = [outputs_and_gradients(attention, (x, x, x, None), {}) for x in (far, near)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(("device", "count", "length", "heads"), places([(1028, 1021, 16)], [(4, 19, 2)]))
def test_tensors_of_more_than_2_to_the_31_elements_are_right_to_their_end(device, count, length, heads):
    """Inputs, outputs and gradients of T·N·H = 2.15e9: the last two documents have the bits that they have alone. 30 GB."""
    width, tokens = 128 if device == "cuda" else 16, count * length
    assert device == "cpu" or tokens * heads * width > 2**31
    generator = torch.Generator(device).manual_seed(0)
    shape = (tokens, heads, width)
    q, k, v = (torch.randn(shape, dtype=half(device), device=device, generator=generator).requires_grad_() for _ in range(3))

    def run(q, k, v, count):
        out, lse = attention(q, k, v, cu_seqlens=boundaries(*[length] * count, device=device), return_lse=True)
        return out, lse.t(), *torch.autograd.grad(out, (q, k, v), q.detach())

    together = run(q, k, v, count)
    alone = run(*(x.detach()[-2 * length :].clone().requires_grad_() for x in (q, k, v)), 2)
    assert all(torch.equal(a[-2 * length :], b) for a, b in zip(together, alone, strict=True))
    assert all(x[5].isfinite().all() and (x[5] != 0).any() for x in together)


@pytest.mark.parametrize(("device", "length", "heads"), places([(2**26 + 5, 32)], [(70, 2)]))
def test_more_than_2_to_the_31_log_sum_exps_are_right(device, length, heads):
    """Each query sees itself alone, in heads of width 1, so every number is known: o = v, lse = q·k; from dlse = 1 and do = 1
    come dq = k, dk = Σ q, dv = N. 40 GB, in N·T = 2^31 + 160 statistics."""
    q, k, v = (random(1, 1, n, 1, seed=n, device=device).to(half(device)) for n in (heads, 1, 1))
    position = torch.arange(length, device=device)
    q, k, v = q.expand(1, length, -1, -1), *((x * (1 + position % 7)[None, :, None, None]).to(x.dtype) for x in (k, v))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, window=1, return_lse=True)
    upstream = torch.ones((1, 1, 1, 1), dtype=out.dtype, device=device).expand_as(out), torch.ones_like(lse)
    d_q, d_k, d_v = torch.autograd.grad((out, lse), leaves, upstream)
    with torch.no_grad():
        for head in range(heads):
            assert torch.equal(out[0, :, head], v[0, :, 0]) and torch.equal(d_q[0, :, head], k[0, :, 0])
            torch.testing.assert_close(lse[0, head], q[0, 0, head, 0].float() * k[0, :, 0, 0].float())
        total = q[0, 0].float().sum()
        torch.testing.assert_close(d_k.float(), total.expand_as(d_k), rtol=0.01, atol=0.01)
        assert (d_v == heads).all()


# ---- Compilers, and other implementations ----


@pytest.mark.parametrize("device", places())
def test_the_operators_pass_opcheck(device):
    case = Case(4, 2, 16, 16, (20, 0, 13), sinks=(0.5, -1.0, 2.0, 0.0), tail=2)
    *qkv, sinks = (x.requires_grad_() for x in case.inputs(torch.float32, device))
    cu_seqlens, offsets = case.keywords(device)["cu_seqlens"], torch.tensor([0, 2, -3], dtype=torch.int32, device=device)
    arguments = (*qkv, cu_seqlens, cu_seqlens, sinks, offsets, 0, True, 9, 2.0, 0.3, torch.float32)
    torch.library.opcheck(torch.ops.warpline.attention, arguments)
    with torch.no_grad():
        out, lse = torch.ops.warpline.attention(*arguments)
    saved, upstream = [x.detach() for x in arguments[:7]], (torch.ones_like(out), torch.ones_like(lse))
    torch.library.opcheck(torch.ops.warpline.attention_backward, (*saved, out, lse, *upstream, *arguments[7:]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("device", "name", "lengths"), places([("everything", (77, 300)), ("sinks", 50)], [("sinks", 9)]))
def test_compiled_by_inductor_in_one_graph_it_gives_the_eager_bits(device, name, lengths):
    """For two sizes, the second of which makes them dynamic."""
    torch.compiler.reset()
    compiled, first = torch.compile(attention, fullgraph=True), (LARGE | CASES)[name]
    for case in (first, first._replace(lengths=lengths)):
        inputs, keywords = case.inputs(half(device), device), case.keywords(device)
        runs = [outputs_and_gradients(function, inputs, keywords) for function in (compiled, attention)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("device", "name"), places(itertools.product(TABLE), [("sdpa-flash",), ("triton",)]))
def test_every_implementation_that_is_here_is_right_by_name(device, name, causal):
    absent = TABLE[name].absent(torch.device(device))
    if absent is not None:
        pytest.skip(absent)
    length, width = (300, 64) if device == "cuda" else (40, 16)
    *qkv, _ = Case(4, 2, width, width, length).inputs(half(device), device)

    def named(q, k, v):
        return attention(q, k, v, causal=causal, backend=name, deterministic=False)

    def eager(q, k, v):
        return attention_reference(q, k, v, causal=causal)

    check_function(named, eager, [x.contiguous() for x in qkv])
