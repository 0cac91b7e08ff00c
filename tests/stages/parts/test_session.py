import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from warpline.parallel.checkpoint import SaveFailed
from warpline.parallel.mesh import start_mesh
from warpline.stages.parts.config import OptimizerConfig, ParallelConfig, TrainingConfig
from warpline.stages.parts.run import RunFolder
from warpline.stages.parts.session import NonFinite, Session, Stopped, StopSignal

STAGES = ["pretrain", "sft", "preference", "rl", "distill"]


class StopAfter(StopSignal):
    """A signal that arrives during step `count`, deterministically."""

    def __init__(self, count: int):
        self.count, self.asked = count, 0

    @property
    def received(self):
        self.asked += 1
        return "SIGTERM" if self.asked == self.count else None


def metrics_of(folder: Path) -> list[dict]:
    clock = ("seconds", "tokens_per_second")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_stopped_and_resumed_gives_the_bits_of_one_that_ran_straight(stage, stage_runner, tmp_path):
    straight = stage_runner(stage, tmp_path / "straight")
    with pytest.raises(Stopped, match="after step 3"):
        stage_runner(stage, tmp_path / "resumed", StopAfter(3))
    resumed = stage_runner(stage, tmp_path / "resumed")
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (straight / name).read_bytes() == (resumed / name).read_bytes()
    assert metrics_of(tmp_path / "straight") == metrics_of(tmp_path / "resumed")


@pytest.mark.parametrize("stage", ["pretrain", "rl"])
def test_a_stage_killed_between_checkpoints_repeats_the_lost_steps_with_equal_bits(stage, stage_runner, tmp_path):
    """The state after a kill -9 in step 4: the checkpoint of step 2 and metrics past it, the last line torn."""
    straight = stage_runner(stage, tmp_path / "straight")
    with pytest.raises(Stopped):
        stage_runner(stage, tmp_path / "killed", StopAfter(2))
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": stage, "step": 3, "loss": 1.0}) + '\n{"stage": "pre')
    leftover = tmp_path / "killed" / "checkpoints" / stage / "step-4.tmp-123"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    resumed = stage_runner(stage, tmp_path / "killed")
    assert (straight / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    assert metrics_of(tmp_path / "straight") == metrics_of(tmp_path / "killed")
    assert not leftover.exists()


def test_a_finished_stage_trains_no_further(stage_runner, tmp_path):
    first = stage_runner("sft", tmp_path / "run")
    written = (first / "manifest.json").stat().st_mtime_ns
    assert stage_runner("sft", tmp_path / "run") == first
    assert (first / "manifest.json").stat().st_mtime_ns == written
    assert len(metrics_of(tmp_path / "run")) == 6


@pytest.fixture
def session_of(tmp_path, tiny_decoder, start_of) -> Callable:
    """`session_of(**changes)`: a session that starts from the tiny decoder, in tmp_path/run."""
    tmp_path.joinpath("run").mkdir()

    def session_of(**changes) -> Session:
        settings = {"steps": 50, "optimizer": OptimizerConfig(learning_rate=0.1), "checkpoint_every_steps": 100, **changes}
        run, start = RunFolder(tmp_path / "run"), start_of(tiny_decoder)
        return Session("test", TrainingConfig(**settings), run, start_mesh(), ParallelConfig(), lambda: start)

    return session_of


def put_gradients(session: Session, value: float) -> None:
    for parameter in session.model.parameters():
        parameter.grad = torch.full_like(parameter, value)


@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, -math.inf)])
def test_a_non_finite_loss_or_gradient_never_reaches_the_weights(loss, gradient, session_of, tmp_path):
    session = session_of(steps=3)
    before = {name: parameter.detach().clone() for name, parameter in session.model.named_parameters()}
    for step in session.steps():
        put_gradients(session, gradient if step == 1 else 0.0)
        applied = session.update(loss if step == 1 else 1.0)
        assert applied == (step != 1)
        session.finish_step(loss if step == 1 else 1.0, 10)
    assert all(torch.equal(before[name], parameter) for name, parameter in session.model.named_parameters())
    lines = metrics_of(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1]
    assert lines[1]["loss"] is None or lines[1]["grad_norm"] is None


def test_gradients_are_clipped_by_the_norm_of_all_of_them(session_of, tmp_path):
    """The norm of n gradients of 2 is 2·√n; AdamW's first moment shows what it was given: 0.1 of a gradient of norm 0.5."""
    session = session_of(steps=1, optimizer=OptimizerConfig(learning_rate=0.1, max_grad_norm=0.5))
    count = sum(parameter.numel() for parameter in session.model.parameters())
    for _ in session.steps():
        put_gradients(session, 2.0)
        session.update(1.0)
        session.finish_step(1.0, 10)
    assert metrics_of(tmp_path / "run")[0]["grad_norm"] == pytest.approx(2 * count**0.5, rel=1e-5)
    for parameter in session.model.parameters():
        expected = torch.full_like(parameter, 0.1 * 0.5 / count**0.5)
        torch.testing.assert_close(session.optimizer.state[parameter]["exp_avg"], expected, rtol=1e-5, atol=0)


def test_too_many_skips_in_a_row_end_the_run(session_of, tmp_path):
    session = session_of(max_skipped_steps_in_a_row=3)
    with pytest.raises(NonFinite, match="3 updates in a row"):
        for step in session.steps():
            put_gradients(session, 0.0)
            session.update(1.0 if step == 0 else math.nan)
            session.finish_step(1.0, 10)
    assert len(metrics_of(tmp_path / "run")) == 4


def test_weights_that_are_not_finite_are_never_saved(session_of, tmp_path):
    session = session_of(steps=1)
    with pytest.raises(NonFinite, match="after step 1 are not finite and are not saved"):
        for _ in session.steps():
            put_gradients(session, 0.0)
            session.update(1.0)
            with torch.no_grad():
                session.model.decoder.norm.weight[0] = float("inf")
            session.finish_step(1.0, 10)
    assert not list((tmp_path / "run").glob("checkpoints/*/*"))


def test_signals_are_remembered_until_the_step_ends():
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        stop = StopSignal().install()
        assert stop.received is None
        signal.raise_signal(signal.SIGUSR1)
        assert stop.received == "SIGUSR1"
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def test_a_loop_that_fails_waits_for_its_save_and_says_nothing_of_it(session_of, monkeypatch):
    """What failed in the loop is what is told; a save in flight ends, and that it failed too is no second message."""
    session, waited = session_of(), []

    def wait() -> None:  # as the saver's: it raises once
        waited.append(True)
        if len(waited) == 1:
            raise SaveFailed(5, "rank 1: another rank ended", "step-1")

    monkeypatch.setattr(session.saver, "wait", wait)
    steps = session.steps()
    next(steps)
    steps.close()
    assert waited


def test_a_signal_is_heard_while_the_main_thread_waits():
    """In a call that does not return, as one that waits for a device, Python runs no handler: the descriptor tells."""
    code = (
        "import ctypes, os, signal, threading\n"
        "from warpline.stages.parts.session import StopSignal\n"
        "read, write = os.pipe(); os.set_blocking(write, False)\n"
        "stop = StopSignal().install(write)\n"
        "def listen():\n"
        "    number = os.read(read, 1)[0]; print(number, stop.received, flush=True); os._exit(0)\n"
        "threading.Thread(target=listen, daemon=True).start()\n"
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # another thread takes it, and this one sleeps on\n"
        "ctypes.CDLL(None).sleep(20)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{int(signal.SIGTERM)} None\n", done.stderr
