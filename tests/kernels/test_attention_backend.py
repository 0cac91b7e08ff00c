"""Which implementation of attention serves a request: names obey or say why not, and nothing is handed on."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from warpline.kernels.attention import attention
from warpline.kernels.attention_backend import AUTO, TABLE, Request, choose
from warpline.kernels.attention_torch import Rule

CPU = torch.device("cpu")


def inputs(dtype=torch.float32, tokens=6, width=8, value_width=8):
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, tokens, 4, width), (2, tokens, 2, width), (2, tokens, 2, value_width))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def request(dtype=torch.bfloat16, cu=None, sinks=None, offset=0, out_dtype=None, is_trained=False, **changes):
    q, k, v = (x.requires_grad_(is_trained) for x in inputs(dtype, value_width=changes.pop("value_width", 8)))
    if cu is not None:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        cu = torch.tensor(cu, dtype=torch.int32)
    rule = Rule(True, None, None, 0.3, False, out_dtype or dtype)._replace(**changes)
    return Request(q, k, v, cu, cu, sinks, rule, offset)


def test_every_entry_of_the_table_says_whether_it_is_here():
    """In one line, for this machine's CPU and for a GPU, without needing one."""
    for backend in TABLE.values():
        for device in (CPU, torch.device("cuda")):
            reason = backend.absent(device)
            assert reason is None or (reason and "\n" not in reason)
    assert TABLE["torch"].absent(CPU) is None and set(AUTO) <= set(TABLE)


def test_auto_takes_torch_on_the_cpu():
    assert choose("auto", request()) is TABLE["torch"]


@pytest.mark.parametrize("name", ["triton", "sdpa-cudnn", "flash-attn", "transformer-engine"])
def test_a_name_whose_implementation_is_not_here_raises_with_the_reason(name):
    with pytest.raises(ValueError, match=f"backend '{name}' is not here: .*(CUDA|cuda|cpu).*; leave it at 'auto'"):
        attention(*inputs(), backend=name)


REFUSED = {
    "sdpa-flash": {
        "packed documents": {"cu": [0, 5, 12]}, "a window": {"window": 3}, "softcap": {"softcap": 2.0},
        "sinks": {"sinks": torch.zeros(4)}, "the log-sum-exp": {"return_lse": True},
        "another output dtype": {"out_dtype": torch.float32},
        "a causal mask on queries": {"offset": 2}, "values narrower": {"value_width": 4},
    },
    "flash-attn": {
        "sinks": {"sinks": torch.zeros(4)}, "log-sum-exp": {"return_lse": True}, "output dtype": {"out_dtype": torch.float32},
        "dtypes other": {"dtype": torch.float32}, "values narrower": {"value_width": 4}, "a query offset": {"offset": 3},
        "without max_seqlen": {"cu": [0, 5, 12]},
    },
    "transformer-engine": {
        "softcap": {"softcap": 2.0}, "sinks": {"sinks": torch.zeros(4)}, "log-sum-exp": {"return_lse": True},
        "output dtype": {"out_dtype": torch.float32}, "dtypes other": {"dtype": torch.float32}, "a query offset": {"offset": 3},
        "without max_seqlen": {"cu": [0, 5, 12]}, "a deterministic backward": {"is_trained": True},
    },
    "triton": {"fp64": {"dtype": torch.float64}},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_implementation_cannot_do_it_refuses_by_name(name, monkeypatch):
    monkeypatch.setitem(TABLE, name, TABLE[name]._replace(absent=lambda device: None))
    assert choose(name, request()) is TABLE[name]
    for words, options in REFUSED[name].items():
        with pytest.raises(ValueError, match=f"backend '{name}' cannot do .*{words}.*; leave it at 'auto'"):
            choose(name, request(**options))


def test_sdpa_by_name_is_torchs_flash_kernel():
    q, k, v = inputs()
    named = attention(q, k, v, backend="sdpa-flash")
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True)
    assert torch.equal(named, expected.transpose(1, 2))
    with pytest.raises(ValueError, match="'sdpa-flash' cannot do a window"):
        attention(q, k, v, window=2, backend="sdpa-flash")


@pytest.fixture
def stand_in(monkeypatch):
    """A module of another package's name that notes what it is called with, and computes with the reference."""

    def install(name, **functions):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        for key, function in functions.items():
            setattr(sys.modules[name], key, function)

    return install


@pytest.mark.parametrize(("window", "causal", "sides"), [(None, True, (-1, -1)), (3, True, (2, 0)), (3, False, (2, 2))])
def test_flash_attn_is_asked_for_the_same_mask(window, causal, sides, stand_in, monkeypatch):
    """Its window counts the keys before and after a query, ours the keys seen."""
    calls = []
    stand_in("flash_attn", flash_attn_func=lambda q, k, v, **keywords: calls.append(keywords) or q)
    monkeypatch.setitem(TABLE, "flash-attn", TABLE["flash-attn"]._replace(absent=lambda device: None))
    q, k, v = inputs(torch.bfloat16)
    attention(q, k, v, window=window, causal=causal, softcap=5.0, scale=0.5, backend="flash-attn", deterministic=False)
    assert calls == [{"softmax_scale": 0.5, "causal": causal, "window_size": sides, "softcap": 5.0, "deterministic": False}]


def test_flash_attn_takes_packed_documents_with_their_largest_length(stand_in, monkeypatch):
    calls = []
    stand_in("flash_attn", flash_attn_varlen_func=lambda q, k, v, *bounds, **_: calls.append(bounds) or q)
    monkeypatch.setitem(TABLE, "flash-attn", TABLE["flash-attn"]._replace(absent=lambda device: None))
    q, k, v = (x[0] for x in inputs(torch.bfloat16))
    cu = torch.tensor([0, 4, 6], dtype=torch.int32)
    attention(q, k, v, cu_seqlens=cu, max_seqlen=4, backend="flash-attn")
    assert calls == [(cu, cu, 4, 4)]


@pytest.mark.parametrize("is_packed", [False, True])
def test_transformer_engine_is_asked_for_the_same_mask(is_packed, stand_in, monkeypatch):
    made, called = [], []

    class DotProductAttention:
        def __init__(self, *sizes, **options):
            made.append((sizes, options))

        def __call__(self, q, k, v, **bounds):
            called.append(bounds)
            return q.flatten(-2)

    stand_in("transformer_engine.pytorch", DotProductAttention=DotProductAttention)
    monkeypatch.setitem(TABLE, "transformer-engine", TABLE["transformer-engine"]._replace(absent=lambda device: None))
    q, k, v = inputs(torch.bfloat16)
    if is_packed:
        cu = torch.tensor([0, 4, 6], dtype=torch.int32)
        out = attention(q[0], k[0], v[0], cu_seqlens=cu, max_seqlen=4, window=3, backend="transformer-engine")
        assert called == [{"cu_seqlens_q": cu, "cu_seqlens_kv": cu, "max_seqlen_q": 4, "max_seqlen_kv": 4}]
        expected = {"attn_mask_type": "padding_causal", "qkv_format": "thd", "window_size": (2, 0)}
    else:
        out = attention(q, k, v, causal=False, backend="transformer-engine")
        expected = {"attn_mask_type": "no_mask", "qkv_format": "bshd", "window_size": (-1, -1)}
    (sizes, options), shape = made[0], q[0].shape if is_packed else q.shape
    assert out.shape == shape and sizes == (4, (8, 8)) and options["num_gqa_groups"] == 2
    assert {key: options[key] for key in expected} == expected
