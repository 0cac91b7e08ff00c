"""The run folder: every file a run writes goes through here, and all but metrics.jsonl and samples.jsonl are replaced
atomically.
"""

import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from ...parallel.tensor_file import naming
from .config import BadConfig, Config
from .file import read_json, write_atomic, write_json

LAYOUTS = ("parallel", "teacher_parallel")  # a run may go on under another layout
LOCK = ".lock"
UNSTARTED = {LOCK, "config.json", "environment.json", "ended.json"}  # all that a run leaves which was refused for its input


class RunFolder:
    """A run on disk. `writes` is False on every rank but the first: its calls then change nothing."""

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes

    def open(self, config: Config, verb: str) -> None:
        """Claim the folder for this resolved configuration, until this process ends; a folder of another one is refused, but
        for its layout, and so is one that another process has claimed."""
        resolved = {"verb": verb, **config.model_dump(mode="json")}
        known = self.path / "config.json"
        if not known.exists() and self.path.is_dir() and {path.name for path in self.path.iterdir()} - {LOCK}:
            raise BadConfig(f"{self.path} is not empty and has no config.json; choose another folder with --run")
        self._lock()
        if known.exists():
            difference = _first_difference(_without_layout(read_json(known)), _without_layout(resolved))
            if not difference or {path.name for path in self.path.iterdir()} <= UNSTARTED:
                self.write_json("config.json", resolved)
            else:
                raise BadConfig(
                    f"{self.path} holds a run of another configuration ({difference}); "
                    "choose another folder with --run, or remove it"
                )
        else:
            self.write_json("config.json", resolved)
        if not (self.path / "environment.json").exists():
            self.write_json("environment.json", environment())

    def _lock(self) -> None:
        """The operating system lets go of it when the process ends, however it ends: the file stays open until then."""
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise BadConfig(f"{self.path} is in use by another process; wait for it, or choose another with --run") from error
        except OSError:
            return  # a file system without locks

    def write_json(self, name: str, value: Any) -> None:
        if self.writes:
            write_json(self.path / name, value)

    def read_json(self, name: str, default: Any) -> Any:
        path = self.path / name
        return read_json(path) if path.exists() else default

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add one line to a .jsonl file."""
        if self.writes:
            with naming(self.path / name), (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def rewind(self, name: str, stage: str, step: int) -> None:
        """Drop a stage's lines past `step`, and a line torn by a kill: a resumed stage writes them again."""
        path = self.path / name
        if not (self.writes and path.exists()):
            return
        kept = []
        for line in path.read_bytes().splitlines(keepends=True):
            record = parse_line(line)
            if record is not None and (record["stage"] != stage or record["step"] <= step):
                kept.append(line)
        write_atomic(path, b"".join(kept))

    def checkpoints(self, stage: str) -> Path:
        return self.path / "checkpoints" / stage

    def add_seconds(self, part: str, seconds: float) -> None:
        timing = self.read_json("timing.json", {})
        self.write_json("timing.json", {**timing, part: round(timing.get(part, 0.0) + seconds, 3)})

    def replace_score(self, score: dict[str, Any]) -> None:
        """Put a stage's score behind the others, or in place of its old one."""
        scores = self.read_json("scores.json", [])
        if any(old["stage"] == score["stage"] for old in scores):
            scores = [score if old["stage"] == score["stage"] else old for old in scores]
        else:
            scores.append(score)
        self.write_json("scores.json", scores)

    def end(self, reason: str) -> None:
        """Say why the run ended, and at which step: that of the last whole line of metrics.jsonl."""
        metrics = self.path / "metrics.jsonl"
        records = [parse_line(line) for line in metrics.read_bytes().splitlines()[-2:]] if metrics.exists() else []
        step = next((record["step"] for record in reversed(records) if record is not None), 0)
        self.write_json("ended.json", {"reason": reason, "step": step})


def environment() -> dict[str, Any]:
    """What the run runs on; shown in the report, never compared."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = {name: importlib.metadata.version(name) for name in ("warpline", "torch", "numpy", "tokenizers", "safetensors")}
    return {
        **versions,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv[1:]),
    }


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def parse_line(line: bytes) -> dict[str, Any] | None:
    """One line of a .jsonl file, or None where a kill tore it."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _without_layout(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in LAYOUTS}


def _first_difference(old: Any, new: Any, key: str = "") -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*new, *(name for name in old if name not in new)]:
            found = _first_difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
            if found:
                return found
        return None
    return None if old == new else f"{key} is {old!r} there and {new!r} here"
