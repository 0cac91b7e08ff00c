"""Our modules for Megatron's layer, each alone; `test_megatron.py` tests that they are the ones called there."""

import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

WORKER = Path(__file__).parent / "megatron_worker.py"


@pytest.fixture(scope="module")
def layer():
    """The module, in this process: Megatron warns when it is imported that it misses Transformer Engine and apex."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("warpline.parallel.megatron_layer")


def config_of(**changes):
    fields = {
        "attention_dropout": 0.0, "activation_func": F.silu, "hidden_size": 6, "layernorm_epsilon": 1e-5,
        "layernorm_zero_centered_gamma": False, "num_attention_heads": 4, "params_dtype": torch.float64,
        "sequence_parallel": False, "use_cpu_initialization": True,
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


def groups_of(context=1):
    return SimpleNamespace(cp=SimpleNamespace(size=lambda: context), tp=SimpleNamespace(size=lambda: 2))


@pytest.mark.slow
def test_megatrons_dense_sequences_lie_over_two_context_ranks():
    done = subprocess.run([sys.executable, str(WORKER), "2", "dense"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["dense"]["dense"] < 1e-14


@pytest.mark.parametrize("packed", [False, True])
def test_core_attention_takes_what_megatron_gives(layer, packed):
    core = layer.CoreAttention(
        config_of(), 2, layer.AttnMaskType.causal, "self", softmax_scale=0.3, pg_collection=groups_of(), windows=(0, 3),
        softcap=2.0, has_sinks=True,
    )  # fmt: skip
    torch.nn.init.normal_(core.sinks)
    query, key, value = (torch.randn(9, 3, n, 4, dtype=torch.float64) for n in (2, 1, 1))
    rule = {"window": 3, "softcap": 2.0, "scale": 0.3, "sinks_N": core.sinks}
    if packed:
        bounds = torch.tensor([0, 4, 9], dtype=torch.int64)
        params = layer.PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
        out = core(query[:, 0], key[:, 0], value[:, 0], None, packed_seq_params=params)
        expected = layer.attention(query[:, 0], key[:, 0], value[:, 0], cu_seqlens=bounds.int(), **rule)
    else:
        out = core(query, key, value, None)
        expected = layer.attention(*(x.transpose(0, 1) for x in (query, key, value)), **rule).transpose(0, 1).flatten(2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    assert core.sinks.tensor_model_parallel and core.sinks.shape == (2,)


def test_core_attention_refuses_what_it_does_not_have(layer):
    with pytest.raises(ValueError, match=r"attention_dropout 0\.1.*expected causal self attention without dropout"):
        layer.CoreAttention(config_of(attention_dropout=0.1), 1, layer.AttnMaskType.causal, "self", pg_collection=groups_of())
    with pytest.raises(ValueError, match="no_mask"):
        layer.CoreAttention(config_of(), 1, layer.AttnMaskType.no_mask, "self", pg_collection=groups_of())
    core = layer.CoreAttention(config_of(), 1, layer.AttnMaskType.causal, "self", pg_collection=groups_of(context=2))
    x = torch.zeros(4, 2, 4)
    with pytest.raises(ValueError, match="an attention bias; expected none"):
        core(x, x, x, None, attention_bias=x)
    with pytest.raises(ValueError, match="PackedSeqParams over 2 context ranks; expected PackedRow"):
        core(x, x, x, None, packed_seq_params=layer.PackedSeqParams(cu_seqlens_q=torch.tensor([0, 4])))
    with pytest.raises(ValueError, match="linears is 'apex'; expected one of"):
        layer.layer_spec(None, None, "apex")


@pytest.mark.parametrize("zero_centred", [False, True])
def test_a_norm_begins_as_the_plain_norm_and_knows_sequence_parallelism(layer, zero_centred):
    norm = layer.Norm(config_of(layernorm_zero_centered_gamma=zero_centred, sequence_parallel=True), 6, 1e-5)
    hidden = torch.randn(5, 1, 6, dtype=torch.float64)
    expected = F.rms_norm(hidden, (6,), eps=1e-5)
    torch.testing.assert_close(norm(hidden), expected, rtol=0, atol=1e-14)
    assert norm.weight.sequence_parallel is True


def test_a_branch_is_normed_with_its_bias_before_it_is_added(layer):
    add = layer.PostNormAdd(config_of())(True, False)
    branch, bias, residual = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 1, 6), (6,), (5, 1, 6)))
    normed = F.rms_norm(branch + bias, (6,), eps=1e-5)
    torch.testing.assert_close(add((branch, bias), residual, 0.0), residual + normed, rtol=0, atol=1e-14)
    torch.testing.assert_close(add((branch + bias, None), residual, 0.0), residual + normed, rtol=0, atol=1e-14)


def test_the_gate_takes_gate_rows_before_up_rows(layer):
    gate_up = torch.randn(5, 1, 8, dtype=torch.float64)
    gate, up = gate_up[..., :4], gate_up[..., 4:]
    torch.testing.assert_close(layer.Gate(config_of())(gate_up), F.silu(gate) * up, rtol=0, atol=1e-14)
    gelu = layer.Gate(config_of(activation_func=F.gelu))(gate_up)
    torch.testing.assert_close(gelu, F.gelu(gate, approximate="tanh") * up, rtol=0, atol=1e-14)
