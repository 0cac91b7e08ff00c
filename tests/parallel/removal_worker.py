"""One rank of many layouts, with each collective taken away in turn: what one process computes must then be missed.

Run     torchrun --nproc-per-node N tests/parallel/removal_worker.py      (N is 2 or 4)
Prints  on rank 0, one JSON object: for each layout of N ranks the largest error without a removal and with each that it has;
        and the calls that are not exactly one of REMOVALS and NOT_REMOVED
"""

import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from model_worker import LAYOUTS, fill, rows
from removals import NOT_REMOVED, REMOVALS
from tensor_worker import CONFIGS, build
from wire import Wire

from warpline.kernels.linear_divergence import linear_divergence
from warpline.kernels.linear_logprob import linear_cross_entropy, linear_logprob
from warpline.kernels.linear_topk import linear_topk
from warpline.models.decoder import Decoder
from warpline.parallel.gather import WholeDecoder
from warpline.parallel.mesh import Mesh, Sizes
from warpline.parallel.model import Loss, ParallelModel, Techniques

TIED, GEMMA = CONFIGS["tied"], CONFIGS["Gemma with sinks"]
WANTED = {
    2: {"tp2": GEMMA, "cp2 ring": GEMMA, "cp2 ulysses": TIED, "fsdp2": TIED, "dp2": TIED, "pp2 1f1b": TIED, "losses": TIED},
    4: {"hsdp2x2": TIED, "tp2 cp2": GEMMA},
}
NUM_ROWS, ALONE = 4, Sizes()


# ---- What is compared ----


def computed(config, sizes, techniques):
    """Everything that layouts must agree on: ({name: number}, {name: piece of a gradient}, hidden states)."""
    mesh = Mesh(dist.get_rank() if sizes.product > 1 else 0, sizes, torch.device("cpu"))
    with torch.device("meta"):
        model, template = (Decoder(config).to(torch.float64) for _ in range(2))
    model = ParallelModel(model, mesh, techniques, lambda: {"softcap": config.logit_softcap})
    fill(model, dict(build(config).named_parameters()))
    mine = mesh.share(rows()[:NUM_ROWS])
    counted = mesh.sum_data([sum(int((row.target_T >= 0).sum()) for row in mine)])[0] or math.nan

    def head(view, hidden, weight):
        summed = linear_cross_entropy(hidden, weight, view.target_T, reduction="sum", **view.options)
        sequences = view.once(view.sequence_sum((view.target_T >= 0).to(hidden.dtype)).square().sum())
        return Loss(summed / counted, torch.stack([summed.detach() / counted, sequences]))

    loss, sequences = model.accumulate(mine, head, 2)
    model.reduce_gradients()
    numbers = {"loss": loss, "sequences": sequences, "norm": model.grad_norm()}
    gradients = {name: piece._replace(tensor=piece.tensor.clone()) for name, piece in model.pieces(lambda p: p.grad).items()}
    with WholeDecoder(model, template) as whole, torch.no_grad():
        hidden = whole(torch.arange(1, 9)[None])
    numbers["evaluated"] = model.totals(mine, lambda *given: head(*given).numbers, 2)[0]
    items = list(range(10, 10 + 2 * mesh.num_data))
    numbers["items"] = float(mesh.gather(mesh.share(items), "replicate", "shard") == items)
    with torch.no_grad():
        if mesh.rank == 0:
            next(iter(model.pieces().values())).tensor.view(-1)[0] = math.nan
    numbers["finite"] = float(model.has_finite_weights())
    return numbers, gradients, hidden


def losses(config, sizes, techniques):
    """As `computed`, of the losses alone, over a vocabulary that is cut where `sizes` say so."""
    group, rank, size = (dist.group.WORLD, dist.get_rank(), sizes.tensor) if sizes.product > 1 else (None, 0, 1)
    generator = torch.Generator().manual_seed(2)
    hidden, teacher = (torch.randn(9, 6, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    whole = [torch.randn(21, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    target_T = torch.randint(0, 21, (9,), generator=generator)
    start, stop = 21 * rank // size, 21 * (rank + 1) // size
    weight, teacher_weight = (x[start:stop] for x in whole)
    where = {"group": group, "vocab_start": start if group else None, "vocab_size": 21 if group else None}
    loss = linear_logprob(hidden, weight, target_T, **where).logprob_T.sum()
    divergences = {
        kind: linear_divergence(hidden, weight, teacher.detach(), teacher_weight, kind=kind, **where).sum()
        for kind in ("reverse_kl", "jsd")
    }
    ids_TC, logprobs_TC = linear_topk(hidden.detach(), weight, 3, **where)
    numbers = {"loss": loss.item(), **{kind: x.item() for kind, x in divergences.items()}}
    numbers |= {"ids": ids_TC.double().square().sum().item(), "best": logprobs_TC.sum().item()}
    gradient = torch.cat([torch.autograd.grad(x, hidden)[0] for x in (loss, *divergences.values())])
    return numbers, {}, gradient


def worst_error(received, truth) -> float:
    """The largest over what was computed and over ranks, each relative to its truth; infinite where something is no number."""
    errors = [abs(received[0][name] - x) / max(abs(x), 1e-3) for name, x in truth[0].items()]
    errors.append(((received[2] - truth[2]).abs().max() / truth[2].abs().max()).item())
    norm = truth[0].get("norm", 0.0)
    for name, piece in received[1].items():
        x = truth[1][name].tensor
        for dim, (start, length) in enumerate(zip(piece.offset, piece.tensor.shape, strict=True)):
            x = x.narrow(dim, start, length)
        if x.numel():
            scale = truth[1][name].tensor.abs().max().clamp(min=1e-6 * norm)
            errors.append(((piece.tensor - x).abs().max() / scale).item())
    worst = torch.tensor(max(math.inf if math.isnan(error) else error for error in errors), dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


def known(kind: str, chain: str) -> list[str]:
    return [name for name, removal in (REMOVALS | NOT_REMOVED).items() if removal.is_of(kind, chain)]


def examine(name: str, config) -> tuple[dict, set[str]]:
    """({removal: error}, of "" without one; calls that are not exactly one of the lists' entries)"""
    sizes, techniques = (Sizes(tensor=dist.get_world_size()), Techniques()) if name == "losses" else LAYOUTS[name]
    compute = losses if name == "losses" else computed
    truth = compute(config, ALONE, Techniques())
    wire = Wire()
    found = {"": worst_error(compute(config, sizes, techniques), truth)}
    calls = {(call.kind, call.chain) for call in wire.calls}
    unlisted = {f"{kind} {chain}: {known(kind, chain)}" for kind, chain in calls if len(known(kind, chain)) != 1}
    here = {entry for kind, chain in calls for entry in known(kind, chain)}
    # A call may be made by one rank alone (the last stage's losses); every rank runs every removal.
    everywhere: list = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (here, unlisted))
    for removal in REMOVALS:
        if any(removal in entries for entries, _ in everywhere):
            wire.is_removed = lambda call, removal=removal: REMOVALS[removal].is_of(call.kind, call.chain)
            found[removal] = worst_error(compute(config, sizes, techniques), truth)
    wire.cut()
    return found, set().union(*(others for _, others in everywhere))


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found, unlisted = {}, set()
    for name, config in WANTED[dist.get_world_size()].items():
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        found[name], others = examine(name, config)
        unlisted |= others
        if dist.get_rank() == 0:
            for removal, error in found[name].items():
                print(f"{error:8.1e}  {name}: {removal or 'nothing removed'}", file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        json.dump({"errors": found, "unlisted": sorted(unlisted)}, sys.stdout)
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
