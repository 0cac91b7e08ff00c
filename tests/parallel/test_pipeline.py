"""Pipelines: the cut and the placement against numbers worked by hand, every schedule against one process."""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

from warpline.models.decoder import Decoder, DecoderConfig
from warpline.parallel.pipeline import Pipeline, split_layers, stages_of

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


def test_an_unknown_schedule_is_refused_with_the_choice():
    config = DecoderConfig(vocab_size=5, width=4, num_layers=1, num_heads=2, num_kv_heads=2, head_width=2, mlp_width=6)
    with pytest.raises(ValueError, match=r"schedule is '2f2b'; expected one of \['gpipe', '1f1b'"):
        Pipeline(Decoder(config), None, None, schedule="2f2b", num_microbatches=2)


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "num_cases"), [(2, 7), (4, 3)])
def test_every_schedule_computes_what_one_process_computes(num_ranks, num_cases):
    """Tied embeddings and not, Gemma's norms, documents of uneven length, tokens past the last boundary, 8 microbatches."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), str(WORKER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert len(result["errors"]) == num_cases
    for error in result["errors"].values():
        assert error["loss"] < 1e-12 and error["gradients"] < 1e-12
    assert result["without tied gradients"]["gradients"] > 1e-3
    if num_ranks == 2:
        assert result["products"]["zero_bubble"] == result["products"]["interleaved"] > 0
