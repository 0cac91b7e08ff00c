"""Who is alive: every process notes in the launcher's store that it lives and which step it is in, and one loss ends them all.

A collective's own timeout says that somebody is missing, not who. Each process watches the next rank; when that has been silent
for nine tenths of the timeout it is lost: so say the first to find it, in the store, where every process sees it within a beat.
Then each ends at once, collectives or not, and the lowest that is left writes why. A rank whose collective fails looks itself.
The store lives in the first node's torchrun, or in the first rank: where it does not answer, they are gone.

| calls to the store, a beat (a second; with more than 1000 ranks size/1000) | ranks      | bytes     |
|-----------------------------------------------------------------------------|------------|-----------|
| set its own, read the next one's, ask whether one was lost                  | every rank | about 100 |
| once a collective has failed: read everybody's, two to four times           | one rank   | 50·size   |
"""

from __future__ import annotations

import datetime
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from torch.distributed import Store  # type: ignore[attr-defined]

BEAT_SECONDS = 1.0
STORE_SECONDS = 3.0  # without the store, in which a process that is ending anyway ends
BEATS_A_SECOND = 1000  # of all ranks together: one process answers them
EXIT_FAILED = 4
HURRIED_BEATS = 10  # of silence, once a signal asked this process to end
NAMED = 4  # ranks named in a line


class FirstFailed(Exception):
    """The first rank failed at what the others waited for; it says why itself."""


class Beat(NamedTuple):
    """What a rank last said: how often it did, where it runs, and what it was at."""

    number: str
    host: str
    pid: str
    where: str


class Loss(NamedTuple):
    """Why the job ends: ranks that are gone or stopped, or none, where one failed and says why itself."""

    ranks: tuple[int, ...]
    reason: str
    line: str


class Watch:
    """Beats in the launcher's store, and ends the process when a rank is lost. `store` is the main thread's connection, `own`
    the watching thread's. `last_words` is called with the reason, on one rank, before it ends. A byte of a signal is written to
    `wakeup`: Python's own handlers wait for the main thread, and that for a collective."""

    def __init__(self, rank: int, size: int, timeout: datetime.timedelta, store: Store, own: Store):
        self.rank, self.size, self.seconds, self.store, self.own = rank, size, 0.9 * timeout.total_seconds(), store, own
        self.beat_seconds = max(BEAT_SECONDS, size / BEATS_A_SECOND)
        self.where, self.turns, self.beats = "start", 0, 0
        self.last_words: Callable[[str], None] = lambda reason: None
        self.stopped, self.ending = threading.Event(), threading.Lock()
        self.signals, self.wakeup = _pipe()
        self.beat(own)
        self.thread = threading.Thread(target=self._run, name="warpline-watch", daemon=True)
        self.thread.start()

    # ---- The thread ----

    def beat(self, store: Store) -> None:
        self.beats += 1
        store.set(f"beat/{self.rank}", f"{self.beats} {socket.gethostname()} {os.getpid()} {self.where}")

    def _run(self) -> None:
        behind = (self.rank + 1) % self.size
        last, since = None, time.monotonic()
        while not self.stopped.wait(self.beat_seconds):
            with suppress(BlockingIOError):
                if os.read(self.signals, 64):  # perhaps the launcher's, as it lost a rank: it will not wait for the timeout
                    self.seconds = min(self.seconds, HURRIED_BEATS * self.beat_seconds)
            try:
                self.beat(self.own)
                seen, loss = _seen(self.own, behind), _found(self.own)
                if seen != last:
                    last, since = seen, time.monotonic()
                elif time.monotonic() - since > self.seconds and seen.number != "ended":
                    loss = loss or self._lose(self.own, [behind])
            except RuntimeError:
                if self.stopped.wait(STORE_SECONDS):
                    return
                loss = self._orphaned()
            if loss is not None:
                self.end(loss)

    # ---- Losing ----

    def lost(self) -> Loss | None:
        """Why a collective failed here, if a rank is lost: one rank looks at all of them (3 beats, 6 where several seem
        silent), the others wait for what it finds."""
        try:
            if self.store.add("looking", 1) == 1 and _found(self.store) is None:
                silent = self._silent(range(self.size))
                silent = self._silent(silent) if len(silent) > 1 else silent
                if silent:
                    return self._lose(self.store, silent)
                self.store.set("nobody", "1")
            end = time.monotonic() + 6 * self.beat_seconds + 10
            while time.monotonic() < end and not self.store.check(["nobody"]):
                if loss := _found(self.store):
                    return loss
                time.sleep(0.05)
            return _found(self.store)
        except RuntimeError:
            return self._orphaned()

    def fail(self, reason: str, line: str) -> bool:
        """Tell the others that this rank ends by its own failure, so that they do not wait for it. False where another told the
        same `line` before."""
        self.stopped.set()
        self.thread.join()  # which would read what is told here, and end this process before it says why
        mine = Loss((), reason, line)
        try:
            found = self._publish(self.store, mine)
        except RuntimeError:
            return True
        return found is mine or found.line != line

    def end(self, loss: Loss) -> None:
        """Leave why in the run, and end this process: its collectives can neither finish nor be torn down."""
        self.ending.acquire()  # once: of two threads, the second waits here for the end
        try:
            if self.rank == self._heir(loss):
                self.last_words(loss.reason)
            with suppress(RuntimeError):
                for rank in loss.ranks:
                    self._kill_stopped(rank)
        finally:
            self.leave()

    def leave(self) -> None:
        os._exit(EXIT_FAILED)

    def _heir(self, loss: Loss) -> int:
        return next(rank for rank in range(self.size) if rank not in loss.ranks)

    def _orphaned(self) -> Loss:
        """The store does not answer: gone with torchrun, or with the first rank where that holds it."""
        line = f"rank 0, or the torchrun of its node, is gone with their store; rank {self.rank} is in {self.where}"
        loss = Loss(() if self.rank == 0 else (0,), "rank 0 or its torchrun was lost", line)
        if self.rank == self._heir(loss):
            _say(line)
        return loss

    def _silent(self, ranks: Iterable[int]) -> list[int]:
        """Those of these ranks that do not beat within three beats."""
        before = {rank: _seen(self.store, rank) for rank in ranks if rank != self.rank}
        time.sleep(3 * self.beat_seconds)
        return [rank for rank, seen in before.items() if seen.number != "ended" and _seen(self.store, rank) == seen]

    def _lose(self, store: Store, ranks: list[int]) -> Loss:
        named = [f"rank {rank} on {_seen(store, rank).host}" for rank in ranks[:NAMED]]
        more = f" and {len(ranks) - NAMED} more ranks" if len(ranks) > NAMED else ""
        verb, was = ("is", "was") if len(ranks) == 1 else ("are", "were")
        line = f"{', '.join(named)}{more} {verb} gone or stopped, last seen in {_seen(store, ranks[0]).where}"
        reason = f"{', '.join(f'rank {rank}' for rank in ranks[:NAMED])}{more} {was} lost"
        return self._publish(store, Loss(tuple(ranks), reason, line))

    def _publish(self, store: Store, loss: Loss) -> Loss:
        """The first to publish is believed, and says so."""
        mine = "\n".join([f"{self.rank} {' '.join(map(str, loss.ranks))}", loss.reason, loss.line])
        if store.compare_set("lost", "", mine).decode() == mine:
            if loss.ranks:
                _say(loss.line)
            return loss
        return _found(store) or loss

    def _kill_stopped(self, rank: int) -> None:
        """A process that was stopped, of the same launcher as this one, which would wait half a minute for it."""
        host, pid = _seen(self.own if threading.current_thread() is self.thread else self.store, rank)[1:3]
        is_sibling = host == socket.gethostname() and pid.isdigit() and _parent(int(pid)) == os.getppid()
        if is_sibling and int(pid) != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    # ---- Turns, and the end ----

    def next_turn(self) -> str:
        self.turns += 1
        return f"turn/{self.turns}"

    def wait_for(self, turn: str) -> None:
        while not self.store.check([turn]):
            time.sleep(0.05)
        if self.store.get(turn) != b"done":
            raise FirstFailed("the first rank failed")

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join()
        try:
            self.own.set(f"beat/{self.rank}", f"ended - - {self.where}")
        except RuntimeError:
            return


def _pipe() -> tuple[int, int]:
    """(end to read, end to write), neither of which waits; open until the process ends."""
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    return ends


def _say(line: str) -> None:
    print(f"warpline: {line}; start it again to go on from the last checkpoint", file=sys.stderr, flush=True)


def _seen(store: Store, rank: int) -> Beat:
    key = f"beat/{rank}"
    return Beat(*(store.get(key).decode() if store.check([key]) else "0 ? - start").split(" ", 3))


def _found(store: Store) -> Loss | None:
    if not store.check(["lost"]):
        return None
    head, reason, line = store.get("lost").decode().split("\n", 2)
    return Loss(tuple(int(rank) for rank in head.split()[1:]), reason, line)


def _parent(pid: int) -> int | None:
    """The parent of a process of this machine; None where that cannot be read."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return None
