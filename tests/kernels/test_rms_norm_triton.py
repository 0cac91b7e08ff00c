"""rms_norm's Triton kernels: in the interpreter against the fp64 reference, and the machine code that they become."""

import pytest
import torch
from error_rule import check, far_apart, random, results
from machine_code import check_row, for_every_row

from warpline.kernels.rms_norm import rms_norm, rms_norm_reference

pytest.importorskip("triton")
from warpline.kernels import rms_norm_triton as kernels

# Rows of a tile 2, three programs of 14 rows at most, both ragged at the end.
SHAPES = [(37, 13), (2, 19, 16), (1, 3), (5, 300), (0, 7), (9,)]


def tensors(shape, has_residual, dtype=torch.float32, weight_dtype=None):
    weight = random(shape[-1], seed=1, dtype=weight_dtype or dtype)
    return random(*shape, seed=0, dtype=dtype), weight, random(*shape, seed=2, dtype=dtype) if has_residual else None


def call(function):
    return lambda x, weight, residual, **options: function(x, weight, residual=residual, eps=1e-3, **options)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "ELEMENTS_PER_TILE", 32)
    monkeypatch.setattr(kernels, "PROGRAMS", 3)


@pytest.mark.interpreter
@pytest.mark.interpreter_only
@pytest.mark.usefixtures("nan_memory", "small_tiles")
class TestInTheInterpreter:
    @pytest.mark.parametrize("zero_centred", [False, True])
    @pytest.mark.parametrize("has_residual", [False, True])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_outputs_and_gradients_equal_the_reference(self, shape, has_residual, zero_centred):
        check(call(rms_norm), call(rms_norm_reference), tensors(shape, has_residual), zero_centred=zero_centred)

    @pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
    @pytest.mark.parametrize("zero_centred", [False, True])
    def test_half_precision_is_as_good_as_eagers(self, weight_dtype, zero_centred):
        inputs = tensors((37, 13), True, torch.float16, weight_dtype)
        check(call(rms_norm), call(rms_norm_reference), inputs, zero_centred=zero_centred)

    def test_rows_with_gaps_and_columns_apart_are_read_where_they_are(self):
        for x in (random(37, 26, seed=0)[:, ::2], random(37, 20, seed=0)[:, 3:16], random(13, 37, seed=0).t()):
            inputs = (x, random(26, seed=1)[::2], x.flip(0))
            plain = [y.contiguous() for y in inputs]
            for a, b in zip(results(call(rms_norm), inputs), results(call(rms_norm), plain), strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("needed", [(True, False), (False, True)])
    def test_only_the_gradients_that_are_needed_are_made(self, needed):
        x, weight, _ = tensors((37, 13), False)
        y, z, r = kernels.forward(x, weight, None, 1e-3, False)
        one, both = (kernels.backward(y, None, z, weight, r, False, n) for n in (needed, (True, True)))
        assert all((a is None) == (not asked) for a, asked in zip(one, needed, strict=True))
        assert all(a is None or torch.equal(a, b) for a, b in zip(one, both, strict=True))

    def test_an_output_without_gradient_has_none(self):
        x, weight, residual = (y.requires_grad_() for y in tensors((37, 13), True))
        _, z = rms_norm(x, weight, residual=residual)
        d_x, d_residual = torch.autograd.grad(z, (x, residual), torch.ones_like(z))
        assert (d_x == 1).all() and (d_residual == 1).all()
        y, _ = rms_norm(x, weight, residual=residual)
        d_x, d_residual = torch.autograd.grad(y, (x, residual), torch.ones(()).expand(y.shape))
        assert torch.equal(d_x, d_residual) and d_x.isfinite().all()

    def test_a_row_does_not_depend_on_the_others_and_equal_calls_give_equal_bits(self):
        x, weight, _ = tensors((37, 13), False)
        whole, again = (results(call(rms_norm), (x, weight, None)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
        assert torch.equal(rms_norm(x[5:6], weight, eps=1e-3), whole[0][5:6])

    def test_rows_further_apart_than_32_bits_can_count_are_reached(self, tmp_path):
        far = far_apart(random(3, 8, seed=0), (2**30, 1), tmp_path)
        weight = random(8, seed=1)
        runs = [results(call(rms_norm), (x, weight, x)) for x in (far, far.contiguous())]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# Each of these edits of the kernels' source must be noticed.
MUTATIONS = {
    "columns past the end count in the mean": ("tl.sum(value * value, 1) / width", "tl.sum(value * value, 1) / WIDTH"),
    "eps is forgotten": (" / width + eps)", " / width + 2.0 * eps)"),
    "the residual is forgotten": ("value += tl.load(residual", "value += 0.0 * tl.load(residual"),
    "the norm is of the unrounded sum": ("value = rounded.to(tl.float32)", "value += 0.0"),
    "x̂ is not rounded": ("x_hat.to(x.dtype.element_ty).to(tl.float32) * w", "x_hat * w"),
    "zero-centred is plain": ("out = x_hat * (1.0 + w)", "out = x_hat * w"),
    "the gradient's weight is plain": ("w = 1.0 + w", "w = w + 0.0"),
    "rows past the end are the program's": ("rows_per_program, num_rows)", "rows_per_program, num_rows - 1)"),
    "the mean is of the padded row": ("tl.sum(g * x_hat, 1) / width", "tl.sum(g * x_hat, 1) / WIDTH"),
    "the mean's part is forgotten": ("(g - x_hat * mean[:, None])", "(g - 0.0 * mean[:, None])"),
    "the outside gradient is forgotten": ("d_value += tl.load(d_z", "d_value += 0.0 * tl.load(d_z"),
    "d_weight is of the weighted gradient": ("total += d_out * x_hat", "total += d_out * w * x_hat"),
    "d_weight is the last row's": ("total += d_out * x_hat", "total = d_out * x_hat"),
    "a program's part is another's": ("parts + program * width + column", "parts + column"),
    "the gradient is read in steps of x": ("row[:, None] * d_y_stride", "row[:, None] * width"),
    "x is read in steps of its width": ("x + row[:, None] * x_stride", "x + row[:, None] * width"),
}
# Rounding in fp16 is what tells these two apart from the kernel.
SEEN_IN_BITS = {"the norm is of the unrounded sum", "x̂ is not rounded"}


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.interpreter_only
@pytest.mark.usefixtures("nan_memory", "small_tiles")
@pytest.mark.parametrize("name", [None, *MUTATIONS])
def test_every_mutation_is_noticed(name, mutated, monkeypatch):
    source = kernels if name is None else mutated("rms_norm_triton", *MUTATIONS[name])
    monkeypatch.setattr(source, "ELEMENTS_PER_TILE", 32)
    monkeypatch.setattr(source, "PROGRAMS", 3)
    inputs = [random(37, 20, seed=0)[:, 3:16], random(13, seed=1), random(37, 13, seed=2)]
    halves = [x.half() for x in inputs]
    steps = {}
    for zero_centred in (False, True):
        for key, (x, weight, residual) in {"fp32": inputs, "fp16": halves}.items():
            expected_y, expected_z = rms_norm_reference(x, weight, residual=residual, eps=1e-3, zero_centred=zero_centred)
            steps[key, zero_centred] = (x, weight, residual, expected_y, expected_z)

    def check_all():
        for (key, zero_centred), (x, weight, residual, expected_y, expected_z) in steps.items():
            y, z, r = source.forward(x, weight, residual, 1e-3, zero_centred)
            assert torch.equal(z, expected_z)
            if key == "fp16" and not zero_centred:
                assert (y != expected_y).float().mean() < 0.02, "beyond what fp32 arithmetic of another order rounds away"
            torch.testing.assert_close(y, expected_y)
            d_y = random(37, 20, seed=3)[:, 4:17].to(y.dtype)
            d_x, d_weight = source.backward(d_y, z, z, weight, r, zero_centred, (True, True))
            leaf_z, leaf_w = z.double().requires_grad_(), weight.double().requires_grad_()
            truth = rms_norm_reference(leaf_z, leaf_w, eps=1e-3, zero_centred=zero_centred)
            d_z, d_w = torch.autograd.grad(truth, (leaf_z, leaf_w), d_y.double())
            tolerance = 1e-5 if key == "fp32" else 2e-2
            torch.testing.assert_close(d_x.double(), d_z + z.double(), rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(d_weight.double(), d_w, rtol=tolerance, atol=10 * tolerance)

    if name is None:
        check_all()
    else:
        with pytest.raises(AssertionError):
            check_all()


# ---- What the kernels become, without a GPU ----


def machine_code(row: str, architecture: int, compiled) -> dict:
    """What a row of the table uses: "<forward | backward>, <dtype>, <width>"."""
    name, dtype, width = row.split(", ")
    rows, padded, warps = kernels._layout(int(width))
    kernel = kernels.forward_kernel if name == "forward" else kernels.backward_kernel
    flags = ("HAS_RESIDUAL", "HAS_D_Z", "NEEDS_X", "NEEDS_WEIGHT")
    constants = {**dict.fromkeys(flags, True), "ZERO_CENTRED": False, "ROWS": rows, "WIDTH": padded}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    types = dict.fromkeys(kernel.arg_names, f"*{dtype}") | {"inverse_rms": "*fp32", "parts": "*fp32", "eps": "fp32"}
    integers = ("num_rows", "width", "rows_per_program", *(x for x in kernel.arg_names if x.endswith("stride")))
    types |= dict.fromkeys(integers, "i32")
    divisible = tuple(x for x in integers if x != "num_rows")
    return compiled(kernel, types, constants, architecture, divisible, num_warps=warps)


@for_every_row("rms_norm")
def test_machine_code_uses_no_more_than_the_table_says(row, architecture, compiled):
    used = machine_code(row, architecture, compiled)
    assert "LDG.E.128" in check_row(used, "rms_norm", row, architecture), "loads of 16 bytes"
    # A backward keeps three numbers of 16 or 32 columns in the 64 registers that 1024 threads may have.
    assert used["stack"] == 0 or row in ("backward, bf16, 16384", "backward, bf16, 32768")
