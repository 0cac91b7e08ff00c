"""Checkpoints: complete or absent, verified on load, written by every rank while training goes on.

Axes: all of them; each rank writes the rectangles that it holds into shared safetensors files (`tensor_file.py`), which are the
same bytes whatever the layout. A `Saver` copies a rank's pieces to host memory and returns; a thread writes them into
`step-N.tmp-…`, reads all files back for the digests of manifest.json, which comes last, and one rename publishes `step-N`.

| collective of a save, n ranks, t tensors                       | bytes a rank                                |
|----------------------------------------------------------------|---------------------------------------------|
| all-reduce: is every number written by one rank                | 2·(n−1)/n·8·t                               |
| six all-gathers: name, outcomes of five phases, digests        | n·(8 + the longest JSON: about 100 a file)  |

**Source** load-time resharding, asynchronous saves: PyTorch's distributed checkpoint; ByteCheckpoint, arXiv 2407.20143.
**Limits** Hosts must share a file system on which several may write one file at once, and where what one wrote, synced and
closed is seen by another (disks of one host, Lustre, GPFS, NFS; no object store). The copy holds a rank's pieces once more.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .tensor_file import BadCheckpoint as BadCheckpoint
from .tensor_file import Piece as Piece
from .tensor_file import Plan, check_piece, create, write
from .tensor_file import Whole as Whole
from .tensor_file import plan as plan
from .tensor_file import read_into as read_into
from .tensor_file import reader as reader

MANIFEST = "manifest.json"
Contents = tuple[Plan, dict[str, Piece]]


class SaveFailed(OSError):
    """A checkpoint that was not written, on every rank: the rank that failed, and the file."""


# ---- Complete or absent: digests, names, and what a kill leaves ----


def digests(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size in bytes and BLAKE2b digest of files, read back."""
    return {name: {"bytes": (folder / name).stat().st_size, "blake2b": _digest(folder / name)} for name in names}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def share(sizes: dict[str, int], rank: int, size: int) -> list[str]:
    """The files that `rank` of `size` ranks reads: dealt out in turn, the largest first."""
    return sorted(sizes, key=lambda name: (-sizes[name], name))[rank::size]


def write_manifest(folder: Path, entries: dict[str, dict[str, Any]] | None = None) -> None:
    """Writes manifest.json, which certifies the folder's files and is written last, from `digests` (None: made here)."""
    if entries is None:
        entries = digests(folder, flush(folder))
    path = folder / MANIFEST
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(dict(sorted(entries.items())), indent=2) + "\n")
    sync(path)
    sync(folder)


def flush(folder: Path) -> list[str]:
    """Every file of the folder but the manifest, once they are on disk (fsync)."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    for name in names:
        sync(folder / name)
    sync(folder)
    return names


def sync(path: Path) -> None:
    """What was written to a file, or a folder's names, is on disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(checkpoint: Path, rank: int = 0, size: int = 1) -> str | None:
    """What is wrong with a checkpoint's files, or None; of `size` ranks, each reads its share, and all must find nothing."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        entries = {name: {"bytes": entry["bytes"], "blake2b": entry["blake2b"]} for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    present = {path.name for path in checkpoint.iterdir()} - {MANIFEST}
    if present != set(entries):
        return f"its files differ from the manifest's: {', '.join(sorted(present ^ set(entries)))}"
    for name in share({name: (checkpoint / name).stat().st_size for name in entries}, rank, size):
        if (checkpoint / name).stat().st_size != entries[name]["bytes"] or _digest(checkpoint / name) != entries[name][
            "blake2b"
        ]:
            return f"{name} does not match its digest"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The published checkpoints under `folder`, newest first."""
    folders = [path for path in folder.glob("step-*") if path.is_dir()]
    found = [(int(match[1]), path) for path in folders if (match := re.fullmatch(r"step-(\d+)", path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def sweep(folder: Path) -> None:
    """Removes what killed saves left under `folder`; while nothing saves there."""
    for old in folder.glob("step-*.old-*"):
        final = old.with_name(old.name.partition(".")[0])
        if final.exists():
            shutil.rmtree(old)
        else:  # killed between the two renames of `_publish`
            old.rename(final)
    for leftover in folder.glob("step-*.tmp-*"):
        shutil.rmtree(leftover)


def _publish(temporary: Path, final: Path, keep: int) -> None:
    """Renames a complete folder to its name, an earlier one of that name out of the way, and removes all but it and the `keep`
    − 1 before it. Newer ones are damaged: training went on from an older one. They stay, and do not count."""
    folder, token = final.parent, secrets.token_hex(4)
    old = folder / f"{final.name}.old-{token}"
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    sync(folder)
    if old.exists():
        shutil.rmtree(old)
    found = checkpoints(folder)
    for path in found[found.index(final) + keep :]:
        shutil.rmtree(path.rename(folder / f"{path.name}.tmp-{token}"))


# ---- Saving while training goes on ----


class Saver:
    """Saves on a thread, at most one save at a time; every rank makes the same calls.

    `group` is a gloo group of all ranks for the Saver alone (None: one process). Its timeout bounds the longest that one rank
    waits for another: choose it longer than a rank writes. At the end call `wait`, drop the Saver, then destroy the group: a
    gloo group that outlives the interpreter may abort it (pytorch pull request 179291).
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self._flight: Future[None] | None = None

    def save(
        self,
        folder: Path,
        step: int,
        files: list[Contents],
        describe: Callable[[Path], None],
        keep: int,
    ) -> None:
        """Returns once the pieces are in host memory; `folder/step-N` appears later, or `wait` or the next `save` raises.

        `describe`, on the first rank and on the thread, writes all other files into the folder it is given. All but the
        newest `keep` checkpoints, up to this one, are removed.
        """
        self.wait()
        frozen = [(layout, _snapshot(layout, pieces)) for layout, pieces in files]
        thread = ThreadPoolExecutor(1, "checkpoint")
        self._flight = thread.submit(self._commit, folder / f"step-{step}", frozen, describe, keep)
        thread.shutdown(wait=False)  # ends with the save; the interpreter's exit waits for it

    def wait(self) -> None:
        """Returns once the save in flight is published; SaveFailed on every rank where it failed on any."""
        if self._flight is not None:
            try:
                self._flight.result()
            finally:
                if self._flight.done():
                    self._flight = None

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (JSON), in rank order, once no save is in flight."""
        self.wait()
        return self._gather(value)

    def _commit(self, final: Path, files: list[Contents], describe: Callable[[Path], None], keep: int) -> None:
        try:
            # A name that no save used before: hosts of a shared file system may remember names that did not exist.
            temporary = final.with_name(self._gather(f"{final.name}.tmp-{secrets.token_hex(4)}")[0])
            self._check_covered(final, files)
            try:
                self._write(temporary, final, files, describe, keep)
            finally:
                if self.rank == 0:  # there after a failure alone
                    shutil.rmtree(temporary, ignore_errors=True)
        except RuntimeError as error:  # of a collective
            text = f"rank {self.rank}: another rank ended, or hangs: {_one_line(error)}"
            raise SaveFailed(errno.ECONNRESET, text, str(final)) from error

    def _write(self, temporary: Path, final: Path, files: list[Contents], describe: Callable[[Path], None], keep: int) -> None:
        def start() -> None:
            temporary.mkdir(parents=True)
            for layout, _ in files:
                create(layout, temporary)

        def write_mine() -> None:
            for layout, pieces in files:
                write(layout, temporary, pieces)

        def finish() -> dict[str, int]:
            describe(temporary)
            return {name: (temporary / name).stat().st_size for name in flush(temporary)}

        def publish() -> None:
            write_manifest(temporary, {name: entry for part in parts for name, entry in part.items()})
            _publish(temporary, final, keep)

        is_first = self.rank == 0
        self._together(final, start if is_first else None)
        self._together(final, write_mine)
        sizes = self._together(final, finish if is_first else None)[0]
        parts = self._together(final, partial(digests, temporary, share(sizes, self.rank, self.size)))
        self._together(final, publish if is_first else None)

    def _check_covered(self, final: Path, files: list[Contents]) -> None:
        """A number that no rank writes would be 0, silently."""
        places = [(name, place, pieces) for layout, pieces in files for name, place in layout.places.items()]
        written = torch.tensor([pieces[name].tensor.numel() if name in pieces else 0 for name, _, pieces in places])
        if self._group is not None:
            dist.all_reduce(written, group=self._group)
        for (name, place, _), count in zip(places, written.tolist(), strict=True):
            if count != (expected := math.prod(place.whole.shape)):
                text = f"tensor {name}: the ranks write {count} of its {expected} numbers; let one rank write each of them"
                raise SaveFailed(errno.EINVAL, text, str(final / place.file))

    def _together(self, final: Path, action: Callable[[], Any] | None) -> list[Any]:
        """What `action` returns (JSON) on every rank; what it raises on any rank is raised on all."""
        cause: Exception | None = None
        outcome: dict[str, Any] = {"failure": [errno.EIO, "ended unexpectedly", str(final)]}
        try:
            outcome = {"result": None if action is None else action()}
        except OSError as error:
            cause = error
            outcome["failure"] = [error.errno or errno.EIO, error.strerror or str(error), str(error.filename or final)]
        except (ValueError, RuntimeError) as error:
            cause = error
            outcome["failure"][1] = str(error)
        finally:  # whatever was raised: the other ranks wait for this one
            outcomes = self._gather(outcome)
        for rank, other in enumerate(outcomes):
            if "failure" in other:
                number, text, file = other["failure"]
                raise SaveFailed(number, f"rank {rank}: {_one_line(text)}", file) from cause
        return [other["result"] for other in outcomes]

    def _gather(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(content)]), group=self._group)
        rows = [torch.zeros(int(max(sizes)), dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(rows, torch.nn.functional.pad(content, (0, len(rows[0]) - len(content))), group=self._group)
        return [json.loads(row[: int(size)].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())


def _snapshot(layout: Plan, pieces: dict[str, Piece]) -> dict[str, Piece]:
    """Copies, in host memory (pinned where they come from a GPU) and in the files' dtypes, of the pieces to be written."""
    frozen, devices = {}, set()
    for name, piece in pieces.items():
        check_piece(layout, name, piece)
        if piece.writes:
            tensor = piece.tensor.detach()
            host = torch.empty(tensor.shape, dtype=layout.places[name].whole.dtype, pin_memory=tensor.is_cuda)
            frozen[name] = piece._replace(tensor=host.copy_(tensor, non_blocking=tensor.is_cuda))
            devices |= {tensor.device} if tensor.is_cuda else set()
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return frozen
