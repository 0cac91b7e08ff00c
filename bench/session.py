"""The items of a run: pytest collects one for every case of a bench, and pytest-benchmark calls its rounds.

Run     by `suite`; no bench of its own
Expect  an item fails if ours does not run, or is further from fp64 than it may be; its rows are on disk either way
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import torch

from .measure import Report
from .profile import Traced, profile
from .rows import Row
from .telemetry import Telemetry


class Plan:
    """What a run of pytest is to measure; a plugin, which makes the items."""

    def __init__(
        self,
        report: Report,
        telemetry: Telemetry,
        cases: Callable[[], list[Any]],
        seconds: float,
        measure: Callable[..., list[Row]],
    ):
        self.report, self.telemetry, self.cases, self.seconds, self.measure = report, telemetry, cases, seconds, measure
        self.traced: Traced | None = None
        self.failures: list[str] = []
        self.num_cases = 0

    def pytest_generate_tests(self, metafunc: Any) -> None:
        cases = self.cases()
        self.num_cases = len(cases)
        metafunc.parametrize("work", [(self, case) for case in cases], ids=[case.name for case in cases])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            reason = report.longreprtext.strip().splitlines()[-1].removeprefix("E ").strip()
            self.failures.append(f"{report.nodeid.partition('::')[2]}: {reason}".removeprefix(": "))
            print(f"failed: {self.failures[-1]}", flush=True)

    def pytest_report_teststatus(self, report: Any) -> tuple[str, str, str]:
        """No dot and no F: the next row would stand behind it."""
        return report.outcome if report.when == "call" else "error" if report.failed else "", "", ""

    pytest_collectreport = pytest_runtest_logreport  # where the cases cannot be made at all


def bench_case(work: tuple[Plan, Any], benchmark: Any) -> None:
    plan, case = work
    if plan.traced is not None:
        benchmark.pedantic(profile, args=(case, plan.report, plan.traced))
        return
    rows = plan.measure(case, benchmark, plan.report, plan.telemetry, plan.seconds)
    benchmark.extra_info["rows"] = [row.key for row in rows]
    # Every case compiles anew: torch.compile falls back to eager after some recompilations of one function.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if plan.report.device.type == "cuda":
        torch.cuda.empty_cache()
    ours = next(iter(case.candidates))
    wrong = [row.check for row in rows if row.candidate == ours and row.check not in ("", "passed")]
    assert not wrong, f"{case.name}: {ours}: {wrong[0]}"
