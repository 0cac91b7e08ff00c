"""Files that are never half-written: temporary sibling, fsync, rename."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...parallel.checkpoint import sync
from ...parallel.tensor_file import naming
from .config import BadConfig


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step; a reader sees the old or the new file, never a mixture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with naming(path):
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadConfig(f"{path}: not valid JSON ({error}); restore or delete it") from error
