"""Hugging Face folders in and out: the families of `huggingface_config.py`, safetensors only, one tensor at a time.

Reads   config.json, model.safetensors or model.safetensors.index.json with its shards; other files are left alone.
Writes  the same, generation_config.json and the tokenizer's files; config.json last: without it a folder is refused.
Memory  load holds one tensor beside the model; save holds nothing on a CPU, one shard on the host elsewhere.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .decoder import Decoder, DecoderConfig
from .huggingface_config import BadCheckpoint as BadCheckpoint
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


class _Stored(NamedTuple):
    path: Path
    shape: tuple[int, ...]
    dtype: str


def read_config(folder: str | Path) -> DecoderConfig:
    """The decoder that config.json describes; BadCheckpoint names the first setting that it does not compute."""
    path = Path(folder) / _CONFIG
    return read_settings(_read_json(path), path)


@torch.no_grad()
def load(folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Decoder:
    """The decoder of a Hugging Face folder, read tensor by tensor; `dtype` None keeps the files' dtype."""
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"):
        decoder = Decoder(config)
    stored = _stored_tensors(folder)
    shape = {_their_name(name): tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    duplicate_head = config.tie_embeddings and _HEAD in stored
    if duplicate_head:
        shape[_HEAD] = shape[_EMBEDDING]
    _check(folder, stored, shape, dtype)
    for path in sorted({tensor.path for tensor in stored.values()}):
        names = [name for name in shape if stored[name].path == path and not (duplicate_head and name == _HEAD)]
        for name, tensor in _read(path, names):
            owner, _, leaf = _our_name(name).rpartition(".")
            # A copy, as the file is memory-mapped and may be overwritten while the decoder lives.
            placed = tensor.to(device=device, dtype=dtype, copy=True)
            setattr(decoder.get_submodule(owner), leaf, nn.Parameter(placed))
    if duplicate_head:
        ((_, head_VD),) = _read(stored[_HEAD].path, [_HEAD])
        if not torch.equal(head_VD.to(device=device, dtype=dtype), decoder.output_weight):
            raise BadCheckpoint(
                f"{stored[_HEAD].path}: {_HEAD} differs from {_EMBEDDING}, but config.json ties them; "
                "set tie_word_embeddings to false to keep both"
            )
    return decoder


def _stored_tensors(folder: Path) -> dict[str, _Stored]:
    """Name, file, shape and dtype of every tensor of the folder's model, from the files' headers alone."""
    stored: dict[str, _Stored] = {}
    for path in _weight_files(folder):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                if name.endswith(_DERIVED):
                    continue
                if name in stored:
                    raise BadCheckpoint(f"{path}: tensor {name} is also in {stored[name].path.name}; keep one of them")
                view = file.get_slice(name)
                stored[name] = _Stored(path, tuple(view.get_shape()), view.get_dtype())
    return stored


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if not index.is_file():
        pickled = sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise BadCheckpoint(
                f"{pickled[0]}: a pickle runs code when it is opened, so it is not read; where you trust it, convert "
                "it with AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
            )
        raise BadCheckpoint(f"{folder}: holds neither {_SINGLE} nor {_INDEX}; pass a Hugging Face folder with safetensors")
    weight_map = _read_json(index).get("weight_map")
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    if not files or not all(isinstance(file, str) for file in files):
        raise BadCheckpoint(f"{index}: weight_map must name the file of every tensor; save the model again")
    names = sorted(set(files))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise BadCheckpoint(f"{index}: it lists {name}, which is not a file of this folder; copy that shard here")
    return [folder / name for name in names]


def _check(folder: Path, stored: dict[str, _Stored], shape: dict[str, tuple[int, ...]], dtype: torch.dtype | None) -> None:
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
        path, received, kind = stored[name]
        if received != expected:
            raise BadCheckpoint(
                f"{path}: tensor {name} has shape {list(received)}, not config.json's {list(expected)}; correct either"
            )
        if kind not in _DTYPES:
            raise BadCheckpoint(f"{path}: tensor {name} has dtype {kind}; dequantise it to {', '.join(_DTYPES)}")
    kinds = sorted({tensor.dtype for tensor in stored.values()})
    if dtype is None and len(kinds) > 1:
        raise BadCheckpoint(f"{folder}: tensors have dtypes {' and '.join(kinds)}; choose one with dtype=")


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise BadCheckpoint(f"{path}: not a readable safetensors file ({error}); copy or download it again") from None


def _read(path: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    with _opened(path) as file:
        for name in names:
            yield name, file.get_tensor(name)


def _their_name(name: str) -> str:
    return name if name == _HEAD else f"model.{name}"


def _our_name(name: str) -> str:
    return name.removeprefix("model.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadCheckpoint(f"{path}: there is no such file; pass the folder of a Hugging Face model") from None
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path}: not readable as JSON ({error}); copy or download it again") from None
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path}: holds a JSON {type(value).__name__}, not an object; copy or download it again")
    return value


@torch.no_grad()
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
    settings = write_settings(decoder.config, own_form=own_form)
    settings["dtype"] = str(decoder.output_weight.dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CONFIG).unlink(missing_ok=True)
    for path in folder.iterdir():
        if _WEIGHT_FILE.fullmatch(path.name):
            path.unlink()
    _write_weights(decoder, folder, max_shard_bytes)
    if tokenizer is not None:
        tokenizer.save(folder)
    ends = list(end_ids if end_ids is not None else getattr(tokenizer, "end_ids", ()))
    special = {
        "bos_token_id": None if tokenizer is None else tokenizer.document_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": None if tokenizer is None else tokenizer.pad_id,
    }
    _write_json(folder / _GENERATION, special)
    for path in folder.iterdir():
        if path.is_file():
            _flush(path)
    _write_json(folder / _CONFIG, settings | special)
    _flush(folder / _CONFIG)
    _flush(folder)


def _write_weights(decoder: Decoder, folder: Path, max_shard_bytes: int) -> None:
    """One file, or shards of at most `max_shard_bytes` (a larger tensor gets a shard of its own) and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, parameter in decoder.named_parameters():
        if shards[-1] and size + parameter.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][_their_name(name)] = parameter.detach()
        size += parameter.nbytes
    if len(shards) == 1:
        _write_shard(folder / _SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(parameter.nbytes for parameter in decoder.parameters())
    _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    path.touch()
    mode = path.stat().st_mode & 0o777  # what the umask grants; safetensors makes it 0600
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(mode)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
