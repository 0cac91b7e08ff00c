"""Which implementation serves a call: the shape of an operation's table, which can be printed, and the choice from it.

An entry says whether it is here at all (its distribution is installed and really imports) and what it cannot do. "auto" takes
the first of the operation's own list that serves the request; a name obeys or raises with the reason. Nothing is handed on
silently.

**Math**, **Shapes**, **Source**: those of the operation.
**Limits** Other packages' kernels have not been run from here: their adapters are tested against stand-ins that check what they
  are called with. So "auto" never takes them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Backend(NamedTuple):
    """`absent` says why it is not here for a device; `cannot` what of a request it does not do; both None if all is well."""

    absent: Callable[[torch.device], str | None]
    cannot: Callable[[Any], str | None]
    run: Callable[[Any], Any]


def choose(
    operation: str, table: Mapping[str, Backend], auto: Sequence[str], name: str, request: Any, device: torch.device
) -> Backend:
    """The entry that serves the request, or a ValueError with the reason."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{operation}: device: received {device.type}, expected cpu or cuda; move the tensors")
    if name == "auto":
        return next(table[n] for n in auto if table[n].absent(device) is None and table[n].cannot(request) is None)
    if name not in table:
        expected = f"expected 'auto' or one of {', '.join(table)}; leave it at 'auto'"
        raise ValueError(f"{operation}: backend: received {name!r}, {expected}")
    absent = table[name].absent(device)
    if absent is not None:
        raise ValueError(f"{operation}: backend {name!r} is not here: {absent}; leave it at 'auto'")
    cannot = table[name].cannot(request)
    if cannot is not None:
        raise ValueError(f"{operation}: backend {name!r} cannot do {cannot}; leave it at 'auto'")
    return table[name]


def check_floats(operation: str, *tensors: Tensor | None) -> None:
    """Refuses integers, booleans and complex numbers, which would be cut to something else."""
    dtypes = [x.dtype for x in tensors if x is not None]
    if not all(dtype in FLOATS for dtype in dtypes):
        received = ", ".join(map(str, dtypes))
        raise ValueError(f"{operation}: received {received}; expected fp16, bf16, fp32 or fp64: cast the tensors")


def first_reason(reasons: Mapping[str, bool]) -> str | None:
    return next((reason for reason, holds in reasons.items() if holds), None)


def package_absent(distribution: str, module: str) -> str | None:
    """Why an optional package cannot be used, or None; asked by the distribution's name, then by a real import."""
    try:
        importlib.metadata.version(distribution)
        importlib.import_module(module)
    except importlib.metadata.PackageNotFoundError:
        return f"{distribution} is not installed"
    except (ImportError, OSError, RuntimeError) as error:
        return f"{distribution} is installed but does not import: {str(error).splitlines()[0]}"
    return None


def cuda_package_absent(distribution: str, module: str) -> Callable[[torch.device], str | None]:
    """`package_absent` of a package whose kernels run on CUDA only."""
    return lambda device: package_absent(distribution, module) if device.type == "cuda" else f"{distribution} runs on CUDA"


def triton_absent(device: torch.device) -> str | None:
    """Why our Triton kernels cannot run on a device, or None."""
    if device.type == "cuda":
        from .triton_jit import triton

        return "triton is not installed" if triton is None else None
    if device.type == "cpu" and interprets():
        return None
    return f"its kernels run on CUDA, not on {device.type} (TRITON_INTERPRET=1 runs them on the CPU)"


def runs_triton(x: Tensor) -> bool:
    """Whether our Triton kernels serve this tensor's device and dtype here."""
    return triton_absent(x.device) is None and x.dtype != torch.float64


@functools.cache
def interprets() -> bool:
    """Whether Triton is here, and in its interpreter mode."""
    from .triton_jit import triton

    return triton is not None and bool(triton.knobs.runtime.interpret)
