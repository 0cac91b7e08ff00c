"""Pipelines: the cut and the placement against numbers worked by hand, every schedule against one process."""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch

from warpline.models.decoder import Decoder, DecoderConfig
from warpline.parallel.pipeline import split, split_layers, stages_of

WORKER = Path(__file__).parent / "pipeline_worker.py"


def test_layers_are_cut_so_that_the_dearest_stage_is_as_cheap_as_can_be():
    assert split_layers([1] * 8, 0, 0, 4) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    # The output matrix costs as much as two layers.
    assert split_layers([1] * 8, 0, 2, 3) == [(0, 3), (3, 6), (6, 8)]
    assert split_layers([1] * 8, 0, 0, 3) == [(0, 2), (2, 5), (5, 8)]  # among equals, earlier stages are the shorter
    assert split_layers([1] * 4, 0, 100, 2) == [(0, 3), (3, 4)]
    assert split_layers([5, 1, 1, 1], 0, 0, 2) == [(0, 1), (1, 4)]
    assert split_layers([1, 1, 1], 0, 0, 3) == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("num_stages", range(1, 7))
def test_no_cut_is_cheaper(num_stages):
    """Against every cut there is."""
    costs, first, last = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0], 2.0, 6.0

    def dearest(ends):
        sums = [sum(costs[a:b]) for a, b in zip((0, *ends), (*ends, len(costs)), strict=True)]
        sums[0] += first
        sums[-1] += last
        return max(sums)

    found = split_layers(costs, first, last, num_stages)
    assert found[0][0] == 0 and found[-1][1] == 6 and all(a < b for a, b in found)
    assert dearest([end for _, end in found[:-1]]) == min(map(dearest, combinations(range(1, 6), num_stages - 1)))


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match="received 2 layers for 3 stages; expected a layer a stage"):
        split_layers([1, 1], 0, 0, 3)


def test_ranks_hold_stages_in_rounds_and_in_a_v():
    assert [stages_of("interleaved", rank, 3, 2) for rank in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert [stages_of("zbv", rank, 3, 2) for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]


class Group:
    """As much of a process group as a cut needs."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = lambda: rank, lambda: size


def decoder_of(**changes) -> Decoder:
    sizes = {"width": 4, "num_layers": 4, "num_heads": 2, "num_kv_heads": 2, "head_width": 2, "mlp_width": 6}
    return Decoder(DecoderConfig(vocab_size=5, **sizes, **changes))


def test_an_unknown_schedule_is_refused_with_the_choice():
    with pytest.raises(ValueError, match=r"schedule is '2f2b'; expected one of \['gpipe', '1f1b'"):
        split(decoder_of(), Group(0, 2), "2f2b")


@pytest.mark.parametrize("schedule", ["zero_bubble", "zbv"])
def test_a_torch_that_cannot_split_a_backward_is_refused(schedule, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    with pytest.raises(ValueError, match=rf"'{schedule}' on torch 2.11.0\+cu130; expected torch >= 2.13: use interleaved"):
        split(decoder_of(), Group(0, 2), schedule)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_rank_keeps_its_stages_under_the_decoders_names_and_nothing_else(is_tied, monkeypatch):
    """Of 4 equal layers: the first stage has the embedding, the last the norm and the matrix; a V has both on one rank."""
    monkeypatch.setattr(torch, "__version__", "2.13.0")  # nothing is run
    matrix = "embed_tokens" if is_tied else "lm_head"
    kept = {}
    for schedule in ("1f1b", "interleaved", "zbv"):
        for rank in range(2):
            decoder = decoder_of(tie_embeddings=is_tied)
            stages = split(decoder, Group(rank, 2), schedule, 2)
            names = {
                ".".join(name.split(".")[: 2 if name.startswith("layers") else 1]) for name, _ in decoder.named_parameters()
            }
            assert {name for stage in stages for name, _ in stage.named_parameters()} == dict(decoder.named_parameters()).keys()
            kept[schedule, rank] = names
    ends = {"embed_tokens", "norm", matrix}
    assert kept["1f1b", 0] == {"embed_tokens", "layers.0", "layers.1"}
    assert kept["1f1b", 1] == {matrix, "layers.2", "layers.3", "norm"}
    assert kept["interleaved", 0] == {"embed_tokens", "layers.0", "layers.2"}
    assert kept["interleaved", 1] == {matrix, "layers.1", "layers.3", "norm"}
    assert kept["zbv", 0] == {*ends, "layers.0", "layers.3"} and kept["zbv", 1] == {"layers.1", "layers.2"}


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "num_cases"), [(2, 7), (4, 3)])
def test_every_schedule_computes_what_one_process_computes(num_ranks, num_cases):
    """Tied embeddings and not, Gemma's norms, uneven documents, tokens past the last boundary, 8 rows; a forward alone."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), str(WORKER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert len(result["errors"]) == num_cases
    for error in result["errors"].values():
        assert error["loss"] < 1e-12 and error["evaluated"] < 1e-12 and error["gradients"] < 1e-12
    assert result["errors"]["gpipe"]["apart"] > 1e-3, "a tied embedding has a part of its gradient on both ends"
    if num_ranks == 2:
        assert result["products"]["zero_bubble"] == result["products"]["interleaved"] > 0
