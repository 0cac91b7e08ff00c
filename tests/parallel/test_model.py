"""A decoder under any layout: what lies where without processes, and every verb against one process."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from warpline.kernels.linear_logprob import linear_cross_entropy
from warpline.models.decoder import Decoder, DecoderConfig
from warpline.parallel.context import ContextBatch, Zigzag
from warpline.parallel.mesh import Mesh, Sizes
from warpline.parallel.model import Loss, ParallelModel, Techniques, View

sys.path.insert(0, str(Path(__file__).parent))
from model_worker import LAYOUTS

WORKER = Path(__file__).parent / "model_worker.py"
CPU = torch.device("cpu")
CONFIG = DecoderConfig(
    vocab_size=37, width=16, num_layers=4, num_heads=4, num_kv_heads=2, head_width=8, mlp_width=24, init_std=0.2
)


def compared(num_ranks: int, *layouts: str) -> dict[str, dict]:
    """What the worker found; every error is at rounding."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), str(WORKER)]
    done = subprocess.run([*command, *layouts], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for name, errors in found.items():
        assert max(*errors["numbers"], *errors["norms"], errors["evaluated"]) < 1e-12, name
        assert max(errors["gradients"]) < 1e-11 and not errors["completions differ"], name
    return found


def test_two_ranks_compute_what_one_process_computes():
    """Tensor, a V of two stages a rank, context, and sharded with everything made again; in a step of six rows, and of one."""
    has_v = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
    assert len(compared(2, "tp2", "pp2 zbv" if has_v else "pp2 interleaved", "cp2 ulysses", "fsdp2")) == 4


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_every_layout_computes_what_one_process_computes(num_ranks):
    wanted = {name for name, (sizes, _) in LAYOUTS.items() if sizes.product == num_ranks}
    assert compared(num_ranks).keys() == wanted != set()


# ---- One process ----


class Row(NamedTuple):
    tokens_T: Tensor
    target_T: Tensor
    cu_seqlens: Tensor


def row_of(*lengths: int, seed: int = 0) -> Row:
    generator = torch.Generator().manual_seed(seed)
    tokens, target = (torch.randint(0, 37, (sum(lengths),), generator=generator) for _ in range(2))
    return Row(tokens, target.index_fill(0, torch.tensor([0]), -100), torch.tensor([0, *lengths]).cumsum(0).int())


def head(view: View, hidden_TD: Tensor, weight_VD: Tensor) -> Loss:
    summed = linear_cross_entropy(hidden_TD, weight_VD, view.target_T, reduction="sum", **view.options)
    return Loss(summed / 10, torch.stack([summed.detach(), (view.target_T >= 0).sum().to(summed)]))


def alone(**changes) -> ParallelModel:
    decoder = Decoder(CONFIG).double().initialise(torch.Generator().manual_seed(0))
    return ParallelModel(decoder, Mesh(0, Sizes(), CPU), **changes)


def test_gradients_of_rows_add_up_over_calls_and_numbers_within_one():
    """Documents apart, each with plain torch."""
    model, rows = alone(), [row_of(3, 5, seed=1), row_of(4, seed=2), row_of(2, 2, 1, seed=3)]
    counted = [model.accumulate(rows[:2], head, 2), model.accumulate(rows[2:], head, 2)]
    expected = []
    decoder = Decoder(CONFIG).double().initialise(torch.Generator().manual_seed(0))
    for row in rows:
        parts = zip(*(x.split(row.cu_seqlens.diff().tolist()) for x in (row.tokens_T, row.target_T)), strict=True)
        logits = [(F.linear(decoder(tokens[None])[0], decoder.output_weight), target) for tokens, target in parts]
        expected.append(sum(F.cross_entropy(*pair, reduction="sum", ignore_index=-100) for pair in logits))
    (sum(expected) / 10).backward()
    values = [x.item() for x in expected]
    assert counted[0] == pytest.approx([values[0] + values[1], 10]) and counted[1] == pytest.approx([values[2], 4])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, decoder.get_parameter(name).grad, rtol=1e-9, atol=1e-12)


def test_no_rows_have_no_loss_and_a_gradient_of_zero():
    model = alone()
    assert model.accumulate([], head, 2) == model.totals([], lambda *seen: head(*seen).numbers, 2) == [0.0, 0.0]
    assert model.evaluate([], lambda *seen: 1) == []
    model.reduce_gradients()
    assert model.grad_norm() == 0.0 and all(not parameter.grad.any() for parameter in model.parameters())


def test_what_is_evaluated_comes_row_by_row_without_gradients():
    model, rows = alone(), [row_of(3, 5, seed=1), row_of(4, seed=2)]
    found = model.evaluate(rows, lambda view, hidden, weight: (view.index, hidden.shape, hidden.requires_grad, weight.shape))
    assert found == [(0, (8, 16), False, (37, 16)), (1, (4, 16), False, (37, 16))]
    each = [model.totals([row], lambda *seen: head(*seen).numbers, 2) for row in rows]
    assert model.totals(rows, lambda *seen: head(*seen).numbers, 2) == pytest.approx([sum(x) for x in zip(*each, strict=True)])


def test_a_model_that_is_not_trained_has_no_gradients():
    model = alone()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert model.totals([row_of(3, 5)], lambda *seen: head(*seen).numbers, 2)[1] == 7
    model.reduce_gradients()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_options_are_asked_for_under_the_models_precision():
    def options():
        return {"softcap": 3.0, "product_dtype": torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None}

    for precision, dtype in ((lambda: torch.autocast("cpu", torch.bfloat16), torch.bfloat16), (None, None)):
        model = alone(options=options, **({"precision": precision} if precision else {}))
        (seen,) = model.evaluate([row_of(3)], lambda view, hidden, weight: view.options)
        assert seen == {"softcap": 3.0, "product_dtype": dtype}


def test_the_norm_is_of_all_gradients_and_scaling_scales_each():
    model = alone()
    model.accumulate([row_of(3, 5)], head, 2)
    norm = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in model.parameters()))
    assert model.grad_norm() == pytest.approx(norm, rel=1e-12)
    model.scale_gradients(0.25)
    assert model.grad_norm() == pytest.approx(norm / 4, rel=1e-12)


def test_one_number_that_is_not_finite_is_found():
    model = alone()
    assert model.has_finite_weights()
    with torch.no_grad():
        model.decoder.norm.weight[3] = math.nan
    assert not model.has_finite_weights()


# ---- A row over context ranks ----


def test_a_view_takes_its_tokens_numbers_and_counts_whole_sequences_once():
    """Chunks 0–1, 2–4, 5–7 and 8–10 of 11 tokens over two ranks; the row itself had 9, two are padding."""
    values_T = torch.arange(1.0, 10.0)
    for rank, places in ((0, [0, 1, 8, 9, 10]), (1, [2, 3, 4, 5, 6, 7])):
        shared = ContextBatch(Zigzag((0, 5, 9), 11, 2), rank, None, CPU)
        tokens = torch.zeros(len(places), dtype=torch.int64)
        view = View(0, tokens, tokens, torch.tensor([0, 2, 3] if rank == 0 else [0, 3, 6], dtype=torch.int32), shared)
        assert view.places.tolist() == places and view.cu_seqlens is None
        assert view.local(values_T).tolist() == [place + 1.0 if place < 9 else 0.0 for place in places]
        assert view.local(torch.stack([values_T] * 2, 1)).shape == (len(places), 2)
        assert view.sequence_sum(view.local(values_T)).tolist() == ([3.0, 9.0] if rank == 0 else [12.0, 21.0])
        assert view.once(torch.tensor(5.0)).item() == (5.0 if rank == 0 else 0.0)


def test_a_view_of_a_whole_row_is_the_row():
    tokens, bounds = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 4], dtype=torch.int32)
    view = View(0, tokens, tokens, bounds, None)
    assert view.places.tolist() == [0, 1, 2, 3] and view.cu_seqlens is bounds and view.once(tokens) is tokens
    assert view.local(torch.tensor([1.0, 2.0, 3.0])).tolist() == [1, 2, 3, 0]
    assert view.sequence_sum(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [1, 9]


# ---- What lies where: every rank in turn, in one process ----


def on_rank(rank: int, sizes: Sizes, config: DecoderConfig = CONFIG, **techniques) -> ParallelModel:
    """The model of one rank of a group whose other ranks are imagined."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=sizes.product)
    try:
        with torch.device("meta"):
            decoder = Decoder(config)
        return ParallelModel(decoder, Mesh(rank, sizes, CPU), Techniques(**techniques))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("sizes", "is_tied", "techniques"),
    [
        (Sizes(tensor=4), True, {}),
        (Sizes(shard=3), True, {}),
        (Sizes(replicate=2, context=2), False, {}),
        (Sizes(pipeline=2, replicate=2), True, {"schedule": "interleaved", "stages_per_rank": 2}),
        (Sizes(pipeline=2), False, {}),
        (Sizes(pipeline=2, tensor=2), True, {"schedule": "zbv"}),
        (Sizes(replicate=2, shard=2, tensor=2), False, {}),
        (Sizes(pipeline=2, shard=2, context=2), True, {}),
    ],
    ids=str,
)
def test_every_number_is_written_by_one_rank_and_held_where_its_rectangle_is(sizes, is_tied, techniques, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0")  # nothing is run
    config = CONFIG.model_copy(update={"num_kv_heads": 1, "tie_embeddings": is_tied, "query_key_norm": True})
    with torch.device("meta"):
        written = {name: torch.zeros(p.shape, device="cpu") for name, p in Decoder(config).named_parameters()}
    for rank in range(sizes.product):
        model = on_rank(rank, sizes, config, **techniques)
        for name, piece in model.pieces().items():
            assert (piece.offset, tuple(piece.tensor.shape)) == model.rectangle(name, model.mesh.place.tensor, model.shard_rank)
            assert piece.shape == tuple(written[name].shape)
            if piece.writes:
                place = tuple(slice(start, start + n) for start, n in zip(piece.offset, piece.tensor.shape, strict=True))
                written[name][place] += 1
    assert {name for name, count in written.items() if not bool((count == 1).all())} == set()


def test_layouts_that_a_model_cannot_have_are_refused_with_the_nearest_that_it_can(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0")  # nothing is run
    with pytest.raises(ValueError, match="tensor=3 does not divide its 4 query heads; the nearest legal layout is"):
        on_rank(0, Sizes(tensor=3))
    with pytest.raises(ValueError, match="pipeline=8 exceeds its 4 layers; the nearest legal layout is"):
        on_rank(0, Sizes(pipeline=8))
    with pytest.raises(ValueError, match=r"schedule 'zbv' with shard=2, .*; use interleaved or 1f1b, or shard=1"):
        on_rank(0, Sizes(pipeline=2, shard=2), schedule="zbv")
