"""Hugging Face folders in and out: the families of `huggingface_config.py`, safetensors only, one tensor at a time.

Reads   config.json, model.safetensors or model.safetensors.index.json with its shards; other files are left alone.
Writes  the same, generation_config.json and the tokenizer's files; config.json last: without it a folder is refused.
Memory  load holds at most one tensor beside the model; save nothing on a CPU, one tensor on the host elsewhere.
Ranks   `load_pieces` reads the rectangles that a rank holds; `wholes`, `plan` and a `Saver` write them, with `describe`.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from ..parallel.checkpoint import BadCheckpoint as BadCheckpoint
from ..parallel.checkpoint import Piece, Whole, flush, plan
from ..parallel.tensor_file import Stored, create, read_object, read_pieces, stored_tensors, write
from .decoder import Decoder, DecoderConfig
from .huggingface_config import read_settings, write_settings

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
_DERIVED = ".rotary_emb.inv_freq"  # a table that old Llama checkpoints store


class ExportableTokenizer(Protocol):
    """What `save` asks of a tokenizer: `data/tokenizer.py` has it, and this room may not import that one."""

    @property
    def end_ids(self) -> tuple[int, ...]: ...
    @property
    def document_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int | None: ...
    def save(self, folder: Path) -> Any: ...


def read_config(folder: str | Path) -> DecoderConfig:
    """The decoder that config.json describes; BadCheckpoint names the first setting that it does not compute."""
    path = Path(folder) / _CONFIG
    return read_settings(read_object(path), path)


@torch.no_grad()
def load(folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Decoder:
    """The decoder of a Hugging Face folder, read tensor by tensor; `dtype` None keeps the files' dtype."""
    folder = Path(folder)
    decoder = _on_meta(read_config(folder))
    stored = _stored(folder, decoder)
    kinds = sorted({tensor.dtype for tensor in stored.values()})
    if dtype is None and len(kinds) > 1:
        raise BadCheckpoint(f"{folder}: tensors have dtypes {' and '.join(kinds)}; choose one with dtype=")
    decoder = decoder.to(dtype or _DTYPES[kinds[0]]).to_empty(device=device)
    _fill(stored, {name: Piece.of(parameter) for name, parameter in decoder.named_parameters()}, decoder.config)
    return decoder


def reader(folder: str | Path) -> Callable[[dict[str, Piece]], None]:
    """What fills pieces of parameters, by our names, from a Hugging Face folder, checked as `load` checks; a rank reads its own
    bytes alone, whatever wrote the folder. A tied head that is stored again is compared where the embedding is filled.
    """
    folder = Path(folder)
    decoder = _on_meta(read_config(folder))
    stored = _stored(folder, decoder)
    shape = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}

    def fill(pieces: dict[str, Piece]) -> None:
        for name, piece in pieces.items():
            if shape.get(name) != piece.shape:
                there = list(shape[name]) if name in shape else "absent"
                is_here = f"{name} is {list(piece.shape)} in the model"
                raise BadCheckpoint(f"{folder}: {is_here} but {there} in config.json; load a folder of this model")
        _fill(stored, pieces, decoder.config)

    return fill


def load_pieces(folder: str | Path, pieces: dict[str, Piece]) -> None:
    """`reader`, once."""
    reader(folder)(pieces)


def wholes(config: DecoderConfig, dtype: torch.dtype) -> dict[str, Whole]:
    """Every tensor of a folder, by the names in its files, as all ranks know them."""
    return {their_name(name): Whole(tuple(x.shape), dtype) for name, x in _on_meta(config).named_parameters()}


def their_name(name: str) -> str:
    """A parameter's name in the files."""
    return name if name == _HEAD else f"model.{name}"


def our_name(name: str) -> str:
    return name.removeprefix("model.")


def _on_meta(config: DecoderConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


def _stored(folder: Path, decoder: Decoder) -> dict[str, Stored]:
    """The tensors of the folder, which are the decoder's; a tied model may store its head again."""
    if not any((folder / name).is_file() for name in (_SINGLE, _INDEX)):
        pickled = sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise BadCheckpoint(
                f"{pickled[0]}: a pickle runs code when it is opened, so it is not read; where you trust it, convert "
                "it with AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
            )
    stored = {name: tensor for name, tensor in stored_tensors(folder, "model").items() if not name.endswith(_DERIVED)}
    shape = {their_name(name): tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    if decoder.config.tie_embeddings and _HEAD in stored:
        shape[_HEAD] = shape[_EMBEDDING]
    _check(folder, stored, shape)
    return stored


@torch.no_grad()
def _fill(stored: dict[str, Stored], pieces: dict[str, Piece], config: DecoderConfig) -> None:
    read_pieces(stored, {their_name(name): piece for name, piece in pieces.items()})
    embedding = pieces.get(our_name(_EMBEDDING))
    if config.tie_embeddings and _HEAD in stored and embedding is not None:
        head = embedding._replace(tensor=torch.empty_like(embedding.tensor))
        read_pieces(stored, {_HEAD: head})
        if not torch.equal(head.tensor, embedding.tensor):
            raise BadCheckpoint(
                f"{stored[_HEAD].path}: {_HEAD} differs from {_EMBEDDING}, but config.json ties them; "
                "set tie_word_embeddings to false to keep both"
            )


def _check(folder: Path, stored: dict[str, Stored], shape: dict[str, tuple[int, ...]]) -> None:
    missing = [name for name in shape if name not in stored]
    if missing:
        raise BadCheckpoint(f"{folder}: tensor {_first(missing)} is missing, but config.json asks for it; correct either")
    extra = [name for name in stored if name not in shape]
    if extra:
        raise BadCheckpoint(
            f"{stored[extra[0]].path}: tensor {_first(extra)} is not part of the model that config.json describes; "
            "remove it or correct config.json"
        )
    for name, expected in shape.items():
        path, received, kind, _ = stored[name]
        if received != expected:
            raise BadCheckpoint(
                f"{path}: tensor {name} has shape {list(received)}, not config.json's {list(expected)}; correct either"
            )
        if kind not in _DTYPES:
            raise BadCheckpoint(f"{path}: tensor {name} has dtype {kind}; dequantise it to {', '.join(_DTYPES)}")


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def save(
    decoder: Decoder,
    folder: str | Path,
    tokenizer: ExportableTokenizer | None = None,
    *,
    max_shard_bytes: int = 5 * 10**9,
    end_ids: Sequence[int] | None = None,
    own_form: bool = False,
) -> None:
    """Write the decoder as the first family of transformers that computes it, replacing weights there.

    A decoder that none computes is refused before anything is written; with `own_form`, it is written for `load` alone.
    `end_ids` (default: the tokenizer's) stop `generate`. Every file is on disk (fsync) when this returns.
    """
    folder = Path(folder)
    write_settings(decoder.config, own_form=own_form)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CONFIG).unlink(missing_ok=True)
    for path in folder.iterdir():
        if _WEIGHT_FILE.fullmatch(path.name):
            path.unlink()
    pieces = {their_name(name): Piece.of(parameter) for name, parameter in decoder.named_parameters()}
    layout = plan({name: Whole(piece.shape, piece.tensor.dtype) for name, piece in pieces.items()}, "model", max_shard_bytes)
    create(layout, folder)
    write(layout, folder, pieces)
    describe(decoder.config, folder, tokenizer, dtype=decoder.output_weight.dtype, end_ids=end_ids, own_form=own_form)


def describe(
    config: DecoderConfig,
    folder: Path,
    tokenizer: ExportableTokenizer | None = None,
    *,
    dtype: torch.dtype,
    end_ids: Sequence[int] | None = None,
    own_form: bool = False,
) -> None:
    """Write what `save` writes beside the weights, config.json last; all files of the folder are on disk when this returns."""
    settings = write_settings(config, own_form=own_form)
    settings["dtype"] = str(dtype).removeprefix("torch.")
    if tokenizer is not None:
        tokenizer.save(folder)
    ends = list(end_ids if end_ids is not None else getattr(tokenizer, "end_ids", ()))
    special = {
        "bos_token_id": None if tokenizer is None else tokenizer.document_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": None if tokenizer is None else tokenizer.pad_id,
    }
    _write_json(folder / _GENERATION, special)
    flush(folder)
    _write_json(folder / _CONFIG, settings | special)
    flush(folder)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
