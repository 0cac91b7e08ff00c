"""The benchmark suite: every operation and stage, ours beside every peer that is here, as a table and pictures.

Run     warpline bench [NAME ...] [--quick] [--out DIR]         (PYTHONPATH=src python -m warpline.bench.suite from a checkout)
        warpline bench --compare A.json B.json                   warpline bench NAME --profile TEXT
Writes  DIR/<machine>/<date>-<commit>.json (default bench/results) as it measures; beside it a picture of each bench, of the
        roofline and of the stages, and one page with all of them
Expect  exit code 0 if every bench ran and every check of ours passed; --compare exits 1 on a regression beyond the spread;
        2, with one line, where a file, the folder or what measuring needs is not as it must be
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from . import session
from .compare import compare
from .machine import ceilings
from .measure import REFUSALS, Case, LeftOut, Report, measure
from .profile import Traced
from .rows import RESULTS, BadResults, load, save
from .session import Plan
from .table import table, terminal_columns
from .telemetry import Telemetry

KERNELS = (
    "logit_block", "linear_logprob", "linear_divergence", "policy_loss", "preference_loss", "attention", "rms_norm", "rope",
    "swiglu", "adamw",
)  # fmt: skip
STAGES = ("pretrain", "sft", "preference", "rl", "distill")
APART = ("use_in_your_trainer", "context_parallel", "pipeline")  # they start processes of their own, and run by name only
SECONDS = {("cpu", True): 0.02, ("cpu", False): 0.05, ("cuda", True): 0.2, ("cuda", False): 1.0}
PYTEST = (
    "-c", os.devnull, "--rootdir", str(Path(__file__).parent), "-p", "no:cacheprovider", "--import-mode=importlib", "-q", "-s",
    "-o", "python_functions=bench_*", "-o", "consider_namespace_packages=true", "--benchmark-quiet", "--benchmark-disable-gc",
    "--tb=short", "--no-header",
)  # fmt: skip


class BadMachine(ValueError):
    """A machine without what measuring needs, in one line."""


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("warpline bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"default: {' '.join(KERNELS + STAGES)}; by name only: {' '.join(APART)}"
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes, less time a candidate")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default bench/results")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two results: what B made faster or slower")
    parser.add_argument("--profile", metavar="TEXT", help="trace the rows that contain TEXT, instead of timing")
    parser.add_argument("--no-pictures", action="store_true")
    arguments = parser.parse_args(argv)
    known = KERNELS + STAGES + APART
    unknown = [name for name in arguments.names if name not in known]
    if unknown:
        parser.error(f"received bench {unknown[0]!r}; expected {', '.join(known)}: choose among them")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = arguments_of(argv)
    try:
        if arguments.compare:
            words, has_regressed = compare(*(load(path) for path in arguments.compare))
            print(words)
            return int(has_regressed)
        check_pytest()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        report = Report(arguments.out, device)
    except (BadResults, BadMachine) as error:
        print(f"warpline bench: {error}", file=sys.stderr)
        return 2
    chosen = arguments.names or [*KERNELS, *STAGES]
    traced = None if arguments.profile is None else Traced(arguments.profile)
    if traced is None:
        report.results.ceilings = ceilings(device)
        print(f"{report.path}\nceilings: {report.results.ceilings}", flush=True)
    telemetry = Telemetry(device)
    if telemetry.absent:
        print(f"absent: telemetry and energy: {telemetry.absent}")
    failed = []
    for name in chosen:
        ended = run(name, report, telemetry, arguments, traced)
        if ended.startswith(("failed", "interrupted")):
            failed.append(name)
        if ended == "interrupted":
            break
    if traced is not None:
        if traced.num_traced == 0 and not failed:
            print(f"warpline bench: {traced.refusal()}", file=sys.stderr)
            return 2
        return int(bool(failed))
    report.results.machine["load_after"] = f"{os.getloadavg()[0]:.2f}"
    save(report.results, report.path)
    print(table(report.results, chosen, terminal_columns()))
    if not arguments.names:
        print(f"left out: {', '.join(APART)}: about two minutes each, by name")
    if not arguments.no_pictures:
        for path in pictures(report.path):
            print(path)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def check_pytest() -> None:
    """What calls the rounds is there; a comparison does without."""
    try:
        importlib.import_module("pytest")
        importlib.import_module("pytest_benchmark")
    except ModuleNotFoundError as error:
        raise BadMachine(
            f"{error}; expected pytest-benchmark, which calls the rounds: pip install 'warpline[bench]'"
        ) from error


def run(name: str, report: Report, telemetry: Telemetry, arguments: argparse.Namespace, traced: Traced | None) -> str:
    """One bench; how it ended, as in `rows.Bench`."""
    import pytest  # a comparison runs without it

    is_quick, device, started = arguments.quick, report.device, time.monotonic()
    if traced is None:
        report.start(name, is_quick)
    report.bench = name
    print(f"\n== {name}", flush=True)
    try:
        module = module_of(name)
    except ModuleNotFoundError as error:  # a bare machine has what the kernels need, and not what the stages need
        return _left_out(report, traced, f"{error}; install the package")
    if name in STAGES and traced is not None:
        return _left_out(report, traced, "a stage is traced by `warpline profile`")
    if name in APART:
        return apart(module, report, is_quick) if traced is None else _left_out(report, traced, "its processes are its own")

    def cases() -> list[Any]:
        found = list(module.cases(device, is_quick))
        return compile_once(found) if device.type == "cpu" and name in KERNELS else found

    plan = Plan(report, telemetry, cases, SECONDS[device.type, is_quick], getattr(module, "measure_case", measure))
    plan.traced = traced
    code = pytest.main([*PYTEST, str(session.__file__)], plugins=[plan])
    ended = "complete" if code == 0 else "interrupted" if code == pytest.ExitCode.INTERRUPTED else "failed"
    if plan.failures:
        ended = f"failed: {len(plan.failures)} of {plan.num_cases}: {plan.failures[0]}"
    if traced is None:
        report.end(ended, time.monotonic() - started)
    return ended


def apart(module: Any, report: Report, is_quick: bool) -> str:
    """A bench that starts processes of its own and adds its rows itself; how it ended."""
    started = time.monotonic()
    try:
        module.fill(report, is_quick)
    except LeftOut as error:
        return _left_out(report, None, str(error))
    except ModuleNotFoundError as error:
        return _left_out(report, None, f"{error}; install the extra `trainers`")
    except KeyboardInterrupt:
        ended = "interrupted"
    except (*REFUSALS, subprocess.SubprocessError) as error:
        traceback.print_exc()
        ended = f"failed: {(str(error).splitlines() or [type(error).__name__])[0]}"
    else:
        rows = [row for row in report.results.rows if row.bench == report.bench]
        wrong = [f"{row.operation}: {row.candidate}: {row.check}" for row in rows if row.check not in ("", "passed")]
        ended = f"failed: {len(wrong)} of {len(rows)}: {wrong[0]}" if wrong else "complete"
    if ended.startswith("failed"):
        print(ended, flush=True)
    report.end(ended, time.monotonic() - started)
    return ended


def module_of(name: str) -> Any:
    return importlib.import_module(f".{name}", __package__)


def _left_out(report: Report, traced: Traced | None, reason: str) -> str:
    """Says that a bench did not run, and why; that is no failure."""
    print(f"left out: {report.bench}: {reason}")
    ended = f"left out: {reason}"
    if traced is None:
        report.end(ended, 0.0)
    return ended


def compile_once(cases: list[Case]) -> list[Case]:
    """torch.compile at the last case that has it: on a CPU a compilation takes longer than all the rows of a case."""
    for case in [case for case in cases if "torch.compile" in case.candidates][:-1]:
        del case.candidates["torch.compile"]
        case.absent = {**case.absent, "torch.compile at other cases": "on a CPU it is compiled for one case a bench"}
    return cases


def pictures(path: Path) -> list[Path]:
    try:
        from .page import write_page
    except ImportError as error:
        print(f"no pictures: {error}; install the extra `bench`")
        return []
    return write_page(path)


if __name__ == "__main__":
    sys.exit(main())
