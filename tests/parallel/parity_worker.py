"""One rank of the parity suite: stages under layouts against what one process computed, in one spawn.

Run     torchrun --nproc-per-node N tests/parallel/parity_worker.py FOLDER CASE…     (parity.py does)
Reads   FOLDER/inputs, and for N > 1 FOLDER/one/<stage> <model>.{json,safetensors}, which N = 1 writes
Prints  on rank 0, one JSON object a case
"""

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from parity_cases import CASES, STEPS, Case, config_of

from warpline.parallel.mesh import Mesh
from warpline.parallel.model import ParallelModel
from warpline.stages import distill, evaluate, preference, pretrain, rl, sft
from warpline.stages.parts.config import ParallelConfig
from warpline.stages.parts.run import RunFolder

SAME = ("tokens", "reward", "completion_tokens", "ended")  # of every step, exactly; the last three where a stage samples
MAIN = {module.__name__.rpartition(".")[2]: module for module in (pretrain, sft, preference, rl, distill, evaluate)}


@contextlib.contextmanager
def recorded_gradients():
    """This rank's pieces of the first update's gradient, summed over ranks, before they are clipped."""
    seen, plain = {}, ParallelModel.grad_norm

    def recording(self):
        if not seen:
            seen.update(
                {name: piece._replace(tensor=piece.tensor.clone()) for name, piece in self.pieces(lambda p: p.grad).items()}
            )
        return plain(self)

    ParallelModel.grad_norm = recording
    try:
        yield seen
    finally:
        ParallelModel.grad_norm = plain


def run(folder: Path, case: Case, rank: int, size: int):
    """(losses of every step, this rank's gradients, scores, metrics) of one case."""
    config = config_of(case, folder / "inputs")
    parallel: ParallelConfig = config.parallel
    mesh = Mesh(rank, parallel.sizes, torch.device("cpu"))
    path = folder / ("one" if size == 1 else "many") / case.name
    run_folder = RunFolder(path, writes=mesh.is_first)
    if mesh.is_first:
        path.mkdir(parents=True)
        run_folder.open(config, case.stage)
    mesh.barrier()
    with recorded_gradients() as gradients:
        found = MAIN[case.stage].main(config, run_folder, mesh)
    mesh.barrier()
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] if case.stage != "evaluate" else []
    steps = [line for line in lines if "loss" in line]
    return steps, gradients, found if case.stage == "evaluate" else None


def gradient_error(gradients, reference: Path) -> float:
    """The largest over parameters of ‖error‖ / max(‖gradient‖, 1e-6·global norm), gathered over ranks."""
    with safe_open(reference, framework="pt") as file:
        names = sorted(file.keys())
        sums = torch.zeros(len(names), 2, dtype=torch.float64)
        for index, name in enumerate(names):
            truth = file.get_tensor(name)
            sums[index, 1] = truth.square().sum()
            if name in gradients and gradients[name].writes:
                piece = gradients[name]
                for dim, (start, length) in enumerate(zip(piece.offset, piece.tensor.shape, strict=True)):
                    truth = truth.narrow(dim, start, length)
                sums[index, 0] = (piece.tensor - truth).square().sum()
    _sum_first(sums)
    smallest = 1e-6 * math.sqrt(sums[:, 1].sum())
    return max(math.sqrt(error) / max(math.sqrt(norm), smallest) for error, norm in sums.tolist())


def _sum_first(sums) -> None:
    errors = sums[:, 0].contiguous()
    dist.all_reduce(errors)
    sums[:, 0] = errors


def main() -> None:
    torch.set_num_threads(1)
    folder, size, rank = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size > 1:
        dist.init_process_group("gloo")
    for case in (CASES[name] for name in sys.argv[2:]):
        started = time.monotonic()
        steps, gradients, score = run(folder, case, rank, size)
        reference = folder / "one" / case.reference
        if size == 1:
            save_file({name: piece.tensor.contiguous() for name, piece in gradients.items()}, f"{reference}.safetensors")
            Path(f"{reference}.json").write_text(json.dumps({"steps": steps, "score": score}))
            continue
        truth = json.loads(Path(f"{reference}.json").read_text())
        result = {"case": case.name, "stage": case.stage, "layout": case.layout, "model": case.model, "seconds": 0.0}
        if case.stage == "evaluate":
            result |= {"scores equal": score == truth["score"]}
        else:
            assert len(steps) == len(truth["steps"]) == STEPS
            pairs = list(zip(steps, truth["steps"], strict=True))
            result |= {
                "loss": max(abs(a["loss"] - b["loss"]) / max(abs(b["loss"]), 1.0) for a, b in pairs),
                "first loss": abs(pairs[0][0]["loss"] - pairs[0][1]["loss"]) / max(abs(pairs[0][1]["loss"]), 1.0),
                "gradient": gradient_error(gradients, Path(f"{reference}.safetensors")),
                "same data": all(a.get(name) == b.get(name) for a, b in pairs for name in SAME),
            }
        result["seconds"] = time.monotonic() - started
        if rank == 0:
            print(json.dumps(result), flush=True)
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
