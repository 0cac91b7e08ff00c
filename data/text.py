"""Documents: raw text with its source, from a user's files or from the running Python's standard library."""

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .record import RECORD_SUFFIXES, BadData, BadRecord, read_bytes, read_records, require, suffix_of

TEXT_SUFFIXES = (".txt", ".txt.gz", ".txt.zst")
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class Document:
    text: str
    source: str  # FILE, or FILE:LINE where a file holds many


def read_documents(paths: Iterable[str | Path], text_field: str = "text") -> Iterator[Document]:
    """Documents of .txt, .jsonl (both also .gz or .zst) and .parquet files, in the order given; a folder is walked sorted.

    A text file is one document; a record is one document, its text under `text_field`.
    """
    for path in map(Path, paths):
        for file in _files_of(path):
            if suffix_of(file) in TEXT_SUFFIXES:
                yield Document(_read_text(file), str(file))
            else:
                yield from (Document(require(record, text_field, str), record.source) for record in read_records(file))


def standard_library_documents() -> list[Document]:
    """The running Python's own library, its tests left out: real text that every machine with Python has."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1]) and (text := _decodable(path)):
            documents.append(Document(text, relative.as_posix()))
    return sorted(documents, key=lambda document: document.source)


def split(documents: Iterable[Document], held_out_fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """(train, held out). The side of a document is a hash of its text and the seed: whole documents, whatever their order,
    their names and the folder they lie in.
    """
    if not 0 < held_out_fraction < 1:
        raise BadData(f"held_out_fraction is {held_out_fraction}, expected a number between 0 and 1, neither included")
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        digest = hashlib.blake2b(f"{seed}:{document.text}".encode(), digest_size=8).digest()
        sides[int.from_bytes(digest, "little") < held_out_fraction * 2**64].append(document)
    if not all(sides):
        counts = f"{len(sides[0])} train and {len(sides[1])} held-out documents"
        raise BadData(f"the split left {counts}, expected some on each side; give more files, another fraction or seed")
    return sides


def _files_of(path: Path) -> list[Path]:
    known = (*TEXT_SUFFIXES, *RECORD_SUFFIXES)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and suffix_of(file) in known)
        if not files:
            raise BadRecord(path, "the folder holds no text", f"put files there ending in {', '.join(known)}")
        return files
    if suffix_of(path) not in known:
        raise BadRecord(path, f"has the unknown suffix {suffix_of(path)!r}", f"give one of {', '.join(known)}")
    return [path]


def _read_text(path: Path) -> str:
    data = b"".join(read_bytes(path))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadRecord(f"{path}:{line}", f"is not UTF-8 at byte {error.start + 1} of the file", "save it as UTF-8") from None
    if not text.strip():
        raise BadRecord(path, "holds no text", "an empty dataset cannot be used: remove the file or fill it")
    return text


def _decodable(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
