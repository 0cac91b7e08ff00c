"""One progress bar per stage: a live bar in a terminal, a plain line at every tenth elsewhere."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)


class StageProgress:
    """Counts `total` steps of `name`; `advance` shows a short note such as the loss. Silent where `shown` is False."""

    def __init__(self, name: str, total: int, done: int = 0, shown: bool = True):
        self.name, self.total, self.done = name, total, done
        self.live = shown and sys.stderr.isatty()
        self.plain = shown and not self.live
        self.bar = Progress(
            TextColumn("{task.description:<16}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"), console=console, disable=not self.live,
        )  # fmt: skip
        self.task = self.bar.add_task(name, total=total, completed=done, note="")

    def __enter__(self) -> "StageProgress":
        self.bar.start()
        return self

    def __exit__(self, *error) -> None:
        self.bar.stop()

    def advance(self, note: str = "") -> None:
        self.done += 1
        self.bar.update(self.task, completed=self.done, note=note)
        if self.plain and (self.done == self.total or self.done * 10 // self.total > (self.done - 1) * 10 // self.total):
            console.print(f"{self.name:<16} {self.done}/{self.total}  {note}")
