"""swiglu's Triton kernels: in the interpreter against the fp64 reference, and the machine code that they become."""

import pytest
import torch
from error_rule import check, far_apart, random, results
from machine_code import check_row, for_every_row

from warpline.kernels.swiglu import swiglu, swiglu_reference

pytest.importorskip("triton")
from warpline.kernels import swiglu_triton as kernels


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 16)


@pytest.mark.interpreter
@pytest.mark.interpreter_only
@pytest.mark.usefixtures("nan_memory", "small_tiles")
class TestInTheInterpreter:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("shape", [(7, 37), (2, 3, 16), (1,), (0, 5)], ids=str)
    def test_outputs_and_gradients_equal_the_reference(self, shape, dtype):
        check(swiglu, swiglu_reference, [random(*shape, seed=seed, dtype=dtype) for seed in (0, 1)])

    def test_halves_of_one_product_are_read_where_they_are(self):
        both = random(7, 74, seed=0)
        gate, up = both.chunk(2, -1)
        plain = results(swiglu, (gate.contiguous(), up.contiguous()))
        assert all(torch.equal(a, b) for a, b in zip(results(swiglu, (gate, up)), plain, strict=True))
        transposed = [x.t().contiguous().t() for x in (gate, up)]
        assert all(torch.equal(a, b) for a, b in zip(results(swiglu, transposed), plain, strict=True))

    @pytest.mark.parametrize("needed", [(True, False), (False, True)])
    def test_only_the_gradients_that_are_needed_are_made(self, needed):
        gate, up, d_out = (random(7, 37, seed=seed) for seed in range(3))
        one, both = (kernels.backward(d_out, gate, up, n) for n in (needed, (True, True)))
        assert all((a is None) == (not asked) for a, asked in zip(one, needed, strict=True))
        assert all(a is None or torch.equal(a, b) for a, b in zip(one, both, strict=True))

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: exp(100) is infinite in fp32
    def test_large_gates_saturate(self):
        gate = torch.tensor([-3e4, -100.0, 100.0, 3e4], requires_grad=True)
        y = swiglu(gate, torch.full((4,), 2.0))
        y.sum().backward()
        assert y.tolist() == [0, 0, 200, 6e4] and gate.grad.tolist() == [0, 0, 2, 2]

    def test_rows_further_apart_than_32_bits_can_count_are_reached(self, tmp_path):
        far = far_apart(random(3, 8, seed=0), (2**30, 1), tmp_path)
        runs = [results(swiglu, (x, x)) for x in (far, far.contiguous())]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# Each of these edits of the kernels' source must be noticed.
MUTATIONS = {
    "silu is relu": ("s = 1.0 / (1.0 + tl.exp(-g))", "s = tl.where(g > 0, 1.0, 0.0)"),
    "the slope has no curve": ("slope = s * (1.0 + g * (1.0 - s))", "slope = s"),
    "d_gate forgets up": ("(d * u * slope)", "(d * slope)"),
    "d_up is of the gate alone": ("(d * activation)", "(d * g)"),
    "up is the gate": ("up + row * up_stride", "gate + row * gate_stride"),
    "a tile is the first one": ("column = (program % tiles) * TILE", "column = (program % tiles) * 0"),
    "rows have no gaps": ("gate + row * gate_stride", "gate + row * width"),
    "the gradient has no gaps": ("row * d_out_stride", "row * width"),
}


@pytest.mark.interpreter
@pytest.mark.interpreter_only
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("name", [None, *MUTATIONS])
def test_every_mutation_is_noticed(name, mutated, monkeypatch):
    source = kernels if name is None else mutated("swiglu_triton", *MUTATIONS[name])
    monkeypatch.setattr(source, "TILE", 16)
    gate, up, d_out = (random(7, 45, seed=seed)[:, 4:41] for seed in range(3))
    leaves = [x.double().requires_grad_() for x in (gate, up)]
    truth = swiglu_reference(*leaves)
    expected = [truth, *torch.autograd.grad(truth, leaves, d_out.double())]

    def check_all():
        actual = [source.forward(gate, up), *source.backward(d_out, gate, up, (True, True))]
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)

    if name is None:
        check_all()
    else:
        with pytest.raises(AssertionError):
            check_all()


# ---- What the kernels become, without a GPU ----


def machine_code(row: str, architecture: int, compiled) -> dict:
    """What a row of the table uses: "<forward | backward>, <dtype>"."""
    name, dtype = row.split(", ")
    kernel = {"forward": kernels.forward_kernel, "backward": kernels.backward_kernel}[name]
    constants = {"TILE": kernels.TILE} | dict.fromkeys({"NEEDS_GATE", "NEEDS_UP"} & set(kernel.arg_names), True)
    integers = ("width", "tiles", *(x for x in kernel.arg_names if x.endswith("stride")))
    types = dict.fromkeys(kernel.arg_names, f"*{dtype}") | dict.fromkeys(integers, "i32")
    divisible = tuple(x for x in integers if x != "tiles")
    return compiled(kernel, types, constants, architecture, divisible, num_warps=kernels.NUM_WARPS)


@for_every_row("swiglu")
def test_machine_code_uses_no_more_than_the_table_says(row, architecture, compiled):
    used = machine_code(row, architecture, compiled)
    assert "LDG.E.128" in check_row(used, "swiglu", row, architecture), "loads of 16 bytes"
    assert used["stack"] == 0, "a spill"
