"""FSDP2, HSDP and their product with tensor parallelism against one process: gradients, and parameters after three steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from warpline.models.decoder import Decoder, DecoderConfig
from warpline.parallel import shard

WORKER = Path(__file__).parent / "shard_worker.py"


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "num_layouts"), [(2, 3), (4, 5)])
def test_ranks_train_as_one_process_trains(num_ranks, num_layouts):
    """Batches of different sizes on every rank; activations kept, and made again."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), str(WORKER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert len(result) == num_layouts
    for error in result.values():
        assert error["gradients"] < 1e-12 and error["steps"] < 1e-10


class Mesh:
    """As much of a mesh as a refusal needs."""

    ndim = 3


def test_bad_options_are_named():
    decoder = Decoder(
        DecoderConfig(vocab_size=5, width=4, num_layers=1, num_heads=2, num_kv_heads=2, head_width=2, mlp_width=6)
    )
    with pytest.raises(ValueError, match="a mesh of 3 axes; expected shard, or replicate and shard"):
        shard.apply(decoder, Mesh())
    mesh = Mesh()
    mesh.ndim = 1
    with pytest.raises(ValueError, match=r"recompute is 'all'; expected one of \['none', 'attention', 'mlp', 'full'\]"):
        shard.apply(decoder, mesh, recompute="all")


def test_what_is_recomputed_is_part_of_a_layer():
    layer = Decoder(
        DecoderConfig(vocab_size=5, width=4, num_layers=1, num_heads=2, num_kv_heads=2, head_width=2, mlp_width=6)
    ).layers[0]
    found = {name: shard.recomputed(layer, name) for name in shard.RECOMPUTE}
    assert found == {"none": [], "attention": [layer.self_attn], "mlp": [layer.mlp], "full": [layer]}
