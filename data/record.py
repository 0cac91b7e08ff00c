"""Records: one JSON object per line (or per parquet row), each with the place it came from.

Everything wrong with a file is a `BadRecord`, one line long: where it is, what is wrong, how to mend it; never the
content itself.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

CHUNK_BYTES = 1 << 20
RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
JSON_TYPE_NAMES = {
    dict: "object",
    list: "array",
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
}


class BadData(ValueError):
    """Data that cannot be used: one line that says what, where and how to mend it."""


class BadRecord(BadData):
    """Bad input, told in one line: `FILE:LINE: what is wrong; how to mend it`."""

    def __init__(self, source: str | Path, problem: str, remedy: str):
        super().__init__(" ".join(f"{source}: {problem}; {remedy}".split()))


@dataclass(frozen=True)
class Record:
    value: dict
    source: str  # FILE:LINE


def suffix_of(path: Path) -> str:
    """The suffix that decides the format: the last one, with the one before it if the last is a compression."""
    suffixes = path.suffixes
    return "".join(suffixes[-2:] if suffixes and suffixes[-1] in (".gz", ".zst") else suffixes[-1:])


def read_bytes(path: Path) -> Iterator[bytes]:
    """The decompressed content in chunks. A damaged or cut archive is a BadRecord."""
    if not path.is_file():
        raise BadRecord(path, "the file does not exist", "check the path")
    readers = {".gz": _read_gzip, ".zst": _read_zstandard}
    try:
        yield from readers.get(path.suffix, _read_plain)(path)
    except (OSError, EOFError, zlib.error) as error:
        raise BadRecord(path, f"cannot be read: {error}", "copy or compress the file again") from None


def read_records(path: str | Path) -> Iterator[Record]:
    """Every record of a .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, streamed. Blank lines are skipped."""
    path = Path(path)
    suffix = suffix_of(path)
    if suffix not in RECORD_SUFFIXES:
        raise BadRecord(path, f"has the unknown suffix {suffix!r}", f"give one of {', '.join(RECORD_SUFFIXES)}")
    records = _read_parquet(path) if suffix == ".parquet" else _read_json_lines(path)
    first = next(records, None)
    if first is None:
        raise BadRecord(path, "holds no record", "an empty dataset cannot be used: write at least one line")
    yield from chain((first,), records)


def write_records(path: str | Path, values: Iterable[dict]) -> None:
    """One JSON object per line, atomically: a temporary file, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def require(record: Record, key: str, kind: type | tuple[type, ...]):
    """The value of `key`, or a BadRecord naming the key and both types."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    expected = " or ".join(JSON_TYPE_NAMES.get(one, one.__name__) for one in kinds)
    if key not in record.value:
        raise BadRecord(record.source, f"has no key {key!r}", f"add it as {expected}")
    value = record.value[key]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        received = JSON_TYPE_NAMES.get(type(value), type(value).__name__)
        raise BadRecord(record.source, f"{key!r} is {received}", f"make it {expected}")
    return value


def _read_plain(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _read_gzip(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _read_zstandard(path: Path) -> Iterator[bytes]:
    """Frame after frame. The library's own stream reader takes a cut frame for the end, so frames are counted here."""
    try:
        import zstandard
    except ImportError:
        raise BadRecord(path, "needs the package zstandard", "pip install warpline[text]") from None
    frame = None
    try:
        for chunk in _read_plain(path):
            while chunk:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(chunk)
                chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from None
    if frame is not None:
        raise EOFError("the last zstandard frame is cut off")


def _lines(path: Path) -> Iterator[bytes]:
    rest = b""
    for chunk in read_bytes(path):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _read_json_lines(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield _parse_line(line, f"{path}:{number}", "utf-8-sig" if number == 1 else "utf-8")


def _parse_line(line: bytes, source: str, encoding: str) -> Record:
    try:
        value = json.loads(line.decode(encoding))
        if b"\\u" in line:  # only an escape can smuggle in half a surrogate pair, which no tokenizer can encode
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise BadRecord(source, f"is not UTF-8 at byte {error.start + 1}", "save the file as UTF-8") from None
    except UnicodeEncodeError:
        raise BadRecord(source, "escapes half a surrogate pair", "write the character itself, or both halves") from None
    except json.JSONDecodeError as error:
        raise BadRecord(source, f"is not JSON: {error.msg} at column {error.colno}", "write one JSON object per line") from None
    except (ValueError, RecursionError):  # a number past Python's digit limit; brackets nested past its stack
        raise BadRecord(source, "is not JSON this program can hold", "shorten its numbers and nesting") from None
    if not isinstance(value, dict):
        received = JSON_TYPE_NAMES.get(type(value), type(value).__name__)
        raise BadRecord(source, f"is a JSON {received}, not an object", 'write one {"key": value} object per line')
    return Record(value, source)


def _read_parquet(path: Path) -> Iterator[Record]:
    """Row group by row group; the line of a record is its row, counted from 1."""
    if not path.is_file():
        raise BadRecord(path, "the file does not exist", "check the path")
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise BadRecord(path, "needs the package pyarrow", "pip install warpline[text]") from None
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            for value in (value for batch in file.iter_batches(batch_size=1024) for value in batch.to_pylist()):
                row += 1
                yield Record(value, f"{path}:{row}")
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise BadRecord(path, f"is not readable parquet after row {row}: {reason}", "write the file again") from None
