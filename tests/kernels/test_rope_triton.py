"""rope's Triton kernels: in the interpreter against the fp64 reference, and the machine code that they become."""

import pytest
import torch
from error_rule import check, far_apart, random, results
from machine_code import check_row, for_every_row

from warpline.kernels.rope import rope, rope_reference, rope_tables

pytest.importorskip("triton")
from warpline.kernels import rope_triton as kernels


@pytest.fixture
def small_tiles(monkeypatch):
    """Two heads a tile of 16 channels; three programs, the last with fewer tokens."""
    monkeypatch.setattr(kernels, "ELEMENTS_PER_TILE", 32)
    monkeypatch.setattr(kernels, "PROGRAMS", 3)


def tables(shape, rotated, is_per_row=False):
    """Of `shape` [B, S] or [T]."""
    positions = torch.arange(shape[-1]) if not is_per_row else torch.arange(shape.numel()).view(shape) * 7 % 50
    return rope_tables(positions, rotated, 100.0, dtype=torch.float64)


def call(function, cos, sin, has_norm, zero_centred):
    def run(q, k, q_weight, k_weight):
        c, s = (table.to(torch.float64 if q.dtype == torch.float64 else torch.float32) for table in (cos, sin))
        weights = {"q_norm_weight": q_weight, "k_norm_weight": k_weight} if has_norm else {}
        q, k = function(q, k, c, s, eps=1e-3, zero_centred=zero_centred, **weights)
        # Without a norm the weights still have a gradient, of zero, so that both are compared.
        return q, k, q_weight * 1.0, k_weight * 1.0

    return run


@pytest.mark.interpreter
@pytest.mark.interpreter_only
@pytest.mark.usefixtures("nan_memory", "small_tiles")
class TestInTheInterpreter:
    @pytest.mark.parametrize("zero_centred", [False, True])
    @pytest.mark.parametrize("has_norm", [False, True])
    @pytest.mark.parametrize("width", [(16, 16), (12, 6), (16, 10)], ids=str)
    @pytest.mark.parametrize("tokens", [(2, 5), (7,), (0,)], ids=str)
    def test_outputs_and_gradients_equal_the_reference(self, tokens, width, has_norm, zero_centred):
        inputs = [random(*tokens, heads, width[0], seed=heads) for heads in (3, 1)] + [random(width[0], seed=s) for s in (3, 4)]
        cos, sin = tables(torch.Size(tokens), width[1], is_per_row=len(tokens) == 2)
        options = (cos, sin, has_norm, zero_centred)
        check(call(rope, *options), call(rope_reference, *options), inputs)

    def test_half_precision_is_as_good_as_eagers(self):
        inputs = [random(7, heads, 16, seed=heads, dtype=torch.float16) for heads in (5, 2)]
        inputs += [random(16, seed=s, dtype=torch.float16) for s in (3, 4)]
        options = (*tables(torch.Size((7,)), 16), True, False)
        check(call(rope, *options), call(rope_reference, *options), inputs)

    def test_heads_and_tokens_with_gaps_are_read_where_they_are(self):
        both = random(7, 6, 24, seed=0)[:, :, 4:20]
        options = (*tables(torch.Size((7,)), 12), True, False)
        weights = [random(16, seed=s) for s in (3, 4)]
        given = [both[:, :5], both[:, 5:], *weights]
        plain = [x.contiguous() for x in given]
        for other in (given, [x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() == 3 else x for x in given]):
            runs = [results(call(rope, *options), x) for x in (other, plain)]
            assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    def test_one_side_may_have_a_norm_and_a_frozen_weight_has_no_gradient(self):
        q, k, weight = random(7, 3, 16, seed=0), random(7, 1, 16, seed=1), random(16, seed=2)
        cos, sin = (table.float() for table in tables(torch.Size((7,)), 16))
        plain_q, normed_k = rope(q.requires_grad_(), k.requires_grad_(), cos, sin, k_norm_weight=weight)
        assert torch.equal(plain_q, rope(q, k, cos, sin)[0]) and not torch.equal(normed_k, rope(q, k, cos, sin)[1])
        d_k = torch.autograd.grad(normed_k.sum(), k)[0]
        y = rope(q, k, cos, sin, k_norm_weight=weight.requires_grad_())[1]
        both = torch.autograd.grad(y.sum(), (k, weight))
        assert torch.equal(d_k, both[0]) and both[1].isfinite().all()
        only = torch.autograd.grad(rope(q.detach(), k.detach(), cos, sin, k_norm_weight=weight)[1].sum(), weight)[0]
        assert torch.equal(only, both[1])

    def test_equal_calls_give_equal_bits_and_a_token_does_not_depend_on_others(self):
        q, k, weight = random(7, 5, 16, seed=0), random(7, 1, 16, seed=1), random(16, seed=2)
        cos, sin = tables(torch.Size((7,)), 16)
        runs = [results(call(rope, cos, sin, True, False), (q, k, weight, weight)) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        one = rope(q[3:4], k[3:4], cos[3:4].float(), sin[3:4].float(), q_norm_weight=weight, eps=1e-3)[0]
        assert torch.equal(one, runs[0][0][3:4])

    def test_heads_further_apart_than_32_bits_can_count_are_reached(self, tmp_path):
        far = far_apart(random(2, 3, 16, seed=0), (16, 2**30 + 2**29, 1), tmp_path)
        weight, (cos, sin) = random(16, seed=1), tables(torch.Size((2,)), 16)
        runs = [results(call(rope, cos, sin, True, False), (x, x, weight, weight)) for x in (far, far.contiguous())]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# Each of these edits of the kernels' source must be noticed.
MUTATIONS = {
    "the other direction": ("s = sign * tl.load", "s = -sign * tl.load"),
    "halves are swapped": ("a * c - b * s)", "b * c - a * s)"),
    "the second half stands still": ("b * c + a * s)", "b * c)"),
    "a token's angles are the first one's": ("table = (token % table_rows) * half", "table = 0 * half"),
    "the table does not repeat": ("token % table_rows", "tl.minimum(token, table_rows - 1)"),
    "eps is forgotten": ("/ width + eps)", "/ width + 2.0 * eps)"),
    "the rest does not count in the norm": ("squares += tl.sum(rest * rest, 1)", "squares += 0.0"),
    "the rest is not normed": ("rest = rest * r * _weights", "rest = rest * _weights"),
    "zero-centred is plain": ("w = 1.0 + w", "w = w + 0.0"),
    "the first half's weights serve the second": ("(weight, column, half, 2 * half", "(weight, column, 0, half"),
    "the backward turns forward": (
        "d_a, d_b = d_one * c + d_two * s, d_two * c - d_one * s", "d_a, d_b = d_one * c - d_two * s, d_two * c + d_one * s"),
    "the mean's part is forgotten": ("(d_a * w_a - a * mean)", "(d_a * w_a)"),
    "the rest has no part in the mean": ("dots += tl.sum(d_rest * w_rest * rest, 1)", "dots += 0.0"),
    "d_weight is the last token's": ("total_a += d_a * a * r", "total_a = d_a * a * r"),
    "the rest's weight has no gradient": ("total_rest += d_rest * rest * r", "total_rest += d_rest * 0.0"),
    "a program's part is another's": ("parts += program * width", "parts += 0 * width"),
    "only the first heads": ("for first in range(0, num_heads, HEADS)", "for first in range(0, HEADS, HEADS)"),
    "heads have no gaps": ("tl.load(x + head[:, None] * head_stride", "tl.load(x + head[:, None] * 16"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.interpreter_only
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("name", [None, *MUTATIONS])
def test_every_mutation_is_noticed(name, mutated, monkeypatch):
    source = kernels if name is None else mutated("rope_triton", *MUTATIONS[name])
    monkeypatch.setattr(source, "ELEMENTS_PER_TILE", 32)
    monkeypatch.setattr(source, "PROGRAMS", 3)
    x, d_y, weight = random(14, 5, 24, seed=0)[:, :, 3:19], random(14, 5, 16, seed=1), random(16, seed=2)
    cos, sin = tables(torch.Size((7,)), 12)  # two rows of seven positions
    cases = []
    for has_norm in (False, True):
        for zero_centred in (False, True):
            leaves = [x.double().view(2, 7, 5, 16).requires_grad_(), weight.double().requires_grad_()]
            given = leaves[1] if has_norm else None
            truth = rope_reference(leaves[0], leaves[0], cos, sin, q_norm_weight=given, eps=1e-3, zero_centred=zero_centred)[0]
            wanted = leaves if has_norm else leaves[:1]
            gradients = torch.autograd.grad(truth, wanted, d_y.double().view(truth.shape))
            cases.append(((weight if has_norm else None, 1e-3, zero_centred), [truth, *gradients]))

    def check_all():
        for options, expected in cases:
            y = source.forward(x, cos.float(), sin.float(), *options)
            actual = [y, *source.backward(d_y, x, cos.float(), sin.float(), *options, (True, True))]
            for a, b in zip(actual, expected, strict=False):
                torch.testing.assert_close(a.double().view(b.shape), b, rtol=1e-4, atol=1e-4)

    if name is None:
        check_all()
    else:
        with pytest.raises(AssertionError):
            check_all()


# ---- What the kernels become, without a GPU ----


def machine_code(row: str, architecture: int, compiled) -> dict:
    """What a row of the table uses: "<forward | backward>, <dtype>, <width>[/<rotated>], <plain | norm>", of 32 heads."""
    name, dtype, widths, norm = row.split(", ")
    width, rotated = (int(x) for x in (widths.split("/") * 2)[:2])
    kernel = {"forward": kernels.forward_kernel, "backward": kernels.backward_kernel}[name]
    constants = kernels._constants(width, rotated // 2, 32) | {"HAS_NORM": norm == "norm", "ZERO_CENTRED": False}
    constants |= {"NEEDS_X": True, "NEEDS_WEIGHT": True} | ({"weight": None} if norm == "plain" else {})
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    integers = ("num_tokens", "num_heads", "table_rows", "width", "half", "tokens_per_program")
    integers += tuple(x for x in kernel.arg_names if x.endswith("stride"))
    types = dict.fromkeys(kernel.arg_names, f"*{dtype}") | dict.fromkeys(("cos", "sin", "eps", "sign", "parts"), "fp32")
    types |= dict.fromkeys(("cos", "sin", "parts"), "*fp32") | dict.fromkeys(integers, "i32")
    divisible = tuple(x for x in integers if x not in ("num_tokens", "table_rows", "tokens_per_program"))
    return compiled(kernel, types, constants, architecture, divisible, num_warps=kernels.NUM_WARPS)


@for_every_row("rope")
def test_machine_code_uses_no_more_than_the_table_says(row, architecture, compiled):
    used = machine_code(row, architecture, compiled)
    assert "LDG.E.128" in check_row(used, "rope", row, architecture), "loads of 16 bytes"
    assert used["stack"] == 0, "a spill"
