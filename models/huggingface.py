"""Hugging Face folders in and out: Llama and Qwen 3, safetensors only, one tensor at a time.

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
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .decoder import Decoder, DecoderConfig, RopeScaling

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
_DERIVED = ".rotary_emb.inv_freq"  # a table that old Llama checkpoints store

_SIZES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "mlp_width": "intermediate_size",
    "max_positions": "max_position_embeddings",
}
_DERIVED_SIZES = ("num_kv_heads", "head_width")
# What transformers assumes where config.json is silent, by model type.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "head_dim": None},
    "qwen3": {"max_position_embeddings": 32768, "head_dim": 128, "num_key_value_heads": 32},
}
# Settings that change the mathematics, and the values under which this decoder computes the same.
_REQUIRED_VALUES: dict[str, tuple] = {
    "hidden_act": ("silu",),
    "pretraining_tp": (1, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
}


class BadCheckpoint(ValueError):
    """One line that names the file or tensor, what is wrong with it, and the remedy."""


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
    settings = _read_json(path)
    kind = settings.get("model_type")
    if kind not in _ARCHITECTURES:
        raise BadCheckpoint(f"{path}: model_type is {kind!r}; supported are {', '.join(_ARCHITECTURES)}")
    architectures = settings.get("architectures") or [_ARCHITECTURES[kind]]
    if _ARCHITECTURES[kind] not in architectures:
        raise BadCheckpoint(f"{path}: architectures is {architectures}; for {kind} only {_ARCHITECTURES[kind]} is supported")
    for name, values in _REQUIRED_VALUES.items():
        if settings.get(name, values[0]) not in values:
            raise BadCheckpoint(f"{path}: {name}={settings[name]!r} is not supported; only {values[0]!r} is")
    if any(layer != "full_attention" for layer in settings.get("layer_types") or ()):
        raise BadCheckpoint(f"{path}: layer_types={settings['layer_types']} is not supported; only full_attention is")
    settings = _DEFAULTS[kind] | settings
    try:
        return DecoderConfig(
            **_sizes(settings, path),
            **_rope(settings, path),
            norm_eps=settings.get("rms_norm_eps", 1e-6),
            query_key_norm=kind == "qwen3",
            attention_bias=settings.get("attention_bias", False),
            mlp_bias=settings.get("mlp_bias", False),
            tie_embeddings=settings.get("tie_word_embeddings", False),
            init_std=settings.get("initializer_range", 0.02),
        )
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "the sizes"
        raise BadCheckpoint(f"{path}: {name}: {first['msg']}; correct that setting") from None


def _sizes(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    sizes: dict[str, Any] = {ours: settings.get(theirs) for ours, theirs in _SIZES.items()}
    for ours, size in sizes.items():
        if not isinstance(size, int) and (size is not None or ours not in _DERIVED_SIZES):
            raise BadCheckpoint(f"{path}: {_SIZES[ours]} is {size!r}; it must be a number, as transformers writes it")
    derived = {"num_kv_heads": sizes["num_heads"], "head_width": sizes["width"] // max(1, sizes["num_heads"])}
    return sizes | {ours: sizes[ours] or derived[ours] for ours in _DERIVED_SIZES}


def _rope(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`; before, `rope_theta` and `rope_scaling`, with `type` for `rope_type`."""
    new, old = settings.get("rope_parameters") or {}, settings.get("rope_scaling") or {}
    if new and old and new != old:
        raise BadCheckpoint(f"{path}: rope_parameters and rope_scaling differ; keep rope_parameters and delete the other")
    rope = new or old
    if not isinstance(rope, dict):
        raise BadCheckpoint(f"{path}: rope_parameters is {rope!r}; it must be an object, as transformers writes it")
    theta = rope.get("rope_theta") or settings.get("rope_theta") or 10000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    fraction = rope.get("partial_rotary_factor", 1.0)
    if fraction != 1.0:
        raise BadCheckpoint(f"{path}: partial_rotary_factor={fraction!r} is not supported; only 1.0 is")
    if kind not in ("default", "llama3"):
        raise BadCheckpoint(f"{path}: rope_type={kind!r} is not supported; supported are default and llama3")
    if kind == "default":
        return {"rope_theta": theta}
    names = ("factor", "low_freq_factor", "high_freq_factor")
    absent = [name for name in names if name not in rope]
    if absent:
        raise BadCheckpoint(f"{path}: rope_type llama3 lacks {absent[0]}; add it, as transformers writes it")
    original = rope.get("original_max_position_embeddings") or settings["max_position_embeddings"]
    scaling = RopeScaling(**{name: rope[name] for name in names}, original_max_positions=original)
    return {"rope_theta": theta, "rope_scaling": scaling}


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
) -> None:
    """Write the decoder as a Llama (with query/key norm: Qwen 3) that transformers loads, replacing weights there.

    `end_ids` (default: the tokenizer's) stop `generate`. Every file is on disk (fsync) when this returns.
    """
    folder = Path(folder)
    settings = _settings(decoder)
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


def _settings(decoder: Decoder) -> dict[str, Any]:
    config = decoder.config
    kind = "qwen3" if config.query_key_norm else "llama"
    if kind == "qwen3" and config.mlp_bias:
        raise ValueError("mlp_bias=True with query_key_norm=True is neither Llama nor Qwen 3; to export, set one of them False")
    if kind == "llama" and config.width % config.num_heads:
        raise ValueError(
            f"width={config.width} is not a multiple of num_heads={config.num_heads}, and transformers then refuses "
            "a Llama; to export, choose such a width"
        )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling.model_dump()
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": scaling.pop("original_max_positions")}
        rope |= scaling
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "dtype": str(decoder.output_weight.dtype).removeprefix("torch."),
        "hidden_act": "silu",
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        "rope_parameters": rope,
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.attention_bias,
        **({} if kind == "qwen3" else {"mlp_bias": config.mlp_bias}),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
    }


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
