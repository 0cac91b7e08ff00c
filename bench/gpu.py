"""One call for a short lease of a GPU machine: the kernels' GPU tests, then every bench in its quick form, then a table.

Run     make gpu [OUT=DIR]      (or: PYTHONPATH=src python -m warpline.bench.gpu --out DIR)
Needs   python, torch, triton, pytest; nvidia-ml-py for the driver's version; peers where they are importable
Writes  DIR/gpu_tests.log, DIR/<bench>.log, DIR/<machine>/<bench>.json (default DIR: bench/results)
Expect  exit code 0 only if every part ended with 0. Rows are on disk as they are measured, so a run that is cut off leaves
        complete ones; the tests come first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from .measure import RESULTS

ROOT = Path(__file__).resolve().parents[1]
BENCHES = ("logit_block", "linear_logprob", "linear_divergence", "attention", "rms_norm", "rope", "swiglu", "adamw")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"tests or benches to run: tests {' '.join(BENCHES)}; default all"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {"tests", *BENCHES}
    if unknown:
        parser.error(f"{sorted(unknown)[0]!r} is neither tests nor a bench; choose among tests {' '.join(BENCHES)}")
    folder = arguments.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in ("tests", *BENCHES) if not arguments.names or name in arguments.names]
    ended = {}
    for name in chosen:
        if name == "tests":
            # Warnings are errors on the pinned versions only, and this machine brings its own.
            pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-W", "default", "tests/kernels"]
            ended[name] = run("gpu_tests", pytest, folder)
        else:
            command = [sys.executable, "-m", f"warpline.bench.{name}", "--quick", "--out", str(folder)]
            ended[name] = run(name, command, folder)
    print("\npart                 exit code   seconds")
    for name, (code, seconds) in ended.items():
        print(f"{name:<20} {code:>9} {seconds:>9.0f}")
    sys.exit(max(code for code, _ in ended.values()))


if __name__ == "__main__":
    main()
