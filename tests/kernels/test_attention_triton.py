"""Attention's Triton kernels: in the interpreter against the fp64 reference, and the machine code that they become."""

import pytest
import torch
from attention_cases import CASES, Case, boundaries, check, outputs_and_gradients, random
from machine_code import check_row, for_every_row

from warpline.kernels.attention import attention

pytest.importorskip("triton")
from warpline.kernels import attention_triton as forwards
from warpline.kernels import attention_triton_backward as backwards
from warpline.kernels.attention_triton import Call, Tile


def set_tiles(monkeypatch, queries, keys):
    monkeypatch.setattr(forwards, "WIDE", dict.fromkeys((64, 128, 256), Tile(queries, keys, 4, 1)))


@pytest.mark.interpreter
@pytest.mark.interpreter_only
@pytest.mark.usefixtures("nan_memory")
class TestInTheInterpreter:
    @pytest.mark.parametrize("name", CASES)
    def test_outputs_and_gradients_equal_the_reference(self, name, monkeypatch):
        set_tiles(monkeypatch, 16, 16)
        check(CASES[name].inputs(torch.float32), CASES[name].keywords())

    @pytest.mark.slow
    @pytest.mark.parametrize("tile", [(32, 16), (16, 32)], ids=str)
    @pytest.mark.parametrize("name", CASES)
    def test_outputs_and_gradients_equal_the_reference_with_tiles_of_unequal_sides(self, name, tile, monkeypatch):
        set_tiles(monkeypatch, *tile)
        check(CASES[name].inputs(torch.float32), CASES[name].keywords())

    @pytest.mark.parametrize("name", ["causal", "documents and other keys", "softcap, window and sinks of 20"])
    def test_half_precision_is_as_good_as_eagers(self, name, monkeypatch):
        for table in (forwards.FORWARD, backwards.BACKWARD_KEYS, backwards.BACKWARD_QUERIES):
            monkeypatch.setitem(table, 64, Tile(16, 16, 4, 1))
        check(CASES[name].inputs(torch.float16), CASES[name].keywords())

    @pytest.mark.parametrize("widths", [(80, 80), (96, 96), (128, 128), (192, 128), (256, 256)], ids=str)
    def test_every_head_width_is_right_with_the_shipped_tiles(self, widths):
        case = Case(2, 1, *widths, 70, options={"window": 50}, batch=1)
        check(case.inputs(torch.float16), case.keywords())

    def test_what_lies_past_the_last_boundary_is_never_read(self, monkeypatch):
        set_tiles(monkeypatch, 16, 16)
        length, keywords = 44, {"cu_seqlens": boundaries(20, 0, 24)}
        q, k, v, _ = Case(2, 1, 16, 16, (20, 0, 24), tail=30).inputs(torch.float32)
        sinks = torch.tensor([0.5, -0.5])
        clean = outputs_and_gradients(attention, (q, k, v, sinks), keywords)
        for x in (q, k, v):
            x[length:] = torch.nan
        leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
        out, lse = attention(*leaves[:3], sinks_N=sinks, return_lse=True, **keywords)
        d_out, d_lse = (random(*x.shape, seed=9).to(x.dtype) for x in (out, lse))
        d_lse, d_out[length:] = torch.where(lse.isfinite(), d_lse, torch.nan), torch.nan
        dirty = [out, lse, *torch.autograd.grad((out, lse), leaves, (d_out, d_lse))]
        assert all(torch.equal(a, b) for a, b in zip(dirty, clean, strict=True))
        assert (out[length:] == 0).all() and all((x[length:] == 0).all() for x in dirty[2:5])

    def test_rows_that_see_nothing_give_zero_and_no_gradient(self, monkeypatch):
        set_tiles(monkeypatch, 16, 16)
        inputs, keywords = CASES["queries before their keys"].inputs(torch.float32)[:3], {"query_offset": -21}
        out, lse, d_q, d_k, d_v = outputs_and_gradients(attention, (*inputs, None), keywords)
        assert (out[:, :21] == 0).all() and (lse[:, :, :21] == -torch.inf).all() and (d_q[:, :21] == 0).all()
        assert (d_k[:, 19:] == 0).all() and (d_v[:, 19:] == 0).all() and lse[:, :, 21:].isfinite().all()

    @pytest.mark.parametrize("shapes", [((0, 2, 16), (0, 1, 16)), ((5, 2, 16), (0, 1, 16)), ((0, 2, 16), (5, 1, 16))], ids=str)
    def test_no_queries_and_no_keys(self, shapes):
        q, k = (torch.randn(shape, requires_grad=True) for shape in shapes)
        keywords = {"cu_seqlens": boundaries(0, len(q)), "cu_seqlens_k": boundaries(len(k), 0), "query_offset": 0}
        results = outputs_and_gradients(attention, (q, k, k, None), keywords)
        assert all((x[x.isfinite()] == 0).all() for x in results)

    def test_outputs_and_log_sums_for_merging_are_not_rounded(self, monkeypatch):
        monkeypatch.setitem(forwards.FORWARD, 64, Tile(16, 16, 4, 1))
        q, k, v, _ = CASES["causal"].inputs(torch.float16)
        out, lse = attention(q, k, v, return_lse=True, out_dtype=torch.float32)
        assert out.dtype == lse.dtype == torch.float32 and (out != out.half()).any()

    def test_gradients_of_an_output_wider_than_the_queries_are_as_good_as_eagers(self, monkeypatch):
        for table in (forwards.FORWARD, backwards.BACKWARD_KEYS, backwards.BACKWARD_QUERIES):
            monkeypatch.setitem(table, 64, Tile(16, 16, 4, 1))
        check(CASES["causal"].inputs(torch.float16), {**CASES["causal"].keywords(), "out_dtype": torch.float32})

    def test_parts_of_the_keys_merge_to_the_whole(self, monkeypatch):
        """As ring attention does: keys 0–19 and 20–36 apart, outputs weighted by exp(lse)."""
        set_tiles(monkeypatch, 16, 16)
        q, k, v, _ = Case(2, 1, 16, 16, 37).inputs(torch.float32)
        whole, whole_lse = attention(q, k, v, return_lse=True)
        parts = [attention(q, k[:, a:b], v[:, a:b], query_offset=-a, return_lse=True) for a, b in ((0, 20), (20, 37))]
        lse = torch.logaddexp(parts[0][1], parts[1][1])
        merged = sum(torch.exp(part_lse - lse).transpose(1, 2)[..., None] * part for part, part_lse in parts)
        torch.testing.assert_close(merged, whole)
        torch.testing.assert_close(lse, whole_lse)

    def test_equal_calls_give_equal_bits(self, monkeypatch):
        set_tiles(monkeypatch, 16, 16)
        inputs, keywords = CASES["documents"].inputs(torch.float32), CASES["documents"].keywords()
        runs = [outputs_and_gradients(attention, inputs, keywords) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    def test_rows_further_apart_than_32_bits_can_count_are_reached(self, tmp_path, monkeypatch):
        """Three tokens 2^30 numbers apart, and heads 2^32 apart, in a sparse file."""
        set_tiles(monkeypatch, 16, 16)
        near = random(1, 3, 2, 16, seed=1).float()
        path = tmp_path / "sparse.bin"
        size = 2**32 + 2**31 + 16
        with path.open("wb") as file:
            file.truncate(4 * size)
        far = torch.from_file(str(path), shared=True, size=size).as_strided(near.shape, (0, 2**30, 2**32, 1)).copy_(near)
        runs = [outputs_and_gradients(attention, (x, x, x, None), {}) for x in (far, near)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    def test_work_is_planned_by_document_and_not_by_the_square_of_the_tokens(self):
        """100 documents of 24 tokens: 200 walks of at most 2 tiles; one document of 2400 walks 11325 tiles."""
        many = forwards.plan(boundaries(*[24] * 100), 2400, 16)
        planned = many[many[:, 0] < 100]
        assert len(planned) == 200 and len(many) <= 2400 // 16 + 101
        assert torch.equal(planned, torch.tensor([[i // 2, 1 - i % 2] for i in range(200)], dtype=torch.int32))
        assert not (many[200:, 0] < 100).any()


# ---- Mutations ----

FORWARD_MUTATIONS = {
    "keys past the end are seen": (" & (key < num_keys)[None, :]", ""),
    "the causal mask is off by one": ("seen = distance >= 0", "seen = distance >= 1"),
    "the causal end is forgotten": ("whole_end = tl.minimum(whole_end, first + 1)", "whole_end = whole_end"),
    "the window is one longer": ("(distance < window)", "(distance <= window)"),
    "the window is one-sided": (" & (distance > -window)", ""),
    "the window begins too late": (
        "begin = tl.maximum(begin, first - window + 1)",
        "begin = tl.maximum(begin, last - window + 1)",
    ),
    "the whole part begins too early": (
        "tl.maximum(whole_begin, last - window + 1)",
        "tl.maximum(whole_begin, first - window + 1)",
    ),
    "a growing maximum rescales nothing": ("acc = acc * factor[:, None]", "acc = acc"),
    "the sum is not rescaled": ("l = l * factor + tl.sum(p, 1)", "l = l + tl.sum(p, 1)"),
    "the softcap is not applied": ("scores = t * (softcap * _LOG2E)", "scores = product * (scale * _LOG2E)"),
    "the scale is forgotten": ("scores = product * (scale * _LOG2E)", "scores = product * _LOG2E"),
    "a sink counts twice": ('l = tl.where(m == -float("inf"), 0.0, 1.0)', 'l = tl.where(m == -float("inf"), 0.0, 2.0)'),
    "a sink of minus infinity counts": ('l = tl.where(m == -float("inf"), 0.0, 1.0)', "l = m * 0.0 + 1.0"),
    "the sink is another head's": ("tl.load(sinks + head)", "tl.load(sinks)"),
    "the key head is the query head's": ("kv_head = head // group_size", "kv_head = head % (num_heads // group_size)"),
    "the offset is forgotten": ("query = row + shift", "query = row"),
    "the offset is the first document's": ("tl.load(offsets + document)", "tl.load(offsets)"),
    "the keys are the queries' document's": ("key_start = tl.load(cu_k + document)", "key_start = start"),
    "the tail is not written": ("elif document == num_documents:", "elif document == num_documents + 1:"),
    "the log-sum-exp is in powers of two": ("m * _LN2", "m"),
    "documents are planned without their order": ("ends[document.clamp(max=num_documents)] - 1 - number", "number * 0"),
}
BACKWARD_MUTATIONS = {
    "delta has no log-sum-exp": ("total -= tl.load(d_lse + place", "total -= 0.0 * tl.load(d_lse + place"),
    "delta is another head's": (
        "place = (batch * num_heads + head) * num_queries + row",
        "place = batch * num_heads * num_queries + row",
    ),
    "the softcap's slope is forgotten": ("d_s = d_s * (1.0 - t * t)", "d_s = d_s"),
    "an empty row counts": ('log_sum = tl.where(log_sum == -float("inf"), float("inf"), log_sum)', "log_sum = log_sum"),
    "an empty query counts": (
        'log_sum == -float("inf"), float("inf"), log_sum * _LOG2E',
        'log_sum < -1e30, -float("inf"), log_sum * _LOG2E',
    ),
    "a group's queries are only its first's": ("head = kv_head * group_size + member", "head = kv_head * group_size"),
    "a key's queries begin too late": ("begin = tl.maximum(begin, first)", "begin = tl.maximum(begin, last)"),
    "a key's whole part begins too early": (
        "whole_begin = tl.maximum(whole_begin, last)",
        "whole_begin = tl.maximum(whole_begin, first)",
    ),
    "a key's queries end too early": ("end = tl.minimum(end, last + window)", "end = tl.minimum(end, first + window)"),
    "a key's whole part ends too late": (
        "whole_end = tl.minimum(whole_end, first + window)",
        "whole_end = tl.minimum(whole_end, last + window)",
    ),
    "keys have no scale": ("(total_k * scale)", "(total_k)"),
    "queries have no scale": ("(total * scale)", "(total)"),
    "the delta is not taken off": ("d_s = p * (d_p - row_delta[:, None])", "d_s = p * d_p"),
    "the keys' delta is not taken off": ("d_s = p * (d_p - row_delta[None, :])", "d_s = p * d_p"),
    "the queries' offset is forgotten": ("query = row + shift", "query = row"),
    "the keys' offset is forgotten": ("_query_range(index * BN - shift, last", "_query_range(index * BN, last"),
    "the tail has no gradient written": ("if document <= num_documents:", "if document < num_documents:"),
    "the sinks' gradient has the wrong sign": ("d_sinks_XN = -torch", "d_sinks_XN = torch"),
    "an empty row has a sink's gradient": ("torch.where(lse == -torch.inf, 0.0, share * delta)", "(share * delta)"),
}
# The fewest cases that between them notice every mutation.
TELLING = (
    "queries before their keys",
    "documents and other keys",
    "softcap, window and sinks of 20",
    "a window on both sides",
    "sinks",
    "documents",
    "causal",
)


def attention_with(forward, backward):
    """`attention` made of the functions given, without its checks."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, sinks, call):
            out, lse = forward(q, k, v, sinks, call, q.dtype)
            ctx.save_for_backward(q, k, v, sinks, out, lse)
            ctx.call = call
            return out, lse

        @staticmethod
        def backward(ctx, d_out, d_lse):
            return *backward(ctx.saved_tensors, d_out, d_lse, ctx.call), None

    def run(q, k, v, *, sinks_N, causal=True, window=None, softcap=None, scale=None, cu_seqlens=None, **rest):
        cu_k, offset = rest.get("cu_seqlens_k", cu_seqlens), rest.get("query_offset", 0)
        call = Call(causal, window, softcap, scale or q.shape[-1] ** -0.5, cu_seqlens, cu_k, offset)
        return Function.apply(q, k, v, sinks_N, call)

    return run


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.interpreter_only
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", [None, *FORWARD_MUTATIONS, *BACKWARD_MUTATIONS])
def test_every_mutation_is_noticed(name, mutated, monkeypatch):
    set_tiles(monkeypatch, 16, 16)
    forward, backward = forwards.forward, backwards.backward
    if name in BACKWARD_MUTATIONS:
        backward = mutated("attention_triton_backward", *BACKWARD_MUTATIONS[name]).backward
    else:
        module = mutated("attention_triton", *FORWARD_MUTATIONS.get(name, ("", "")))
        monkeypatch.setattr(module, "WIDE", forwards.WIDE)
        forward = module.forward

    def check_all():
        for case in map(CASES.get, TELLING):
            check(case.inputs(torch.float32), case.keywords(), attention_with(forward, backward))

    if name is None:
        check_all()
    else:
        with pytest.raises(AssertionError):
            check_all()


# ---- What the kernels become, without a GPU ----

TABLES = {
    "forward": (forwards.forward_kernel, forwards.FORWARD),
    "delta": (backwards.delta_kernel, None),
    "backward keys": (backwards.backward_keys_kernel, backwards.BACKWARD_KEYS),
    "backward queries": (backwards.backward_queries_kernel, backwards.BACKWARD_QUERIES),
}
# Pointers that are None without their feature.
OPTIONAL = {
    "plan": "HAS_CU",
    "cu_q": "HAS_CU",
    "cu_k": "HAS_CU",
    "offsets": "HAS_OFFSETS",
    "sinks": "HAS_SINKS",
    "d_lse": "HAS_D_LSE",
}


def type_of(argument: str, dtype: str) -> str:
    if argument in ("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v"):
        return f"*{dtype}"
    if argument in ("lse", "delta", "sinks", "d_lse"):
        return "*fp32"
    if argument in ("plan", "cu_q", "cu_k", "offsets"):
        return "*i32"
    return "fp32" if argument in ("scale", "softcap") else "i32"


def machine_code(row: str, architecture: int, compiled) -> dict:
    """What a row of the table uses: "<kernel>, <dtype>, <width>[/<value width>], dense | documents | everything"."""
    name, dtype, widths, features = row.split(", ")
    width, value_width = (int(x) for x in (widths.split("/") * 2)[:2])
    kernel, table = TABLES[name]
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    tile = (
        Tile(backwards.ROWS_PER_DELTA, 0, 4, 1)
        if table is None
        else forwards.tile_for(table, forwards.padded(width), torch_dtype)
    )
    has_all = dict.fromkeys(("HAS_OFFSETS", "HAS_SINKS", "HAS_CAP", "WINDOW", "HAS_D_LSE"), features == "everything")
    constants = {
        **has_all, "HAS_CU": features != "dense", "CAUSAL": True, "H": width, "HP": forwards.padded(width), "HV": value_width,
        "HVP": forwards.padded(value_width), "PRECISION": "ieee", "BM": tile.queries, "BN": tile.keys,
    }  # fmt: skip
    constants |= {pointer: None for pointer, has in OPTIONAL.items() if not constants[has]}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    divisible = tuple(x for x in kernel.arg_names if "stride" in x and not x.startswith("lse"))
    types = {argument: type_of(argument, dtype) for argument in kernel.arg_names}
    return compiled(kernel, types, constants, architecture, divisible, num_warps=tile.warps, num_stages=tile.stages)


@for_every_row("attention")
def test_machine_code_uses_no_more_than_the_table_says(row, architecture, compiled):
    used = machine_code(row, architecture, compiled)
    code, is_16_bit = check_row(used, "attention", row, architecture), "fp32" not in row
    if architecture == 90 and is_16_bit and row.startswith("forward"):
        assert used["stack"] == 0, "a spill"
    if is_16_bit and not row.startswith("delta"):
        products = {80: ("HMMA",), 90: ("HGMMA", "HMMA"), 100: ("UTCHMMA", "HMMA")}[architecture]
        assert any(product in code for product in products), "products without tensor cores"
