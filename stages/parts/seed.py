"""Seeds: all randomness of a stage is a pure function of (seed, stage, step, purpose)."""

import hashlib
from typing import Any

import torch


def seed_of(*parts: Any) -> int:
    """A 63-bit seed that depends on every part (seed, stage, step, purpose) and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def generator_of(*parts: Any) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*parts))
