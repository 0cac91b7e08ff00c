"""How stages are measured: their own `main`, beside a plain transformers and torch loop of the same weights and batches.

Run     by `pretrain`, `sft`, `preference`, `rl` and `distill`; needs what the stages need, and transformers for the plain loop
Expect  a row for ours and one for the plain loop: milliseconds are those of a step, ours from metrics.jsonl; the loops take
        turns, twice each. FLOPs are the model's (`forward_flops`) in every pass that the method needs. The split comes from a
        run of its own, with hooks on every module and optimiser: forward includes the loss (and the gradient of the output
        matrix where the loss makes it), "without gradient" is generation, reference, teacher and old log-probabilities,
        backward includes clipping. One process: no communication. `checkpoint` is that of the run's last step, spread over its
        steps.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.packing import PackedBatch
from ..data.record import write_records
from ..data.text import standard_library_documents
from ..models.decoder import DecoderShape
from ..parallel.mesh import start_mesh
from ..stages import data, pretrain
from ..stages.parts.config import OptimizerConfig
from ..stages.parts.run import RunFolder
from .machine import memory_watch
from .measure import Report, Rounds, interquartile_range, self_spread, synchronise
from .rows import Row
from .telemetry import Telemetry

WARM_STEPS, TURNS = 2, 2
ALLOWED_LOSS_ERROR = {"float32": 1e-4, "bfloat16": 2e-2}  # relative, of the first step's loss
FORWARD, UNTRAINED, BACKWARD, OPTIMISER, DATA, CHECKPOINT = (
    "forward", "without gradient", "backward", "optimiser", "data and host", "checkpoint",
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What fits the machine."""

    shape: DecoderShape
    vocabulary: int
    window_tokens: int
    tokens_per_step: int
    steps: int
    text_bytes: int


def size_of(device: torch.device, is_quick: bool) -> Size:
    if device.type == "cuda":
        shape = DecoderShape(width=2048, num_layers=16, num_heads=16, num_kv_heads=4, head_width=128, mlp_width=7168)
        return Size(shape, 8192, 2048, 16384, 8 if is_quick else 16, 20_000_000)
    width, layers = (64, 2) if is_quick else (128, 4)
    shape = DecoderShape(
        width=width, num_layers=layers, num_heads=width // 32, num_kv_heads=width // 64, head_width=32, mlp_width=3 * width
    )
    return Size(shape, 1024, 128, 1024 if is_quick else 1536, 4, 1_000_000)


@dataclass
class Loop:
    """One way to run a stage: `run(steps)` trains from the start and returns the seconds and tokens of every step, and the
    first step's loss."""

    run: Callable[[int], tuple[list[float], list[float], float]]


@dataclass
class StageCase:
    """One stage at one size. `passes` are multiples of a forward's FLOPs: 3 of the trained model, and what else runs."""

    stage: str
    size: Size
    model: Path
    candidates: dict[str, Loop]
    passes: float
    dtype: str
    absent: dict[str, str] = field(default_factory=dict)
    is_checked: bool = True
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.stage} step"

    @property
    def sizes(self) -> dict[str, int]:
        shape = self.size.shape
        return {"D": shape.width, "L": shape.num_layers, "V": self.size.vocabulary}


# ---- What every stage starts from ----


@cache
def ground(device: torch.device, size: Size) -> Path:
    """A folder with data/ (text, tasks, pairs) and a fresh model, in the machine's temporary folder until the process ends."""
    keeper = tempfile.TemporaryDirectory(prefix="warpline-bench-")
    _KEPT.append(keeper)
    folder, mesh = Path(keeper.name), start_mesh()
    text, total = [], 0
    for document in standard_library_documents():
        if total < size.text_bytes:
            text.append({"text": document.text})
            total += len(document.text)
    write_records(folder / "text.jsonl", text)
    tasks = {
        "sizes": {"addition": 2, "sorting": 8, "counting": 12}, "sft_per_family": 400, "rl_per_family": 200,
        "held_out_per_family": 8,
    }  # fmt: skip
    config = data.DataStageConfig.model_validate({
        "text": [str(folder / "text.jsonl")], "vocab_size": size.vocabulary, "tokenizer_bytes": 1_000_000,
        "held_out_fraction": 0.2, "held_out_bytes": 10_000, "tasks": tasks,
    })  # fmt: skip
    run = RunFolder(folder)
    data.main(config, run, mesh)
    talks = [json.loads(line)["messages"] for line in (folder / "data" / "sft.jsonl").read_text().splitlines()]
    pairs = [
        {"prompt": one[:-1], "chosen": one[-1:], "rejected": other[-1:]}
        for one, other in pairwise(talks)
        if one[-1]["content"] != other[-1]["content"]
    ]
    write_records(folder / "data" / "pairs.jsonl", pairs)
    begin = pretrain.PretrainStageConfig(
        steps=1, optimizer=optimizer(), sequence_tokens=size.window_tokens, sequences_per_step=1, data=str(folder),
        model=size.shape,
    )  # fmt: skip
    pretrain.main(begin, run, mesh)
    return folder


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def model_folder(device: torch.device, size: Size) -> Path:
    return ground(device, size) / "checkpoints" / "pretrain" / "step-1"


def optimizer() -> OptimizerConfig:
    return OptimizerConfig.model_validate({"learning_rate": 1e-5})


# ---- Ours ----


def our_loop(stage: str, main: Callable[..., Path], config: Callable[[int], Any]) -> Loop:
    """`main(config(steps), …)` in a folder of its own; times, tokens and the loss are those of its metrics.jsonl."""

    def run(steps: int) -> tuple[list[float], list[float], float]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            main(config(steps), RunFolder(path), start_mesh())
            lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if line["stage"] == stage and "tokens" in line]
        seconds, tokens = ([line[name] for line in lines] for name in ("seconds", "tokens"))
        return _differences(seconds), _differences(tokens), float(lines[0]["loss"])

    return Loop(run)


def _differences(values: Sequence[float]) -> list[float]:
    return [now - then for then, now in zip([0.0, *values], values, strict=False)]


# ---- The plain loop ----

Step = Callable[[nn.Module, Any], tuple[Tensor, float]]


def plain_loop(
    model: Path, device: torch.device, batches: Callable[[int], Iterator[Any]], step: Step, frozen: bool = False
) -> Loop:
    """A loop as people write it: `step(model, batch)` gives (loss, tokens read); AdamW fused, norm clipped to 1. With `frozen`
    the batch comes with a second model that is not trained, loaded from the same folder."""

    def run(steps: int) -> tuple[list[float], list[float], float]:
        trained = load_plain(model, device)
        other = load_plain(model, device).requires_grad_(False) if frozen else None
        adamw = torch.optim.AdamW(trained.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        seconds, tokens, losses = [], [], []
        source = batches(steps)
        for _ in range(steps):
            started = time.perf_counter()
            batch = next(source)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, read = step(trained, batch if other is None else (other, batch))
            loss.backward()
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            losses.append(loss.item())
            seconds.append(time.perf_counter() - started)
            tokens.append(read)
        return seconds, tokens, losses[0]

    return Loop(run)


def load_plain(model: Path, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return loaded.to(device)


def padded(batch: PackedBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, targets, mask), [B, S] each, padded at the right as a plain loop does it."""
    bounds = batch.cu_seqlens.tolist()
    pairs = list(pairwise(bounds))
    rows = [batch.tokens_T[start:end] for start, end in pairs], [batch.target_T[start:end] for start, end in pairs]
    tokens, targets = (
        nn.utils.rnn.pad_sequence(row, batch_first=True, padding_value=value)
        for row, value in zip(rows, (0, -100), strict=True)
    )
    lengths = torch.tensor([end - start for start, end in pairs])
    mask = (torch.arange(tokens.shape[1])[None] < lengths[:, None]).long()
    return tokens.to(device), targets.to(device), mask.to(device)


def sequence_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the counted targets' log-probabilities [B], from full logits."""
    logp = logits.float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (logp * (targets >= 0)).sum(-1)


# ---- Where the time goes ----


class StepClock:
    """Marks on every outermost module's forward and every optimiser's step, by torch's global hooks."""

    def __init__(self, device: torch.device):
        self.device, self.depth = device, 0
        self.marks: list[tuple[str, float]] = []

    def mark(self, kind: str) -> None:
        synchronise(self.device)
        self.marks.append((kind, time.perf_counter()))

    def enter(self, *_: Any) -> None:
        if self.depth == 0:
            self.mark("forward" if torch.is_grad_enabled() else "untrained")
        self.depth += 1

    def leave(self, *_: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.mark("end of forward" if torch.is_grad_enabled() else "end of untrained")

    @contextmanager
    def installed(self) -> Iterator[None]:
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        handles = [
            nn.modules.module.register_module_forward_pre_hook(self.enter),
            nn.modules.module.register_module_forward_hook(self.leave, always_call=True),
            register_optimizer_step_pre_hook(lambda *_: self.mark("optimiser")),
            register_optimizer_step_post_hook(lambda *_: self.mark("end of optimiser")),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.mark("end")

    def split(self) -> dict[str, float]:
        """Seconds a step of each part, over the steps after the first; the last mark's wait is the checkpoint."""
        ends = [number for number, (kind, _) in enumerate(self.marks) if kind == "end of optimiser"]
        found = dict.fromkeys((DATA, FORWARD, UNTRAINED, BACKWARD, OPTIMISER), 0.0)
        steps = len(ends) - 1
        if steps < 1:
            return {}
        for (kind, start), (_, end) in zip(self.marks[ends[0] : ends[-1]], self.marks[ends[0] + 1 :], strict=False):
            found[PARTS[kind]] += (end - start) / steps
        last = self.marks[-2:]
        found[CHECKPOINT] = (last[1][1] - last[0][1]) / len(ends)
        return {name: seconds for name, seconds in found.items() if seconds > 0}


# What follows each mark. After a forward with gradients comes its backward, up to the next forward or the optimiser.
PARTS = {
    "forward": FORWARD, "end of forward": BACKWARD, "untrained": UNTRAINED, "end of untrained": DATA, "optimiser": OPTIMISER,
    "end of optimiser": DATA,
}  # fmt: skip


# ---- A row of each ----


def measure_stage(case: StageCase, rounds: Rounds, report: Report, telemetry: Telemetry, seconds: float) -> list[Row]:
    """Ours and the plain loop in turns; `seconds` has no say: a step takes what it takes."""
    report.absent(case.absent)
    taken: dict[str, list[tuple[list[float], list[float], float]]] = {name: [] for name in case.candidates}
    peaks: dict[str, float | None] = {}
    steps = case.size.steps + WARM_STEPS

    def one_turn() -> None:
        for name, loop in case.candidates.items():
            with memory_watch(report.device) as watch:
                taken[name].append(loop.run(steps))
            peaks.setdefault(name, watch.peak_mib)

    rounds.pedantic(one_turn, setup=lambda: ((), {}), rounds=TURNS)
    first_loss = {name: turns[0][2] for name, turns in taken.items()}
    rows = []
    for name, turns in taken.items():
        row = _stage_row(case, name, turns, report)
        row.peak_mib = peaks[name]
        clock = StepClock(report.device)
        with clock.installed():
            case.candidates[name].run(WARM_STEPS + 2)
        row.split = clock.split() if name.startswith("warpline") else _without_checkpoint(clock.split())
        row.telemetry, joules = telemetry.watch(partial(case.candidates[name].run, 2), partial(synchronise, report.device), 0.0)
        row.joules = None if joules is None else joules / 2
        if case.is_checked and "transformers + torch" in first_loss:
            _check_loss(row, first_loss)
        report.add(row)
        rows.append(row)
    return rows


def _without_checkpoint(split: dict[str, float]) -> dict[str, float]:
    return {part: seconds for part, seconds in split.items() if part != CHECKPOINT}


def _check_loss(row: Row, losses: dict[str, float]) -> None:
    plain, ours = losses["transformers + torch"], next(iter(losses.values()))
    row.error = abs(ours - plain) / abs(plain)
    allowed = ALLOWED_LOSS_ERROR[row.dtype]
    row.check = "passed" if row.error <= allowed else f"failed: loss {ours:.5f}, plain {plain:.5f}, allowed {allowed:.0e} apart"


def _stage_row(case: StageCase, name: str, turns: list[tuple[list[float], list[float], float]], report: Report) -> Row:
    """Median step after the warm ones, of all turns; `self_spread` is the turns' difference."""
    warm = [[1e3 * second for second in seconds[WARM_STEPS:]] for seconds, _, _ in turns]
    together = [step for turn in warm for step in turn]
    median, tokens = statistics.median(together), statistics.median(turns[0][1][WARM_STEPS:])
    row = Row(case.name, name, case.sizes, case.dtype, median, interquartile_range(together), num_runs=len(together))
    row.self_spread, row.tokens, row.note = self_spread(together), int(tokens), case.note
    row.tflops = case.passes * forward_flops(case.size, tokens) / median / 1e9
    ceilings = report.results.ceilings
    if ceilings is not None and case.dtype in ceilings.product_tflops:
        row.of_ceiling = row.tflops / ceilings.product_tflops[case.dtype]
    return row


def forward_flops(size: Size, tokens: float) -> float:
    """Of the model: 2 per matrix entry and token (the output matrix included, the input's not), and causal attention's, of
    sequences as long as a window at most."""
    shape = size.shape
    heads = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_width
    matrices = shape.num_layers * shape.width * (heads + 3 * shape.mlp_width) + shape.width * size.vocabulary
    attention = 2 * shape.num_layers * shape.num_heads * shape.head_width * size.window_tokens
    return tokens * (2.0 * matrices + attention)


def stage_dtype(device: torch.device) -> str:
    return "bfloat16" if device.type == "cuda" else "float32"
