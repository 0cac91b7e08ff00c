"""Checkpoints: a Hugging Face folder plus optimizer.safetensors, state.json and manifest.json; complete or absent, verified
on load.

A checkpoint is written to `step-N.tmp-PID/`, every file is fsynced, `manifest.json` with size and BLAKE2b digest of every
file comes last, and one rename publishes it. Loading verifies the digests and falls back to the newest good one. Nothing here
unpickles.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...data.tokenizer import ChatTokenizer
from ...models import huggingface
from ...models.decoder import Decoder
from .config import BadConfig
from .file import read_json, sync_folder, write_json

MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(
    folder: Path,
    step: int,
    decoder: Decoder,
    optimizer: torch.optim.Optimizer,
    tokenizer: ChatTokenizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step-N` and remove all but the newest `keep`. `state` is JSON, and comes back from `load_state`."""
    final = folder / f"step-{step}"
    temporary = folder / f"step-{step}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    huggingface.save(decoder, temporary, tokenizer, own_form=True)
    save_file(_optimizer_tensors(decoder, optimizer), temporary / "optimizer.safetensors")
    write_json(temporary / "state.json", state)
    write_manifest(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    sync_folder(folder)
    for old in checkpoints(folder)[keep:]:
        shutil.rmtree(old)
    return final


def write_manifest(folder: Path) -> None:
    """Digest every file of `folder` into manifest.json, which certifies them and is written last."""
    files = sorted(path for path in folder.iterdir() if path.name != "manifest.json")
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    write_json(
        folder / "manifest.json", {path.name: {"bytes": path.stat().st_size, "blake2b": _digest(path)} for path in files}
    )


def checkpoints(folder: Path) -> list[Path]:
    """The published checkpoints under `folder`, newest first."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := re.fullmatch(r"step-(\d+)", path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def latest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files match their digests; damaged ones are named through `warn`, and killed writes swept
    away.
    """
    for leftover in folder.glob("step-*.tmp-*"):
        shutil.rmtree(leftover)
    for path in checkpoints(folder):
        problem = damage(path)
        if problem is None:
            return path
        warn(f"checkpoint {path} is damaged ({problem}); falling back to the one before it")
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = read_json(checkpoint / "manifest.json")
        entries = {name: (entry["bytes"], entry["blake2b"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read: {error}"
    present = {path.name for path in checkpoint.iterdir()} - {"manifest.json"}
    if present != set(entries):
        return f"its files differ from the manifest's: {', '.join(sorted(present ^ set(entries)))}"
    for name, (size, digest) in entries.items():
        path = checkpoint / name
        if path.stat().st_size != size or _digest(path) != digest:
            return f"{name} does not match its digest"
    return None


def load_state(checkpoint: Path, decoder: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load the optimiser's moments in place and return state.json."""
    state = read_json(checkpoint / "state.json")
    try:
        with safe_open(checkpoint / "optimizer.safetensors", framework="pt") as tensors:
            for name, parameter in decoder.named_parameters():
                moments = {moment: tensors.get_tensor(f"{moment}.{name}").to(parameter.device) for moment in MOMENTS}
                optimizer.state[parameter] = {"step": torch.tensor(float(state["num_updates"])), **moments}
    except SafetensorError as error:
        raise BadConfig(f"{checkpoint}/optimizer.safetensors does not fit the model: {error}; delete the checkpoint") from error
    return state


def load_start(folder: Path, device: torch.device) -> tuple[Decoder, ChatTokenizer]:
    """A model to start from, in fp32: a checkpoint of ours (its digests are verified) or any Hugging Face folder."""
    if not folder.is_dir():
        raise BadConfig(f"{folder}: no such folder; give a checkpoint (…/step-N) or a Hugging Face folder")
    if (folder / "checkpoints").is_dir():
        raise BadConfig(f"{folder} is a run; give one of its checkpoints (checkpoints/<stage>/step-N) or its release/ folder")
    if (folder / "manifest.json").exists() and (problem := damage(folder)):
        raise BadConfig(f"checkpoint {folder} is damaged: {problem}; use an earlier one")
    decoder = huggingface.load(folder, device=device, dtype=torch.float32)
    tokenizer = ChatTokenizer.load(folder)
    if tokenizer.vocab_size > decoder.config.vocab_size:
        raise BadConfig(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens but the model's vocabulary only "
            f"{decoder.config.vocab_size}; "
            "use the tokenizer the model was trained with"
        )
    return decoder, tokenizer


def _optimizer_tensors(decoder: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in decoder.named_parameters():
        for moment in MOMENTS:
            state = optimizer.state.get(parameter, {})
            tensors[f"{moment}.{name}"] = state[moment] if moment in state else torch.zeros_like(parameter)
    return tensors


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
