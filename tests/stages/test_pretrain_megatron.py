import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from warpline.models import huggingface
from warpline.stages.pretrain import PretrainStageConfig

WORKER = Path(__file__).with_name("pretrain_megatron_worker.py")
CONFIG = """
data = "{data}"
start = "{start}"
steps = 3
sequence_tokens = 23
sequences_per_step = 8
tokens_per_microbatch = 46
precision = "fp32"
optimizer = {{ learning_rate = 1e-3, weight_decay = 0.1 }}
"""


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def megatron(num_ranks: int, *arguments: str) -> subprocess.CompletedProcess:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [sys.executable, *torchrun, str(WORKER), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)


@pytest.mark.slow
def test_the_engine_takes_the_steps_that_pretrain_takes(stage_runner, start_folder, text_run, tmp_path):
    config = tmp_path / "pretrain.toml"
    config.write_text(CONFIG.format(data=text_run, start=start_folder))
    ours = {
        "start": str(start_folder), "model": None, "steps": 3, "sequence_tokens": 23, "sequences_per_step": 8,
        "tokens_per_microbatch": 46, "precision": "fp32", "seed": 0, "checkpoint_every_steps": 50,
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1},
    }  # fmt: skip
    stage_runner("pretrain", tmp_path / "ours", **ours)
    done = megatron(2, str(config), str(tmp_path / "theirs"), "parallel.tensor=2", "checkpoint_every_steps=1")
    assert done.returncode == 0, done.stderr[:4000]
    assert losses(tmp_path / "theirs") == pytest.approx(losses(tmp_path / "ours"), rel=1e-5)
    trained, before = (huggingface.load(tmp_path / run / "checkpoints/pretrain/step-3") for run in ("theirs", "ours"))
    for (name, received), expected in zip(trained.named_parameters(), before.parameters(), strict=True):
        assert (received - expected).abs().max() <= 1e-4, name
    again = megatron(2, str(config), str(tmp_path / "theirs"), "parallel.tensor=2", "checkpoint_every_steps=1")
    assert again.returncode == 0 and len(losses(tmp_path / "theirs")) == 3

    # From its second step on: under another layout, and by the other engine.
    shutil.rmtree(tmp_path / "theirs/checkpoints/pretrain/step-3")
    shutil.copytree(tmp_path / "ours", tmp_path / "back")
    shutil.rmtree(tmp_path / "back/checkpoints")
    shutil.copytree(tmp_path / "theirs/checkpoints", tmp_path / "back/checkpoints")
    again = megatron(2, str(config), str(tmp_path / "theirs"), "parallel.pipeline=2", "checkpoint_every_steps=1")
    assert again.returncode == 0, again.stderr[:4000]
    assert losses(tmp_path / "theirs") == pytest.approx(losses(tmp_path / "ours"), rel=1e-5)
    stage_runner("pretrain", tmp_path / "back", **ours)
    for run in ("theirs", "back"):
        trained = huggingface.load(tmp_path / run / "checkpoints/pretrain/step-3")
        for (name, received), expected in zip(trained.named_parameters(), before.parameters(), strict=True):
            assert (received - expected).abs().max() <= 1e-4, (run, name)
    assert losses(tmp_path / "back") == pytest.approx(losses(tmp_path / "ours"), rel=1e-5)


def test_what_megatron_does_not_do_is_refused_by_its_key(text_run, start_folder, monkeypatch):
    from warpline.stages.parts.config import BadConfig
    from warpline.stages.pretrain_megatron import _check

    settings = {"data": str(text_run), "start": str(start_folder), "steps": 1, "sequence_tokens": 8, "sequences_per_step": 1}

    def absent() -> int:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr("torch.cuda.current_device", absent)
    with pytest.raises(BadConfig, match="runs on GPUs alone, and there is none here; use --engine warpline"):
        _check(PretrainStageConfig.model_validate({**settings, "optimizer": {"learning_rate": 1e-3}}).parallel)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    for key, value in {"attention": "ulysses", "schedule": "zbv", "recompute": "full", "offload": True}.items():
        parallel = {key: value}
        config = PretrainStageConfig.model_validate({**settings, "optimizer": {"learning_rate": 1e-3}, "parallel": parallel})
        with pytest.raises(BadConfig, match=f"parallel.{key}.*use --engine warpline"):
            _check(config.parallel)
