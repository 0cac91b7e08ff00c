"""The tables in the headers of `parallel/` are what ranks send: each formula is read from its header and evaluated."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOM = FOLDER.parents[1] / "parallel"
TECHNIQUES = ("context", "tensor", "shard", "pipeline", "model", "gather")
FORMULA = re.compile(r"^[A-Z][·A-Za-z]*$|.*·.*")


def lines(name: str) -> list[list[str]]:
    """The cells of every line of the tables of bytes in a header."""
    header = ast.get_docstring(ast.parse((ROOM / f"{name}.py").read_text())) or ""
    tables = re.findall(r"(?:^\|.*\n?)+", header, re.MULTILINE)
    return [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for table in tables
        if "bytes" in table.partition("\n")[0]
        for line in table.strip().split("\n")[2:]
    ]


def value(formula: str, symbols: dict[str, float]) -> float:
    """Of a cell, with · for times."""
    expression = formula.replace("·", "*").replace("−", "-").replace("'", "_")
    return eval(expression, {"__builtins__": {}}, symbols)


def test_a_cell_is_read_as_arithmetic():
    assert value("2·(n−1)/n·P·b", {"n": 4, "P": 100, "b": 4}) == 600
    assert value("(n−1)/n·t·(N+K')·(H+H')·b", {"n": 2, "t": 8, "N": 4, "K_": 2, "H": 8, "H_": 6, "b": 2}) == 672


def test_every_table_of_bytes_is_found():
    assert {name: len(lines(name)) for name in TECHNIQUES} == {
        "context": 3, "tensor": 6, "shard": 4, "pipeline": 3, "model": 3, "gather": 4,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_send_the_bytes_of_the_tables(num_ranks):
    """By layout and line, to a byte; and the wire saw every collective that the dispatcher saw."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), FOLDER / "bytes_worker.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert len(result["counts"]) == (12 if num_ranks == 2 else 11)
    for layout, (seen, dispatched) in result["counts"].items():
        assert seen == dispatched and sum(seen.values()) > 0, layout
    wrong, unmeasured = [], []
    for name in TECHNIQUES:
        for label, *cells in lines(name):
            found = [layouts for line, layouts in result["measured"].items() if f"{name}: {label}".startswith(line)]
            if not found:
                unmeasured.append(f"{name}: {label}")
            for layout, (sent, symbols) in (pair for layouts in found for pair in layouts.items()):
                cell = cells[-1] if name != "context" or layout == "Ulysses" else cells[0]
                if not sent > 0 or sent != pytest.approx(value(cell, symbols), rel=1e-12):
                    wrong.append(f"{layout}, {name}: {label}: {sent} bytes, {cell} = {value(cell, symbols)} of {symbols}")
    assert not wrong
    assert unmeasured == ([] if num_ranks == 4 else [label for label in unmeasured if "HSDP" in label])
