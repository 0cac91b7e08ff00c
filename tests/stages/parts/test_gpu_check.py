"""Judging readings, by hand-made ones; and the checks themselves on the device that is here."""

from dataclasses import replace

import pytest
import torch

from warpline.parallel.mesh import start_mesh
from warpline.stages.parts.gpu_check import Reading, check, digest, problems, read_device, timed

GOOD = Reading("node7 GPU 0", "H100", 600.0, 2500.0, "ab12", 1700, 1980)


def eight(**changes):
    """Eight equal GPUs but for number 3."""
    return [replace(GOOD, where=f"node7 GPU {n}", **(changes if n == 3 else {})) for n in range(8)]


def test_equal_gpus_have_no_problem():
    assert problems(eight()) == [] and problems([]) == []
    assert problems(eight(product_tflops=545.0, copy_gbytes=2300.0, clock_mhz=None, ecc_errors=0)) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"product_tflops": 480.0}, "straggler: product at 480 TFLOP/s, 80% of the median 600"),
        ({"copy_gbytes": 1000.0}, "straggler: copy at 1000 GB/s, 40% of the median 2500"),
        ({"digest": "ab13"}, "other bits than 7 of 8 for the same input"),
        ({"ecc_errors": 2}, "2 uncorrected ECC error(s)"),
        ({"slowdowns": ("too hot (hardware)",)}, "clocks held down: too hot (hardware)"),
        ({"remapping": "waits for a reset"}, "remapping of a memory row waits for a reset"),
    ],
)
def test_a_bad_gpu_is_named_with_what_is_wrong(changes, told):
    assert problems(eight(**changes)) == [f"node7 GPU 3: {told}"]


def test_processes_of_one_cpu_are_no_stragglers():
    slow = [replace(GOOD, is_shared=True, copy_gbytes=rate) for rate in (20.0, 5.0)]
    assert problems(slow) == [] and problems([replace(slow[1], digest="other"), *slow]) != []


def test_gpus_are_judged_among_their_own_model():
    other = [replace(GOOD, where=f"node8 GPU {n}", model="A100", product_tflops=250.0, digest="cd34") for n in range(4)]
    assert problems([*eight(), *other]) == []
    other[1] = replace(other[1], product_tflops=200.0)
    assert problems([*eight(), *other]) == ["node8 GPU 1: straggler: product at 200 TFLOP/s, 80% of the median 250"]


def test_this_device_is_read_and_gives_its_bits_twice():
    mesh = start_mesh()
    ((reading,), sweep) = check(mesh)
    assert sweep == [] and reading.product_tflops > 0 and reading.copy_gbytes > 0 and problems([reading]) == []
    assert reading.digest == digest(mesh.device) == read_device(mesh.device).digest


def test_a_digest_sees_one_bit(monkeypatch):
    before, plain = digest(torch.device("cpu")), torch.Tensor.sum

    def flipped(self, *arguments):
        total = plain(self, *arguments)
        total.view(torch.int32)[5] ^= 1
        return total

    monkeypatch.setattr(torch.Tensor, "sum", flipped)
    assert digest(torch.device("cpu")) != before


def test_a_time_is_the_median_of_warm_calls(monkeypatch):
    clock = iter([0, 9, 20, 21, 30, 33, 40, 42, 50, 54])  # lasting 9 1 3 2 4
    calls = []
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert timed(lambda: calls.append(1), torch.device("cpu")) == 3 and len(calls) == 6
