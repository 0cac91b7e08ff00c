"""What a bare GPU machine needs: GPU tests and benches with nothing but torch, Triton, pytest and pytest-benchmark."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from warpline.bench.gpu import PARTS, todo
from warpline.bench.measure import Report
from warpline.bench.rows import load
from warpline.bench.suite import KERNELS

ROOT = Path(__file__).parents[2]
# Everything the product or its tests import beyond torch (with what torch itself needs), Triton, pytest, pytest-benchmark and
# nvidia-ml-py.
BLOCKED = ("pydantic", "typer", "rich", "safetensors", "tokenizers", "transformers", "datasets", "kernels", "huggingface_hub",
           "pyarrow", "zstandard", "psutil", "websocket", "matplotlib", "pytest_timeout", "anyio", "liger_kernel",
           "cut_cross_entropy")  # fmt: skip
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
BLOCKER = (
    "import sys\n"
    "class Blocker:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    f"        if name.partition('.')[0] in {BLOCKED}:\n"
    "            raise ImportError(f'{name} is not on a bare machine')\n"
    "sys.meta_path.insert(0, Blocker())\n"
)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**ENVIRONMENT, **environment}, capture_output=True, text=True
    )


def test_the_kernels_gpu_tests_are_collected_on_a_bare_machine():
    code = BLOCKER + (
        "import pytest\nsys.exit(pytest.main(['--collect-only', '-q', '-m', 'gpu', '-W', 'default', 'tests/kernels']))\n"
    )
    done = python("-c", code, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("losses", "attention", "small_kernels"):
        assert f"test_{name}_gpu.py" in done.stdout
    assert "error" not in done.stdout.lower().replace("errors", "")


def test_an_unknown_part_is_refused_with_the_choice():
    done = python("-m", "warpline.bench.gpu", "benchmarks")
    assert done.returncode == 2 and "choose among tests logit_block" in done.stderr


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    done = python("-m", "warpline.bench.gpu", "rope", "--out", str(tmp_path / "file" / "below"))
    assert done.returncode == 2 and "Not a directory; expected a folder that can be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_was_cut_off_goes_on_with_what_is_not_complete(tmp_path):
    report = Report(tmp_path, torch.device("cpu"))
    for name, ended in (("rope", "complete"), ("swiglu", "running"), ("adamw", "failed: 1 of 1: it")):
        report.start(name, True)
        report.end(ended, 1.0)
    assert todo([], tmp_path) == [part for part in PARTS if part != "rope"]
    assert todo(["rope", "tests"], tmp_path) == ["tests", "rope"], "what is named runs again, in the parts' own order"
    (tmp_path / f"gpu_tests.passed-{report.results.machine['commit']}").touch()
    assert "tests" not in todo([], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_every_bench_runs_on_a_bare_cpu_and_its_checks_pass(name, tmp_path):
    code = BLOCKER + (
        "from warpline.bench import measure, suite\n"
        "suite.SECONDS = {key: 0.001 for key in suite.SECONDS}\n"
        f"sys.exit(suite.main([{name!r}, '--quick', '--out', {str(tmp_path)!r}]))\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stdout + done.stderr
    results = load(next(tmp_path.glob("*/*.json")))
    assert results.benches[name].ended == "complete" and results.ceilings is not None
    assert {"card", "driver", "torch", "triton", "commit", "date"} <= set(results.machine)
    ours = [row for row in results.rows if row.check]
    assert len(results.rows) >= 3 and all(row.milliseconds > 0 and row.of_ceiling for row in results.rows)
    assert any(row.check == "passed" and row.error is not None for row in ours)
