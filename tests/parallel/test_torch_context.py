"""Ring attention beside torch's own context parallelism: the same tokens on every rank, the same numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "torch_context_worker.py"


@pytest.mark.slow
def test_ring_attention_computes_what_torchs_context_parallelism_does():
    """The output of a causal document with shared key heads, in fp64; torch's balancer deals tokens as ours does. On a CPU
    torch's has no backward."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(WORKER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert not result["inputs differ"]
    assert result["ring"] < 1e-12 and result["torch"] < 1e-12 and result["between"] < 1e-12
