"""A training stage in progress: model, optimiser and counters, resumed from the stage's last checkpoint or fresh at step 0.

All randomness of a stage is a pure function of (seed, stage, step), and so is its data order; weights, moments and counters
are in the checkpoint, which any other layout can go on from. That is everything, so a resumed stage computes the bits that an
uninterrupted one would.
"""

import datetime
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ...parallel.checkpoint import Piece, SaveFailed, Saver
from ...parallel.mesh import Mesh
from ...parallel.model import ParallelModel
from .checkpoint import MOMENTS, Checkpoints, load_moments, moment_names
from .config import OptimizerConfig, ParallelConfig, TrainingConfig
from .model import Start, build, start_from
from .precision import choose_precision
from .progress import StageProgress, console
from .run import RunFolder
from .schedule import learning_rate

COUNTERS = ("step", "tokens", "num_updates", "seconds", "skipped_steps", "skipped_in_a_row")  # of a stage, in its checkpoints
SAVE_TIMEOUT = datetime.timedelta(minutes=30)  # of one rank for another's part of a save


class Stopped(Exception):
    """A signal asked for an end; a checkpoint of the last finished step is on disk."""


class NonFinite(Exception):
    """Too many updates in a row had a non-finite loss or gradient."""


class StopSignal:
    """Remembers SIGTERM, SIGINT or SIGUSR1 until the end of the step."""

    def __init__(self):
        self.received: str | None = None

    def install(self, wakeup: int | None = None) -> "StopSignal":
        """`wakeup`: a descriptor that the number of a signal is written to at once."""
        if wakeup is not None:
            signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


def build_optimizer(model: ParallelModel, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (torch's fused); weight decay on matrices only."""
    parameters = model.parameters()
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=True)


class Session:
    """One stage's training. `for step in session.steps():` accumulate gradients in `session.model`, `update(loss)` once or
    more, `finish_step(…)` once.
    """

    def __init__(
        self,
        stage: str,
        config: TrainingConfig,
        run: RunFolder,
        mesh: Mesh,
        parallel: ParallelConfig,
        start: Callable[[], Start],
        stop: StopSignal | None = None,
    ):
        self.stage, self.config, self.run, self.mesh, self.stop = stage, config, run, mesh, stop or StopSignal()
        self.folder = run.checkpoints(stage)
        everyone = None if mesh.size == 1 else mesh.new_group(range(mesh.size), "gloo", SAVE_TIMEOUT)
        self.saver = Saver(everyone)
        self.checkpoints = Checkpoints(self.folder, self.saver, config.keep_checkpoints)
        mesh.note(f"{stage}, looking for checkpoints")
        resumed = self.checkpoints.latest(lambda message: console.print(message, soft_wrap=True))
        begin = start_from(resumed, mesh) if resumed else start()
        self.tokenizer = begin.tokenizer
        self.precision = choose_precision(config.precision, mesh.device)
        self.model = build(begin, mesh, parallel, self.precision)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.step, self.tokens, self.num_updates, self.seconds = 0, 0, 0, 0.0
        self.skipped_steps, self.skipped_in_a_row, self.grad_norm = 0, 0, 0.0
        if resumed:
            state = load_moments(resumed, self._moments())
            for name in self._state():
                setattr(self, name, state[name])
            for parameter in self.model.parameters():
                self.optimizer.state[parameter]["step"].fill_(self.num_updates)
        run.rewind("metrics.jsonl", stage, self.step)
        mesh.note(f"{stage} step {self.step}")

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of the last finished step; it is on disk once `steps` has ended."""
        return self.folder / f"step-{self.step}"

    def steps(self) -> Iterator[int]:
        """The steps still to do; ends with a checkpoint of the last one, or raises Stopped after one when a signal came."""
        self.model.train()
        try:
            with StageProgress(self.stage, self.config.steps, self.step, shown=self.mesh.is_first) as progress:
                while self.step < self.config.steps:
                    self._started = time.monotonic()
                    self._rate = learning_rate(self.config.optimizer, self.step, self.config.steps)
                    yield self.step
                    progress.advance(self._note)
                    stopping = self.mesh.sum([float(self.stop.received is not None)])[0] > 0
                    if stopping or self.step == self.config.steps or self.step % self.config.checkpoint_every_steps == 0:
                        self._save()
                    if stopping and self.step < self.config.steps:
                        raise Stopped(
                            f"{self.stage}: stopped by {self.stop.received or 'a signal'} after step {self.step}; "
                            "run it again to go on"
                        )
        except GeneratorExit:  # the loop's body failed, and says why itself
            with suppress(SaveFailed):
                self.saver.wait()
            raise
        finally:
            self.saver.wait()

    def update(self, loss: float) -> bool:
        """Apply the accumulated gradients (summed over ranks, clipped by norm) unless `loss` or they are not finite.

        `loss` is the same number on every rank, and so is the norm: all skip together.
        """
        self.model.reduce_gradients()
        self.grad_norm = self.model.grad_norm()  # one sync per update: the decision to skip needs it on the host
        is_finite = math.isfinite(loss) and math.isfinite(self.grad_norm)
        if is_finite:
            if self.grad_norm > self.config.optimizer.max_grad_norm:
                self.model.scale_gradients(self.config.optimizer.max_grad_norm / self.grad_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate
            self.optimizer.step()
            self.num_updates += 1
            self.skipped_in_a_row = 0
        else:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        return is_finite

    def finish_step(self, loss: float, num_tokens: float, **metrics: float) -> None:
        """Count the step (`num_tokens` over all ranks, padding excluded), log one line, give up on too many skips."""
        elapsed = time.monotonic() - self._started
        self.step += 1
        self.tokens += int(num_tokens)
        self.seconds += elapsed
        shown = f"reward {metrics['reward']:.3f}" if "reward" in metrics else f"loss {loss:.3f}"  # an RL loss is about 0
        self.mesh.note(f"{self.stage} step {self.step}")
        self._note = f"{shown}  {num_tokens / elapsed:,.0f} tokens/s"
        line = {
            "stage": self.stage, "step": self.step, "loss": _finite(loss), "tokens_per_second": num_tokens / elapsed,
            "learning_rate": self._rate, "grad_norm": _finite(self.grad_norm), "seconds": self.seconds, "tokens": self.tokens,
            "skipped_steps": self.skipped_steps, "precision": self.precision,
        }  # fmt: skip
        self.run.append("metrics.jsonl", {**line, **{name: _finite(value) for name, value in metrics.items()}})
        if self.skipped_in_a_row >= self.config.max_skipped_steps_in_a_row:
            raise NonFinite(
                f"{self.stage}: {self.skipped_in_a_row} updates in a row had a non-finite loss or gradient (step {self.step}); "
                "the weights are those before them: lower optimizer.learning_rate or inspect the data"
            )

    def _state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in COUNTERS}

    def _moments(self) -> dict[str, Piece]:
        """This rank's pieces of the optimiser's moments, made where there are none."""
        pieces = {}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            state.setdefault("step", torch.zeros((), device=parameter.device))
            for moment, of in zip(moment_names(name), MOMENTS, strict=True):
                if of not in state:
                    state[of] = torch.zeros_like(parameter)
                pieces[moment] = self.model.piece(name, state[of])
        return pieces

    def _save(self) -> None:
        if not self.model.has_finite_weights():
            raise NonFinite(
                f"{self.stage}: the weights after step {self.step} are not finite and are not saved; go back to the last "
                "checkpoint with a lower optimizer.learning_rate"
            )
        self.checkpoints.save(
            self.step, self.model.config, self.tokenizer, {"stage": self.stage, **self._state()}, self.model.pieces(),
            self._moments(),
        )  # fmt: skip


def _finite(value: float) -> float | None:
    """JSON has no NaN: a non-finite number is null in the metrics."""
    return value if math.isfinite(value) else None
