"""Checkpoints of a stage: a Hugging Face folder plus the optimiser's safetensors, state.json and manifest.json; complete or
absent, verified on load.

`Checkpoints` saves and finds them on any number of ranks, each of which holds pieces of the model (`parallel/checkpoint.py`);
the other functions are for one process that holds all of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...data.tokenizer import ChatTokenizer
from ...models import huggingface
from ...models.decoder import Decoder, DecoderConfig
from ...parallel.checkpoint import BadCheckpoint, Piece, Saver, Whole, plan, read_into, sweep
from ...parallel.checkpoint import checkpoints as checkpoints
from ...parallel.checkpoint import damage as damage
from .config import BadConfig
from .file import read_json, write_json

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints under `folder`, of which the newest `keep` stay. Every rank of `saver` makes the same calls."""

    folder: Path
    saver: Saver
    keep: int
    max_shard_bytes: int = 5 * 10**9

    def save(
        self,
        step: int,
        config: DecoderConfig,
        tokenizer: ChatTokenizer,
        state: dict[str, Any],
        model: dict[str, Piece],
        moments: dict[str, Piece],
    ) -> None:
        """Begin to write `folder/step-N`: pieces of the parameters by name, of the moments as `moment_names` has them, and
        `state` (JSON, the first rank's counts). Pieces and state may change once this returns; `saver.wait` ends it.

        All pieces of the model have one dtype, and those of the moments; the files hold it.
        """
        dtype, moment_dtype = (next(iter(pieces.values())).tensor.dtype for pieces in (model, moments))
        wholes = huggingface.wholes(config, dtype)
        theirs = {huggingface.their_name(name): piece for name, piece in model.items()}
        names = [huggingface.our_name(name) for name in wholes]
        moment_wholes = {
            name: Whole(wholes[huggingface.their_name(of)].shape, moment_dtype) for of in names for name in moment_names(of)
        }
        frozen = dict(state)

        def describe(folder: Path) -> None:
            huggingface.describe(config, folder, tokenizer, dtype=dtype, own_form=True)
            write_json(folder / "state.json", frozen)

        files = [
            (plan(wholes, "model", self.max_shard_bytes), theirs),
            (plan(moment_wholes, "optimizer", self.max_shard_bytes), moments),
        ]
        self.saver.save(self.folder, step, files, describe, self.keep)

    def latest(self, warn: Callable[[str], None]) -> Path | None:
        """The newest checkpoint whose files match their digests, which the ranks share out; the first rank names damaged ones
        through `warn`, after it swept killed saves away.
        """
        is_first = self.saver.rank == 0
        if is_first:
            sweep(self.folder)
        names = self.saver.gather([path.name for path in checkpoints(self.folder)] if is_first else None)[0]
        for path in (self.folder / name for name in names):
            problems = [problem for problem in self.saver.gather(damage(path, self.saver.rank, self.saver.size)) if problem]
            if not problems:
                return path
            if is_first:
                warn(f"checkpoint {path} is damaged ({problems[0]}); falling back to the one before it")
        return None


def moment_names(name: str) -> list[str]:
    """The names of a parameter's moments in the optimiser's files."""
    return [f"{moment}.{name}" for moment in MOMENTS]


def load_moments(checkpoint: Path, moments: dict[str, Piece]) -> dict[str, Any]:
    """Fill pieces of the moments, cut as they may be, and return state.json."""
    state = read_json(checkpoint / "state.json")
    try:
        read_into(checkpoint, "optimizer", moments)
    except BadCheckpoint as error:
        raise BadConfig(f"the optimiser of {checkpoint} does not fit the model: {error}; or delete the checkpoint") from error
    return state


def save_checkpoint(
    folder: Path,
    step: int,
    decoder: Decoder,
    optimizer: torch.optim.Optimizer | None,
    tokenizer: ChatTokenizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step-N` of a whole model, and remove all but the newest `keep`. Without an optimiser its moments are 0."""
    saver = Saver(None)
    model = {name: Piece.of(parameter) for name, parameter in decoder.named_parameters()}
    moments = {}
    for name, parameter in decoder.named_parameters():
        made = {} if optimizer is None else optimizer.state.get(parameter, {})
        for moment in MOMENTS:
            moments[f"{moment}.{name}"] = Piece.of(made[moment] if moment in made else torch.zeros_like(parameter))
    Checkpoints(folder, saver, keep).save(step, decoder.config, tokenizer, state, model, moments)
    saver.wait()
    return folder / f"step-{step}"


def read_start(folder: Path, damage_of: Callable[[Path], str | None] = damage) -> tuple[DecoderConfig, ChatTokenizer]:
    """What a model may start from, refused if it cannot: a checkpoint of ours, verified by `damage_of`, or any Hugging Face
    folder."""
    if not folder.is_dir():
        raise BadConfig(f"{folder}: no such folder; give a checkpoint (…/step-N) or a Hugging Face folder")
    if (folder / "checkpoints").is_dir():
        raise BadConfig(f"{folder} is a run; give one of its checkpoints (checkpoints/<stage>/step-N) or its release/ folder")
    if (folder / "manifest.json").exists() and (problem := damage_of(folder)):
        raise BadConfig(f"checkpoint {folder} is damaged: {problem}; use an earlier one")
    config, tokenizer = huggingface.read_config(folder), ChatTokenizer.load(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise BadConfig(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens but the model's vocabulary only {config.vocab_size}; "
            "use the tokenizer the model was trained with"
        )
    return config, tokenizer


def load_start(folder: Path, device: torch.device) -> tuple[Decoder, ChatTokenizer]:
    """A whole model, in fp32, and its tokenizer."""
    _, tokenizer = read_start(folder)
    return huggingface.load(folder, device=device, dtype=torch.float32), tokenizer
