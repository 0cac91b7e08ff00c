"""One call for a short lease of a GPU machine: the kernels' GPU tests, then every bench in its quick form, then a table.

Run     make gpu [OUT=DIR] [NAMES="attention adamw"]      (or: PYTHONPATH=src python -m warpline.bench.gpu NAME ... --out DIR)
Needs   python, torch, triton, pytest, pytest-benchmark; nvidia-ml-py for telemetry; peers where they are importable
Writes  DIR/gpu_tests.log, DIR/<bench>.log, DIR/<machine>/<date>-<commit>.json (default DIR: bench/results), and pictures where
        matplotlib is
Expect  exit code 0 only if every part ended with 0. Rows are on disk as they are measured, so a run that is cut off leaves
        complete ones. Called again it goes on: what is complete is left out, unless it is named. The tests come first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from .measure import Report
from .rows import RESULTS, BadResults
from .suite import KERNELS, pictures
from .table import table, terminal_columns

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tests", *KERNELS)
PASSED = "gpu_tests.passed"


def run(name: str, command: list[str], folder: Path) -> tuple[int, float]:
    """(exit code, seconds); the output goes to the terminal and into a log, line by line."""
    started = time.monotonic()
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout or ():
            log.write(line)
            log.flush()
            print(line, end="", flush=True)
        code = process.wait()
    return code, time.monotonic() - started


def todo(names: list[str], folder: Path) -> list[str]:
    """What is named, else what is not complete: a part that failed or was cut off runs again."""
    if names:
        return [part for part in PARTS if part in names]
    report = _report(folder)
    passed = folder / f"{PASSED}-{report.results.machine['commit']}"
    done = {name for name, bench in report.results.benches.items() if bench.ended == "complete"}
    return [part for part in PARTS if part not in done | ({"tests"} if passed.exists() else set())]


def _report(folder: Path) -> Report:
    return Report(folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"parts to run: {' '.join(PARTS)}; default the incomplete")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(PARTS)
    if unknown:
        parser.error(f"{sorted(unknown)[0]!r} is neither tests nor a bench; choose among {' '.join(PARTS)}")
    folder = arguments.out.resolve()
    try:
        _report(folder)
    except BadResults as error:
        parser.error(str(error))
    chosen, ended = todo(arguments.names, folder), {}
    print(f"to do: {' '.join(chosen) or 'nothing'}", flush=True)
    for name in chosen:
        if name == "tests":
            # Warnings are errors on the pinned versions only, and this machine brings its own.
            pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-W", "default", "tests/kernels"]
            ended[name] = run("gpu_tests", pytest, folder)
            if ended[name][0] == 0:
                (folder / f"{PASSED}-{_report(folder).results.machine['commit']}").touch()
        else:
            command = [sys.executable, "-m", "warpline.bench.suite", name, "--quick", "--no-pictures", "--out", str(folder)]
            ended[name] = run(name, command, folder)
    report = _report(folder)
    if report.path.exists():
        for path in pictures(report.path):
            print(path)
        print(table(report.results, KERNELS, terminal_columns()))
    print("\npart                 exit code   seconds")
    for name, (code, seconds) in ended.items():
        print(f"{name:<20} {code:>9} {seconds:>9.0f}")
    sys.exit(max((code for code, _ in ended.values()), default=0))


if __name__ == "__main__":
    main()
