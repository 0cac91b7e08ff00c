"""Saves beside training: the old values or an error, one at a time, complete or absent, and the same bytes from any ranks."""

import json
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from warpline.parallel.checkpoint import (
    Piece,
    SaveFailed,
    Saver,
    Whole,
    checkpoints,
    damage,
    digests,
    plan,
    read_into,
    share,
    sweep,
    sync,
    write_manifest,
)

WORKER = Path(__file__).parent / "checkpoint_worker.py"


def run_worker(*arguments, launcher=(), expect=0):
    command = [sys.executable, *launcher, str(WORKER), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stderr[-3000:]
    return json.loads(done.stdout) if done.stdout else None


def describe(folder: Path) -> None:
    (folder / "state.json").write_text("{}")


def files_of(tensor):
    layout = plan({"x": Whole(tuple(tensor.shape), tensor.dtype)}, "model")
    return [(layout, {"x": Piece.of(tensor)})]


def value_of(checkpoint: Path):
    back = torch.empty(4)
    read_into(checkpoint, "model", {"x": Piece.of(back)})
    return back.tolist()


def save(folder, step, value, keep=2, describe=describe):
    saver = Saver(None)
    saver.save(folder, step, files_of(torch.full((4,), float(value))), describe, keep)
    saver.wait()


def test_what_changes_after_save_returned_is_not_in_the_file_and_one_save_at_a_time(tmp_path):
    training, saver, began, may_end = torch.zeros(4), Saver(None), threading.Event(), threading.Event()

    def wait_for_training(folder: Path) -> None:
        began.set()
        assert may_end.wait(30)
        describe(folder)

    saver.save(tmp_path, 1, files_of(training), wait_for_training, keep=2)
    training.fill_(1)
    assert began.wait(30)
    assert not checkpoints(tmp_path) and len(list(tmp_path.glob("step-1.tmp-*"))) == 1
    threading.Timer(0.2, may_end.set).start()
    saver.save(tmp_path, 2, files_of(training), describe, keep=2)  # returns once the first is published
    assert tmp_path / "step-1" in checkpoints(tmp_path)
    training.fill_(2)
    saver.wait()
    assert [value_of(path) for path in checkpoints(tmp_path)] == [[1.0] * 4, [0.0] * 4]
    assert [path.name for path in tmp_path.iterdir() if "." in path.name] == []
    saver.wait()
    for thread in (thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")):
        thread.join(30)  # ends by itself, without another save
        assert not thread.is_alive()


def test_the_newest_are_kept_by_number(tmp_path):
    for step in (9, 10, 11):
        save(tmp_path, step, step)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-11", "step-10"]


def test_an_earlier_checkpoint_of_the_same_step_goes_once_the_new_one_is_complete(tmp_path):
    save(tmp_path, 5, 1)

    def look(folder: Path) -> None:
        assert value_of(tmp_path / "step-5") == [1.0] * 4 and damage(tmp_path / "step-5") is None
        describe(folder)

    save(tmp_path, 5, 2, describe=look)
    assert value_of(tmp_path / "step-5") == [2.0] * 4 and damage(tmp_path / "step-5") is None
    assert [path.name for path in tmp_path.iterdir()] == ["step-5"]


def test_a_save_that_fails_is_said_once_and_leaves_nothing(tmp_path):
    save(tmp_path, 5, 1)

    def fail(folder: Path) -> None:
        raise ValueError("no\ntokenizer")

    saver = Saver(None)
    saver.save(tmp_path, 5, files_of(torch.zeros(4)), fail, keep=2)
    with pytest.raises(SaveFailed, match=r"rank 0: no tokenizer: '.*step-5'") as caught:
        saver.save(tmp_path, 6, files_of(torch.zeros(4)), describe, keep=2)
    assert "\n" not in str(caught.value) and isinstance(caught.value.__cause__, ValueError)
    saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-5"] and value_of(tmp_path / "step-5") == [1.0] * 4
    (tmp_path / "file").write_text("")
    saver.save(tmp_path / "file", 1, files_of(torch.zeros(4)), describe, keep=2)
    with pytest.raises(SaveFailed, match=r"rank 0: Not a directory: '.*file/step-1\.tmp-"):
        saver.wait()


def test_a_tensor_of_which_a_part_is_written_by_nobody_is_not_saved(tmp_path):
    layout, saver = plan({"x": Whole((4,), torch.float32), "y": Whole((2, 2), torch.float32)}, "model"), Saver(None)
    pieces = {"x": Piece(torch.zeros(3), (4,), (0,)), "y": Piece.of(torch.zeros(2, 2))}
    saver.save(tmp_path, 1, [(layout, pieces)], describe, keep=2)
    with pytest.raises(SaveFailed, match="tensor x: the ranks write 3 of its 4 numbers; let one rank write each of them"):
        saver.wait()
    saver.save(tmp_path, 1, [(layout, {"x": Piece.of(torch.zeros(4))})], describe, keep=2)
    with pytest.raises(SaveFailed, match="tensor y: the ranks write 0 of its 4 numbers"):
        saver.wait()
    assert not list(tmp_path.iterdir())


def test_a_kill_between_two_renames_is_undone_and_leftovers_are_swept(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, step)
    (tmp_path / "step-2").rename(tmp_path / "step-2.old-0123abcd")
    save(tmp_path, 3, 3, keep=9)
    (tmp_path / "step-3").rename(tmp_path / "step-1.old-0123abcd")
    (tmp_path / "step-7.tmp-0123abcd").mkdir()
    (tmp_path / "step-7.tmp-0123abcd" / "model.safetensors").write_bytes(b"half")
    sweep(tmp_path)
    assert {path.name: value_of(path)[0] for path in tmp_path.iterdir()} == {"step-1": 1.0, "step-2": 2.0}


def test_the_files_of_a_check_are_dealt_out_and_every_one_is_read_by_one_rank(tmp_path):
    sizes = {"a": 5, "b": 70, "c": 5, "d": 60, "e": 1}
    assert [share(sizes, rank, 2) for rank in range(2)] == [["b", "a", "e"], ["d", "c"]]
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
    write_manifest(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text()) == digests(tmp_path, sorted(sizes))
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size - 1) + b"\1")
        found = [damage(tmp_path, rank, 3) for rank in range(3)]
        assert [problem for problem in found if problem] == [f"{name} does not match its digest"]
        assert damage(tmp_path) == f"{name} does not match its digest"
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "e").unlink()
    assert [damage(tmp_path, rank, 3) for rank in range(3)] == ["its files differ from the manifest's: e"] * 3


def test_four_ranks_write_the_bytes_of_one_and_what_fails_on_one_is_told_to_all(tmp_path):
    """Rows, columns, both, a copy on every rank, uneven and empty parts; while training changes what it had saved."""
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "4")
    ranks = run_worker("ranks", tmp_path / "ranks", launcher=launcher)
    assert len(ranks) == 4
    for rank, seen in enumerate(ranks):
        assert seen["steps"] == ["step-2", "step-1"] and seen["busy"] == 1.0
        assert seen["resharded"], "read under another cut, bitwise, after the pieces were set to zero"
        failures = seen["failures"]
        assert failures["full disk"].startswith("SaveFailed: [Errno 27] rank 2: File too large: '")
        assert "/ranks/step-4.tmp-" in failures["full disk"] and ".safetensors'" in failures["full disk"]
        assert failures["describe"] == f"SaveFailed: [Errno 5] rank 0: a bad tokenizer: '{tmp_path}/ranks/step-3'"
        assert failures["bug"].startswith("KeyError" if rank == 0 else "SaveFailed: [Errno 5] rank 0: ended unexpectedly")
        assert "tensor rows: the ranks write 27 of its 30 numbers" in failures["hole"]
        assert failures["left"] == "['step-2', 'step-3'] None" and failures["then"] == "none"
        assert seen["intact"] is None
    damaged = [seen["damage"] for seen in ranks]
    assert damaged[1:] == damaged[:-1] and sum(problem is not None for problem in damaged[0]) == 1
    # The last save was in flight when the program ended; one process writes the same bytes, manifest and all.
    worker = runpy.run_path(str(WORKER))
    whole = {name: Piece.of(tensor) for name, tensor in worker["tensors"]().items()}
    saver = Saver(None)
    saver.save(tmp_path / "one", 9, [(worker["layout"](), whole)], describe, keep=2)
    saver.wait()
    ours, theirs = tmp_path / "one" / "step-9", tmp_path / "ranks" / "step-9"
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()} >= {"manifest.json"}
    assert len(list(ours.iterdir())) == 4 + 1 + 2
    assert all(path.read_bytes() == (theirs / path.name).read_bytes() for path in ours.iterdir())


def test_an_end_of_the_program_waits_for_the_save_in_flight(tmp_path):
    run_worker("exits", tmp_path / "run", expect=5)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-1"] and damage(tmp_path / "run" / "step-1") is None


@pytest.mark.slow
def test_kill_9_of_one_rank_at_any_moment_ends_all_and_leaves_whole_checkpoints(tmp_path):
    """The worker compares every number of every published checkpoint with its step, and its files with their manifest."""
    for trial in run_worker("ranks_killed", tmp_path / "killed", 32):
        assert trial["codes"] == [-signal.SIGKILL, 7, 7, 7] and trial["published"] >= 1


@pytest.mark.slow
def test_kill_9_at_every_event_leaves_the_old_checkpoint_or_the_new(tmp_path):
    """step-5 is saved over itself and step-4 removed, with a kill before each file, rename and removal in turn."""
    seen = run_worker("killed_everywhere", tmp_path / "run")
    assert len(seen) > 60 and [trial["code"] for trial in seen] == [-signal.SIGKILL] * (len(seen) - 1) + [0]
    assert not any(trial["damaged"] for trial in seen)
    assert {trial["newest"] for trial in seen} == {"step-5"}
    values = [trial["values"] for trial in seen]
    old = values.count([5.0])
    assert 10 < old < len(seen) and values == [[5.0]] * old + [[6.0]] * (len(seen) - old)


@pytest.mark.gpu
def test_pieces_on_a_gpu_are_saved_as_they_were(tmp_path):
    training, saver = torch.randn(1000, 1000, device="cuda"), Saver(None)
    expected = training[:, 100:].bfloat16().cpu()
    layout = plan({"x": Whole((1000, 900), torch.bfloat16)}, "model")
    saver.save(tmp_path, 1, [(layout, {"x": Piece.of(training[:, 100:])})], describe, keep=1)
    training.zero_()
    saver.wait()
    back = torch.empty(1000, 900, dtype=torch.float32, device="cuda")
    read_into(tmp_path / "step-1", "model", {"x": Piece.of(back)})
    assert torch.equal(back.cpu(), expected.float())


def test_syncing_what_is_missing_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "missing")


def test_a_save_behind_damaged_ones_stays_and_they_do_not_count(tmp_path):
    """Training that fell back behind damaged checkpoints saves lower numbers than theirs."""
    for step in (29, 30, 1):
        save(tmp_path, step, step)
    (tmp_path / "step-31").write_text("no checkpoint")
    for kept in (
        ["step-30", "step-29", "step-1"],
        ["step-30", "step-29", "step-2", "step-1"],
        ["step-30", "step-29", "step-3", "step-2"],
    ):
        assert [path.name for path in checkpoints(tmp_path)] == kept
        save(tmp_path, int(kept[2].removeprefix("step-")) + 1, 0)
