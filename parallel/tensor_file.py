"""Tensors in safetensors files that every rank writes and reads by itself: its rectangle of each, whatever cut it there.

Where a tensor's bytes lie follows from names, shapes and dtypes alone (`plan`): the files are those that safetensors would
write of the whole tensors, byte for byte, and a rank writes its rectangles into them at computed offsets. Any other cut, one
process, or transformers reads them. Nothing is gathered, and nothing here communicates.

**Source** the format: github.com/huggingface/safetensors (8 bytes of header length, a JSON header, the data).
**Limits** Hosts must share a file system on which several may write one file at once (no object store). A cut of columns costs
one system call a row.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# In the order of the data of a file, which is safetensors': wide dtypes first, so that every tensor is aligned.
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_DTYPES)}


class BadCheckpoint(ValueError):
    """One line that names the file or tensor, what is wrong with it, and the remedy."""


class Piece(NamedTuple):
    """A rank's rectangle of a tensor of `shape`, beginning at `offset`; `writes` is False where another rank writes it."""

    tensor: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    writes: bool = True

    @classmethod
    def of(cls, tensor: Tensor) -> Piece:
        """A tensor that is whole here."""
        return cls(tensor.detach(), tuple(tensor.shape), (0,) * tensor.ndim)


class Whole(NamedTuple):
    """A tensor as the files hold it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Place(NamedTuple):
    """Where a whole tensor lies: `start` is its first byte, counted from the file's."""

    file: str
    start: int
    whole: Whole


@dataclass(frozen=True)
class Plan:
    """Files by name: the first bytes of each (all of the index), its size in bytes; and where every tensor lies."""

    heads: dict[str, bytes]
    sizes: dict[str, int]
    places: dict[str, Place]


# ---- Where every byte goes ----


def plan(wholes: dict[str, Whole], stem: str, max_shard_bytes: int = 5 * 10**9) -> Plan:
    """`stem`.safetensors, or shards of at most `max_shard_bytes` (a larger tensor gets one of its own) and their index, as
    Hugging Face names them. A pure function of its arguments, in their order.
    """
    shards: list[dict[str, Whole]] = [{}]
    size = 0
    for name, whole in wholes.items():
        if whole.dtype not in _DTYPES:
            raise ValueError(f"tensor {name} has dtype {whole.dtype}; expected one of {', '.join(map(str, _DTYPES))}: cast it")
        if shards[-1] and size + _num_bytes(whole) > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = whole
        size += _num_bytes(whole)
    count = len(shards)
    files = (
        [f"{stem}.safetensors"] if count == 1 else [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    )
    result = Plan({}, {}, {})
    for file, shard in zip(files, shards, strict=True):
        _place(file, shard, result)
    if count > 1:
        total = sum(_num_bytes(whole) for whole in wholes.values())
        weight_map = {name: result.places[name].file for name in wholes}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        result.heads[f"{stem}.safetensors.index.json"] = (json.dumps(index, indent=2) + "\n").encode()
        result.sizes[f"{stem}.safetensors.index.json"] = len(result.heads[f"{stem}.safetensors.index.json"])
    return result


def _place(file: str, shard: dict[str, Whole], result: Plan) -> None:
    """Adds a file: 8 bytes of header length, the header, padded to 8 bytes, and the tensors without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, whole in sorted(shard.items(), key=lambda item: (_RANKS[item[1].dtype], item[0])):
        start, end = end, end + _num_bytes(whole)
        header[name] = {"dtype": _DTYPES[whole.dtype], "shape": list(whole.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    result.heads[file] = head
    result.sizes[file] = len(head) + end
    for name, whole in shard.items():
        result.places[name] = Place(file, len(head) + header[name]["data_offsets"][0], whole)


def _num_bytes(whole: Whole) -> int:
    return math.prod(whole.shape) * whole.dtype.itemsize


# ---- Writing ----


def create(layout: Plan, folder: Path) -> None:
    """Creates the files at full size, with their headers; one rank does so, before any writes."""
    for file, head in layout.heads.items():
        with naming(folder / file), (folder / file).open("xb") as opened:
            opened.write(head)
            opened.truncate(layout.sizes[file])
            opened.flush()
            os.fsync(opened.fileno())


def write(layout: Plan, folder: Path, pieces: dict[str, Piece]) -> None:
    """Writes this rank's pieces, in the files' dtypes, into files that `create` made; on disk (fsync) when it returns.

    Holds one tensor in host memory where a piece is elsewhere, strided, or of another dtype, and nothing otherwise.
    """
    names: dict[str, list[str]] = {}
    for name, piece in pieces.items():
        check_piece(layout, name, piece)
        if piece.writes and piece.tensor.numel():
            names.setdefault(layout.places[name].file, []).append(name)
    for file in sorted(names):
        with naming(folder / file), (folder / file).open("r+b", buffering=0) as opened:
            for name in sorted(names[file], key=lambda name: layout.places[name].start):
                _write_piece(opened.fileno(), layout.places[name], pieces[name])
            os.fsync(opened.fileno())


def check_piece(layout: Plan, name: str, piece: Piece) -> None:
    """ValueError unless the piece is a rectangle of a tensor of the plan."""
    if name not in layout.places:
        raise ValueError(f"received a piece of {name}; expected a tensor of the plan: add it there")
    part, shape, offset = tuple(piece.tensor.shape), piece.shape, piece.offset
    if shape != layout.places[name].whole.shape:
        raise ValueError(f"tensor {name} has shape {list(shape)}; expected the plan's {list(layout.places[name].whole.shape)}")
    if not len(part) == len(shape) == len(offset) or any(
        start < 0 or start + size > whole for start, size, whole in zip(offset, part, shape, strict=True)
    ):
        raise ValueError(f"a piece {list(part)} at {list(offset)} of tensor {name}; expected one inside {list(shape)}")


def _write_piece(descriptor: int, place: Place, piece: Piece) -> None:
    flat = piece.tensor.detach().to("cpu", place.whole.dtype).contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().data
    length, starts = runs(tuple(piece.tensor.shape), piece.shape, piece.offset)
    size = place.whole.dtype.itemsize
    length *= size
    for number, start in enumerate(starts):
        rest, position = content[number * length : (number + 1) * length], place.start + start * size
        while rest:  # a call may write less than it was given, and Linux's at most 2 GiB
            written = os.pwrite(descriptor, rest, position)
            rest, position = rest[written:], position + written


def runs(part: tuple[int, ...], shape: tuple[int, ...], offset: tuple[int, ...]) -> tuple[int, list[int]]:
    """A rectangle `part` at `offset` of a row-major tensor as runs: their length and the first number of each."""
    if not math.prod(part):
        return 0, []
    last = max((dim for dim in range(len(part)) if part[dim] != shape[dim]), default=0)  # whole behind this dim
    stride = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    starts = torch.tensor([sum(start * step for start, step in zip(offset, stride, strict=True))])
    for dim in range(last):
        starts = (starts[:, None] + torch.arange(part[dim]) * stride[dim]).flatten()
    return math.prod(part[last:]), starts.tolist()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """What a descriptor's calls raise does not name the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


# ---- Reading ----


class Stored(NamedTuple):
    """A tensor of a folder, by its file's header; `start` is its first byte, counted from the file's."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    start: int


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of `stem`: one, or those that its index lists."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise BadCheckpoint(
            f"{folder}: holds neither {single.name} nor {index.name}; pass a Hugging Face folder with safetensors"
        )
    weight_map = read_object(index).get("weight_map")
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    if not files or not all(isinstance(file, str) for file in files):
        raise BadCheckpoint(f"{index}: weight_map must name the file of every tensor; save the model again")
    names = sorted(set(files))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise BadCheckpoint(f"{index}: it lists {name}, which is not a file of this folder; copy that shard here")
    return [folder / name for name in names]


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; BadCheckpoint if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadCheckpoint(f"{path}: there is no such file; pass the folder of a Hugging Face model") from None
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path}: not readable as JSON ({error}); copy or download it again") from None
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path}: holds a JSON {type(value).__name__}, not an object; copy or download it again")
    return value


def stored_tensors(folder: Path, stem: str) -> dict[str, Stored]:
    """Every tensor of the folder's `stem` files, from their headers alone."""
    stored: dict[str, Stored] = {}
    for path in weight_files(folder, stem):
        for name, entry in _header(path).items():
            if name in stored:
                raise BadCheckpoint(f"{path}: tensor {name} is also in {stored[name].path.name}; keep one of them")
            stored[name] = entry
    return stored


def _header(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(path, framework="np"):  # checks the whole header against the file's size, and reads no tensor
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError) as error:
        raise BadCheckpoint(f"{path}: not a readable safetensors file ({error}); copy or download it again") from None
    header.pop("__metadata__", None)
    return {
        name: Stored(path, tuple(entry["shape"]), entry["dtype"], 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def reader(folder: Path, stem: str) -> Callable[[dict[str, Piece]], None]:
    """What fills every piece's tensor in place, whatever cut the files were written from; only its own bytes are read, and the
    files' headers once."""
    stored = stored_tensors(folder, stem)

    def fill(pieces: dict[str, Piece]) -> None:
        for name, piece in pieces.items():
            if name not in stored:
                raise BadCheckpoint(f"{folder}: tensor {name} is missing from its {stem} files; take another checkpoint")
            if stored[name].shape != piece.shape:
                raise BadCheckpoint(
                    f"{stored[name].path}: tensor {name} has shape {list(stored[name].shape)}, not the model's "
                    f"{list(piece.shape)}; take a checkpoint of this model"
                )
        read_pieces(stored, pieces)

    return fill


def read_into(folder: Path, stem: str, pieces: dict[str, Piece]) -> None:
    """`reader`, once."""
    reader(folder, stem)(pieces)


def read_pieces(stored: dict[str, Stored], pieces: dict[str, Piece]) -> None:
    """`read_into` for names and shapes that were compared with `stored`.

    Holds one piece in host memory where it is elsewhere, strided, or of another dtype, and nothing otherwise.
    """
    for path in sorted({stored[name].path for name in pieces}):
        names = [name for name in pieces if stored[name].path == path]
        with naming(path), path.open("rb", buffering=0) as opened:
            for name in sorted(names, key=lambda name: stored[name].start):
                if stored[name].dtype not in _BY_NAME:
                    raise BadCheckpoint(f"{path}: tensor {name} has dtype {stored[name].dtype}; cast it to a plain one")
                _read_piece(opened.fileno(), stored[name], pieces[name])


@torch.no_grad()
def _read_piece(descriptor: int, stored: Stored, piece: Piece) -> None:
    tensor, dtype = piece.tensor.detach(), _BY_NAME[stored.dtype]
    fits = tensor.device.type == "cpu" and tensor.dtype == dtype and tensor.is_contiguous()
    host = tensor if fits else torch.empty(tensor.shape, dtype=dtype)
    content = host.reshape(-1).view(torch.uint8).numpy().data
    length, starts = runs(tuple(tensor.shape), piece.shape, piece.offset)
    length *= dtype.itemsize
    for number, start in enumerate(starts):
        rest, position = content[number * length : (number + 1) * length], stored.start + start * dtype.itemsize
        while rest:
            if not (read := os.preadv(descriptor, [rest], position)):
                raise BadCheckpoint(f"{stored.path}: ended at byte {position} while it was read; copy or download it again")
            rest, position = rest[read:], position + read
    if not fits:
        tensor.copy_(host)
