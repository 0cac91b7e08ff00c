"""Data: from text to a tokenizer, token shards and generated tasks.

Run     warpline data configs/data/own_data.toml
Reads   text files (.txt .jsonl .parquet, .gz and .zst too), or Python's standard library ("standard-library")
Writes  RUN/data/: tokenizer/, train/ (token shards), held_out.jsonl, and with [tasks] sft.jsonl, rl.jsonl,
        held_out_tasks.jsonl; RUN/data.json with the counts, last
Expect  half a minute for the standard library (about 10 MB of source) on two cores
"""

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt

from ..data.deduplicate import deduplicate
from ..data.record import write_records
from ..data.shards import TokenShards, write_shards
from ..data.task import make_tasks
from ..data.text import Document, read_documents, split, standard_library_documents
from ..data.tokenizer import ChatTokenizer, train_tokenizer
from ..parallel.mesh import Mesh
from .parts.config import BadConfig, Config
from .parts.progress import StageProgress
from .parts.run import RunFolder

STANDARD_LIBRARY = "standard-library"


class TaskConfig(Config):
    """Generated tasks: difficulty per family, and how many instances of each family go where.

    `wrong_demonstrations` is the share of SFT's demonstrated answers that are wrong (near misses), as people's are; the graders
    know the right ones.
    """

    sizes: dict[str, PositiveInt]
    wrong_demonstrations: float = Field(0.0, ge=0, lt=1)
    sft_per_family: PositiveInt
    rl_per_family: PositiveInt
    held_out_per_family: PositiveInt


class DataConfig(Config):
    """`text`: files and folders, or "standard-library". Held-out documents are chosen by a hash of their text.

    Give `vocab_size` to train a tokenizer, or `tokenizer`, a model's folder, to use its own.
    """

    text: list[str] = Field(min_length=1)
    vocab_size: PositiveInt | None = None
    tokenizer: str | None = None
    held_out_fraction: float = Field(0.05, gt=0, lt=1)
    held_out_bytes: PositiveInt = 200_000
    near_duplicate_threshold: float = Field(0.8, gt=0, le=1)
    tokenizer_bytes: PositiveInt = 4_000_000
    tasks: TaskConfig | None = None


class DataStageConfig(DataConfig):
    """The stage by itself."""

    seed: NonNegativeInt = 0


def main(config: DataStageConfig, run: RunFolder, mesh: Mesh) -> Path:
    """Make RUN/data unless RUN/data.json says that it is done; returns RUN/data."""
    folder = run.path / "data"
    mesh.note("data")
    # The first rank alone looks: another may come here after the data was made, and must wait its turn all the same.
    mesh.on_first(lambda: _make(config, run, folder))
    return folder


def _make(config: DataStageConfig, run: RunFolder, folder: Path) -> None:
    if (run.path / "data.json").exists():
        return
    with StageProgress("data", 4) as progress:
        _make_files(config, run, folder, progress)


def _make_files(config: DataStageConfig, run: RunFolder, folder: Path, progress: StageProgress) -> None:
    documents, counts = deduplicate(_collect(config.text), threshold=config.near_duplicate_threshold)
    train, held_out = split(documents, config.held_out_fraction, config.seed)
    held_out = _excerpts(held_out, config.held_out_bytes)
    if not held_out:
        raise BadConfig(
            f"held_out_bytes={config.held_out_bytes} is too little for one line of each held-out document; raise it"
        )
    progress.advance(f"{len(documents)} documents")
    tokenizer = _tokenizer(config, train)
    tokenizer.save(folder / "tokenizer")
    progress.advance(f"{tokenizer.vocab_size} tokens")
    write_shards(
        folder / "train",
        _encoded(train, tokenizer),
        vocab_size=tokenizer.vocab_size,
        document_id=tokenizer.document_id,
    )
    write_records(folder / "held_out.jsonl", ({"text": document.text, "source": document.source} for document in held_out))
    num_tokens = TokenShards(folder / "train").num_tokens
    progress.advance(f"{num_tokens:,} tokens")
    if config.tasks:
        _write_tasks(config.tasks, config.seed, folder)
    run.write_json("baseline.json", zlib_baseline(held_out))
    run.write_json("data.json", {
        **counts,
        "train_documents": len(train), "held_out_documents": len(held_out), "train_tokens": num_tokens,
        "vocab_size": tokenizer.vocab_size, "train_bytes": _bytes(train), "held_out_bytes": _bytes(held_out),
        "bytes_per_token": round(_bytes(train) / num_tokens, 4),
        "tasks": config.tasks.model_dump(mode="json") if config.tasks else None,
    })  # fmt: skip
    progress.advance(f"{_bytes(train) / 1e6:.1f} MB of text, {num_tokens / 1e6:.2f} M tokens")


def _tokenizer(config: DataConfig, train: Sequence[Document]) -> ChatTokenizer:
    if config.tokenizer is not None and config.vocab_size is None:
        return ChatTokenizer.load(config.tokenizer)
    if config.vocab_size is not None and config.tokenizer is None:
        return ChatTokenizer(train_tokenizer(_some_texts(train, config.tokenizer_bytes), config.vocab_size))
    raise BadConfig("give either vocab_size (a tokenizer is trained) or tokenizer (the folder of a model that has one)")


def _collect(text: Sequence[str]) -> list[Document]:
    paths = [Path(path) for path in text if path != STANDARD_LIBRARY]
    library = standard_library_documents() if STANDARD_LIBRARY in text else []
    return [*library, *read_documents(paths)]


def _write_tasks(config: TaskConfig, seed: int, folder: Path) -> None:
    sides: dict[str, dict[str, Any]] = {
        "sft.jsonl": {
            "count_per_family": config.sft_per_family,
            "held_out": False,
            "seed": seed,
            "wrong_share": config.wrong_demonstrations,
        },
        "rl.jsonl": {"count_per_family": config.rl_per_family, "held_out": False, "seed": seed + 1_000_003},
        "held_out_tasks.jsonl": {"count_per_family": config.held_out_per_family, "held_out": True, "seed": seed},
    }
    for name, side in sides.items():
        write_records(folder / name, make_tasks(config.sizes, **side))


def _encoded(documents: Sequence[Document], tokenizer: ChatTokenizer, per_batch: int = 64) -> Iterator[list[int]]:
    for batch in _batched(documents, per_batch):
        yield from tokenizer.encode_batch([document.text for document in batch])


def _batched(documents: Sequence[Document], size: int) -> Iterator[Sequence[Document]]:
    for start in range(0, len(documents), size):
        yield documents[start : start + size]


def _excerpts(documents: Sequence[Document], limit: int) -> list[Document]:
    """The beginning of every document, whole lines, each as long as an equal share of `limit` bytes allows.

    Short documents are whole, and what they leave of their share goes to the longer ones.
    """
    excerpts, left = {}, limit
    by_size = sorted(range(len(documents)), key=lambda index: len(documents[index].text.encode()))
    for rank, index in enumerate(by_size):
        excerpts[index] = _first_lines(documents[index].text, left // (len(documents) - rank))
        left -= len(excerpts[index].encode())
    return [Document(excerpts[index], documents[index].source) for index in range(len(documents)) if excerpts[index]]


def _first_lines(text: str, limit: int) -> str:
    content = text.encode()
    if len(content) <= limit:
        return text
    cut = content[:limit]
    return cut[: cut.rfind(b"\n") + 1].decode()


def _some_texts(documents: Sequence[Document], limit: int) -> list[str]:
    """An even sample of the documents, about `limit` bytes, for training the tokenizer."""
    stride = max(1, round(_bytes(documents) / limit))
    return [document.text for document in documents[::stride]]


def _bytes(documents: Sequence[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def zlib_baseline(documents: Sequence[Document]) -> dict[str, Any]:
    """What `zlib -9` makes of the held-out bytes, all documents in one stream."""
    content = "".join(document.text for document in documents).encode()
    return {"zlib_bits_per_byte": round(8 * len(zlib.compress(content, 9)) / len(content), 4), "bytes": len(content)}
