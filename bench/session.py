"""The items of a run: pytest collects one for every case of a bench, and pytest-benchmark calls its rounds.

Run     by `suite`; no bench of its own
Expect  an item fails if ours does not run, or is further from fp64 than it may be; its rows are on disk either way
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from .measure import Case, Report, measure
from .profile import profile
from .telemetry import Telemetry


class Plan:
    """What a run of pytest is to measure; a plugin, which makes the items."""

    def __init__(self, report: Report, telemetry: Telemetry, cases: list[Case], seconds: float, profiled: str | None = None):
        self.report, self.telemetry, self.cases, self.seconds, self.profiled = report, telemetry, cases, seconds, profiled
        self.failures: list[str] = []

    def pytest_generate_tests(self, metafunc: Any) -> None:
        metafunc.parametrize("work", [(self, case) for case in self.cases], ids=[case.name for case in self.cases])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            reason = report.longreprtext.strip().splitlines()[-1].removeprefix("E ").strip()
            self.failures.append(f"{report.nodeid.partition('::')[2]}: {reason}")


def bench_case(work: tuple[Plan, Case], benchmark: Any) -> None:
    plan, case = work
    if plan.profiled is not None:
        profile(case, plan.report, plan.profiled)
        return
    rows = measure(case, benchmark, plan.report, plan.telemetry, plan.seconds)
    benchmark.extra_info["rows"] = [row.key for row in rows]
    # Every case compiles anew: torch.compile falls back to eager after some recompilations of one function.
    torch._dynamo.reset()
    gc.collect()
    if plan.report.device.type == "cuda":
        torch.cuda.empty_cache()
    ours = next(iter(case.candidates))
    wrong = [row.check for row in rows if row.candidate == ours and row.check not in ("", "passed")]
    assert not wrong, f"{case.name}: {ours}: {wrong[0]}"
