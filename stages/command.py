"""The command line: `warpline VERB CONFIG.toml [dotted.key=value ...]`, also under torchrun.

Exit codes: 0 done; 2 bad config or bad input, one line on stderr; 3 stopped by a signal after a checkpoint; 4 non-finite too
often, or failed.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..data.record import BadData
from ..models.huggingface import BadCheckpoint
from ..parallel.checkpoint import SaveFailed
from ..parallel.mesh import Mesh, end_mesh, start_mesh
from ..parallel.watch import FirstFailed
from . import data, distill, doctor, evaluate, line, preference, pretrain, pretrain_megatron, profile, rl, sft
from .parts.checkpoint import checkpoints, load_start, save_checkpoint
from .parts.config import BadConfig, Config, load_config
from .parts.progress import console
from .parts.run import RunFolder
from .parts.session import NonFinite, Stopped, StopSignal
from .release import export
from .report import write_report

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="The assembly line of LLM training. A config is a TOML file; any key can be set behind it, such as "
    "optimizer.learning_rate=3e-4",
)  # fmt: skip

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="the run's configuration")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="dotted keys set over the config's")]
RunPath = Annotated[Path | None, typer.Option("--run", metavar="DIR", help="the run folder; default runs/<config name>")]

EXIT_BAD_INPUT, EXIT_STOPPED, EXIT_FAILED = 2, 3, 4
BAD_INPUT = (BadConfig, BadData, BadCheckpoint, OSError)


class Outcome:
    """Turns the end of a run into ended.json and the exit code, whatever that end is."""

    def __init__(self, run: RunFolder | None = None):
        self.run = run
        self.mesh: Mesh | None = None

    def __enter__(self) -> "Outcome":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is SystemExit:
            end_mesh(self.mesh)
            return
        reason, code = self._judge(error)
        end_mesh(self.mesh)
        if not self._end(reason):
            code = code or EXIT_BAD_INPUT
        if code:
            raise SystemExit(code) from None

    def watch(self, mesh: Mesh, run: RunFolder) -> None:
        """A run whose end is to be told, by any rank that outlives the first."""
        self.mesh, self.run = mesh, run
        if mesh.watch is not None:
            mesh.watch.last_words = RunFolder(run.path).end

    def _end(self, reason: str) -> bool:
        """Whether the run says why it ended: a full disk may not let it."""
        try:
            if self.run is not None and (self.run.path / "config.json").exists():
                self.run.end(reason)
        except OSError as error:
            print(f"warpline: {_words(error)}", file=sys.stderr)
            return False
        return True

    def _judge(self, error: BaseException | None) -> tuple[str, int]:
        watch = None if self.mesh is None else self.mesh.watch
        if error is None:
            return "done", 0
        if isinstance(error, Stopped | KeyboardInterrupt):
            console.print(str(error) or "interrupted", soft_wrap=True, markup=False)
            return "signal", EXIT_STOPPED
        if watch is not None and isinstance(error, RuntimeError | SaveFailed) and (loss := watch.lost()):
            watch.end(loss)
        if isinstance(error, BAD_INPUT):
            line = f"warpline: {' '.join(_words(error).split())}"
            if watch is None or watch.fail("bad input", line):
                print(line, file=sys.stderr)
            return "bad input", EXIT_BAD_INPUT
        if isinstance(error, NonFinite):
            print(f"warpline: {error}", file=sys.stderr)
            return "non-finite", EXIT_FAILED
        if isinstance(error, FirstFailed):
            return "failed: the first rank", EXIT_FAILED
        traceback.print_exception(error)
        if watch is not None:
            what = f"rank {watch.rank} failed"
            watch.fail(f"{what}: {type(error).__name__}", f"{what} in {watch.where}")
        return f"failed: {type(error).__name__}", EXIT_FAILED


def _words(error: BaseException) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}; check the path, its permissions and the space left"
    return str(error)


def _run(verb: str, kind: type[Config], work: Callable, path: Path, overrides: list[str] | None, run_path: Path | None) -> None:
    outcome = Outcome()
    with outcome:
        config = load_config(kind, path, overrides or [])
        outcome.mesh = mesh = _mesh(config)
        run = RunFolder(run_path or Path("runs") / path.stem, writes=mesh.is_first)
        mesh.on_first(lambda: run.open(config, verb))
        outcome.watch(mesh, run)
        work(config, run, mesh, StopSignal().install(None if mesh.watch is None else mesh.watch.wakeup))


def _mesh(config: Config) -> Mesh:
    try:
        parallel = getattr(config, "parallel", None)
        return start_mesh() if parallel is None else start_mesh(parallel.sizes, parallel.timeout_seconds)
    except ValueError as error:
        raise BadConfig(str(error)) from error


def _stage(verb: str, main: Callable) -> Callable:
    def work(config: Config, run: RunFolder, mesh: Mesh, stop: StopSignal) -> None:
        started = time.monotonic()
        checkpoint = main(config, run, mesh, stop)
        run.add_seconds(verb, time.monotonic() - started)
        if mesh.is_first:
            print(checkpoint)

    return work


def _whole_line(config: line.LineConfig, run: RunFolder, mesh: Mesh, stop: StopSignal) -> None:
    print_path = line.main(config, run, mesh, stop)
    if mesh.is_first:
        print(print_path)


def _data(config: data.DataStageConfig, run: RunFolder, mesh: Mesh, stop: StopSignal) -> None:
    folder = data.main(config, run, mesh)
    if mesh.is_first:
        print(folder)


def _evaluate(config: evaluate.EvaluateStageConfig, run: RunFolder, mesh: Mesh, stop: StopSignal) -> None:
    score = evaluate.main(config, run, mesh)
    if mesh.is_first:
        print(" ".join(f"{name}={value}" for name, value in score.items()))


VERBS: dict[str, tuple[type[Config], Callable, str]] = {
    "line": (line.LineConfig, _whole_line, "Run every stage in order, resumable, and report."),
    "data": (data.DataStageConfig, _data, "From text to a tokenizer and token shards."),
    "pretrain": (pretrain.PretrainStageConfig, _stage("pretrain", pretrain_megatron.train), "Pretrain on packed documents."),
    "sft": (sft.SftStageConfig, _stage("sft", sft.main), "Fine-tune on conversations."),
    "preference": (
        preference.PreferenceStageConfig,
        _stage("preference", preference.main),
        "Optimise on preference pairs (DPO, IPO).",
    ),
    "rl": (rl.RlStageConfig, _stage("rl", rl.main), "Reinforcement learning with reward functions (GRPO)."),
    "distill": (distill.DistillStageConfig, _stage("distill", distill.main), "Distil a teacher's distribution into a student."),
    "evaluate": (evaluate.EvaluateStageConfig, _evaluate, "Score a model on held-out text and tasks."),
}


def _add(verb: str, kind: type[Config], work: Callable, description: str) -> None:
    @app.command(verb, help=description)
    def command(config: ConfigPath, overrides: Overrides = None, run: RunPath = None) -> None:
        _run(verb, kind, work, config, overrides, run)


def _add_pretrain(verb: str, kind: type[Config], work: Callable, description: str) -> None:
    @app.command(verb, help=description)
    def command(
        config: ConfigPath,
        overrides: Overrides = None,
        run: RunPath = None,
        engine: Annotated[str | None, typer.Option("--engine", metavar="NAME", help="warpline, or megatron (on GPUs)")] = None,
    ) -> None:
        chosen = [] if engine is None else [f"engine={engine}"]
        _run(verb, kind, work, config, [*(overrides or []), *chosen], run)


for _verb, (_kind, _work, _description) in VERBS.items():
    (_add_pretrain if _verb == "pretrain" else _add)(_verb, _kind, _work, _description)


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")]) -> None:
    """Rebuild a run's report.html from its JSON files."""
    with Outcome():
        if not (run / "config.json").exists():
            raise BadConfig(f"{run} is not a run folder: it has no config.json")
        print(write_report(run))


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a Hugging Face folder (Llama, Qwen 3, Mistral, Gemma)")],
    run: Annotated[Path, typer.Option("--run", metavar="RUN", help="the run folder to import into")],
) -> None:
    """Bring a Hugging Face folder into a run, checked.

    It becomes RUN/checkpoints/import/step-0.
    """
    with Outcome():
        decoder, tokenizer = load_start(folder, torch.device("cpu"))
        state = {"stage": "import", "step": 0, "num_updates": 0}
        print(save_checkpoint(run / "checkpoints" / "import", 0, decoder, None, tokenizer, state, keep=1))


@app.command("export")
def export_(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder, or one checkpoint (…/step-N)")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="where the Hugging Face folder goes")],
) -> None:
    """Write a run's model as a Hugging Face folder.

    The released model; without a release, that of the newest checkpoint.
    """
    with Outcome():
        if folder.exists():
            raise BadConfig(f"{folder} exists; give a folder that does not")
        export(_model_of(run), folder)
        print(folder)


def _model_of(run: Path) -> Path:
    """The released model of a run, else its newest checkpoint; a checkpoint stands for itself."""
    if (run / "model.safetensors").exists() or (run / "model.safetensors.index.json").exists():
        return run
    if (run / "release" / "config.json").exists():
        return run / "release"
    newest = [checkpoints(stage)[0] for stage in (run / "checkpoints").glob("*") if checkpoints(stage)]
    if not newest:
        raise BadConfig(f"{run} holds no checkpoint and no release; give a run folder or a checkpoint")
    return max(newest, key=lambda path: (path / "manifest.json").stat().st_mtime)


@app.command("doctor")
def doctor_() -> None:
    """Print what is here: machine, GPUs, versions, kernels.

    With GPUs, each is checked; exit code 4 if one is bad.
    """
    with Outcome():
        is_well = doctor.main()
    if not is_well:
        raise SystemExit(EXIT_FAILED)


@app.command("profile")
def profile_(
    config: ConfigPath,
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option("--run", metavar="DIR", help="default runs/profile_<config name>")] = None,
    stage: Annotated[str | None, typer.Option("--stage", help="whose config it is, where folder and keys do not tell")] = None,
    steps: Annotated[str, typer.Option("--steps", metavar="A:B", help="run A steps, then record B - A")] = "10:13",
    schedule: Annotated[bool, typer.Option("--schedule", help="draw the pipeline's schedule; runs nothing")] = False,
    microbatches: Annotated[int | None, typer.Option("--microbatches", min=1, help="of the drawn schedule")] = None,
    sweep: Annotated[list[str] | None, typer.Option("--sweep", metavar="KEY=V,V", help="scaling over these values")] = None,
) -> None:
    """Trace a few steps of a stage: where time goes.

    Under torchrun every rank is traced, onto one time line.
    """
    outcome = Outcome()
    with outcome:
        asked = profile.request(config, overrides or [], stage, steps)
        folder = run or Path("runs") / f"profile_{config.stem}"
        if microbatches and not schedule:
            raise BadConfig(f"received --microbatches {microbatches} without --schedule; expected both: it is drawn, never run")
        if schedule:
            print(profile.draw(asked, microbatches))
        elif sweep:
            print(profile.sweep(asked, sweep, folder))
        else:
            outcome.mesh = mesh = _mesh(asked.config)
            page = profile.main(asked, folder, mesh, StopSignal().install())
            if mesh.is_first:
                print(page)


# A process of its own: nothing of the stages imports the benches, and a measurement wants none of what was imported here.
@app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Measure every operation and stage beside its peers.

    `warpline bench --help` says how.
    """
    sys.stdout.flush()
    # In this process: a child would be killed a quarter of a second after Ctrl-C.
    os.execv(sys.executable, [sys.executable, "-m", "warpline.bench.suite", *context.args])


def main() -> None:
    app()


if __name__ == "__main__":
    main()
