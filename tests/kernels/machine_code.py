"""The committed table of what the kernels' machine code uses, and what every row of it must hold."""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

RESOURCES = json.loads((Path(__file__).parent / "resources.json").read_text())
ARCHITECTURES = (80, 90, 100)


def for_every_row(group: str) -> Callable:
    """Marks a test of (row, architecture, …) to run for every row of a kernel's part of the table."""

    def mark(test: Callable) -> Callable:
        test = pytest.mark.parametrize("architecture", ARCHITECTURES)(pytest.mark.parametrize("row", RESOURCES[group])(test))
        is_other = version("triton") != RESOURCES["triton"]
        return pytest.mark.slow(pytest.mark.skipif(is_other, reason="the table of resources is of another Triton")(test))

    return mark


def check_row(used: dict, group: str, row: str, architecture: int) -> str:
    """The code, once it is known to use no more than the table says and to compute nothing in fp64."""
    code, allowed = used.pop("code"), RESOURCES[group][row][f"sm_{architecture}"]
    assert all(used[key] <= allowed[key] for key in allowed), f"uses {used}, the table allows {allowed}"
    assert used["registers"] > 16, "a kernel that the compiler could not fit only traps"
    assert not any(word in code for word in ("DADD", "DMUL", "DFMA")), "arithmetic in fp64"
    return code
