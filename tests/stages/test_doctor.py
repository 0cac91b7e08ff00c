"""The doctor says what the tables say and what would really be chosen, within 80 columns, with and without a driver."""

import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from warpline.kernels import triton_jit
from warpline.kernels.backend import Backend, choose, cuda_package_absent
from warpline.stages import doctor
from warpline.stages.doctor import OPERATIONS, Operation, findings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def printed(monkeypatch, capsys) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    doctor.main()
    return capsys.readouterr().out


def test_every_operation_and_implementation_is_printed_within_80_columns(printed):
    assert max(map(len, printed.splitlines())) <= 80
    for line in (f"python   {sys.version.split()[0]}", f"torch    {torch.__version__}", "machine  ", "triton   ", "driver   "):
        assert f"\n{line}" in f"\n{printed}"
    sections = re.split(r"\n(\w+), on \w+ *\n", printed)[1:]
    assert sections[::2] == list(OPERATIONS)
    for name, text in zip(sections[::2], sections[1::2], strict=True):
        rows = re.findall(r"^(?:auto   |by name|absent )  ([\w-]+) ", text.partition("\n\n")[0], re.MULTILINE)
        assert sorted(rows) == sorted(OPERATIONS[name].table)
        assert text.startswith("auto ")


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_found_is_what_a_call_meets(name):
    operation = OPERATIONS[name]
    calls, found = list(operation.calls(CPU)), findings(operation, CPU)

    def chosen(backend, call):
        return choose(name, operation.table, operation.auto, backend, call, CPU)

    assert chosen("auto", calls[0]) is operation.table[found[0].name]
    for status, backend, note in found:
        if status == "absent":
            with pytest.raises(ValueError, match="is not here"):
                chosen(backend, calls[0])
            assert note in (operation.table[backend].absent(CPU), operation.table[backend].absent(CUDA))
            continue
        takes = [call for call in calls if operation.table[backend].cannot(call) is None]
        assert takes and all(chosen(backend, call) is operation.table[backend] for call in takes)
        assert (status == "auto") == (backend in operation.auto)
        for call in calls:
            if operation.table[backend].cannot(call) is not None:
                with pytest.raises(ValueError, match="cannot do ") as refused:
                    chosen(backend, call)
                assert status == "auto" or re.search("cannot do (.*); leave", str(refused.value))[1] in note


def test_with_a_gpu_ours_comes_first_and_an_installed_package_shows_its_version():
    table = {
        "pytest": Backend(cuda_package_absent("pytest", "pytest"), lambda call: "odd numbers" if call % 2 else None, print),
        "away": Backend(cuda_package_absent("no-such-package", "pytest"), lambda call: None, print),
        "slow": Backend(lambda device: None, lambda call: None, print),
        "ours": Backend(lambda device: None, lambda call: "threes" if call == 3 else None, print),
    }
    operation = Operation(table, ("ours", "slow"), lambda device: iter((2, 1, 3)))
    assert findings(operation, CUDA) == [
        ("auto", "ours", "cannot do threes"),
        ("auto", "slow", "takes what ours cannot"),
        ("by name", "pytest", f"version {version('pytest')}, cannot do odd numbers"),
        ("absent", "away", "no-such-package is not installed"),
    ]
    without_gpu = {name: note for _, name, note in findings(operation, CPU)}
    assert without_gpu["pytest"] == "pytest runs on CUDA" and without_gpu["away"] == "no-such-package is not installed"


def test_without_a_driver_or_its_library_one_line_says_so(monkeypatch):
    pynvml = pytest.importorskip("pynvml")

    def no_driver():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    assert doctor.machine()["driver"] == "no NVIDIA driver answers: NVML Shared Library Not Found"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert doctor.machine()["driver"] == "unknown: nvidia-ml-py is not installed"


def test_gpus_are_named_as_the_driver_names_them(monkeypatch):
    """And a torch that cannot use them says so: the commonest reason why training runs on the CPU."""
    pynvml = pytest.importorskip("pynvml")
    stand_ins = {
        "nvmlInit": None, "nvmlSystemGetCudaDriverVersion_v2": 12040, "nvmlDeviceGetCount": 2,
        "nvmlSystemGetDriverVersion": "550.54", "nvmlDeviceGetHandleByIndex": 0, "nvmlDeviceGetName": "NVIDIA [H100]",
        "nvmlDeviceGetCudaComputeCapability": (9, 0), "nvmlDeviceGetMemoryInfo": type("Memory", (), {"total": 80 * 2**30}),
    }  # fmt: skip
    for name, value in stand_ins.items():
        monkeypatch.setattr(pynvml, name, lambda *arguments, value=value: value)
    lines = doctor.machine()
    assert lines["driver"] == "550.54, up to CUDA 12.4"
    assert lines["GPU 0"] == lines["GPU 1"] == "NVIDIA [H100], 80 GiB, sm_90"
    assert ("it cannot use the GPUs here" in lines["torch"]) == (not torch.cuda.is_available())


def test_without_triton_it_still_answers(monkeypatch):
    monkeypatch.setattr(triton_jit, "triton", None)
    assert doctor.machine()["triton"] == "not installed: no kernel of ours runs on a GPU"


def test_a_bad_device_is_named_and_the_doctor_is_not_content(monkeypatch, capsys):
    from warpline.parallel.mesh import start_mesh
    from warpline.stages.parts.gpu_check import Reading

    readings = [Reading(f"node GPU {n}", "H100", rate, 2500.0, "ab") for n, rate in enumerate((600.0, 600.0, 300.0))]
    monkeypatch.setattr(doctor, "check", lambda mesh: (readings, [(2**20, 12.34)]))
    assert doctor.check_ranks(start_mesh()) is False
    told = capsys.readouterr().out
    assert "node GPU 2: straggler: product at 300 TFLOP/s, 50% of the median 600" in told and "1 MiB    12.3 GB/s" in told
    monkeypatch.setattr(doctor, "check", lambda mesh: (readings[:2], []))
    assert doctor.check_ranks(start_mesh()) is True
    assert "nothing is wrong" in capsys.readouterr().out


@pytest.mark.slow
def test_under_torchrun_every_ranks_device_is_checked_and_the_first_prints():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, "-m", "warpline.stages.command", "doctor"], capture_output=True, text=True, timeout=300)
    assert re.findall(r"CPU 0 +\d", done.stdout) and done.stdout.count(" CPU 0  ") >= 2
    assert "all-reduce, bus bandwidth" in done.stdout and re.search(r"1 MiB +[\d.]+ GB/s", done.stdout)
    # Two processes on busy cores may well differ in speed, which is no fault of theirs, but not in bits.
    assert done.returncode == 0 and "nothing is wrong" in done.stdout
