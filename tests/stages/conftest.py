"""A small data folder, and every training stage at its smallest, each startable by name."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from warpline.data.record import write_records
from warpline.data.task import make_tasks, near_miss
from warpline.models.decoder import DecoderShape
from warpline.parallel.mesh import start_mesh
from warpline.stages import distill, preference, pretrain, rl, sft
from warpline.stages.parts.config import OptimizerConfig, ParallelConfig
from warpline.stages.parts.model import Start, build
from warpline.stages.parts.run import RunFolder
from warpline.stages.parts.session import StopSignal

TRAINING = {
    "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
    "checkpoint_every_steps": 2,
    "steps": 6,
    "seed": 5,
}
SHAPE = DecoderShape(
    width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_width=8, mlp_width=24, max_positions=128, init_std=0.2
)


class StopAfter(StopSignal):
    """A signal that arrives during step `count`, deterministically."""

    def __init__(self, count: int):
        self.count, self.asked = count, 0

    @property
    def received(self):
        self.asked += 1
        return "SIGTERM" if self.asked >= self.count else None


@pytest.fixture
def start_of(tokenizer) -> Callable:
    """`start_of(decoder)`: a start whose weights are the decoder's."""

    def start_of(decoder) -> Start:
        def fill(pieces) -> None:
            whole = dict(decoder.named_parameters())
            for name, piece in pieces.items():
                piece.tensor.copy_(whole[name].detach())

        return Start(decoder.config, tokenizer, fill)

    return start_of


@pytest.fixture
def model_of(start_of) -> Callable:
    """`model_of(decoder, precision)`: what the stages train, with the decoder's weights, in one process."""

    def model_of(decoder, precision: str = "fp32"):
        return build(start_of(decoder), start_mesh(), ParallelConfig(), precision)

    return model_of


@pytest.fixture
def pair_file(tmp_path) -> Path:
    records = []
    slips = random.Random(9)
    for task in make_tasks({"sorting": 4}, 40, held_out=False, seed=9):
        answers = task["answer"], near_miss(slips, task["answer"])
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in answers)
        records.append({"prompt": task["prompt"], "chosen": chosen, "rejected": rejected})
    write_records(tmp_path / "pairs.jsonl", records)
    return tmp_path / "pairs.jsonl"


@pytest.fixture
def stage_runner(text_run, start_folder, pair_file) -> Callable:
    """`run(stage, folder, stop=None, **changes)` trains a stage in `folder` and returns its last checkpoint."""
    chat = {
        "files": [str(text_run / "data" / "sft.jsonl")],
        "text": str(text_run),
        "text_tokens_per_step": 64,
        "text_window_tokens": 32,
    }
    kinds = {
        "pretrain": (
            pretrain, pretrain.PretrainStageConfig,
            {"data": str(text_run), "model": SHAPE, "sequence_tokens": 32, "sequences_per_step": 4},
        ),
        "sft": (sft, sft.SftStageConfig, {"start": str(start_folder), "tokens_per_step": 256, **chat}),
        "preference": (
            preference, preference.PreferenceStageConfig,
            {"start": str(start_folder), "files": [str(pair_file)], "tokens_per_step": 256},
        ),
        "rl": (
            rl, rl.RlStageConfig,
            {"start": str(start_folder), "files": [str(text_run / "data" / "rl.jsonl")], "prompts_per_step": 4,
             "completions_per_prompt": 4,
             "minibatches_per_step": 2, "max_new_tokens": 6, "kl_coefficient": 0.1, "samples_per_step": 1,
             "rewards": [{"function": "warpline.data.task:exact_match"}]},
        ),
        "distill": (
            distill, distill.DistillStageConfig,
            {"teacher": str(start_folder), "student_layers": [1], "tokens_per_step": 256, **chat},
        ),
    }  # fmt: skip

    def run(stage: str, folder: Path, stop: StopSignal | None = None, **changes) -> Path:
        module, kind, inputs = kinds[stage]
        config = kind.model_validate({**TRAINING, **inputs, **changes})
        folder_run = RunFolder(folder)
        folder_run.open(config, stage)
        return module.main(config, folder_run, start_mesh(), stop)

    return run


def metrics_of(folder: Path) -> list[dict]:
    """The run's metrics without the wall-clock ones."""
    clock = ("seconds", "tokens_per_second")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]
