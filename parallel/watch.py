"""Who is alive: every process notes in the launcher's store, once a second, that it lives and which step it is in.

A collective's own timeout says that somebody is missing, not who. Each process watches the next rank, and ends when that has
been silent for nine tenths of the timeout, so that the line which names it comes before the collectives give up.
"""

from __future__ import annotations

import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence

from torch.distributed import Store  # type: ignore[attr-defined]

BEAT_SECONDS = 1.0
EXIT_FAILED = 4


class FirstFailed(Exception):
    """The first rank failed at what the others waited for; it says why itself."""


class Watch:
    """Beats once a second in the launcher's store, and ends the process when the rank behind it has been silent too long."""

    def __init__(self, rank: int, size: int, timeout: datetime.timedelta, store: Store, own: Store):
        self.rank, self.size, self.seconds, self.store, self.own = rank, size, 0.9 * timeout.total_seconds(), store, own
        self.where, self.turns, self.beats = "start", 0, 0
        self.stopped = threading.Event()
        self.beat(own)
        self.thread = threading.Thread(target=self._run, name="warpline-watch", daemon=True)
        self.thread.start()

    def beat(self, store: Store) -> None:
        self.beats += 1
        store.set(f"beat/{self.rank}", f"{self.beats} {socket.gethostname()} {self.where}")

    def _run(self) -> None:
        behind = (self.rank + 1) % self.size
        last, since = "", time.monotonic()
        while not self.stopped.wait(BEAT_SECONDS):
            try:
                self.beat(self.own)
                seen = self._seen(self.own, behind)
            except RuntimeError:  # the store is gone with its launcher, and with it whom to tell
                return
            if seen != last:
                last, since = seen, time.monotonic()
            elif time.monotonic() - since > self.seconds and not seen.startswith("ended"):
                print(f"warpline: {self.describe([behind])}; ending the job", file=sys.stderr, flush=True)
                os._exit(EXIT_FAILED)

    def _seen(self, store: Store, rank: int) -> str:
        key = f"beat/{rank}"
        return store.get(key).decode() if store.check([key]) else "0 ? start"

    def silent(self) -> list[int]:
        """The ranks that do not beat: takes 3 seconds."""
        try:
            before = [self._seen(self.store, rank) for rank in range(self.size)]
            time.sleep(3 * BEAT_SECONDS)
            after = [self._seen(self.store, rank) for rank in range(self.size)]
        except RuntimeError:
            return []
        return [rank for rank in range(self.size) if before[rank] == after[rank] and rank != self.rank]

    def describe(self, ranks: Sequence[int]) -> str:
        """Who is silent, on which host, and where each was when it was last heard of."""
        parts = []
        for rank in ranks:
            _, host, where = self._seen(self.store if threading.current_thread() is not self.thread else self.own, rank).split(
                " ", 2
            )
            parts.append(f"rank {rank} on {host} is gone or stopped, last seen in {where}")
        return "; ".join(parts)

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
            self.own.set(f"beat/{self.rank}", f"ended - {self.where}")
        except RuntimeError:
            return
