"""Pretraining inside Megatron-core (`warpline pretrain CONFIG --engine megatron`): the same data, order and loss as `pretrain`.

Run     torchrun … warpline pretrain CONFIG --engine megatron parallel.tensor=2     (pip install warpline[megatron]; on GPUs)
Reads   what `pretrain` reads; [parallel]: tensor (with sequence parallelism), context (ring), pipeline (1f1b, interleaved),
        and replicate × shard as data ranks, over which Megatron shards the optimiser
Writes  RUN/checkpoints/pretrain/step-N, as `pretrain` does: a stopped run goes on, under any layout; RUN/metrics.jsonl
Expect  the loss in nats per token; no bits per byte of held-out text: `warpline evaluate` gives them
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.packing import num_windows, text_batch, windows_of_step
from ..data.shards import TokenShards
from ..models import huggingface
from ..models.decoder import DecoderConfig
from ..parallel.checkpoint import Piece, Saver, reader
from ..parallel.mesh import Mesh
from . import pretrain
from .parts.checkpoint import MOMENTS, Checkpoints
from .parts.config import BadConfig, ParallelConfig
from .parts.file import read_json
from .parts.model import start_from
from .parts.precision import choose_precision
from .parts.progress import StageProgress, console
from .parts.run import RunFolder
from .parts.schedule import learning_rate
from .parts.seed import seed_of
from .parts.session import COUNTERS, SAVE_TIMEOUT, NonFinite, Stopped, StopSignal
from .parts.tokens import num_targets, num_tokens
from .pretrain import PretrainStageConfig, data_folder, parts_of, start_of


def main(config: PretrainStageConfig, run: RunFolder, mesh: Mesh, stop: StopSignal | None = None) -> Path:
    """Train to `config.steps`; returns the last checkpoint."""
    _check(config.parallel)
    try:
        from ..parallel.megatron import Adam, Layout, MegatronEngine, start
    except ModuleNotFoundError as error:
        raise BadConfig(f"--engine megatron needs {error.name}; pip install 'warpline[megatron]'") from error

    # -- Where and whence ------------------------------------------------------------------------------------------------------
    saver = Saver(None if mesh.size == 1 else mesh.new_group(range(mesh.size), "gloo", SAVE_TIMEOUT))
    saved = Checkpoints(run.checkpoints("pretrain"), saver, config.keep_checkpoints)
    resumed = saved.latest(lambda message: console.print(message, soft_wrap=True))
    if resumed and resumed.name == f"step-{config.steps}":
        return resumed
    data = data_folder(config.data)
    shards = TokenShards(data / "train")
    windows_in_all, order = num_windows(shards, config.sequence_tokens), seed_of(config.seed, "pretrain", "order")
    begin = start_from(resumed, mesh) if resumed else start_of(config, data, mesh)
    parallel = config.parallel
    stages_per_rank = parallel.stages_per_rank if parallel.schedule == "interleaved" else 1
    layout = Layout(parallel.tensor, parallel.context, parallel.pipeline, stages_per_rank, parallel.tensor > 1)
    start(layout, config.seed)
    optimizer = config.optimizer
    adam = Adam(optimizer.beta1, optimizer.beta2, 1e-8, optimizer.weight_decay, optimizer.max_grad_norm)
    dtype = torch.bfloat16 if choose_precision(config.precision, mesh.device) == "bf16" else torch.float32
    weights = Filled(begin.config, begin.fill)
    engine = MegatronEngine(begin.config, weights, layout, adam, device=mesh.device, dtype=dtype)
    state: dict[str, Any] = dict.fromkeys(COUNTERS, 0)
    if resumed:
        fill, there = reader(resumed, "optimizer"), read_json(resumed / "state.json")
        engine.restore(weights, {of: Filled(begin.config, fill, f"{of}.") for of in MOMENTS}, there["num_updates"])
        state = {name: there[name] for name in COUNTERS}
    run.rewind("metrics.jsonl", "pretrain", state["step"])
    leads = engine.groups.tp.rank() == engine.groups.cp.rank() == engine.groups.pp.rank() == 0

    # -- The loop --------------------------------------------------------------------------------------------------------------
    with _saved(saver), StageProgress("pretrain", config.steps, state["step"], shown=mesh.is_first) as progress:
        for step in range(state["step"], config.steps):
            started, rate = time.monotonic(), learning_rate(optimizer, step, config.steps)
            windows = windows_of_step(windows_in_all, config.sequences_per_step, step, order)
            mine = list(windows)[engine.data_rank :: engine.num_data_ranks]
            per_row = max(1, config.tokens_per_microbatch // config.sequence_tokens)
            batches = [text_batch(shards, part, config.sequence_tokens) for part in parts_of(mine, per_row)]
            counts = [num_targets(batches), num_tokens(batches)] if leads else [0, 0]
            counted, read = mesh.sum(counts)  # over the data ranks
            loss = float(engine.accumulate(batches, counted))
            norm = engine.update(rate)
            elapsed = time.monotonic() - started
            _count(state, read, elapsed, is_skipped=not math.isfinite(norm))
            mesh.note(f"pretrain step {step + 1}")
            run.append("metrics.jsonl", {
                "stage": "pretrain", "step": step + 1, "loss": loss if math.isfinite(loss) else None,
                "tokens_per_second": read / elapsed, "learning_rate": rate, "grad_norm": norm if math.isfinite(norm) else None,
                "seconds": state["seconds"], "tokens": state["tokens"], "skipped_steps": state["skipped_steps"],
                "engine": "megatron",
            })  # fmt: skip
            progress.advance(f"loss {loss:.3f}  {read / elapsed:,.0f} tokens/s")
            if state["skipped_in_a_row"] >= config.max_skipped_steps_in_a_row:
                skipped = f"{state['skipped_in_a_row']} updates in a row had a non-finite gradient (step {step + 1})"
                raise NonFinite(f"pretrain: {skipped}; lower optimizer.learning_rate or inspect the data")
            stopping = mesh.sum([float(stop is not None and stop.received is not None)])[0] > 0
            if stopping or step + 1 == config.steps or (step + 1) % config.checkpoint_every_steps == 0:
                moments = {f"{of}.{name}": piece for of in MOMENTS for name, piece in engine.pieces(of).items()}
                counters = {"stage": "pretrain", "engine": "megatron", **state}
                saved.save(step + 1, begin.config, begin.tokenizer, counters, _finite(engine.pieces(), mesh, step + 1), moments)
            if stopping and step + 1 < config.steps:
                raise Stopped(f"pretrain: stopped after step {step + 1}; run it again to go on")
    return saved.folder / f"step-{config.steps}"


@contextmanager
def _saved(saver: Saver) -> Iterator[None]:
    """However it ends, no save is in flight then."""
    try:
        yield
    finally:
        saver.wait()


def _count(state: dict[str, Any], num_tokens: float, seconds: float, is_skipped: bool) -> None:
    """One more step in the counters that checkpoints keep."""
    state["step"] += 1
    state["tokens"] += int(num_tokens)
    state["seconds"] += seconds
    state["num_updates"] += not is_skipped
    state["skipped_steps"] += is_skipped
    state["skipped_in_a_row"] = state["skipped_in_a_row"] + 1 if is_skipped else 0


def _finite(pieces: dict[str, Piece], mesh: Mesh, step: int) -> dict[str, Piece]:
    """The weights, if they are fit to be saved."""
    bad = sum(not bool(piece.tensor.isfinite().all()) for piece in pieces.values() if piece.writes)
    if mesh.sum([float(bad)])[0]:
        raise NonFinite(f"pretrain: the weights after step {step} are not finite and are not saved; lower the learning rate")
    return pieces


class Filled(Mapping[str, Tensor]):
    """A decoder's whole tensors by its names, each made when it is asked for; `fill` gives pieces, by `prefix` and name, their
    values."""

    def __init__(self, config: DecoderConfig, fill: Callable[[dict[str, Piece]], None], prefix: str = ""):
        self.shapes = {
            huggingface.our_name(name): whole.shape for name, whole in huggingface.wholes(config, torch.float32).items()
        }
        self.fill, self.prefix = fill, prefix

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.empty(self.shapes[name])
        self.fill({self.prefix + name: Piece.of(tensor)})
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _check(parallel: ParallelConfig) -> None:
    try:
        torch.cuda.current_device()
    except (AssertionError, RuntimeError) as error:
        raise BadConfig("the megatron engine runs on GPUs alone, and there is none here; use --engine warpline") from error
    wrong = {"attention": parallel.attention != "ring", "offload": parallel.offload, "recompute": parallel.recompute != "none",
             "schedule": parallel.schedule not in ("1f1b", "interleaved")}  # fmt: skip
    for name in (name for name, is_wrong in wrong.items() if is_wrong):
        raise BadConfig(f"parallel.{name}={getattr(parallel, name)!r} is not in this engine; drop it, or use --engine warpline")


ENGINES = {"warpline": pretrain.main, "megatron": main}


def train(config: PretrainStageConfig, run: RunFolder, mesh: Mesh, stop: StopSignal | None = None) -> Path:
    """`main` of the engine that the config names."""
    return ENGINES[config.engine](config, run, mesh, stop)
