"""Checks that find a bad GPU before a run does: rates of a product and of a copy, clocks and ECC counters, the same input
giving the same bits, and an all-reduce sweep; `problems` names what is off.

Run under torchrun every rank checks the device it would train on. The rates of a GPU are judged against the median of its own
model; a CPU can be checked too (by tests), it has no clocks. Error counters and clocks are the driver's (NVML).
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from ...parallel.mesh import Mesh

SLOW = 0.9  # of the median of the same model; a choice: arXiv 2208.11035 found GPUs of one cluster 8 % apart on average
REPEATS = 5
GIB = 2**30
# nvml.h, nvmlClocksEventReason*: a hardware slowdown, thermal in software and in hardware, the power brake
BAD_REASONS = {0x8: "hardware slowdown", 0x20: "too hot (software)", 0x40: "too hot (hardware)", 0x80: "power brake"}


@dataclass(frozen=True)
class Size:
    """What is measured: a square product's width, a copy's bytes, the all-reduces' bytes."""

    product: int
    copy_bytes: int
    reduce_bytes: tuple[int, ...]
    dtype: torch.dtype


ON_GPU = Size(8192, GIB, tuple(2**power for power in range(20, 31, 2)), torch.bfloat16)
ON_CPU = Size(256, 2**22, (2**12, 2**20), torch.float32)


@dataclass(frozen=True)
class Reading:
    """One device. Counters and clocks are None where the driver does not tell."""

    where: str  # host and index
    model: str
    product_tflops: float
    copy_gbytes: float  # a second, read and written
    digest: str  # of the bits of a fixed computation
    clock_mhz: int | None = None  # of the multiprocessors, during the product
    max_clock_mhz: int | None = None
    slowdowns: tuple[str, ...] = ()
    ecc_errors: int | None = None  # uncorrected, since the last reset of the driver
    remapping: str | None = None  # memory rows whose remapping waits or failed
    is_shared: bool = False  # with other ranks, as a CPU is: its speed says nothing of it


def read_device(device: torch.device) -> Reading:
    size = ON_GPU if device.type == "cuda" else ON_CPU
    # Random numbers: a card draws less power, and clocks higher, on ones or zeros.
    a, b = (torch.randn(size.product, size.product, dtype=size.dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    telemetry: dict[str, Any] = {}

    def during() -> None:
        telemetry.update(_telemetry(device))

    seconds = timed(lambda: torch.mm(a, b, out=out), device, during)
    source = torch.randint(256, (size.copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = timed(lambda: target.copy_(source), device)
    is_cuda = device.type == "cuda"
    return Reading(
        where=f"{platform.node()} {'GPU' if is_cuda else 'CPU'} {device.index or 0}",
        is_shared=not is_cuda,
        model=torch.cuda.get_device_name(device) if is_cuda else platform.machine(),
        product_tflops=2 * size.product**3 / seconds / 1e12, copy_gbytes=2 * size.copy_bytes / copying / 1e9,
        digest=digest(device), **telemetry,
    )  # fmt: skip


def timed(work: Callable[[], Any], device: torch.device, during: Callable[[], None] = lambda: None) -> float:
    """Seconds of one call: the median of REPEATS, warm. `during` is called while the device still works."""
    work()
    seconds = []
    for repeat in range(REPEATS):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(torch.cuda.current_stream(device))
            work()
            end.record(torch.cuda.current_stream(device))
            if repeat == REPEATS - 1:
                during()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
    return median(seconds)


def digest(device: torch.device) -> str:
    """Of the bits that a product, a softmax and a sum give on a fixed input, drawn on the host."""
    size = 1024 if device.type == "cuda" else 96
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, size, generator=generator).to(device, ON_GPU.dtype if device.type == "cuda" else ON_CPU.dtype)
    results = [x @ x, (x @ x).float().softmax(-1), x.float().sum(0)]
    data = b"".join(result.cpu().contiguous().view(torch.uint8).numpy().tobytes() for result in results)
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _telemetry(device: torch.device) -> dict[str, Any]:
    """What the driver tells of a GPU now; each number only where it does."""
    if device.type != "cuda":
        return {}
    import pynvml  # here: only a machine with a GPU has its driver

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")

    def told(question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(handle, *arguments)
        except pynvml.NVMLError:
            return None

    reasons = told(pynvml.nvmlDeviceGetCurrentClocksEventReasons) or 0
    rows = told(pynvml.nvmlDeviceGetRemappedRows)
    remapping = None if rows is None else "failed" if rows[3] else "waits for a reset" if rows[2] else None
    return {
        "clock_mhz": told(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
        "max_clock_mhz": told(pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_SM),
        "slowdowns": tuple(name for bit, name in BAD_REASONS.items() if reasons & bit),
        "ecc_errors": told(
            pynvml.nvmlDeviceGetTotalEccErrors, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        ),
        "remapping": remapping,
    }


def all_reduce_sweep(mesh: Mesh) -> list[tuple[int, float]]:
    """(bytes, bus bandwidth in GB/s: 2·(n−1)/n × bytes over the slowest rank's seconds) over all ranks."""
    size = ON_GPU if mesh.device.type == "cuda" else ON_CPU
    found = []
    for num_bytes in size.reduce_bytes:
        x = torch.zeros(num_bytes // 4, dtype=torch.float32, device=mesh.device)
        mesh.barrier()
        seconds = mesh.max([timed(partial(dist.all_reduce, x), mesh.device)])[0]
        found.append((num_bytes, 2 * (mesh.size - 1) / mesh.size * num_bytes / seconds / 1e9))
    return found


def check(mesh: Mesh) -> tuple[list[Reading], list[tuple[int, float]]]:
    """Every rank's reading, on every rank, and the sweep (empty for one rank)."""
    mine = read_device(mesh.device)
    gathered = mesh.gather([asdict(mine)], *mesh.sizes._fields)
    readings = [Reading(**{**found, "slowdowns": tuple(found["slowdowns"])}) for found in gathered]
    return readings, all_reduce_sweep(mesh) if mesh.size > 1 else []


def problems(readings: Sequence[Reading]) -> list[str]:
    """One line for each thing that is off, naming the device."""
    found = []
    for model in dict.fromkeys(reading.model for reading in readings):
        mine = [reading for reading in readings if reading.model == model]
        own = [reading for reading in mine if not reading.is_shared]
        found += _stragglers(own, "product", "TFLOP/s", [reading.product_tflops for reading in own])
        found += _stragglers(own, "copy", "GB/s", [reading.copy_gbytes for reading in own])
        digests = [reading.digest for reading in mine]
        usual = max(dict.fromkeys(digests), key=digests.count)
        found += [
            f"{reading.where}: other bits than {digests.count(usual)} of {len(mine)} for the same input"
            for reading in mine if reading.digest != usual
        ]  # fmt: skip
    for reading in readings:
        found += [f"{reading.where}: clocks held down: {reason}" for reason in reading.slowdowns]
        if reading.ecc_errors:
            found.append(f"{reading.where}: {reading.ecc_errors} uncorrected ECC error(s)")
        if reading.remapping:
            found.append(f"{reading.where}: remapping of a memory row {reading.remapping}")
    return found


def _stragglers(readings: Sequence[Reading], what: str, unit: str, rates: Sequence[float]) -> list[str]:
    usual = median(rates) if rates else 0.0
    return [
        f"{reading.where}: straggler: {what} at {rate:.4g} {unit}, {rate / usual:.0%} of the median {usual:.4g}"
        for reading, rate in zip(readings, rates, strict=True) if rate < SLOW * usual
    ]  # fmt: skip
