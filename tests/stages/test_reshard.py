import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("reshard_worker.py")


def worker(num_ranks: int, *arguments) -> dict:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)] if num_ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *torchrun, str(WORKER), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[:4000]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_what_one_layout_saved_another_goes_on_from_bit_for_bit(start_folder, text_run, tmp_path):
    arguments = start_folder, text_run / "data" / "sft.jsonl", tmp_path
    many = worker(4, *arguments)
    one = worker(1, *arguments)["one"]
    assert one["step"] == 3 and one["bitwise"]
    for layout, found in many.items():
        assert found["step"] == 3 and found["bitwise"], layout
        assert found["loss"] == pytest.approx(one["loss"], rel=1e-5), layout
