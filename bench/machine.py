"""The machine that a run measures: its name, its versions, its last cache, and its ceilings in copies and products.

Run     by `suite` and `measure`
Expect  a large copy and a large square product, the median of several, taken once per run: what every row is a fraction of
"""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from .rows import Ceilings, slug

PACKAGES = (
    "triton", "pytest-benchmark", "liger-kernel", "cut-cross-entropy", "flash-attn", "flash-attn-4", "transformer-engine",
    "apex", "quack-kernels", "transformers",
)  # fmt: skip


def machine_of(device: torch.device) -> dict[str, str | int]:
    """What it takes to run the same thing again."""
    found: dict[str, str | int] = {"processor": _processor(), "cores": os.cpu_count() or 0, "threads": torch.get_num_threads()}
    found |= {"card": "cpu", "driver": "none", "memory_mib": 0}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"card": properties.name, "driver": _driver(), "memory_mib": properties.total_memory // 2**20}
    found["name"] = slug(str(found["card"] if device.type == "cuda" else f"cpu {found['processor']} {found['cores']} cores"))
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda or "none", "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    found |= {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD"),
    }
    found["is_modified"] = (
        "yes" if _git("status", "--porcelain", "--untracked-files=no", "--", "../kernels", ".", ":!results") else "no"
    )
    found["load_before"] = f"{os.getloadavg()[0]:.2f}"
    return found


def _git(*arguments: str) -> str:
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except ImportError:
        return "unknown: nvidia-ml-py is absent"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cache_bytes(device: torch.device) -> int:
    """The last cache before the memory: the GPU's L2, the CPU's last level (32 MiB where the system does not say)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    units = {"K": 2**10, "M": 2**20}
    sizes = [2**25]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        words = path.read_text().strip()
        if words and words[-1] in units:
            sizes.append(int(words[:-1]) * units[words[-1]])
    return max(sizes[1:] or sizes)


def held_bytes(device: torch.device) -> int:
    """What the process holds now: the allocator's bytes, on a CPU its resident pages (0 where Linux does not say)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    return _status("VmRSS") * 2**10


class MemoryWatch:
    """The most memory held meanwhile beyond what was held at the start: the CUDA allocator's, on a CPU resident pages (None
    where Linux does not let a process ask)."""

    peak_mib: float | None = None


@contextmanager
def memory_watch(device: torch.device) -> Iterator[MemoryWatch]:
    watch = MemoryWatch()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield watch
        torch.cuda.synchronize()
        watch.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        return
    try:
        # The heap's free pages go back first, so that what is reused counts.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        yield watch
        return
    resident = _status("VmRSS")
    yield watch
    watch.peak_mib = max(0.0, (_status("VmHWM") - resident) / 2**10)


def _status(field: str) -> int:
    """KiB."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def ceilings(device: torch.device) -> Ceilings:
    """A copy of 1 GiB (CPU: 256 MiB) in bytes read and written a second, and square products, bf16 and fp32."""
    is_gpu = device.type == "cuda"
    source = torch.randn((2**30 if is_gpu else 2**28) // 4, device=device)
    target = torch.empty_like(source)
    copy = _seconds(partial(target.copy_, source), device)
    rate = 2 * source.numel() * 4 / copy / 1e9
    del source, target
    products = {}
    for dtype, size in ((torch.bfloat16, 8192), (torch.float32, 8192)) if is_gpu else ((torch.float32, 1536),):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        products[str(dtype).removeprefix("torch.")] = 2 * size**3 / _seconds(partial(torch.matmul, left, right), device) / 1e12
    return Ceilings(rate, products)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The best of ten calls after two: a ceiling is what the machine can do when nothing else runs."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    taken = []
    for number in range(12):
        wait()
        started = time.perf_counter()
        call()
        wait()
        if number >= 2:
            taken.append(time.perf_counter() - started)
    return min(taken)
