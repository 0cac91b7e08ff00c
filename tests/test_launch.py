"""The launch files: rendered, and run as they stand on processes of this machine in place of GPUs and nodes."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from job import CONFIG, Job

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "configs" / "launch"
VALUES = {
    "NAME": "llama-8b", "NODES": "8", "GPUS": "4", "IMAGE": "my/warpline:1", "CLAIM": "shared", "VERB": "pretrain",
    "CONFIG": "/shared/my.toml", "RUN": "/shared/runs/llama-8b",
}  # fmt: skip


def rendered() -> dict:
    """The JobSet as envsubst fills it in."""
    return yaml.safe_load(re.sub(r"\$\{(\w+)\}", lambda match: VALUES[match[1]], (LAUNCH / "jobset.yaml").read_text()))


def environment_of_shells() -> dict[str, str]:
    """What environment.sh sets for those that source it."""
    code = f"set -eu; source {LAUNCH}/environment.sh; env"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, check=True)
    own = ("PWD", "SHLVL", "_", "PATH")
    return {name: value for name, value in (line.split("=", 1) for line in done.stdout.splitlines()) if name not in own}


def test_every_launch_file_is_described_and_tested():
    names = {path.name for path in LAUNCH.iterdir()}
    assert names == {"environment.sh", "one_node.sh", "nodes.sh", "slurm.sbatch", "jobset.yaml"}
    text = (ROOT / "docs" / "cluster.md").read_text()
    assert all(f"configs/launch/{name}" in text for name in names)


def test_a_jobset_starts_one_pod_a_node_and_one_rank_a_gpu():
    job = rendered()["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 8 and job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    (container,) = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4} and container["command"] == ["torchrun"]
    assert container["args"] == [
        "--nnodes=8", "--nproc-per-node=4", "--node-rank=$(JOB_COMPLETION_INDEX)", "--master-addr=llama-8b-node-0-0.llama-8b",
        "--master-port=29400", "--max-restarts=0", "--no-python", "--", "warpline", "pretrain", "/shared/my.toml", "--run",
        "/shared/runs/llama-8b",
    ]  # fmt: skip
    assert container["ports"] == [{"containerPort": 29400}]
    volumes = {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    assert volumes == {mount["name"] for mount in container["volumeMounts"]} == {"shared", "memory"}


def test_a_jobset_restarts_from_the_last_checkpoint_and_leaves_time_to_write_one():
    spec = rendered()["spec"]
    pod = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    environment = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
    assert environment == environment_of_shells(), "as the shells' environment.sh"
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] > int(
        environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    )
    assert spec["failurePolicy"]["maxRestarts"] == 10
    assert spec["failurePolicy"]["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"


def test_a_batch_job_asks_for_its_signal_earlier_than_torchrun_kills():
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert "requeue" in options and options["ntasks-per-node"] == "1" and options["open-mode"] == "append"
    name, seconds = options["signal"].split("@")
    assert f"SIG{name}" in environment_of_shells()["PET_SIGNALS_TO_HANDLE"].split(",")
    assert int(seconds) > int(environment_of_shells()["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])


# ---- Run as they stand ----


@pytest.fixture
def launch(tmp_path, start_folder, text_run) -> Iterator[Callable[..., Job]]:
    """`launch(file, **environment)`: a small SFT run of two ranks through a launch file, with `warpline` and `torchrun` as this
    interpreter has them, and tools of a cluster's that do here what they do there."""
    jobs: list[Job] = []
    values = {"start": start_folder, "data": text_run, "every": 50, "ranks": 2, "timeout": 60}
    (tmp_path / "sft.toml").write_text(CONFIG.format(**values))
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, body in {
        "warpline": f'exec {sys.executable} -m warpline.stages.command "$@"',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
        "srun": 'shift 2; export SLURM_NODEID=0; echo $$ > srun.pid; exec "$@"',
        "scontrol": 'case "$1" in show) echo 127.0.0.1 ;; requeue) echo "$2" >> requeued.txt ;; esac',
    }.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)
    (tmp_path / "configs").symlink_to(ROOT / "configs")

    def launch(file: str, *overrides: str, **environment: str) -> Job:
        command = ["bash", str(LAUNCH / file), "sft", "sft.toml", "--run", "run", *overrides]
        path = f"{tools}:{os.environ['PATH']}"
        jobs.append(Job(tmp_path, ["env", "-C", str(tmp_path), *command], PATH=path, **environment))
        return jobs[-1]

    yield launch
    for job in jobs:
        job.kill()


def test_one_node_saves_at_a_signal_to_torchrun(launch):
    """SIGUSR1, of which torchrun dies by itself, and leaves its workers behind."""
    job = launch("one_node.sh", GPUS="2")
    job.wait_until(lambda: job.steps() > 1)
    workers = [job.worker(rank) for rank in range(2)]
    job.process.send_signal(signal.SIGUSR1)
    code, said = job.end(60)
    assert code == 1 and "stopped by SIGUSR1" in said and not any(worker.is_running() for worker in workers)
    assert job.ended() == {"reason": "signal", "step": job.steps()} and job.newest_checkpoint() == job.steps()


@pytest.mark.slow
def test_two_nodes_meet_and_end_together(launch):
    nodes = [
        launch("nodes.sh", "steps=3", NODES="2", NODE=str(node), HEAD="127.0.0.1", PORT="29417", GPUS="1") for node in range(2)
    ]
    assert [node.end(240)[0] for node in nodes] == [0, 0]
    assert nodes[0].ended() == {"reason": "done", "step": 3}


SLURM = {
    "SLURM_JOB_ID": "417", "SLURM_JOB_NODELIST": "n[1-1]", "SLURM_NNODES": "1", "SLURM_CPUS_PER_TASK": "2", "GPUS": "2",
}  # fmt: skip


@pytest.mark.slow
def test_a_batch_job_that_was_signalled_is_requeued_and_one_of_bad_input_is_not(launch, tmp_path):
    requeued = tmp_path / "requeued.txt"
    job = launch("slurm.sbatch", **SLURM)
    job.wait_until(lambda: job.steps() > 1)
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGUSR1)  # a step is signalled, the batch shell is not
    code, _ = job.end(60)
    assert code == 0 and job.ended()["reason"] == "signal" and requeued.read_text() == "417\n"
    step = job.steps()

    again = launch("slurm.sbatch", f"steps={step + 2}", **SLURM)
    code, said = again.end(240)
    assert code == 1 and "holds a run of another configuration (steps is 100000 there" in said
    assert requeued.read_text() == "417\n"


@pytest.mark.slow
@pytest.mark.parametrize(("count", "code", "queued"), [("9", 0, "417\n"), ("10", 1, None)])
def test_a_batch_job_that_lost_a_rank_is_requeued_ten_times(launch, tmp_path, count, code, queued):
    job = launch("slurm.sbatch", SLURM_RESTART_COUNT=count, **SLURM)
    job.wait_until(lambda: job.steps() > 1)
    torchrun = psutil.Process(int((tmp_path / "srun.pid").read_text()))
    torchrun.children()[-1].kill()
    assert job.end(120)[0] == code and "was lost" in job.ended()["reason"]
    requeued = tmp_path / "requeued.txt"
    assert (requeued.read_text() if requeued.exists() else None) == queued
