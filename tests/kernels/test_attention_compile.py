"""Attention under torch.compile: operators that pass opcheck, one graph, the eager call's bits, nothing read from a GPU."""

import pytest
import torch
from attention_cases import CASES, Case, boundaries, outputs_and_gradients, random
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from warpline.kernels.attention import attention


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def op_arguments(case, dtype):
    """What the forward operator takes for a case, every tensor that can be trained a leaf."""
    *qkv, sinks = (None if x is None else x.requires_grad_() for x in case.inputs(dtype))
    keywords = case.keywords()
    cu_seqlens, offset = keywords.get("cu_seqlens"), keywords.get("query_offset", 0)
    offsets = offset if isinstance(offset, torch.Tensor) else None
    options = (
        keywords.get("causal", True),
        keywords.get("window"),
        keywords.get("softcap"),
        0.3,
        keywords.get("out_dtype", dtype),
    )
    tensors = (*qkv, cu_seqlens, keywords.get("cu_seqlens_k", cu_seqlens), sinks, offsets)
    return (*tensors, 0 if offsets is not None else offset, *options)


OP_CASES = {
    "dense": Case(4, 2, 8, 8, 9),
    "values narrower, another output dtype": Case(2, 1, 8, 4, 9, options={"softcap": 2.0, "out_dtype": torch.float32}),
    "an offset a sequence": Case(2, 1, 8, 8, 5, 9, (3, -4), options={"window": 4}, sinks=(0.5, -1.0)),
    "documents": Case(2, 1, 8, 8, (1, 0, 6), sinks=(0.5, -1.0), tail=2),
    "documents and other keys": Case(2, 1, 8, 8, (3, 0, 4), (5, 2, 1), (2, 0, -1), options={"causal": False}),
    "no document at all": Case(2, 1, 8, 8, (), tail=5),
}
OP_DTYPES = dict.fromkeys(OP_CASES, torch.float64) | {"values narrower, another output dtype": torch.float16}
# The operators' Triton bodies, in the interpreter.
ON_TRITON = [pytest.param(name, torch.float32, marks=[pytest.mark.interpreter, pytest.mark.slow]) for name in OP_CASES]


@pytest.mark.parametrize(("name", "dtype"), [*OP_DTYPES.items(), *ON_TRITON])
def test_the_registered_operators_pass_opcheck(name, dtype):
    arguments = op_arguments(OP_CASES[name], dtype)
    torch.library.opcheck(torch.ops.warpline.attention, arguments)
    with torch.no_grad():
        out, lse = torch.ops.warpline.attention(*arguments)
    upstream = random(*out.shape, seed=1).to(out.dtype), random(*lse.shape, seed=2).to(lse.dtype)
    saved = [None if x is None else x.detach() for x in arguments[:7]]
    torch.library.opcheck(torch.ops.warpline.attention_backward, (*saved, out, lse, *upstream, *arguments[7:]))


def compiled_attention(backend="aot_eager"):
    return torch.compile(attention, fullgraph=True, backend=backend)


IN_THE_INTERPRETER = ("causal", "documents and other keys", "softcap, window and sinks of 20")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.interpreter] * (name in IN_THE_INTERPRETER)) for name in CASES]
)
def test_compiled_values_and_gradients_are_the_eager_calls_bits(name):
    inputs, keywords = CASES[name].inputs(torch.float32), CASES[name].keywords()
    runs = [outputs_and_gradients(function, inputs, keywords) for function in (compiled_attention(), attention)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_inductor_too_gives_the_eager_calls_bits():
    """It may ask an operator for other strides than it was given."""
    inputs, keywords = CASES["documents and other keys"].inputs(torch.bfloat16), CASES["documents and other keys"].keywords()
    runs = [outputs_and_gradients(function, inputs, keywords) for function in (compiled_attention("inductor"), attention)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def output_and_gradients(function, inputs, **keywords):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, **keywords)
    out = out[0] if isinstance(out, tuple) else out
    return [out.detach(), *torch.autograd.grad(out, leaves, random(*out.shape, seed=9).to(out.dtype))]


def test_without_the_log_sum_exp_the_bits_are_those_of_the_call_with_it():
    """The operator always makes it; eager calls that want none may take torch's fused kernel, which rounds differently."""
    inputs = CASES["causal"].inputs(torch.float32)[:3]
    received = output_and_gradients(compiled_attention(), inputs)
    with_lse = output_and_gradients(attention, inputs, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(received, with_lse, strict=True))
    for a, b in zip(received, output_and_gradients(attention, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_around_a_compiled_call_changes_nothing():
    inputs, keywords = CASES["documents"].inputs(torch.float32), CASES["documents"].keywords()
    plain = outputs_and_gradients(attention, inputs, keywords)
    with torch.autocast("cpu", torch.bfloat16):
        cast = outputs_and_gradients(compiled_attention(), inputs, keywords)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_compiled_without_any_document_everything_is_zero():
    inputs, cu_seqlens = Case(2, 1, 8, 8, (), tail=4).inputs(torch.float32)[:3], boundaries()
    results = output_and_gradients(compiled_attention(), inputs, cu_seqlens=cu_seqlens)
    assert all((x == 0).all() for x in results)


# ---- One graph, and few of them ----

DENSE = [({}, (2, tokens)) for tokens in (40, 17, 33, 64)]
PACKED = [({"cu_seqlens": boundaries(*lengths)}, (sum(lengths) + 2,)) for lengths in ((5, 9, 20), (7, 3), (4, 3, 2, 6), (30,))]
CALLS = {
    "dense": DENSE,
    "features": [({"softcap": 3.0, "window": 5, "return_lse": True}, rows) for _, rows in DENSE],
    "documents": PACKED,
    "documents of an offset each": [
        ({**keywords, "query_offset": torch.zeros(len(keywords["cu_seqlens"]) - 1, dtype=torch.int32)}, rows)
        for keywords, rows in PACKED[::2]
    ],
    "a decoder that goes on": [({"query_offset": offset}, (1, 40)) for offset in (7, 8, 9, 30)],
}


@pytest.mark.parametrize("name", CALLS)
def test_one_graph_of_one_operator_takes_any_number_of_tokens(name):
    """The second size compiles once more, for any size; what changes may also be the number of documents, or the offset."""
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled_attention(counter)
    for keywords, rows in CALLS[name]:
        inputs = [random(*rows, heads, 16, seed=heads).float() for heads in (4, 2, 2)]
        received, expected = (output_and_gradients(f, inputs, **keywords) for f in (function, attention))
        for a, b in zip(received, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2
    for graph in counter.graphs:
        calls = [node.target for node in graph.graph.nodes if node.op == "call_function" and "attention" in str(node.target)]
        assert calls == [torch.ops.warpline.attention.default]


@pytest.mark.parametrize("keywords", [{}, {"softcap": 2.0}, {"cu_seqlens": boundaries(9, 31)}], ids=str)
def test_the_operators_own_implementation_can_be_named(keywords):
    """By name, too, the operator is called: what is inside of it reads lengths, and would break the graph."""
    rows = (40,) if "cu_seqlens" in keywords else (1, 40)
    inputs = [random(*rows, heads, 16, seed=heads).float() for heads in (4, 2, 2)]
    named, unnamed = (output_and_gradients(compiled_attention(), inputs, backend=x, **keywords) for x in ("torch", "auto"))
    assert all(torch.equal(a, b) for a, b in zip(named, unnamed, strict=True))


# ---- What the host reads ----


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that are launched, which are not: only what surrounds them runs."""
    pytest.importorskip("triton")
    from warpline.kernels import attention_triton, attention_triton_backward

    names = []
    for module in (attention_triton, attention_triton_backward):
        monkeypatch.setattr(module, "launch", lambda kernel, *rest, **options: names.append(kernel.__name__))
    return names


@pytest.mark.parametrize("name", ["causal", "sinks", "documents", "documents and other keys", "one query behind its keys"])
def test_the_triton_paths_host_code_reads_nothing_from_the_device(name, launches):
    """Fake tensors have no contents, so whoever reads one raises; the torch path, which reads lengths, does."""
    from warpline.kernels.attention_torch import Rule, attention_torch
    from warpline.kernels.attention_triton import Call, forward
    from warpline.kernels.attention_triton_backward import backward

    case, mode = CASES[name], FakeTensorMode()
    q, k, v, sinks, cu, cu_k, offset = (
        x if not isinstance(x, torch.Tensor) else mode.from_tensor(x)
        for x in (
            *case.inputs(torch.bfloat16), *(case.keywords().get(x) for x in ("cu_seqlens", "cu_seqlens_k")),
            case.keywords().get("query_offset", 0),
        )
    )  # fmt: skip
    cu_k = cu if cu_k is None else cu_k
    call = Call(True, 9, 2.0, 0.3, cu, cu_k, offset)
    with mode:
        out, lse = forward(q, k, v, sinks, call, torch.bfloat16)
        gradients = backward((q, k, v, sinks, out, lse), torch.empty_like(out), torch.empty_like(lse), call)
        if cu is not None:
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                attention_torch(q, k, v, cu, cu_k, sinks, Rule(True, 9, 2.0, 0.3, True, torch.bfloat16), offset)
    assert launches == ["forward_kernel", "delta_kernel", "backward_keys_kernel", "backward_queries_kernel"]
    assert [None if x is None else x.shape for x in gradients] == [None if x is None else x.shape for x in (q, k, v, sinks)]
