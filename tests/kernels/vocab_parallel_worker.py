"""One rank of a group that shards the vocabulary: every loss against the same loss on one process, in fp64.

Run     torchrun --nproc-per-node N tests/kernels/vocab_parallel_worker.py
Prints  on rank 0, one JSON object: the largest relative error of each case, and the collectives of one forward and backward
"""

import json
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from warpline.kernels.linear_divergence import linear_divergence, linear_topk, linear_topk_divergence
from warpline.kernels.linear_logprob import linear_cross_entropy, linear_logprob
from warpline.kernels.sequence_sum import sequence_sum
from warpline.kernels.vocabulary_sweep import BLOCKING, Blocking

BLOCKING["cpu"] = Blocking(rows=8, columns=4, elements=32, backward_columns=5, backward_elements=80, kept_elements=208)
TOKENS, WIDTH, TEACHER_WIDTH, ENTRIES, PADDED = 19, 6, 4, 26, 29  # 26 ids; with padding the ranks' rows add up to 29
ALL = {"entropy": True, "argmax": True, "sum_p2": True, "mean_logit": True}


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shares(num_ranks: int, is_padded: bool) -> list[tuple[int, int]]:
    """(first row, rows) of each rank: equal ones where they divide, else uneven, the last rank's with padding behind."""
    if not is_padded and ENTRIES % num_ranks == 0:
        size = ENTRIES // num_ranks
        return [(rank * size, size) for rank in range(num_ranks)]
    total, rows = (PADDED if is_padded else ENTRIES), []
    for rank in range(num_ranks):
        size = total // num_ranks + (rank < total % num_ranks)
        rows.append((sum(count for _, count in rows), size))
    return rows


class Case:
    """Inputs of the whole, and this rank's part of them."""

    def __init__(self, is_padded: bool):
        self.ranks = shares(dist.get_world_size(), is_padded)
        start, size = self.ranks[dist.get_rank()]
        self.valid = min(size, max(0, ENTRIES - start))
        self.whole = [random(TOKENS, WIDTH, seed=1), random(ENTRIES, WIDTH, seed=2), random(ENTRIES, seed=3)]
        self.teacher = [random(TOKENS, TEACHER_WIDTH, seed=4), random(ENTRIES, TEACHER_WIDTH, seed=5)]
        self.target = torch.randint(0, ENTRIES, (TOKENS, 3), generator=torch.Generator().manual_seed(6))
        self.target[3] = self.target[7, 1] = -100
        self.rows = slice(start, start + self.valid)
        self.options = {"group": dist.group.WORLD}
        if is_padded or ENTRIES % len(self.ranks):
            self.options |= {"vocab_start": start, "vocab_size": ENTRIES}
        padding = size - self.valid
        # Padding holds NaN: nothing may read it.
        self.part = [
            self.whole[0].clone(),
            torch.cat([self.whole[1][self.rows], torch.full((padding, WIDTH), torch.nan, dtype=torch.float64)]),
            torch.cat([self.whole[2][self.rows], torch.full((padding,), torch.nan, dtype=torch.float64)]),
        ]
        nan_rows = torch.full((padding, TEACHER_WIDTH), torch.nan, dtype=torch.float64)
        self.teacher_part = [self.teacher[0], torch.cat([self.teacher[1][self.rows], nan_rows])]
        for x in (*self.whole, *self.part):
            x.requires_grad_()

    def functions(self) -> dict:
        """name → f(hidden, weight, bias, teacher, options) → outputs to compare."""
        one_T = self.target[:, 0]
        cut = {"temperature": 0.7, "softcap": 3.0}

        def divergence(kind):
            return lambda h, w, b, t, o: [linear_divergence(h, w, *t, bias_V=b, kind=kind, beta=0.3, temperature=0.8, **o)]

        def topk(h, w, b, t, o):
            return list(linear_topk(h, w, 5, bias_V=b, **cut, **o))[::-1]

        def topk_divergence(h, w, b, t, o):
            with torch.no_grad():
                cache = linear_topk(*t, 4, **o)
            return [linear_topk_divergence(h, w, *cache, bias_V=b, **o)]

        return {
            "logprob": lambda h, w, b, t, o: list(linear_logprob(h, w, one_T, bias_V=b, **cut, **ALL, **o)),
            "logprob of several targets": lambda h, w, b, t, o: list(linear_logprob(h, w, self.target, bias_V=b, **o)[:2]),
            "cross-entropy": lambda h, w, b, t, o: [
                linear_cross_entropy(h, w, one_T, bias_V=b, z_loss=0.1, label_smoothing=0.2, **o)
            ],
            "forward KL": divergence("forward_kl"),
            "reverse KL": divergence("reverse_kl"),
            "jsd": divergence("jsd"),
            "top k": topk,
            "top-k divergence": topk_divergence,
        }

    def run(self, function, inputs, teacher, options):
        outputs = function(*inputs, teacher, options)
        used = [x for x in outputs if x.requires_grad]
        upstream = [random(*x.shape, seed=10 + i) for i, x in enumerate(used)]
        return outputs, torch.autograd.grad(used, inputs, upstream) if used else []


def error(actual, expected) -> float:
    scale = max(1.0, expected.double().abs().max().item())
    return (actual.double() - expected.double()).abs().max().item() / scale if actual.numel() else 0.0


def compare(case: Case, function) -> float:
    outputs, gradients = case.run(function, case.part, case.teacher_part, case.options)
    expected, expected_gradients = case.run(function, case.whole, case.teacher, {})
    errors = [error(a, b) for a, b in zip(outputs, expected, strict=True)]
    if gradients:
        d_hidden, *d_rows = gradients
        whole_d_hidden, *whole_d_rows = expected_gradients
        errors.append(error(d_hidden, whole_d_hidden))
        for d, whole in zip(d_rows, whole_d_rows, strict=True):
            errors.append(error(d[: case.valid], whole[case.rows]))
            errors.append(d[case.valid :].abs().sum().item())  # padding: gradient zero
    return max(errors)


def collectives(case: Case) -> dict[str, dict[str, int]]:
    """Of one forward and of its backward, by name."""
    counts = {}
    for name in ("logprob", "cross-entropy", "forward KL", "jsd"):
        with CommDebugMode() as forward:
            outputs = [x for x in case.functions()[name](*case.part, case.teacher_part, case.options) if x.requires_grad]
        with CommDebugMode() as backward:
            torch.autograd.grad(outputs, case.part, [torch.ones_like(x) for x in outputs])
        counts[name] = {
            pass_: {str(op).rpartition(".")[2]: n for op, n in mode.get_comm_counts().items()}
            for pass_, mode in (("forward", forward), ("backward", backward))
        }
    return counts


def partial_d_hidden(case: Case) -> float:
    """With `reduce_d_hidden=False` the ranks' parts add up to the whole's d_hidden."""
    case.options["reduce_d_hidden"] = False
    _, (d_hidden, *_) = case.run(case.functions()["logprob"], case.part, case.teacher_part, case.options)
    dist.all_reduce(d_hidden)
    _, (expected, *_) = case.run(case.functions()["logprob"], case.whole, case.teacher, {})
    return error(d_hidden, expected)


def sequence_sums() -> float:
    """Sequences cut into ranks' parts, some of them empty, against the whole."""
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    values, weight, cu = random(12, seed=7).requires_grad_(), random(12, seed=8), torch.tensor([0, 5, 5, 12])
    ends = [3 * i for i in range(num_ranks)] + [12]
    lo, hi = ends[rank], ends[rank + 1]
    own = values.detach()[lo:hi].requires_grad_()
    parts = sequence_sum(own, cu.clamp(lo, hi) - lo, weight_T=weight[lo:hi], group=dist.group.WORLD)
    whole = sequence_sum(values, cu, weight_T=weight)
    upstream = random(3, seed=9)
    d_own = torch.autograd.grad(parts, own, upstream)[0]
    return max(error(parts, whole), error(d_own, torch.autograd.grad(whole, values, upstream)[0][lo:hi]))


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for is_padded in (False, True):
        case = Case(is_padded)
        for name, function in case.functions().items():
            worst = torch.tensor(compare(case, function))
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            found[f"{name}{', padded' if is_padded else ''}"] = worst.item()
    found["partial d_hidden"] = partial_d_hidden(Case(False))
    found["sequence sums"] = sequence_sums()
    counts = collectives(Case(False))
    if dist.get_rank() == 0:
        json.dump({"errors": found, "collectives": counts}, sys.stdout)
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
