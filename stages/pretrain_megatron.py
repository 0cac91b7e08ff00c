"""Pretraining inside Megatron-core (`warpline pretrain CONFIG --engine megatron`): the same data, order and loss as `pretrain`.

Run     torchrun … warpline pretrain CONFIG --engine megatron parallel.tensor=2     (pip install warpline[megatron]; on GPUs)
Reads   what `pretrain` reads; [parallel]: tensor (with sequence parallelism), context (ring), pipeline (1f1b, interleaved),
        and replicate × shard as data ranks, over which Megatron shards the optimiser
Writes  RUN/checkpoints/pretrain/step-N, a Hugging Face folder without the optimiser's moments, which Megatron keeps: a stopped
        run is not resumed but started anew from its weights (`start`); RUN/metrics.jsonl
Expect  the loss in nats per token; no bits per byte of held-out text: `warpline evaluate` gives them
"""

import math
import time
from functools import partial
from pathlib import Path

import torch

from ..data.packing import num_windows, text_batch, windows_of_step
from ..data.shards import TokenShards
from ..models.decoder import Decoder
from ..parallel.mesh import ALONE, Mesh
from . import pretrain
from .parts.checkpoint import checkpoints, save_checkpoint
from .parts.config import BadConfig, ParallelConfig
from .parts.model import build
from .parts.precision import choose_precision
from .parts.progress import StageProgress
from .parts.run import RunFolder
from .parts.schedule import learning_rate
from .parts.seed import seed_of
from .parts.session import NonFinite, Stopped, StopSignal
from .parts.tokens import num_targets, num_tokens
from .pretrain import PretrainStageConfig, data_folder, parts_of, start_of


def main(config: PretrainStageConfig, run: RunFolder, mesh: Mesh, stop: StopSignal | None = None) -> Path:
    """Train to `config.steps`; returns the last checkpoint."""
    try:
        from ..parallel.megatron import Adam, Layout, MegatronEngine, start
    except ModuleNotFoundError as error:
        raise BadConfig(f"--engine megatron needs {error.name}; pip install 'warpline[megatron]'") from error

    # -- Where and whence ------------------------------------------------------------------------------------------------------
    _check(config.parallel)
    folder = run.checkpoints("pretrain")
    for checkpoint in checkpoints(folder):
        if checkpoint.name == f"step-{config.steps}":
            return checkpoint
        raise BadConfig(
            f"{checkpoint} is of an unfinished Megatron run, whose optimiser is gone; give it as `start` to a new run"
        )
    data = data_folder(config.data)
    shards = TokenShards(data / "train")
    windows_in_all, order = num_windows(shards, config.sequence_tokens), seed_of(config.seed, "pretrain", "order")
    begin = start_of(config, data, mesh)
    here = Mesh(0, ALONE, torch.device("cpu"))
    whole = build(begin, here, ParallelConfig(), "fp32")
    parallel = config.parallel
    stages_per_rank = parallel.stages_per_rank if parallel.schedule == "interleaved" else 1
    layout = Layout(parallel.tensor, parallel.context, parallel.pipeline, stages_per_rank, parallel.tensor > 1)
    start(layout, config.seed)
    optimizer = config.optimizer
    adam = Adam(optimizer.beta1, optimizer.beta2, 1e-8, optimizer.weight_decay, optimizer.max_grad_norm)
    dtype = torch.bfloat16 if choose_precision(config.precision, mesh.device) == "bf16" else torch.float32
    engine = MegatronEngine(begin.config, dict(whole.named_parameters()), layout, adam, device=mesh.device, dtype=dtype)
    leads = engine.groups.tp.rank() == engine.groups.cp.rank() == engine.groups.pp.rank() == 0

    # -- The loop --------------------------------------------------------------------------------------------------------------
    tokens, seconds, skipped = 0, 0.0, 0
    with StageProgress("pretrain", config.steps, 0, shown=mesh.is_first) as progress:
        for step in range(config.steps):
            started, rate = time.monotonic(), learning_rate(optimizer, step, config.steps)
            windows = windows_of_step(windows_in_all, config.sequences_per_step, step, order)
            mine = list(windows)[engine.data_rank :: engine.num_data_ranks]
            per_row = max(1, config.tokens_per_microbatch // config.sequence_tokens)
            batches = [text_batch(shards, part, config.sequence_tokens) for part in parts_of(mine, per_row)]
            counts = [num_targets(batches), num_tokens(batches)] if leads else [0, 0]
            counted, read = mesh.sum(counts)  # over the data ranks
            loss = float(engine.accumulate(batches, counted))
            norm = engine.update(rate)
            skipped += not math.isfinite(norm)
            tokens, elapsed = tokens + int(read), time.monotonic() - started
            seconds += elapsed
            mesh.note(f"pretrain step {step + 1}")
            run.append("metrics.jsonl", {
                "stage": "pretrain", "step": step + 1, "loss": loss if math.isfinite(loss) else None,
                "tokens_per_second": read / elapsed, "learning_rate": rate, "grad_norm": norm if math.isfinite(norm) else None,
                "seconds": seconds, "tokens": tokens, "skipped_steps": skipped, "engine": "megatron",
            })  # fmt: skip
            progress.advance(f"loss {loss:.3f}  {read / elapsed:,.0f} tokens/s")
            stopping = mesh.sum([float(stop is not None and stop.received is not None)])[0] > 0
            if stopping or step + 1 == config.steps or (step + 1) % config.checkpoint_every_steps == 0:
                weights = engine.weights()  # whole, on every rank
                if not all(bool(x.isfinite().all()) for x in weights.values()):
                    raise NonFinite(f"pretrain: the weights after step {step + 1} are not finite and are not saved")
                mesh.on_first(partial(_save, folder, step + 1, whole.decoder, weights, begin, config))
            if stopping and step + 1 < config.steps:
                raise Stopped(f"pretrain: stopped after step {step + 1}; give its checkpoint as `start` to a new run")
    return folder / f"step-{config.steps}"


def _check(parallel: ParallelConfig) -> None:
    wrong = {"attention": parallel.attention != "ring", "offload": parallel.offload, "recompute": parallel.recompute != "none",
             "schedule": parallel.schedule not in ("1f1b", "interleaved")}  # fmt: skip
    for name in (name for name, is_wrong in wrong.items() if is_wrong):
        raise BadConfig(f"parallel.{name}={getattr(parallel, name)!r} is not in this engine; drop it, or --engine megatron")


@torch.no_grad()
def _save(folder: Path, step: int, decoder: Decoder, weights: dict, begin, config: PretrainStageConfig) -> None:
    """A Hugging Face folder with the weights, and moments of 0."""
    for name, parameter in decoder.named_parameters():
        parameter.copy_(weights[name])
    state = {"stage": "pretrain", "step": step, "num_updates": 0, "engine": "megatron"}
    save_checkpoint(folder, step, decoder, None, begin.tokenizer, state, config.keep_checkpoints)


ENGINES = {"warpline": pretrain.main, "megatron": main}


def train(config: PretrainStageConfig, run: RunFolder, mesh: Mesh, stop: StopSignal | None = None) -> Path:
    """`main` of the engine that the config names."""
    return ENGINES[config.engine](config, run, mesh, stop)
