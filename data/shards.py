"""Token shards: a stream of documents as memory-mapped little-endian integers, with an index that is written last.

Each document is stored as its separator token, then its ids. Shards are cut by count, not by document: one stream.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np

from .record import BadData

INDEX = "index.json"
INDEX_KEYS = {"dtype": str, "vocab_size": int, "document_id": int, "num_tokens": int, "shards": list}
DTYPES = ("<u2", "<u4")


def write_shards(
    folder: str | Path,
    documents: Iterable[list[int]],
    *,
    vocab_size: int,
    document_id: int,
    tokens_per_shard: int = 2**24,
) -> dict:
    """Write the documents' ids; returns the index. An id outside the vocabulary, or equal to the separator, is refused."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)  # an old index must not vouch for new shards
    dtype = DTYPES[int(vocab_size > 2**16)]
    shards: list[dict] = []
    for tokens in _cut(_streams(documents, vocab_size, document_id), tokens_per_shard):
        data = tokens.astype(dtype).tobytes()
        name = f"shard-{len(shards):05d}.bin"
        _write_atomically(folder / name, data)
        shards.append({"name": name, "num_tokens": len(tokens), "blake2b": _digest(data)})
    if not shards:
        raise BadData(f"{folder}: no documents to write, expected at least one; check the text's paths")
    index = {
        "dtype": dtype,
        "vocab_size": vocab_size,
        "document_id": document_id,
        "num_tokens": sum(shard["num_tokens"] for shard in shards),
        "shards": shards,
    }
    _write_atomically(folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())
    return index


class TokenShards:
    """The stream, opened without reading it. Sizes are always checked; `verify` reads everything and checks digests."""

    def __init__(self, folder: str | Path, verify: bool = False):
        self.folder = Path(folder)
        index = _read_index(self.folder / INDEX)
        self.vocab_size: int = index["vocab_size"]
        self.document_id: int = index["document_id"]
        self.num_tokens: int = index["num_tokens"]
        self._shards = [_open_shard(self.folder, shard, index["dtype"], verify) for shard in index["shards"]]
        self._starts = [0, *accumulate(len(shard) for shard in self._shards)]

    def window(self, start: int, length: int) -> np.ndarray:
        """`length` tokens from `start`, across shards; a copy."""
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise BadData(f"window [{start}, {start + length}) of {self.folder}, expected one within [0, {self.num_tokens})")
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        for shard, offset in zip(self._shards[first:], self._starts[first:], strict=False):
            if offset >= start + length:
                break
            parts.append(shard[max(start - offset, 0) : start + length - offset])
        tokens = np.concatenate(parts) if parts else np.empty(0, dtype=DTYPES[0])
        if tokens.size and tokens.max() >= self.vocab_size:
            problem = f"token id {tokens.max()} near token {start}, expected ids below vocab_size = {self.vocab_size}"
            raise BadData(f"{self.folder}: {problem}; the shards are damaged, make them again")
        return tokens


def _streams(documents: Iterable[list[int]], vocab_size: int, document_id: int) -> Iterator[np.ndarray]:
    if not 0 <= document_id < vocab_size:
        raise BadData(f"document_id is {document_id}, expected an id below vocab_size = {vocab_size}")
    for number, ids in enumerate(documents, start=1):
        tokens = np.array([document_id, *ids], dtype=np.int64)
        wrong = tokens[(tokens < 0) | (tokens >= vocab_size)]
        if wrong.size:
            remedy = "use the tokenizer that vocab_size was taken from"
            raise BadData(f"document {number} has token id {wrong[0]}, expected 0 to {vocab_size - 1}; {remedy}")
        if (tokens[1:] == document_id).any():
            remedy = "encode text without special tokens"
            raise BadData(
                f"document {number} contains the separator {document_id}, expected it between documents only; {remedy}"
            )
        yield tokens


def _cut(streams: Iterable[np.ndarray], tokens_per_shard: int) -> Iterator[np.ndarray]:
    parts: list[np.ndarray] = []
    size = 0
    for tokens in streams:
        parts.append(tokens)
        size += len(tokens)
        while size >= tokens_per_shard:
            joined = np.concatenate(parts)
            yield joined[:tokens_per_shard]
            parts, size = [joined[tokens_per_shard:]], size - tokens_per_shard
    if size:
        yield np.concatenate(parts)


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _read_index(path: Path) -> dict:
    if not path.is_file():
        raise BadData(f"{path}: no such index, expected token shards; run `warpline data` first, or again if it was stopped")
    try:
        index = json.loads(path.read_bytes())
    except ValueError as error:
        raise BadData(f"{path}: {error}, expected JSON; run `warpline data` again") from None
    for key, kind in INDEX_KEYS.items():
        if not isinstance(index, dict) or not isinstance(index.get(key), kind):
            raise BadData(f"{path}: no {kind.__name__} {key!r} in the index; run `warpline data` again")
    counts = [shard["num_tokens"] for shard in index["shards"]]
    if index["dtype"] not in DTYPES or sum(counts) != index["num_tokens"]:
        raise BadData(f"{path}: dtype {index['dtype']!r} or counts {counts} are wrong; run `warpline data` again")
    return index


def _open_shard(folder: Path, shard: dict, dtype: str, verify: bool) -> np.memmap:
    path = folder / Path(shard["name"]).name
    received = path.stat().st_size if path.is_file() else 0
    expected = shard["num_tokens"] * np.dtype(dtype).itemsize
    if received != expected:
        raise BadData(f"{path}: {received} bytes, expected {expected}; the shard is cut or missing, run `warpline data` again")
    if verify and _digest(path.read_bytes()) != shard["blake2b"]:
        raise BadData(f"{path}: its digest is not the index's; the shard is damaged, run `warpline data` again")
    return np.memmap(path, dtype=dtype, mode="r")


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
