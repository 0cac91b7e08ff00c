"""No collective is idle: taking any one away gives other numbers than one process, and the list of them is complete."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from removals import NOT_REMOVED, REMOVALS

FOLDER = Path(__file__).parent
ROOM = FOLDER.parents[1] / "parallel"
TECHNIQUES = ("context", "tensor", "shard", "pipeline", "model", "gather", "mesh")
# The same all-reduce as the model's line, which the removals name.
TWICE = {"pipeline: tied embeddings": "model: pipeline, tied", "model: tensor": "tensor: once an update"}


def promised() -> list[str]:
    """ "file: first cell" of every line of a header's table of collectives."""
    found = []
    for name in TECHNIQUES:
        header = ast.get_docstring(ast.parse((ROOM / f"{name}.py").read_text())) or ""
        for table in re.findall(r"(?:^\|.*\n?)+", header, re.MULTILINE):
            if "bytes" in table.partition("\n")[0]:
                found += [f"{name}: {line.split('|')[1].strip()}" for line in table.strip().split("\n")[2:]]
    return found


def test_the_removals_are_of_every_line_of_every_table():
    listed = [entry.row for entry in (REMOVALS | NOT_REMOVED).values()] + list(TWICE)
    lines = promised()
    assert len(lines) == 25
    assert [line for line in lines if not any(line.startswith(row) for row in listed)] == []
    assert [row for row in [*listed, *TWICE.values()] if not any(line.startswith(row) for line in lines)] == []


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_removed_collective_is_missed(num_ranks):
    """In fp64: below 1e-9 with all of them, above 1e-6 without any one. Every call that was made is of the list."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), FOLDER / "removal_worker.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["unlisted"] == []
    whole = {layout: errors.pop("") for layout, errors in result["errors"].items()}
    assert len(whole) == (7 if num_ranks == 2 else 2) and max(whole.values()) < 1e-9
    unmissed = [
        (layout, name) for layout, errors in result["errors"].items() for name, error in errors.items() if error <= 1e-6
    ]
    assert unmissed == []
    taken_away = {name for errors in result["errors"].values() for name in errors}
    if num_ranks == 2:
        assert set(REMOVALS) - taken_away == {"replicas' gradients are not summed"}
    else:
        assert "replicas' gradients are not summed" in taken_away
