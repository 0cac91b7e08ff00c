"""Triton as the kernels' files see it, also where it is not installed: then they import, and nothing in them can be launched.

**Math**, **Shapes**, **Source**: none; this file only brings names. macOS has no Triton, and every module must import there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["constant", "jit", "tl", "triton"]

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
