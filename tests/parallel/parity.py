"""The parity suite: every stage × layout over gloo processes against one process, with the same data from the same weights.

Run     python tests/parallel/parity.py [PART OF A CASE'S NAME …]        (`make parity`; all cases, also to docs/parity.md)
Prints  a table, and what is beyond the limits; exit code 1 if anything is
Limits  fp64: every step's loss within 1e-9 of max(|loss|, 1), every parameter's first gradient within 1e-8 of max(its norm,
        1e-6 of the whole's); fp32: 1e-5 at the first step; evaluations equal; the same tokens, and rewards, at every step
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from parity_cases import CASES, MODELS, REFERENCES, STEPS, VOCABULARY, Case

from warpline.data.record import write_records
from warpline.data.task import make_tasks, near_miss
from warpline.data.tokenizer import ChatTokenizer
from warpline.models import huggingface
from warpline.models.decoder import Decoder, DecoderConfig
from warpline.parallel.mesh import start_mesh
from warpline.stages import data
from warpline.stages.parts.run import RunFolder

WORKER = Path(__file__).with_name("parity_worker.py")
REPORT = Path(__file__).parents[2] / "docs" / "parity.md"
LOSS, GRADIENT, FP32 = 1e-9, 1e-8, 1e-5


def make_inputs(folder: Path) -> None:
    """Text, tasks, pairs and two models whose vocabulary nothing divides."""
    text = folder / "text"
    text.mkdir(parents=True)
    for number in range(24):
        lines = [f"def function_{number}_{line}(value):\n    return value * {line + number}\n" for line in range(20)]
        (text / f"file_{number}.txt").write_text("\n".join(lines[number % 7 :]) + f"\n# file {number}: {'xyz' * number}\n")
    tasks = data.TaskConfig(sizes={"sorting": 4, "reversal": 4}, sft_per_family=60, rl_per_family=40, held_out_per_family=4)
    config = data.DataStageConfig(
        text=[str(text)], vocab_size=VOCABULARY, held_out_fraction=0.1, near_duplicate_threshold=1.0, tasks=tasks
    )
    run = RunFolder(folder / "run")
    run.open(config, "data")
    data.main(config, run, start_mesh())
    tokenizer = ChatTokenizer.load(run.path / "data" / "tokenizer")
    records = []
    slips = random.Random(9)
    for task in make_tasks({"sorting": 4}, 60, held_out=False, seed=9):
        answers = task["answer"], near_miss(slips, task["answer"])
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in answers)
        records.append({"prompt": task["prompt"], "chosen": chosen, "rejected": rejected})
    write_records(folder / "pairs.jsonl", records)
    for index, (name, shape) in enumerate(MODELS.items()):
        decoder = Decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, **shape))
        huggingface.save(decoder.initialise(torch.Generator().manual_seed(index)), folder / name, tokenizer)
        assert tokenizer.vocab_size == VOCABULARY


def spawn(num_ranks: int, folder: Path, cases: list[str]) -> list[dict]:
    """The results of cases of one number of ranks, in one spawn."""
    here = [str(WORKER), str(folder), *cases]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *(torchrun if num_ranks > 1 else []), *here]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = []
        for line in process.stdout:
            found.append(json.loads(line))
            print(describe(found[-1]), flush=True)
    if process.returncode:
        raise SystemExit(
            f"parity: {num_ranks} ranks ended with exit code {process.returncode} after {len(found)} of {len(cases)}"
        )
    return found


def run(folder: Path, cases: list[Case]) -> list[dict]:
    make_inputs(folder / "inputs")
    spawn(1, folder, [REFERENCES[name].name for name in dict.fromkeys(case.reference for case in cases)])
    results = []
    for num_ranks in sorted({case.num_ranks for case in cases}):
        results += spawn(num_ranks, folder, [case.name for case in cases if case.num_ranks == num_ranks])
    return results


def is_equal(result: dict) -> bool:
    """Whether a case is within its limits."""
    if result["stage"] == "evaluate":
        return result["scores equal"]
    if CASES[result["case"]].precision == "fp32":
        return result["first loss"] <= FP32
    return result["loss"] <= LOSS and result["gradient"] <= GRADIENT and result["same data"]


def describe(result: dict) -> str:
    mark = "ok " if is_equal(result) else "RED"
    if result["stage"] == "evaluate":
        return (
            f"{mark} {result['case']:<48} scores {'equal' if result['scores equal'] else 'differ'}  {result['seconds']:.1f} s"
        )
    numbers = f"loss {result['loss']:.1e} (first {result['first loss']:.1e})  gradient {result['gradient']:.1e}"
    return f"{mark} {result['case']:<48} {numbers}  {result['seconds']:.1f} s"


def table(results: list[dict]) -> str:
    """docs/parity.md."""
    lines = [
        "# The same numbers on every layout", "",
        f"Written by `make parity`: {STEPS} steps of each stage over gloo processes on one CPU, against one process with",
        "the same data from the same weights. *loss*: the largest error over the steps, of max(|loss|, 1). *gradient*: of the",
        "first update, the worst parameter's ‖error‖ / max(‖gradient‖, 1e-6 of the whole's). Limits in fp64: 1e-9 and 1e-8;",
        "in fp32 1e-5 for the first step's loss (*first*). Reinforcement learning samples its completions under each layout;",
        "rewards must be equal at each step. Evaluations must give equal scores, sampled and greedy. Two models of 4 layers,",
        "a vocabulary of 307 tokens, documents of uneven length, 4 rows or more a step and rank.", "",
        "| stage | layout | model | loss | first | gradient | |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for result in results:
        case = CASES[result["case"]]
        layout = f"{case.layout}, {case.precision}" if case.precision != "fp64" else case.layout
        layout += f", teacher {case.teacher}" if case.teacher else ""
        numbers = ["scores equal" if result["scores equal"] else "scores differ", "", ""] if case.stage == "evaluate" else [
            f"{result[name]:.0e}" for name in ("loss", "first loss", "gradient")
        ]  # fmt: skip
        lines.append(f"| {' | '.join([case.stage, layout, case.model, *numbers, '' if is_equal(result) else 'RED'])} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    wanted = sys.argv[1:]
    cases = [
        case for case in CASES.values() if case.layout != "one" and (not wanted or any(part in case.name for part in wanted))
    ]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = run(Path(folder), cases)
    red = [result for result in results if not is_equal(result)]
    if not wanted:
        REPORT.write_text(table(results), encoding="utf-8")
    print(
        f"{len(results)} cases in {time.monotonic() - started:.0f} s; {len(red)} beyond the limits",
        *map(describe, red),
        sep="\n",
    )
    return 1 if red else 0


if __name__ == "__main__":
    raise SystemExit(main())
