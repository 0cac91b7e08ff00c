"""Telemetry: silent without a GPU; with one, readings are medians, energy is of one call, and throttling is named."""

import types

import torch

from warpline.bench.telemetry import THROTTLES, Telemetry


class NVMLError(RuntimeError):
    pass


class Card:
    """What nvidia-ml-py answers, for a card at 300 W; the energy counter moves with each call that `watch` makes."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU, NVMLError = 1, 0, NVMLError
    calls, reasons, has_counter = 0, 0, True

    def nvmlDeviceGetClockInfo(self, card, kind):
        return 1500 + self.calls

    def nvmlDeviceGetPowerUsage(self, card):
        return 300_000

    def nvmlDeviceGetTemperature(self, card, kind):
        raise NVMLError("not supported")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, card):
        return self.reasons | 0x1  # idle is no throttling

    def nvmlDeviceGetMemoryInfo(self, card):
        return types.SimpleNamespace(used=2**30)

    def nvmlDeviceGetTotalEnergyConsumption(self, card):
        if not self.has_counter:
            raise NVMLError("not supported")
        return 5_000 * self.calls


def watched(card: Card):
    telemetry = Telemetry(torch.device("cpu"))
    telemetry.absent, telemetry.nvml, telemetry.card = None, card, "the handle"

    def call():
        card.calls += 1

    return telemetry.watch(call, lambda: None, 0.01)


def test_there_is_none_on_a_cpu():
    telemetry = Telemetry(torch.device("cpu"))
    assert telemetry.absent == "telemetry is of CUDA devices"
    assert telemetry.watch(lambda: None, lambda: None, 0.01) == ({}, None)


def test_energy_is_the_cards_counter_over_the_calls():
    found, joules = watched(Card())
    assert joules == 5.0
    assert found["watts"] == 300.0 and found["memory_mib"] == 1024.0 and found["sm_clock_mhz"] > 1500
    assert "celsius" not in found, "what the card refuses is left out"
    assert "throttled" not in found


def test_without_the_counter_energy_is_power_times_time():
    card = Card()
    card.has_counter = False
    _, joules = watched(card)
    assert joules is not None and 0 < joules <= 300.0 * 0.1


def test_throttling_is_named():
    card = Card()
    card.reasons = 0x4 | 0x40
    found, _ = watched(card)
    assert found["throttled"] == "software power cap, hardware thermal slowdown"
    assert all(bit & (bit - 1) == 0 for bit in THROTTLES)
