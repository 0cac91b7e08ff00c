"""One rank that saves a stage under one layout and goes on under others.

Run     torchrun --nproc-per-node 4 tests/stages/reshard_worker.py START FILES FOLDER
Prints  on rank 0, one JSON object: for each layout that goes on, whether every weight and moment it read equals the files bit
        for bit, and the loss of the next step
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open

from warpline.parallel.mesh import Mesh, Sizes
from warpline.stages import sft
from warpline.stages.parts.config import ParallelConfig
from warpline.stages.parts.model import start_from
from warpline.stages.parts.run import RunFolder
from warpline.stages.parts.session import Session

SAVED = ParallelConfig(tensor=2, pipeline=2)
RESUMED = {"tp2×pp2": SAVED, "cp2×fsdp2": ParallelConfig(context=2, shard=2), "tp2×fsdp2": ParallelConfig(tensor=2, shard=2)}


def config_of(start, files, steps, parallel):
    return sft.SftStageConfig.model_validate({
        "start": start, "files": [files], "steps": steps, "tokens_per_step": 256, "tokens_per_microbatch": 64,
        "precision": "fp32",
        "optimizer": {"learning_rate": 1e-3}, "checkpoint_every_steps": 3, "parallel": parallel,
    })  # fmt: skip


def equal_to_files(session: Session, checkpoint: Path) -> bool:
    """This rank's pieces of weights and moments against the files'."""
    files = [safe_open(path, framework="pt") for path in sorted(checkpoint.glob("*.safetensors"))]
    stored = {name: file for file in files for name in file.keys()}  # noqa: SIM118
    pieces = {name if name == "lm_head.weight" else f"model.{name}": piece for name, piece in session.model.pieces().items()}
    for name, piece in (pieces | session._moments()).items():
        part = tuple(slice(start, start + size) for start, size in zip(piece.offset, piece.tensor.shape, strict=True))
        if not torch.equal(stored[name].get_slice(name)[part], piece.tensor):
            return False
    return True


def main() -> None:
    torch.set_num_threads(1)
    start, files, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    cpu = torch.device("cpu")
    found = {}
    if size > 1:
        dist.init_process_group("gloo")
        saved = RunFolder(folder / "saved", writes=rank == 0)
        (folder / "saved").mkdir(exist_ok=True)
        checkpoint = sft.main(config_of(start, files, 3, SAVED), saved, Mesh(rank, SAVED.sizes, cpu))
    layouts = RESUMED if size > 1 else {"one": ParallelConfig()}
    for name, parallel in layouts.items():
        mesh = Mesh(rank, parallel.sizes if size > 1 else Sizes(), cpu)
        if mesh.is_first:
            shutil.copytree(folder / "saved", folder / name)
        mesh.barrier()
        run, config = RunFolder(folder / name, writes=mesh.is_first), config_of(start, files, 4, parallel)
        checkpoint = run.checkpoints("sft") / "step-3"
        session = Session("sft", config, run, mesh, parallel, lambda mesh=mesh: start_from(Path(start), mesh))
        different = mesh.sum([float(not equal_to_files(session, checkpoint))])[0]
        sft.main(config, run, mesh)
        lines = (
            [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()] if mesh.is_first else []
        )
        found[name] = {"step": session.step, "bitwise": different == 0, "loss": lines[-1]["loss"] if lines else None}
    if rank == 0:
        json.dump(found, sys.stdout)
        sys.stdout.flush()
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
