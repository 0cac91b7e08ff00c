"""An operation's table: names obey or say why not, and nothing is handed on; what each entry calls, against stand-ins."""

import sys
from types import ModuleType

import pytest
import torch

from warpline.kernels import rms_norm as norms
from warpline.kernels import swiglu as gates
from warpline.kernels.backend import Backend, choose, package_absent
from warpline.kernels.rms_norm import rms_norm, rms_norm_reference
from warpline.kernels.rope import rope, rope_tables
from warpline.kernels.swiglu import swiglu, swiglu_reference

CPU = torch.device("cpu")
TABLE = {
    "fast": Backend(lambda device: None, lambda request: "odd numbers" if request % 2 else None, lambda request: "fast"),
    "slow": Backend(lambda device: None, lambda request: None, lambda request: "slow"),
    "away": Backend(lambda device: "it is not installed", lambda request: None, lambda request: "away"),
}


def test_auto_takes_the_first_that_serves_and_a_name_obeys_or_says_why_not():
    def chosen(name, request):
        return choose("sum", TABLE, ("away", "fast", "slow"), name, request, CPU).run(request)

    assert [chosen("auto", 2), chosen("auto", 3), chosen("slow", 2)] == ["fast", "slow", "slow"]
    with pytest.raises(ValueError, match="sum: backend 'fast' cannot do odd numbers; leave it at 'auto'"):
        chosen("fast", 3)
    with pytest.raises(ValueError, match="sum: backend 'away' is not here: it is not installed; leave it at 'auto'"):
        chosen("away", 2)
    with pytest.raises(ValueError, match="sum: backend: received 'quick', expected 'auto' or one of fast, slow, away"):
        chosen("quick", 2)
    with pytest.raises(ValueError, match="sum: device: received meta"):
        choose("sum", TABLE, ("fast",), "auto", 2, torch.device("meta"))


def test_a_package_is_found_by_its_distribution_and_a_real_import(monkeypatch, tmp_path):
    assert package_absent("pytest", "pytest") is None
    assert package_absent("no-such-package", "pytest") == "no-such-package is not installed"
    (tmp_path / "broken_package.py").write_text("raise ImportError('libcudart.so.12: cannot open\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_absent("pytest", "broken_package") == "pytest is installed but does not import: libcudart.so.12: cannot open"


@pytest.mark.parametrize(("operation", "name"), [(norms, n) for n in norms.TABLE] + [(gates, n) for n in gates.TABLE])
def test_on_a_cpu_only_torch_is_here(operation, name):
    assert operation.AUTO == ("triton", "torch")
    assert (operation.TABLE[name].absent(CPU) is None) == (name == "torch")


@pytest.fixture
def stand_in(monkeypatch):
    """A module of another package's name, made of functions given, and its entry said to be here."""

    def install(table, name, module, **functions):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
        for key, function in functions.items():
            setattr(sys.modules[module], key, function)
        monkeypatch.setitem(table, name, table[name]._replace(absent=lambda device: None))

    return install


def test_apex_is_asked_for_the_same_norm(stand_in):
    calls = []

    def fused_rms_norm_affine(x, weight, normalized_shape, eps):
        calls.append((tuple(normalized_shape), eps))
        return rms_norm_reference(x, weight, eps=eps)

    stand_in(norms.TABLE, "apex", "apex.normalization.fused_layer_norm", fused_rms_norm_affine=fused_rms_norm_affine)
    x, weight = torch.randn(3, 5), torch.randn(5)
    assert torch.equal(rms_norm(x, weight, eps=0.1, backend="apex"), rms_norm_reference(x, weight, eps=0.1))
    assert calls == [((5,), 0.1)]
    with pytest.raises(ValueError, match="'apex' cannot do a zero-centred weight"):
        rms_norm(x, weight, zero_centred=True, backend="apex")
    with pytest.raises(ValueError, match="'apex' cannot do the addition of a residual"):
        rms_norm(x, weight, residual=x, backend="apex")


@pytest.mark.parametrize("zero_centred", [False, True])
def test_transformer_engine_is_asked_for_the_same_norm_with_our_weight(zero_centred, stand_in):
    class RMSNorm(torch.nn.Module):
        def __init__(self, width, eps, zero_centered_gamma, device, dtype):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((width,), torch.nan, device=device, dtype=dtype))
            self.options = {"eps": eps, "zero_centred": zero_centered_gamma}

        def forward(self, x):
            return rms_norm_reference(x, self.weight, **self.options)

    stand_in(norms.TABLE, "transformer-engine", "transformer_engine.pytorch", RMSNorm=RMSNorm)
    x, weight = torch.randn(3, 5), torch.randn(5, requires_grad=True)
    options = {"eps": 0.1, "zero_centred": zero_centred}
    values = [rms_norm(x, weight, **options, backend="transformer-engine"), rms_norm_reference(x, weight, **options)]
    assert torch.equal(*values)
    assert torch.equal(*(torch.autograd.grad(y.sum(), weight)[0] for y in values))
    with pytest.raises(ValueError, match="cannot do a weight of another dtype"):
        rms_norm(x.half(), weight, backend="transformer-engine")


def test_transformer_engine_is_given_gate_and_up_in_one_tensor(stand_in):
    class SwiGLU(torch.nn.Module):
        def forward(self, both):
            return swiglu_reference(*both.chunk(2, -1))

    stand_in(gates.TABLE, "transformer-engine", "transformer_engine.pytorch.ops", SwiGLU=SwiGLU)
    gate, up = torch.randn(3, 5), torch.randn(3, 5)
    assert torch.equal(swiglu(gate, up, backend="transformer-engine"), swiglu_reference(gate, up))
    with pytest.raises(ValueError, match="cannot do fp64"):
        swiglu(gate.double(), up.double(), backend="transformer-engine")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_what_is_no_real_number_is_refused(dtype):
    x, weight = torch.ones(2, 4).to(dtype), torch.ones(4)
    tables = rope_tables(torch.arange(2), 4, 10.0)
    calls = (lambda: rms_norm(x, weight), lambda: swiglu(x, x), lambda: rope(x[:, None], x[:, None], *tables))
    for call in calls:
        with pytest.raises(ValueError, match="expected fp16, bf16, fp32 or fp64: cast the tensors"):
            call()
    with pytest.raises(ValueError, match="expected a floating-point one"):
        rope_tables(torch.arange(2), 4, 10.0, dtype=torch.int64)


def test_shapes_without_channels_are_refused():
    q = torch.ones(2, 1, 4)
    for cos in (torch.ones(()), torch.ones(2, 0)):
        with pytest.raises(ValueError, match="expected one head width, and equal tables of a row per token"):
            rope(q, q, cos, cos)
    with pytest.raises(ValueError, match=r"for x \[\] on cpu"):
        rms_norm(torch.ones(()), torch.ones(1))
