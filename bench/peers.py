"""Peers of the small kernels by name: what each is called with, or why it is not here.

Run     by `rms_norm`, `rope` and `swiglu`
Expect  a peer takes part only if its distribution is installed and its module really imports
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .measure import absent

Function = Callable[..., Any]


def add_peers(functions: dict[str, Function], peers: Mapping[str, tuple[str | None, Callable[[], Function]]]) -> dict[str, str]:
    """Adds each peer whose reason for absence is None; returns the reasons of the others."""
    missing = {}
    for name, (reason, make) in peers.items():
        if reason is None:
            functions[name] = make()
        else:
            missing[name] = reason
    return missing


def on_cuda(module: str, device: torch.device) -> str | None:
    return absent(module) if device.type == "cuda" else "runs on CUDA"
