"""Reward functions named `module:function`, with TRL's signature, summed with weights.

`function(prompts, completions, completion_ids, **columns) -> list[float | None]`: `completions` are texts for text prompts
and message lists for conversations; None means that the function has no opinion. Reward functions run as code: name only what
you trust.
"""

import importlib
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from ...data.conversation import Prompt
from .config import BadConfig, Config

RESERVED = {"prompts", "completions", "completion_ids"}


class RewardConfig(Config):
    """One reward function and its weight in the sum."""

    function: str = Field(pattern=r"^[\w.]+:\w+$")
    weight: float = 1.0


class _UserCode:
    """Whatever a user's reward function raises becomes one line that names the function, the error and where it happened."""

    def __init__(self, name: str, doing: str):
        self.name, self.doing = name, doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt | BadConfig):
            return
        last = traceback.extract_tb(trace)[-1]
        raise BadConfig(
            f"reward function {self.name!r} failed {self.doing}: {kind.__name__}: {error} "
            f"({last.filename}:{last.lineno}); correct it"
        ) from error


def load_function(name: str) -> Callable[..., list[float | None]]:
    """Import `module:function`; modules of the current directory count."""
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    with _UserCode(name, "to load (name it as module:function, importable from here)"):
        return getattr(importlib.import_module(module_name), function_name)


def rewards_of(
    rewards: Sequence[RewardConfig], prompts: Sequence[Prompt], texts: Sequence[str], ids: Sequence[list[int]]
) -> list[float]:
    """The weighted sum of all rewards per completion; where every function has no opinion the reward is 0."""
    completions: list[Any] = [
        text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in prompts[0].columns} if prompts else {}
    taken = sorted(set(columns) & RESERVED)
    if taken:
        raise BadConfig(f"{prompts[0].source}: reward functions receive {taken[0]!r} themselves; rename that column")
    total = [0.0] * len(prompts)
    for reward in rewards:
        function = load_function(reward.function)
        with _UserCode(reward.function, f"on completions of {prompts[0].source} and after"):
            given = function(
                prompts=[prompt.prompt for prompt in prompts], completions=completions, completion_ids=list(ids), **columns
            )
            values = [None if value is None else float(value) for value in given]
        if len(values) != len(prompts):
            raise BadConfig(f"reward function {reward.function!r} returned {len(values)} values for {len(prompts)} completions")
        for index, value in enumerate(values):
            if value is not None and not math.isfinite(value):
                raise BadConfig(
                    f"reward function {reward.function!r} returned {value} for a completion of {prompts[index].source}"
                )
            total[index] += reward.weight * (value or 0.0)
    return total
