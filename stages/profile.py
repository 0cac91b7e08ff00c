"""Profiling: a few steps of a stage, traced on every rank, and what they say about scaling; or a pipeline's schedule, drawn.

Run     [torchrun --nproc-per-node N --no-python --] warpline profile CONFIG [key=value ...] [--steps 10:13]
        warpline profile CONFIG --sweep 'parallel.tensor=1,2,4'      (starts torchrun by itself, once a point)
        warpline profile CONFIG --schedule
Reads   what the stage reads
Writes  RUN/profile/: rank_N.json.gz (torch's trace), merged.json.gz (for ui.perfetto.dev), summary.json, profile.html; a sweep:
        RUN/scaling.json, RUN/scaling.png and a profile of every point; no checkpoint
Expect  --steps A:B runs A steps, then records B − A. Recorded steps are slower than others: rates come from those before
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from ..parallel.mesh import Mesh
from ..parallel.pipeline import SCHEDULES
from . import distill, preference, pretrain, pretrain_megatron, rl, sft
from .parts.config import BadConfig, ParallelConfig, TrainingConfig, load_config
from .parts.file import write_atomic, write_json
from .parts.profile_merge import chosen_ranks, write_merged
from .parts.profile_page import page, terminal_summary
from .parts.profile_record import Recorded, RecordedRun, clock_offsets
from .parts.profile_schedule import Placed, draw_text, measured_bubble, order, place, predicted_bubble
from .parts.profile_sweep import (
    check_machine,
    combinations,
    num_gpus,
    plot,
    points,
    rate,
    require_matplotlib,
    run_point,
    scaled,
    table,
)
from .parts.profile_trace import Window, read_json_trace, read_trace, summarise
from .parts.progress import console
from .parts.session import StopSignal

STAGES: dict[str, tuple[type[TrainingConfig], Callable[..., Path]]] = {
    "pretrain": (pretrain.PretrainStageConfig, pretrain_megatron.train),
    "sft": (sft.SftStageConfig, sft.main),
    "preference": (preference.PreferenceStageConfig, preference.main),
    "rl": (rl.RlStageConfig, rl.main),
    "distill": (distill.DistillStageConfig, distill.main),
}


class Request(NamedTuple):
    """What to profile: `num_before` steps run unrecorded, then `num_recorded` are recorded."""

    stage: str
    path: Path
    overrides: list[str]
    config: Any  # the stage's
    num_before: int
    num_recorded: int

    @property
    def parallel(self) -> ParallelConfig:
        return self.config.parallel


def request(path: Path, overrides: list[str], stage: str | None, steps: str) -> Request:
    """From the command line; `stage` None: the folder's name (configs/<stage>/), else the one stage that the keys fit."""
    first, _, last = steps.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) < int(last)):
        raise BadConfig(f"received --steps {steps}; expected A:B with 1 <= A < B, such as 10:13: steps 11, 12 and 13")
    stage = stage or _stage_of(path, overrides)
    if stage not in STAGES:
        raise BadConfig(f"received --stage {stage}; expected one of {', '.join(STAGES)}")
    config = load_config(STAGES[stage][0], path, overrides)
    return Request(stage, path, overrides, config, int(first), int(last) - int(first))


def _stage_of(path: Path, overrides: list[str]) -> str:
    if path.resolve().parent.name in STAGES:
        return path.resolve().parent.name
    keys = load_config(AnyKeys, path, overrides).model_fields_set
    fitting = [stage for stage, (kind, _) in STAGES.items() if _fits(kind, path, overrides)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise BadConfig(f"{path} fits {' and '.join(fitting)}; say which with --stage")
    received = f"{path} has {', '.join(sorted(keys)) or 'no keys'}"
    raise BadConfig(f"{received}; expected the keys of one of {', '.join(STAGES)}: say which is meant with --stage")


class AnyKeys(BaseModel):
    """A config of anything."""

    model_config = ConfigDict(extra="allow")


def _fits(kind: type[TrainingConfig], path: Path, overrides: list[str]) -> bool:
    try:
        load_config(kind, path, overrides)
    except BadConfig:
        return False
    return True


def main(asked: Request, folder: Path, mesh: Mesh, stop: StopSignal | None = None) -> Path:
    """Runs the stage to the last recorded step and returns the page."""
    # -- What: the stage without checkpoints and evaluations, as long as is needed ---------------------------------------------
    last = asked.num_before + asked.num_recorded
    lengths = {"steps", "checkpoint_every_steps", "evaluate_every_steps"} & type(asked.config).model_fields.keys()
    config = asked.config.model_copy(update=dict.fromkeys(lengths, last + 1))
    run = RecordedRun(folder, mesh, asked.num_before, asked.num_recorded)
    mesh.on_first(lambda: run.open(asked.config, f"profile {asked.stage}"))

    # -- The steps -------------------------------------------------------------------------------------------------------------
    try:
        STAGES[asked.stage][1](config, run, mesh, stop)
    except Recorded:
        mesh.note("profile, summing up")

    # -- What they say: each rank reads its own trace --------------------------------------------------------------------------
    mine = summarise(read_trace(read_json_trace(run.trace_path(mesh.rank))), mesh.rank, mesh.sizes)
    mine |= {"host": platform.node(), "marks": run.marks, "place": mesh.place._asdict()}
    ranks = mesh.gather([mine], *mesh.sizes._fields)
    path = folder / "profile" / "profile.html"
    mesh.on_first(lambda: _write(asked, run, ranks, path))
    return path


def _write(asked: Request, run: RecordedRun, ranks: list[dict[str, Any]], path: Path) -> None:
    offsets = clock_offsets([rank["host"] for rank in ranks], [[1e6 * mark for mark in rank["marks"]] for rank in ranks])
    chosen = chosen_ranks(len(ranks))
    names = [f"rank {rank} {_place_name(ranks[rank]['place'], asked.parallel)}" for rank in chosen]
    traces = [run.trace_path(rank) for rank in chosen]
    write_merged(path.with_name("merged.json.gz"), traces, names, [offsets[rank] for rank in chosen])
    schedule = schedule_of(asked) if asked.parallel.pipeline > 1 else None
    found = {
        "stage": asked.stage, "config": str(asked.path), "overrides": asked.overrides, "layout": str(asked.parallel.sizes),
        "steps": [run.first + 1, run.last], "environment": run.read_json("environment.json", {}),
        "merged_ranks": chosen, "clock_offsets_us": offsets, "schedule": asked.parallel.schedule if schedule else None,
        "predicted_bubble": None if schedule is None else predicted_bubble(schedule),
        "measured_bubble": bubble(ranks, offsets, asked.parallel), "ranks": ranks,
    }  # fmt: skip
    write_json(path.with_name("summary.json"), found)
    write_atomic(path, page(found, schedule).encode())
    print(terminal_summary(found))
    if schedule is not None:
        print(draw_text(schedule))


def _place_name(place: dict[str, int], parallel: ParallelConfig) -> str:
    shown = [f"{axis} {place[axis]}" for axis, size in parallel.sizes._asdict().items() if size > 1]
    return f"({', '.join(shown)})" if shown else ""


def bubble(ranks: list[dict[str, Any]], offsets: list[float], parallel: ParallelConfig) -> float | None:
    """Measured: the mean over the pipelines (ranks that differ in `pipeline` alone); None without one, or if not seen."""
    pipelines: dict[tuple[int, ...], list[list[Window]]] = {}
    for rank, offset in zip(ranks, offsets, strict=True):
        others = tuple(place for axis, place in rank["place"].items() if axis != "pipeline")
        windows = [Window(start - offset, end - offset, waited) for start, end, waited in rank["windows"]]
        pipelines.setdefault(others, []).append(windows)
    found = [measured_bubble(windows) for windows in pipelines.values()] if parallel.pipeline > 1 else []
    known = [share for share in found if share is not None]
    return sum(known) / len(known) if known else None


# ---- A sweep ----


def sweep(asked: Request, settings: list[str], folder: Path) -> Path:
    """Profiles every combination of the settings, and returns the picture."""
    require_matplotlib()
    if asked.num_before < 2:
        raise BadConfig(f"received --steps {asked.num_before}:…; a sweep's rate is of steps 2 to A: expected A >= 2")
    kind = STAGES[asked.stage][0]
    found = [(chosen, load_config(kind, asked.path, [*asked.overrides, *chosen])) for chosen in combinations(settings)]
    made = points(found)
    check_machine(made, num_gpus())
    steps = f"{asked.num_before}:{asked.num_before + asked.num_recorded}"
    rows, rates = [], {}
    for point in made:
        if point.name not in rates:  # weak scaling begins where strong scaling does
            console.print(f"{point.scaling}: {' '.join(point.overrides)}, {point.num_ranks} rank(s)", markup=False)
            path = run_point(point, [str(asked.path), *asked.overrides, "--stage", asked.stage, "--steps", steps], folder)
            rates[point.name] = rate(path, asked.num_before)
        rows.append({
            "scaling": point.scaling, "setting": " ".join(point.overrides), "ranks": point.num_ranks,
            "tokens_per_second": rates[point.name], "profile": f"{point.name}/profile/profile.html",
        })  # fmt: skip
    rows = scaled(rows)
    write_json(folder / "scaling.json", rows)
    plot(rows, folder / "scaling.png")
    print(table(rows))
    return folder / "scaling.png"


# ---- The schedule ----


def draw(asked: Request, num_microbatches: int | None) -> str:
    """The schedule and its predicted bubble, as text."""
    placed, parallel = schedule_of(asked, num_microbatches), asked.parallel
    count = 1 + max(item.action.microbatch for item in placed[0])
    head = (
        f"{parallel.schedule}, {parallel.pipeline} ranks, {count} microbatches: bubble {predicted_bubble(placed):.1%} predicted"
    )
    return f"{head} (forward 1, backward 2, messages 0)\n{draw_text(placed)}"


def schedule_of(asked: Request, num_microbatches: int | None = None) -> list[list[Placed]]:
    """Of the config's pipeline."""
    parallel = asked.parallel
    if parallel.pipeline == 1:
        raise BadConfig("parallel.pipeline is 1: there is no schedule; set it, as parallel.pipeline=4")
    count = num_microbatches or microbatches_of(asked)
    try:
        return place(order(parallel.schedule, parallel.pipeline, count, parallel.stages_per_rank))
    except ValueError as error:
        raise BadConfig(f"parallel.schedule={parallel.schedule} with {count} microbatches: {error}") from error


def microbatches_of(asked: Request) -> int:
    """Of a step (for stages that pack samples of uneven length, as many as a full packing needs), made a multiple of the
    pipeline's ranks and at least one a stage, as the model makes it."""
    config, parallel = asked.config, asked.parallel
    num_data = parallel.replicate * parallel.shard
    if isinstance(config, pretrain.PretrainConfig):
        in_one = max(1, config.tokens_per_microbatch // config.sequence_tokens)
        count = _ceil(_ceil(config.sequences_per_step, num_data), in_one)
    elif isinstance(config, rl.RlConfig):
        longest = config.prompts_per_step * config.completions_per_prompt * config.max_new_tokens // config.minibatches_per_step
        count = _ceil(_ceil(longest, num_data), config.tokens_per_microbatch)
    else:
        count = _ceil(_ceil(config.tokens_per_step, num_data), config.tokens_per_microbatch)
    held = SCHEDULES[parallel.schedule][1] or parallel.stages_per_rank
    return _ceil(max(count, held * parallel.pipeline), parallel.pipeline) * parallel.pipeline


def _ceil(x: int, size: int) -> int:
    return -(-x // size)
