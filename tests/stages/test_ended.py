"""How a job ends: by a signal, and by the loss of one of its ranks; and how it goes on."""

import json
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from job import CONFIG, Job

TIMEOUT, CHECKPOINT_EVERY = 8, 5
LAUNCH = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture
def start(tmp_path, start_folder, text_run) -> Iterator[Callable[..., Job]]:
    """A small SFT run, under torchrun where it has several ranks."""
    jobs: list[Job] = []

    def start(ranks: int, *arguments: str) -> Job:
        values = {"start": start_folder, "data": text_run, "every": CHECKPOINT_EVERY, "ranks": ranks, "timeout": TIMEOUT}
        (tmp_path / "sft.toml").write_text(CONFIG.format(**values))
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *arguments, "-m", "--"]
        worker = ["warpline.stages.command", "sft", str(tmp_path / "sft.toml"), "--run", str(tmp_path / "run")]
        jobs.append(Job(tmp_path, [sys.executable, "-m", *(torchrun if ranks > 1 else []), *worker], **LAUNCH))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


@pytest.mark.slow
def test_a_signal_is_answered_with_a_checkpoint_and_exit_code_3(start):
    """Without a launcher, whose own exit code is another."""
    job = start(1)
    job.wait_until(lambda: job.steps() > 1)
    job.process.send_signal(signal.SIGTERM)
    code, said = job.end(60)
    step = job.steps()
    assert code == 3 and f"stopped by SIGTERM after step {step}; run it again to go on" in said
    assert job.ended() == {"reason": "signal", "step": step} and job.newest_checkpoint() == step


@pytest.mark.slow
@pytest.mark.parametrize(("number", "rank"), [(signal.SIGKILL, 0), (signal.SIGKILL, 2), (signal.SIGSTOP, 1)])
def test_a_lost_rank_is_named_with_its_step_and_ends_the_job(start, number, rank):
    """At a random moment. A killed rank is found when a connection breaks; a stopped one when it has been silent for nine
    tenths of the timeout, and torchrun would then wait 30 s more for it."""
    job = start(4)
    job.wait_until(lambda: job.steps() > 3)
    time.sleep(random.uniform(1.5, 3.5))  # a rank says once a second which step it is in
    began = time.monotonic()
    job.worker(rank).send_signal(number)
    code, said = job.end(120)
    assert code != 0 and time.monotonic() - began < TIMEOUT + 20
    step, line = job.steps(), r"^warpline: rank (\d).* is gone .* in sft step (\d+); start it again to go on"
    ((named, last),) = re.findall(line, said, re.MULTILINE)
    assert int(named) == rank and int(last) <= step + 1
    assert job.ended()["step"] == step
    assert re.fullmatch(rf"rank {rank} (or its torchrun )?was lost", job.ended()["reason"]), "the first rank may hold the store"
    assert job.newest_checkpoint() >= step - 2 * CHECKPOINT_EVERY


@pytest.mark.slow
def test_a_restarted_job_goes_on_from_the_last_good_checkpoint(start):
    job = start(4, "--max-restarts", "1")
    job.wait_until(lambda: job.steps() > 2 * CHECKPOINT_EVERY)
    time.sleep(random.uniform(0, 2))
    first = job.worker(0)
    job.worker(random.randrange(4)).send_signal(signal.SIGKILL)
    job.wait_until(lambda: not first.is_running())
    kept, before = job.newest_checkpoint(), job.metrics()
    again = slice(kept, kept + 1)  # the step behind the checkpoint, with its seconds
    job.wait_until(lambda: job.metrics()[again] not in ([], before[again]))
    job.wait_until(lambda: job.steps() > kept + CHECKPOINT_EVERY)
    job.process.send_signal(signal.SIGUSR1)
    assert job.end(60)[0] == 1, "torchrun's own"
    after = job.metrics()
    assert after[:kept] == before[:kept], "no step before the checkpoint was done again"
    assert [json.loads(line)["step"] for line in after] == list(range(1, len(after) + 1))
    assert job.ended() == {"reason": "signal", "step": len(after)} and job.newest_checkpoint() == len(after)
