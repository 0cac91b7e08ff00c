"""Tensor parallelism, alone and with context parallelism, against one process; every collective is needed and counted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from warpline.models.decoder import Decoder, DecoderConfig
from warpline.parallel import tensor

WORKER = Path(__file__).parent / "tensor_worker.py"


@pytest.mark.slow  # tests/parallel/test_model.py has two tensor ranks in the quick tests
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_compute_what_one_process_computes_and_every_collective_is_needed(num_ranks):
    """Tied and not, K = 1 and 2, biases, Gemma's norms and caps, sinks, V and S that nothing divides."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), str(WORKER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert len(result["errors"]) == (5 if num_ranks == 4 else 3)
    for error in result["errors"].values():
        assert error["loss"] < 1e-12 and error["gradients"] < 1e-11
    assert [name for name, error in result["removed"].items() if not error["gradients"] > 1e-3] == []
    # 4 layers: 2 of each, there and back; the embedding's and the head's, there and back; the loss's statistics.
    assert result["collectives"] == {"_reduce_scatter_base_": 18, "_allgather_base_": 19}


class Group:
    """As much of a process group as a refusal needs."""

    def rank(self):
        return 0

    def size(self):
        return 3


def test_heads_that_do_not_divide_are_refused():
    config = DecoderConfig(vocab_size=5, width=4, num_layers=1, num_heads=4, num_kv_heads=2, head_width=2, mlp_width=6)
    with pytest.raises(ValueError, match=r"4 heads and an MLP of 6 over 3 ranks; expected multiples"):
        tensor.apply(Decoder(config), Group())
    assert not dist.is_initialized()
