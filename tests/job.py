"""A job of real processes in a test: its log, its run folder, its workers."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

CONFIG = """
start = "{start}"
files = ["{data}/data/sft.jsonl"]
steps = 100000
tokens_per_step = 256
checkpoint_every_steps = {every}
optimizer = {{ learning_rate = 1e-3 }}
[parallel]
replicate = {ranks}
timeout_seconds = {timeout}
"""


class Job:
    """`command` and how it does, with everything that it said in one log."""

    def __init__(self, folder: Path, command: Sequence[str], **environment: str):
        self.run, self.log = folder / "run", folder / "log.txt"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                list(command), stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
            )

    def metrics(self) -> list[bytes]:
        path = self.run / "metrics.jsonl"
        return path.read_bytes().splitlines() if path.exists() else []

    def steps(self) -> int:
        return len(self.metrics())

    def wait_until(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)

    def worker(self, rank: int) -> psutil.Process:
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if child.environ().get("RANK") == str(rank))

    def end(self, seconds: float) -> tuple[int, str]:
        """(exit code, what it said)"""
        return self.process.wait(seconds), self.log.read_text()

    def ended(self) -> dict:
        return json.loads((self.run / "ended.json").read_text())

    def newest_checkpoint(self) -> int:
        """The step of the last checkpoint that is complete."""
        manifests = self.run.glob("checkpoints/sft/step-*/manifest.json")
        return max(int(path.parent.name.removeprefix("step-")) for path in manifests)

    def kill(self) -> None:
        if self.process.poll() is None:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                process.kill()
            self.process.kill()
            self.process.wait()
