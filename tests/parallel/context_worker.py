"""One rank of a context group: ring attention and Ulysses against attention over the whole row on one process, in fp64.

Run     torchrun --nproc-per-node N tests/parallel/context_worker.py
Prints  on rank 0, one JSON object: the largest relative error of each case and of each mutation, the bytes rank 0 sent, the
        numbers that a ring saves for its backward, and the most that its transfers held
"""

import importlib.util
import json
import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist

from warpline.kernels.attention import attention
from warpline.parallel import context
from warpline.parallel.context import ContextBatch, ring_attention, ulysses_attention

NUM_TOKENS, KEY_WIDTH, VALUE_WIDTH = 61, 8, 6
# One document; documents that cross the ranks' borders, of length 1, empty, and tokens past the last; short documents.
BOUNDS = {
    "one document": (0, 61),
    "documents": (0, 1, 20, 20, 47, 56),
    "short documents": (0, 3, 9, 10, 21, 30, 37, 44, 50, 61),
}
OPTIONS = {
    "plain": {},
    "everyone": {"causal": False},
    "window": {"window": 9},
    "window, everyone": {"window": 9, "causal": False},
    "softcap, sinks": {"softcap": 2.0, "sinks": True, "scale": 0.5},
}


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(actual, truth):
    if not truth.numel():
        return 0.0
    return ((actual - truth).abs().max() / truth.abs().max().clamp(min=1e-300)).item()


def compare(function, bounds, options, num_heads, num_key_heads, make=ContextBatch):
    """The largest error of this rank's outputs and gradients, sinks summed over ranks."""
    options = dict(options)
    whole = [random(NUM_TOKENS, n, w, seed=w + n) for n, w in ((num_heads, 8), (num_key_heads, 8), (num_key_heads, 6))]
    has_sinks = options.pop("sinks", False)
    sinks = random(num_heads, seed=5).requires_grad_() if has_sinks else None
    batch = make.of(bounds, NUM_TOKENS, dist.group.WORLD, torch.device("cpu"))
    leaves = [x.clone().requires_grad_() for x in whole]
    out = attention(*leaves, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), sinks_N=sinks, **options)
    d_out = random(*out.shape, seed=9)
    expected = [out, *torch.autograd.grad(out, [*leaves, *([sinks] if has_sinks else [])], d_out)]
    mine = [batch.local(x).requires_grad_() for x in whole]
    part = function(*mine, batch, sinks_N=sinks, **options)
    received = [part, *torch.autograd.grad(part, [*mine, *([sinks] if has_sinks else [])], batch.local(d_out))]
    errors = [error(a, batch.local(b)) for a, b in zip(received[:4], expected[:4], strict=True)]
    if has_sinks:
        dist.all_reduce(received[4])
        errors.append(error(received[4], expected[4]))
    return max(errors)


class Counter:
    """Bytes sent by point-to-point and all-to-all, by wrapping them."""

    def __init__(self):
        self.sent = {"p2p": 0, "all_to_all": 0}
        plain_p2p, plain_all = dist.batch_isend_irecv, dist.all_to_all_single

        def p2p(operations):
            self.sent["p2p"] += sum(o.tensor.nbytes for o in operations if o.op is dist.isend)
            return plain_p2p(operations)

        def all_to_all(received, sent, received_counts, sent_counts, group=None):
            own = sent_counts[dist.get_rank()] / max(1, sum(sent_counts))
            self.sent["all_to_all"] += round(sent.nbytes * (1 - own))
            return plain_all(received, sent, received_counts, sent_counts, group=group)

        dist.batch_isend_irecv, dist.all_to_all_single = p2p, all_to_all


# Each of these edits of the source takes a communication or a rule away, and must be noticed.
MUTATIONS = {
    "keys do not travel": ("coming is None else coming.wait()", "coming is None else torch.zeros_like(coming.wait())"),
    "gradients of keys do not travel": ("d_flat += d_coming.wait()", "d_coming.wait()"),
    "gradients of keys do not come home": (
        "d_flat if d_coming is None else d_coming.wait()",
        "d_flat if d_coming is None else torch.zeros_like(d_coming.wait())",
    ),
    "the merge forgets what was before": ("out.mul_(next(weights))", "out.mul_(0.0 * next(weights))"),
    "offsets are forgotten": ("q[0] - k[0] if q[1]", "0 if q[1]"),
    "heads are not exchanged for tokens": ("row[batch.order] = received", "row.copy_(received)"),
    "a row's tokens go back in the wrong order": ("sent = y[batch.order]", "sent = y.contiguous()"),
    "every rank takes the first sinks": ("sinks_N[heads]", "sinks_N[: num_heads // size]"),
}


def mutated(old: str, new: str):
    """The module with an edit of its source."""
    source = Path(context.__file__).read_text()
    assert old in source, "the mutation is stale: its text is not in the source"
    spec = importlib.util.spec_from_loader("warpline.parallel.context_mutated", loader=None)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    exec(compile(source.replace(old, new), spec.name, "exec"), module.__dict__)
    return module


def worst_error(module) -> float:
    """Over both functions, on documents that cross every border, with all that a mutation may touch."""
    size = dist.get_world_size()
    worst = 0.0
    for function in (module.ring_attention, module.ulysses_attention):
        for options in (OPTIONS["plain"], OPTIONS["softcap, sinks"]):
            worst = max(worst, compare(function, BOUNDS["documents"], options, 2 * size, size, module.ContextBatch))
    worst = torch.tensor(worst)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


def most_held() -> dict[str, int]:
    """The most numbers at once in the buffers of a ring's transfers, of its forward and of its backward."""
    alive, most = weakref.WeakSet(), {"forward": 0, "backward": 0}
    plain = context._Exchange

    class Counted(plain):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            alive.add(self)
            held = {tensor.data_ptr(): tensor.numel() for exchange in alive for tensor in exchange.tensors}
            caller = sys._getframe(1).f_code.co_name
            most[caller] = max(most[caller], sum(held.values()))

    context._Exchange = Counted
    compare(ring_attention, BOUNDS["one document"], {}, 2, 1)
    context._Exchange = plain
    return most


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    functions = {"ring": ring_attention, "ulysses": ulysses_attention}
    heads = {"K=1": (2 * size, 1), "K=2": (2 * size, 2), "N=K": (size, size)}
    found, counter = {}, Counter()
    for name, function in functions.items():
        for bounds_name, bounds in BOUNDS.items():
            for option_name, options in OPTIONS.items():
                key_heads = "K=1" if bounds_name == "one document" else "K=2" if size % 2 == 0 else "N=K"
                worst = torch.tensor(compare(function, bounds, options, *heads[key_heads]))
                dist.all_reduce(worst, dist.ReduceOp.MAX)
                found[f"{name}, {bounds_name}, {option_name}"] = worst.item()
    counter.sent = {"p2p": 0, "all_to_all": 0}
    sent = {}
    for name, function in functions.items():
        batch = ContextBatch.of((0, 61), NUM_TOKENS, dist.group.WORLD, torch.device("cpu"))
        tensors = [batch.local(random(NUM_TOKENS, n, w, seed=n)).requires_grad_() for n, w in ((4 * size, 8), (2, 8), (2, 6))]
        before = dict(counter.sent)
        out = function(*tensors, batch)
        if name == "ring":
            saved = sum(x.numel() for x in out.grad_fn.saved_tensors if x is not None) / batch.layout.tokens(batch.rank)
        forward = {key: counter.sent[key] - before[key] for key in before}
        out.sum().backward()
        both = {key: counter.sent[key] - before[key] for key in before}
        tokens = [batch.layout.tokens(rank) for rank in range(size)]
        sent[name] = {"forward": forward, "both": both, "tokens": tokens}
    mutations = {name: worst_error(mutated(*edit)) for name, edit in MUTATIONS.items()}
    results = {"errors": found, "sent": sent, "mutations": mutations, "plain": worst_error(context), "saved": saved}
    results["held"] = most_held()
    if dist.get_rank() == 0:
        json.dump(results, sys.stdout)
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
