"""What every test shares: one thread, a small model, a tokenizer and a data folder.

Nothing but torch and pytest is imported before a fixture is used: the kernels' tests run on machines that have no more.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from warpline.data.tokenizer import ChatTokenizer
    from warpline.models.decoder import Decoder, DecoderConfig

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # the models of these tests are too small to share: 30 ms instead of 360 ms for one tiny generate
TEXTS = [
    "def add(first, second):\n    return first + second\n",
    "Sort: d a c b",
    "Reverse: a b c d",
    "Add: 37 + 85",
    "class Tree:\n    pass\n",
]


@pytest.fixture(scope="session")
def tokenizer() -> ChatTokenizer:
    from warpline.data.tokenizer import ChatTokenizer, train_tokenizer

    return ChatTokenizer(train_tokenizer(TEXTS * 4, 320))


def tiny_config(vocab_size: int, **changes) -> DecoderConfig:
    from warpline.models.decoder import DecoderConfig

    sizes = {
        "width": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_width": 8,
        "mlp_width": 24,
        "max_positions": 128,
    }
    return DecoderConfig(vocab_size=vocab_size, **{**sizes, "init_std": 0.2, **changes})


@pytest.fixture
def tiny_decoder(tokenizer) -> Decoder:
    from warpline.models.decoder import Decoder

    return Decoder(tiny_config(tokenizer.vocab_size)).initialise(torch.Generator().manual_seed(0))


@pytest.fixture
def start_folder(tmp_path, tokenizer, tiny_decoder) -> Path:
    """A Hugging Face folder of a tiny random model with its tokenizer."""
    from warpline.models import huggingface

    huggingface.save(tiny_decoder, tmp_path / "start", tokenizer)
    return tmp_path / "start"


@pytest.fixture(scope="session")
def text_run(tmp_path_factory, tokenizer) -> Path:
    """A run of the data stage on a few generated files, with tasks, in the tokens of `tokenizer`."""
    from warpline.parallel.mesh import start_mesh
    from warpline.stages import data
    from warpline.stages.parts.run import RunFolder

    folder = tmp_path_factory.mktemp("text")
    for number in range(24):
        lines = [f"def function_{number}_{line}(value):\n    return value * {line + number}\n" for line in range(20)]
        (folder / f"file_{number}.txt").write_text(
            "\n".join(lines[number % 7 :]) + f"\n# file {number} ends here: {'xyz' * number}\n"
        )
    tasks = data.TaskConfig(sizes={"sorting": 4, "reversal": 4}, sft_per_family=60, rl_per_family=40, held_out_per_family=6)
    own = str(tmp_path_factory.mktemp("tokenizer"))
    tokenizer.save(own)
    config = data.DataStageConfig(
        text=[str(folder)], tokenizer=own, held_out_fraction=0.2, near_duplicate_threshold=1.0, tasks=tasks
    )
    run = RunFolder(tmp_path_factory.mktemp("data-run") / "run")
    run.open(config, "data")
    data.main(config, run, start_mesh())
    return run.path


def pytest_terminal_summary(terminalreporter, config) -> None:
    """GPU tests that did not run are counted and said, not hidden."""
    skipped = [item for item in terminalreporter.stats.get("deselected", []) if "gpu" in item.keywords]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} GPU test(s) not run on this machine")
