"""Triton as the kernels' files see it, also where it is not installed: then they import, and nothing in them can be launched.

**Math**, **Shapes**, **Source**: none; this file only brings names. macOS has no Triton, and every module must import there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["constant", "jit", "tanh", "tl", "triton"]

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def jit(kernel: Callable[..., None]) -> Any:
    """`triton.jit`, or the bare function, which nobody can call."""
    return kernel if triton is None else triton.jit(kernel)


def constant(value: float) -> Any:
    """A module-level number that a kernel may read."""
    return value if tl is None else tl.constexpr(value)


@jit
def tanh(x):
    """Within 2 ulp in fp32: its series below 1/4, where 1 − exp(−2x) would cancel."""
    square = x * x
    small = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, small, tl.where(x < 0, -large, large))
