"""The whole smoke line in fp64 under layouts: every stage's losses, scores and released stage are one process's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SMOKE = Path(__file__).parents[2] / "configs" / "line" / "smoke.toml"
PRECISION = [f"{stage}.precision=fp64" for stage in ("pretrain", "sft", "preference", "rl", "distill")]


def losses_and_scores(folder: Path, num_ranks: int, *layout: str) -> tuple[dict, list[dict]]:
    """({(stage, step): loss}, scores.json) of a line of that many ranks."""
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(num_ranks),
        "--no-python",
        "--",
        sys.executable,
    ]
    launcher = [sys.executable, *(torchrun if num_ranks > 1 else []), "-m", "warpline.stages.command"]
    command = [*launcher, "line", str(SMOKE), "--run", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *PRECISION, *layout], capture_output=True, text=True, timeout=590, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {(line["stage"], line["step"]): line["loss"] for line in lines if "loss" in line}
    return losses, json.loads((folder / "scores.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return losses_and_scores(tmp_path_factory.mktemp("alone") / "run", 1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tensor", "context"])
def test_a_line_under_a_layout_has_the_losses_and_scores_of_one_process(alone, tmp_path, layout):
    losses, scores = losses_and_scores(tmp_path / "run", 2, f"parallel.{layout}=2")
    assert losses == pytest.approx(alone[0], rel=1e-9, abs=1e-9)
    assert len(scores) == len(alone[1]) == 6
    for score, other in zip(scores, alone[1], strict=True):
        assert score.pop("bits_per_byte") == pytest.approx(other["bits_per_byte"], rel=1e-12)
        assert score == {name: value for name, value in other.items() if name != "bits_per_byte"}
