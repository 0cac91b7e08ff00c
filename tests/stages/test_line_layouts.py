"""The smoke line on two ranks, in fp64: what it samples, trains and scores is what one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SMOKE = Path(__file__).parents[2] / "configs" / "line" / "smoke.toml"
STAGES = ("pretrain", "sft", "preference", "rl", "distill")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_line_under_tensor_and_context_parallelism_gives_the_scores_of_one_process(tmp_path):
    scores = {}
    for layout in ("", "parallel.tensor=2", "parallel.context=2"):
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", "--",
        ]  # fmt: skip
        folder = tmp_path / (layout or "one")
        command = [sys.executable, "-m", "warpline.stages.command", "line", str(SMOKE), "--run", str(folder)]
        settings = [f"{stage}.precision=fp64" for stage in STAGES]
        command = [*(torchrun if layout else []), *command, *settings, *([layout] if layout else [])]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=900)
        assert done.returncode == 0, done.stderr[:4000]
        assert (folder / "report.html").exists() and json.loads((folder / "ended.json").read_text())["reason"] == "done"
        scores[layout] = json.loads((folder / "scores.json").read_text())
    assert scores["parallel.tensor=2"] == scores[""]
    assert scores["parallel.context=2"] == scores[""]
