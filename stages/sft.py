"""Supervised fine-tuning on conversations; the loss counts the assistant's tokens only.

Run     warpline sft configs/sft/own_data.toml
Reads   `files` of `messages` or `prompt`/`completion` (.jsonl, .gz, .zst, .parquet), a model folder (`start`), and with
        `text_tokens_per_step` the text of a data folder (`text`), mixed in so that the model does not forget it
Writes  RUN/checkpoints/sft/step-N, RUN/metrics.jsonl
Expect  the loss in nats per counted token (assistant's tokens, and text tokens where mixed in)
"""

from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveInt

from ..data.conversation import read_supervised
from ..data.packing import PackedBatch, num_windows, text_batch, windows_of_step
from ..data.shards import TokenShards
from ..data.tokenizer import ChatTokenizer
from ..parallel.mesh import Mesh
from .parts.config import BadConfig, ParallelConfig, TrainingConfig
from .parts.model import start_from
from .parts.run import RunFolder
from .parts.seed import seed_of
from .parts.session import Session, StopSignal
from .parts.tokens import backward_cross_entropy, microbatches, sample_order
from .pretrain import data_folder, require_same_tokenizer


class SftConfig(TrainingConfig):
    """A step takes whole conversations up to `tokens_per_step`, and `text_tokens_per_step` of text in windows of
    `text_window_tokens`.
    """

    tokens_per_step: PositiveInt
    max_tokens: PositiveInt = 2048
    text_tokens_per_step: NonNegativeInt = 0
    text_window_tokens: PositiveInt = 256


class SftStageConfig(SftConfig):
    """The stage by itself."""

    start: str
    files: list[str] = Field(min_length=1)
    text: str | None = None
    seed: NonNegativeInt = 0
    parallel: ParallelConfig = ParallelConfig()


class TextMix:
    """The text mixed into a step: a fixed number of windows of the packed stream, a pure function of seed and step."""

    def __init__(self, text: str | None, config: SftConfig, tokenizer: ChatTokenizer, seed: int):
        self.window_tokens = config.text_window_tokens
        self.windows_per_step = -(-config.text_tokens_per_step // self.window_tokens)
        self.shards: TokenShards | None = None
        if self.windows_per_step:
            if text is None:
                raise BadConfig("text_tokens_per_step is set but text is not; give the folder that `warpline data` made")
            folder = data_folder(text)
            require_same_tokenizer(folder, tokenizer)
            self.shards = TokenShards(folder / "train")
        self.seed = seed

    def windows(self, step: int) -> list[int]:
        """A step's windows, over all ranks."""
        if self.shards is None:
            return []
        return list(windows_of_step(num_windows(self.shards, self.window_tokens), self.windows_per_step, step, self.seed))

    def batches(self, windows: list[int]) -> list[PackedBatch]:
        return [text_batch(self.shards, windows, self.window_tokens)] if self.shards is not None and windows else []


def main(config: SftStageConfig, run: RunFolder, mesh: Mesh, stop: StopSignal | None = None) -> Path:
    """Train to `config.steps`; returns the last checkpoint."""
    # -- Whence: the last checkpoint, or the model folder ----------------------------------------------------------------------
    session = Session("sft", config, run, mesh, config.parallel, lambda: start_from(Path(config.start), mesh), stop)

    # -- What: conversations, and text -----------------------------------------------------------------------------------------
    samples = read_supervised(
        [Path(path) for path in config.files], session.tokenizer, min(config.max_tokens, session.model.config.max_positions)
    )
    text = TextMix(config.text, config, session.tokenizer, seed_of(config.seed, "sft", "text"))
    order = sample_order(
        [len(sample.ids) for sample in samples], config.tokens_per_step, seed_of(config.seed, "sft", "order"), session.step
    )

    # -- The loop --------------------------------------------------------------------------------------------------------------
    for step in session.steps():
        mine = [[samples[index]] for index in mesh.share(next(order))]
        batches = [*microbatches(mine, config.tokens_per_microbatch), *text.batches(mesh.share(text.windows(step)))]
        loss, read = backward_cross_entropy(session, batches)
        session.update(loss)
        session.finish_step(loss, read)
    return session.checkpoint
