"""Pretraining on packed documents.

Run     warpline pretrain configs/pretrain/own_data.toml     (--engine megatron: see pretrain_megatron.py)
Reads   a folder made by `warpline data` (`data`), and a model to go on from (`start`) or a shape to begin with ([model])
Writes  RUN/checkpoints/pretrain/step-N (also a Hugging Face folder), RUN/metrics.jsonl
Expect  the loss in nats per token; bits per byte of the held-out text every `evaluate_every_steps`
"""

from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from ..data.packing import num_windows, text_batch, windows_of_step
from ..data.shards import TokenShards
from ..data.text import read_documents
from ..data.tokenizer import ChatTokenizer
from ..models.decoder import DecoderShape
from ..parallel.mesh import Mesh
from .parts.config import BadConfig, ParallelConfig, TrainingConfig
from .parts.model import Start, fresh, start_from
from .parts.run import RunFolder
from .parts.score import bits_per_byte
from .parts.seed import seed_of
from .parts.session import Session, StopSignal
from .parts.tokens import backward_cross_entropy


class PretrainConfig(TrainingConfig):
    """One sequence is a window of `sequence_tokens` of the packed stream; a step takes `sequences_per_step` of them."""

    sequence_tokens: PositiveInt
    sequences_per_step: PositiveInt
    evaluate_every_steps: PositiveInt = 100


class PretrainStageConfig(PretrainConfig):
    """The stage by itself: give `start` (a model folder) or `model` (a shape)."""

    data: str
    start: str | None = None
    model: DecoderShape | None = None
    seed: NonNegativeInt = 0
    engine: Literal["warpline", "megatron"] = "warpline"
    parallel: ParallelConfig = ParallelConfig()


def main(config: PretrainStageConfig, run: RunFolder, mesh: Mesh, stop: StopSignal | None = None) -> Path:
    """Train to `config.steps`; returns the last checkpoint."""
    # -- What: the text and the model ------------------------------------------------------------------------------------------
    data = data_folder(config.data)
    shards = TokenShards(data / "train")
    windows_in_all = num_windows(shards, config.sequence_tokens)
    held_out = list(read_documents([data / "held_out.jsonl"]))

    # -- Whence: the last checkpoint, or step 0 --------------------------------------------------------------------------------
    session = Session("pretrain", config, run, mesh, config.parallel, lambda: start_of(config, data, mesh), stop)
    require_same_tokenizer(data, session.tokenizer)
    if config.sequence_tokens > session.model.config.max_positions:
        raise BadConfig(
            f"sequence_tokens={config.sequence_tokens} exceeds the model's {session.model.config.max_positions} positions; "
            "shorten it, or raise model.max_positions"
        )

    # -- The loop --------------------------------------------------------------------------------------------------------------
    for step in session.steps():
        windows = windows_of_step(windows_in_all, config.sequences_per_step, step, seed_of(config.seed, "pretrain", "order"))
        batches = [
            text_batch(shards, part, config.sequence_tokens)
            for part in parts_of(mesh.share(list(windows)), max(1, config.tokens_per_microbatch // config.sequence_tokens))
        ]
        loss, read = backward_cross_entropy(session, batches)
        session.update(loss)
        session.finish_step(loss, read)
        if session.step % config.evaluate_every_steps == 0 or session.step == config.steps:
            bits = bits_per_byte(session.model, session.tokenizer, held_out, config.sequence_tokens)
            session.model.train()
            line = {"stage": "pretrain", "step": session.step, "seconds": session.seconds, "held_out_bits_per_byte": bits}
            run.append("metrics.jsonl", line)
    return session.checkpoint


def data_folder(path: str) -> Path:
    """The data folder of a run of `warpline data`, given as the run or as its data/ folder."""
    for folder in (Path(path) / "data", Path(path)):
        if (folder / "train" / "index.json").exists():
            return folder
    raise BadConfig(f"{path}: no data there (train/index.json is missing); make it with `warpline data`")


def require_same_tokenizer(data: Path, tokenizer: ChatTokenizer) -> None:
    """Token shards mean something only to the tokenizer that made them."""
    if ChatTokenizer.load(data / "tokenizer").tokenizer.get_vocab() != tokenizer.tokenizer.get_vocab():
        raise BadConfig(
            f"{data} was made with another tokenizer than the model's; make it again with `tokenizer` set to the model's folder"
        )


def start_of(config: PretrainStageConfig, data: Path, mesh: Mesh) -> Start:
    if config.start is not None and config.model is None:
        return start_from(Path(config.start), mesh)
    if config.model is not None and config.start is None:
        return fresh(config.model, ChatTokenizer.load(data / "tokenizer"), config.seed, "pretrain")
    raise BadConfig("give either start (a model folder to go on from) or a [model] table, not both")


def parts_of(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
