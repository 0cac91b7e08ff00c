"""What the GPU itself says while a row is measured: clock, power, temperature, throttling, memory, and the energy of a call.

Run     by `measure`; needs nvidia-ml-py and a driver, and says nothing without them
Expect  a call repeated for a while, readings taken meanwhile; energy is the card's own counter over those calls, else its mean
        power over their time. A reading that the card refuses is left out.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

# nvmlClocksEventReason…: the ones that mean the card runs slower than it would.
THROTTLES = {
    0x4: "software power cap", 0x8: "hardware slowdown", 0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown", 0x80: "hardware power brake",
}  # fmt: skip


class Telemetry:
    """One card. `absent` says why there is none."""

    def __init__(self, device: torch.device):
        self.absent: str | None = None
        self.nvml: Any = None
        if device.type != "cuda":
            self.absent = "telemetry is of CUDA devices"
            return
        try:
            self.nvml = importlib.import_module("pynvml")
        except ImportError as error:
            self.absent = f"nvidia-ml-py is not there: {error}"
            return
        try:
            self.nvml.nvmlInit()
            # By its bus, not its number: CUDA_VISIBLE_DEVICES numbers the cards anew.
            properties: Any = torch.cuda.get_device_properties(device)
            bus = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
            self.card = self.nvml.nvmlDeviceGetHandleByPciBusId(bus.encode())
        except self.nvml.NVMLError as error:
            self.absent = f"NVML does not answer: {error}"

    def read(self) -> dict[str, float]:
        """Clock in MHz, power in W, temperature in °C, throttle bits, used memory in MiB."""
        nvml = self.nvml
        wanted: dict[str, Callable[[], float]] = {
            "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(self.card, nvml.NVML_CLOCK_SM),
            "watts": lambda: nvml.nvmlDeviceGetPowerUsage(self.card) / 1e3,
            "celsius": lambda: nvml.nvmlDeviceGetTemperature(self.card, nvml.NVML_TEMPERATURE_GPU),
            "throttle": lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self.card) & sum(THROTTLES),
            "memory_mib": lambda: nvml.nvmlDeviceGetMemoryInfo(self.card).used / 2**20,
        }
        return {name: value for name, ask in wanted.items() if (value := self._ask(ask)) is not None}

    def _ask(self, question: Callable[[], float]) -> float | None:
        try:
            return float(question())
        except self.nvml.NVMLError:
            return None

    def watch(
        self, call: Callable[[], Any], synchronise: Callable[[], None], seconds: float
    ) -> tuple[dict[str, float | str], float | None]:
        """(readings while `call` repeats, joules of one call); nothing where there is no telemetry."""
        if self.absent is not None:
            return {}, None
        synchronise()
        readings, num_calls = [], 0
        started, energy = time.monotonic(), self._energy()
        while num_calls == 0 or time.monotonic() - started < seconds:
            call()
            num_calls += 1
            readings.append(self.read())  # the call still runs
            if num_calls % 8 == 0:
                synchronise()
        synchronise()
        taken, after = time.monotonic() - started, self._energy()
        found: dict[str, float | str] = {}
        for name in ("sm_clock_mhz", "watts", "celsius", "memory_mib"):
            values = [reading[name] for reading in readings if name in reading]
            if values:
                found[name] = statistics.median(values)
        bits = 0
        for reading in readings:
            bits |= int(reading.get("throttle", 0))
        reasons = [words for bit, words in THROTTLES.items() if bits & bit]
        if reasons:
            found["throttled"] = ", ".join(reasons)
        if energy is not None and after is not None and after > energy:
            return found, (after - energy) / num_calls
        watts = found.get("watts")
        return found, watts * taken / num_calls if isinstance(watts, float) else None

    def _energy(self) -> float | None:
        """Joules since the driver was loaded."""
        return self._ask(lambda: self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.card) / 1e3)
