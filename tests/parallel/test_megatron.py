"""Megatron-core on a CPU, over gloo, under `megatron_shims`: every layout of an engine against our decoder on one process."""

import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from warpline.models.decoder import DecoderConfig

WORKER = Path(__file__).parent / "megatron_worker.py"
SHAPE = DecoderConfig(vocab_size=5, width=4, num_layers=4, num_heads=4, num_kv_heads=2, head_width=2, mlp_width=6)


def found_by(num_ranks, *checks):
    """What the worker's checks found, the worst of all ranks."""
    command = [sys.executable, str(WORKER), str(num_ranks), *checks]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check_gradients(cases):
    for error in cases.values():
        assert error["loss"] < 1e-14 and error["gradients"] < 1e-12 and error["weights"] == 0


@pytest.fixture(scope="module")
def megatron():
    """The module, in this process: Megatron warns when it is imported that it misses Transformer Engine and apex."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("warpline.parallel.megatron")


def test_two_ranks_compute_what_our_decoder_computes():
    """Gemma's norms, caps and windows, sinks, a vocabulary that nothing divides, rows of unequal length; weights both ways."""
    cases = found_by(2, "gradients of few")["gradients of few"]
    assert len(cases) == 3
    check_gradients(cases)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_layout_computes_our_gradients_and_takes_our_steps(num_ranks):
    """In fp64 the gradients; in fp32, which is all that Megatron's optimiser has, three clipped steps. The weights' change is
    AdamW's, which divides by a gradient's own size: where that is rounding alone (the key's bias), so is the change."""
    found = found_by(num_ranks, "gradients", "steps")
    assert (len(found["gradients"]), len(found["steps"])) == {1: (3, 1), 2: (18, 6), 4: (3, 3)}[num_ranks]
    check_gradients(found["gradients"])
    for error in found["steps"].values():
        assert error["loss"] < 1e-6 and error["norm"] < 1e-5 and error["weights"] < 1e-3


@pytest.mark.slow
def test_what_ranks_owe_each_other_is_needed_and_ours_are_called_and_sent_as_often_as_they_should():
    found = found_by(2, "removals", "calls")
    assert [name for name, error in found["removals"].items() if not error > 1e-2] == [] and len(found["removals"]) == 5
    check_calls(found["calls"])
    sent = {name: case["collectives"] for name, case in found["calls"].items()}
    # 4 rows of 4 layers: 2 of each there and 2 back; the embedding, d_hidden; the losses of data ranks and stages.
    assert sent["tied, tensor"] == {"allreduce": 4 * (4 * 4 + 2) + 2, "_allgather_base": 4, "allreduce_coalesced": 1}
    # Scattered: as often, and d_hidden once. Gathered: half as often again, for the weights' gradients; the statistics.
    gathered = 4 * (4 * 6 + 2 + 1)
    expected = {"_reduce_scatter_base": 4 * (4 * 4 + 2), "_allgather_base": gathered, "allreduce_coalesced": 1, "allreduce": 3}
    assert sent["tied, sequence"] == expected
    # A ring of two: keys and values once there and once back, their gradients twice.
    assert sent["tied, context"] == {"send": 4 * 4 * 4, "recv": 4 * 4 * 4, "allreduce_coalesced": 1, "allreduce": 2}


def check_calls(cases):
    """Ours are the modules that are called, in every layer and row, and none of Megatron's local ones is there."""
    rows, layers = 4, 4
    whole = {"rms_norm": rows * (2 * layers + 1), "rope": rows * layers, "swiglu": rows * layers, "linear_cross_entropy": rows}
    called = {name.removeprefix("tied, "): case["calls"] for name, case in cases.items()}
    for kind in ("tensor", "sequence"):
        assert called[kind] == whole | {"attention": rows * layers}
    assert called["context"] == whole | {"ring_attention": rows * layers}
    assert called["data"] == {name: number // 2 for name, number in (whole | {"attention": rows * layers}).items()}
    for kind in ("pipeline", "interleaved"):  # rank 0 has half of the layers, and not the last
        assert called[kind] == {"rms_norm": rows * layers, "rope": 8, "swiglu": 8, "attention": 8}
    modules = cases["tied, sequence"]["modules"]
    assert modules == {"CoreAttention": 4, "Norm": 9, "Gate": 4, "DotProductAttention": 0, "WrappedTorchNorm": 0}


@pytest.mark.slow
def test_the_output_matrix_alone_has_a_gradient_that_bf16_cannot_hold_and_no_step_is_taken_with_infinity():
    cases = found_by(1, "bf16")["bf16"]
    assert len(cases) == 2
    for name, case in cases.items():
        assert case["loss"] < 1e-3 and case["losses"][0] > case["losses"][1] > case["losses"][2]
        output = "embedding.word_embeddings.weight" if name == "tied, alone" else "output_layer.weight"
        assert case["shares"].pop(output) > 0.9 and max(case["shares"].values()) == 0
        assert case["norm"] == "inf" and case["unmoved"] is True


@pytest.mark.slow
def test_an_optimiser_goes_on_under_any_layout_with_the_bits_that_were_kept():
    """Two steps under sequence parallelism, a third elsewhere, against three of our decoder's."""
    cases = found_by(2, "resume")["resume"]
    assert cases.pop("saved") == {"moments before a step": 0.0} and len(cases) == 4
    for case in cases.values():
        assert case["same bits"] is True and case["loss"] < 1e-6 and case["weights"] < 1e-3


@pytest.mark.slow
def test_in_bf16_the_weights_that_are_kept_are_the_optimisers():
    (case,) = found_by(1, "bf16 resumed")["bf16 resumed"].values()
    assert case["same"] is True and case["finer than bf16"] > 0.9


def test_a_row_is_padded_to_what_its_ranks_cut_it_into(megatron):
    layout = megatron.Layout
    assert [layout().padded(n) for n in (0, 7)] == [0, 7] and layout(tensor=4).padded(7) == 7
    assert layout(context=3).padded(7) == 12 and layout(tensor=4, sequence_parallel=True).padded(9) == 12
    assert layout(tensor=2, context=2, sequence_parallel=True).padded(9) == 16


@pytest.mark.parametrize(
    ("changes", "layout", "message"),
    [
        ({"num_heads": 3, "num_kv_heads": 1}, {"tensor": 2}, r"3 and 1 heads.* over 2 tensor ranks; expected multiples"),
        ({"num_heads": 12, "num_kv_heads": 4}, {"tensor": 6}, r"12 and 4 heads.* over 6 tensor ranks"),
        ({"attention_bias": True}, {}, "attention_bias True and mlp_bias False.*set them alike"),
        ({}, {"pipeline": 3}, "4 layers over 3 ranks of 1 stages"),
        ({}, {"stages_per_rank": 2}, "several a rank only with a pipeline"),
        ({}, {"sequence_parallel": True}, "over 1 tensor rank; expected at least 2"),
    ],
)
def test_what_megatron_cannot_do_is_refused_before_it_fails(megatron, changes, layout, message):
    shape = SHAPE.model_copy(update=changes)
    with pytest.raises(ValueError, match=message):
        megatron.transformer_config(shape, megatron.Layout(**layout), torch.float32, torch.device("cpu"))


def test_dtypes_without_a_scaler_or_an_optimiser_are_refused(megatron):
    with pytest.raises(ValueError, match=r"received torch\.float16; expected bf16"):
        megatron.transformer_config(SHAPE, megatron.Layout(), torch.float16, torch.device("cpu"))
    with pytest.raises(ValueError, match="Adam with fp64; Megatron's optimiser has none"):
        megatron.MegatronEngine(SHAPE, {}, megatron.Layout(), megatron.Adam(), device=torch.device("cpu"), dtype=torch.float64)


def test_steps_that_megatron_cannot_take_are_refused(megatron):
    engine = SimpleNamespace(layout=megatron.Layout(pipeline=2, stages_per_rank=2))
    with pytest.raises(ValueError, match="received no batches"):
        megatron.MegatronEngine._run(engine, [], 1.0, forward_only=False)
    with pytest.raises(ValueError, match="3 batches for 2 interleaved pipeline ranks; expected a multiple"):
        megatron.MegatronEngine._run(engine, [None] * 3, 1.0, forward_only=False)
