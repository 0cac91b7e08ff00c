"""Which number format the matrix products of a stage run in: bf16 autocast where the hardware has it, else fp32; in fp64, for
comparisons, the weights are too.
"""

from contextlib import AbstractContextManager, nullcontext

import torch


def has_fast_bf16(device: torch.device) -> bool:
    """True on CUDA, and on CPUs with bf16 dot-product instructions (avx512_bf16 or amx), where it is over twice as fast as
    fp32.
    """
    if device.type == "cuda":
        return True
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def choose_precision(name: str, device: torch.device) -> str:
    """Resolve "auto" to "bf16" or "fp32" for this device."""
    return name if name != "auto" else ("bf16" if has_fast_bf16(device) else "fp32")


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def product_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast would round a product's operands to here; None where it is off, which leaves them as they are."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
