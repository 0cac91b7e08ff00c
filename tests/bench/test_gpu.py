"""What a bare GPU machine needs: the kernels' tests collected with nothing but torch, Triton and pytest; benches that run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from warpline.bench.gpu import BENCHES

ROOT = Path(__file__).parents[2]
# Everything the product or its tests import beyond torch (with what torch itself needs), Triton, pytest and nvidia-ml-py.
BLOCKED = ("pydantic", "typer", "rich", "safetensors", "tokenizers", "transformers", "datasets", "kernels", "huggingface_hub",
           "pyarrow", "zstandard", "psutil", "websocket", "matplotlib", "pytest_timeout", "anyio")  # fmt: skip
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


def test_the_kernels_gpu_tests_are_collected_on_a_bare_machine():
    code = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {BLOCKED}:\n"
        "            raise ImportError(f'{name} is not on a bare machine')\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "import pytest\n"
        "sys.exit(pytest.main(['--collect-only', '-q', '-m', 'gpu', '-W', 'default', 'tests/kernels']))\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("losses", "attention", "small_kernels"):
        assert f"test_{name}_gpu.py" in done.stdout
    assert "error" not in done.stdout.lower().replace("errors", "")


def test_an_unknown_part_is_refused_with_the_choice():
    done = python("-m", "warpline.bench.gpu", "benchmarks")
    assert done.returncode == 2 and "choose among tests logit_block" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_runs_on_the_cpu_and_leaves_its_rows(name, tmp_path):
    done = python("-m", f"warpline.bench.{name}", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "cpu" / f"{name}.json").read_text())
    assert {"card", "driver", "torch", "triton", "commit", "date"} <= set(result["machine"])
    assert len(result["rows"]) >= 3 and all(row["milliseconds"] > 0 for row in result["rows"])
    for row in result["rows"]:
        assert row["error"] is None or row["error"] < 1e-4
