"""Ranks of one save, and processes that are killed in it.

Run     torchrun --nproc-per-node 4 tests/parallel/checkpoint_worker.py ranks FOLDER      every case of four ranks
        python tests/parallel/checkpoint_worker.py ranks_killed FOLDER TRIALS             one of four ranks, at random moments
        python tests/parallel/checkpoint_worker.py killed_everywhere FOLDER               one process, at every event in turn
        python tests/parallel/checkpoint_worker.py exits FOLDER                           an end of the program during a save
Prints  one JSON object of what was seen
"""

import atexit
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from warpline.parallel.checkpoint import Piece, SaveFailed, Saver, Whole, checkpoints, damage, plan, read_into, sweep

NUM_RANKS, MAX_SHARD_BYTES = 4, 300
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.float16)
SHAPES = {"rows": (10, 3), "columns": (4, 10), "grid": (7, 9), "replica": (), "few": (2, 3), "cube": (3, 4, 5), "here": (6,)}


def tensors() -> dict[str, torch.Tensor]:
    """What the files shall hold."""
    made = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        made[name] = (numbers * 100).to(DTYPES[number % len(DTYPES)])
    return made


def layout(stem: str = "model"):
    return plan({name: Whole(tuple(x.shape), x.dtype) for name, x in tensors().items()}, stem, MAX_SHARD_BYTES)


def spans(size: int, count: int, index: int) -> slice:
    """torch.chunk's share: uneven, and empty at the end."""
    step = -(-size // count)
    return slice(min(index * step, size), min((index + 1) * step, size))


def rectangles(rank: int) -> dict[str, tuple[slice, ...]]:
    """One layout: rows, columns, rows and columns, a copy on every rank, too few rows, the middle dim, and one rank's."""
    return {
        "rows": (spans(10, 4, rank), slice(0, 3)),
        "columns": (slice(0, 4), spans(10, 4, rank)),
        "grid": (spans(7, 2, rank // 2), spans(9, 2, rank % 2)),
        "replica": (),
        "few": (spans(2, 4, rank), slice(0, 3)),
        "cube": (slice(0, 3), spans(4, 4, rank), slice(0, 5)),
        "here": (spans(6, 1, 0 if rank == 3 else 1),),
    }


def other_rectangles(rank: int) -> dict[str, tuple[slice, ...]]:
    """Another: columns for rows, three ranks for four, all on one rank."""
    three = min(rank, 2)
    return {
        "rows": (slice(0, 10), spans(3, 3, three)),
        "columns": (spans(4, 3, three), slice(2, 9)),
        "grid": (spans(7, 3, three), slice(0, 9)),
        "replica": (),
        "few": (slice(0, 2), slice(0, 3)),
        "cube": (spans(3, 3, three), slice(1, 3), slice(0, 5)),
        "here": (spans(6, 3, three),),
    }


def cut(rank: int, cuts=rectangles, whole=None) -> dict[str, Piece]:
    pieces = {}
    for name, x in (whole or tensors()).items():
        where = cuts(rank)[name]
        offset = tuple(span.start for span in where)
        pieces[name] = Piece(x[where].clone(), tuple(x.shape), offset, writes=name != "replica" or rank == 1)
    return pieces


def failure(saver: Saver) -> str:
    try:
        saver.wait()
    except (SaveFailed, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def describe(folder: Path) -> None:
    (folder / "state.json").write_text("{}")


def refuse(*_arguments, **_options):
    raise AssertionError("something unpickles")


def run_ranks(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    saver = Saver(dist.new_group(backend="gloo"))
    pickle.load = pickle.loads = pickle.Unpickler = refuse  # the C functions; nothing of a save or a load may reach them
    pieces, moments = cut(rank), cut(rank)
    files = [(layout(), pieces), (layout("optimizer"), moments)]
    for step in (1, 2):
        saver.save(folder, step, files, describe, keep=2)
    for piece in (*pieces.values(), *moments.values()):
        piece.tensor.zero_()
    busy = torch.ones(1)
    for _ in range(50):  # collectives of training, beside those of the save
        dist.all_reduce(busy)
        busy /= NUM_RANKS
    saver.wait()
    seen = {"steps": [path.name for path in checkpoints(folder)], "busy": busy.item()}
    back = {
        name: piece._replace(tensor=torch.full_like(piece.tensor, 7)) for name, piece in cut(rank, other_rectangles).items()
    }
    read_into(folder / "step-2", "model", back)
    expected = cut(rank, other_rectangles)
    seen["resharded"] = all(torch.equal(back[name].tensor, expected[name].tensor) for name in expected)
    seen["failures"] = failures(saver, folder, files)
    flip(saver, folder / "step-1")
    seen["damage"] = saver.gather(damage(folder / "step-1", rank, NUM_RANKS))
    seen["intact"] = damage(folder / "step-2")
    if rank == 0:
        everyone = saver.gather(seen)
        print(json.dumps(everyone))
    else:
        saver.gather(seen)
    # The program ends with a save in flight: its thread is joined, then this, as gloo's threads may abort an interpreter's end.
    atexit.register(dist.destroy_process_group)
    saver.save(folder, 9, [(layout(), cut(rank))], lambda path: (time.sleep(0.5), describe(path)), keep=2)


def failures(saver: Saver, folder: Path, files) -> dict[str, str]:
    """What each rank is told when a save fails somewhere; nothing of it may be left."""
    seen, rank = {}, saver.rank
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    saver.save(folder, 3, files, describe, keep=2)
    saver.wait()
    if rank == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    saver.save(folder, 4, files, describe, keep=2)
    seen["full disk"] = failure(saver)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def raise_value_error(_folder: Path) -> None:
        raise ValueError("a bad\ntokenizer")

    def raise_key_error(_folder: Path) -> None:
        raise KeyError("a bug")

    for name, broken in (("describe", raise_value_error), ("bug", raise_key_error)):
        saver.save(folder, 3, files, broken, keep=2)
        seen[name] = failure(saver)
    hole = {name: piece._replace(writes=piece.writes and rank != 3) for name, piece in cut(rank).items()}
    saver.save(folder, 4, [(layout(), hole)], describe, keep=2)
    seen["hole"] = failure(saver)
    saver.gather(None)
    left = sorted(path.name for path in folder.iterdir())
    seen["left"] = f"{left} {damage(folder / 'step-3')}"
    saver.gather(None)
    saver.save(folder, 1, [(layout(), cut(rank))], describe, keep=9)
    seen["then"] = failure(saver)
    return seen


def flip(saver: Saver, folder: Path) -> None:
    if saver.rank == 0:
        path = folder / "model-00003-of-00004.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    saver.gather(None)


# ---- Kills ----


def constant(value: int, rank: int) -> list:
    """Two files, every number of which is `value`."""
    whole = {name: torch.full_like(x, value) for name, x in tensors().items()}
    return [(layout(), cut(rank, whole=whole)), (layout("optimizer"), cut(rank, whole=whole))]


def values(path: Path) -> set[float]:
    """The distinct numbers of a checkpoint; damage is a fault."""
    assert damage(path) is None, damage(path)
    found = set()
    for stem in ("model", "optimizer"):
        back = {name: Piece.of(torch.full_like(x, -1)) for name, x in tensors().items()}
        read_into(path, stem, back)
        found |= {float(number) for piece in back.values() for number in piece.tensor.flatten()}
    return found


def train(folder: Path, meeting: Path, rank: int, started: int) -> None:
    """Saves step after step until another rank is gone; exits 7 then."""
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=NUM_RANKS, timeout=timedelta(seconds=20)
    )
    saver, step = Saver(dist.group.WORLD), started
    try:
        while True:
            step += 1
            saver.save(folder, step, constant(step, rank), describe, keep=2)
            if step == started + 1:
                saver.wait()
                (meeting.parent / f"ready-{rank}").touch()
    except SaveFailed:
        os._exit(7)


def run_ranks_killed(folder: Path, trials: int) -> None:
    generator, seen = random.Random(0), []
    for trial in range(trials):
        room = folder / f"meeting-{trial}"
        room.mkdir(parents=True)
        published = checkpoints(folder / "run")
        started = int(published[0].name.partition("-")[2]) if published else 0
        ranks = []
        for rank in range(NUM_RANKS):
            if not (process := os.fork()):
                train(folder / "run", room / "store", rank, started)
            ranks.append(process)
        while sum(1 for _ in room.glob("ready-*")) < NUM_RANKS:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.2))
        os.kill(ranks[trial % NUM_RANKS], signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks]
        found = [(path, values(path)) for path in checkpoints(folder / "run")]
        assert all(numbers == {float(path.name.partition("-")[2])} for path, numbers in found), found
        debris = sum(1 for _ in (folder / "run").glob("step-*.*"))
        sweep(folder / "run")
        assert not list((folder / "run").glob("step-*.*"))
        assert [path for path, _ in found] == checkpoints(folder / "run")
        seen.append({"codes": sorted(codes), "published": len(found), "debris": debris})
    print(json.dumps(seen))


def run_killed_everywhere(folder: Path) -> None:
    """step-5 is saved again over itself, and step-4 removed, by a process that kills itself at its first, second, … event."""
    seen = []
    while not seen or seen[-1]["code"] == -signal.SIGKILL:
        shutil.rmtree(folder, ignore_errors=True)
        saver = Saver(None)
        for step in (4, 5):
            saver.save(folder, step, whole(step), describe, keep=2)
        saver.wait()
        if not (process := os.fork()):
            die_at(len(seen))
            saver.save(folder, 5, whole(6), describe, keep=1)
            saver.wait()
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        damaged = [path.name for path in checkpoints(folder) if damage(path)]
        sweep(folder)
        newest = checkpoints(folder)[0]
        seen.append({"code": code, "damaged": damaged, "newest": newest.name, "values": sorted(values(newest))})
    print(json.dumps(seen))


def whole(value: int) -> list:
    full = {name: Piece.of(torch.full_like(x, value)) for name, x in tensors().items()}
    return [(layout(), full), (layout("optimizer"), full)]


def die_at(number: int) -> None:
    """Kills this process at its `number`-th event of the file system."""
    left = [number]

    def hook(event: str, _arguments) -> None:
        if event in {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run_exits(folder: Path) -> None:
    """Ends, by an error, while a save waits."""
    saver = Saver(None)
    saver.save(folder, 1, whole(1), lambda path: (time.sleep(0.3), describe(path)), keep=1)
    assert not checkpoints(folder)
    raise SystemExit(5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, place, *rest = sys.argv[1:]
    modes = {
        "ranks": run_ranks,
        "ranks_killed": run_ranks_killed,
        "killed_everywhere": run_killed_everywhere,
        "exits": run_exits,
    }
    modes[mode](Path(place), *map(int, rest))
