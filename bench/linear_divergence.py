"""Divergences from both sides' hidden states, against full logits in torch and Liger's fused JSD, and the bare products; top k.

Run     warpline bench linear_divergence [--quick] [--out DIR]
Expect  a row per kind, candidate and shape, forward and backward. The products needed: the student's logits twice and the
        teacher's twice (the backward makes both again), d_hidden and d_weight. The cache of a teacher's top 64: making it, and
        the forward KL against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.linear_divergence import linear_divergence, linear_topk, linear_topk_divergence
from ..kernels.linear_topk import linear_topk_divergence_reference
from .head import Loss, both_ways, chunks, compiled, gpu_peers, gradients_in_chunks, head, head_bytes, working_dtype
from .measure import Candidate, Case, Inputs

KINDS = ("forward_kl", "reverse_kl", "jsd")
CACHE_ENTRIES = 64
HALF = 0.6931471805599453  # log 2


def shapes(device: torch.device, is_quick: bool) -> list[tuple[int, int, int, int]]:
    """T, D, U, V: a student of an 8B model's width beside as wide a teacher, a narrow one beside a wider; a laptop's."""
    if device.type == "cpu":
        return [(512, 64, 128, 4096)] if is_quick else [(256, 64, 128, 4096), (512, 64, 128, 4096)]
    middle = (8192, 4096, 4096, 131072)
    if is_quick:
        return [middle]
    lengths = [(tokens, *middle[1:]) for tokens in (2048, 4096, 8192, 16384)]
    return [*lengths, (8192, 2048, 4096, 151936), (8192, 2048, 8192, 128256)]


def eager_divergence(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Their sum over the tokens, from both sides' logits."""
    student, teacher = (x if x.dtype == torch.float64 else x.float() for x in (student, teacher))
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    if kind == "forward_kl":
        return F.kl_div(log_s, log_t, reduction="sum", log_target=True)
    if kind == "reverse_kl":
        return F.kl_div(log_t, log_s, reduction="sum", log_target=True)
    log_m = torch.logaddexp(log_s, log_t) - HALF
    parts = (F.kl_div(log_m, log_p, reduction="sum", log_target=True) for log_p in (log_s, log_t))
    return 0.5 * sum(parts, torch.zeros((), device=student.device))


def eager(x: Inputs, kind: str) -> Tensor:
    teacher = F.linear(x["teacher_hidden"], x["teacher_weight"])
    return eager_divergence(F.linear(x["hidden"], x["weight"]), teacher, kind)


def ours(x: Inputs, kind: str) -> Tensor:
    sides = (x["hidden"], x["weight"], x["teacher_hidden"], x["teacher_weight"])
    return linear_divergence(*sides, kind=kind).sum()  # type: ignore[arg-type]


def inputs_of(shape: tuple[int, int, int, int], generator: torch.Generator) -> Inputs:
    tokens, width, teacher_width, entries = shape
    teacher = head(tokens, teacher_width, entries, generator)
    detached = {f"teacher_{name}": teacher[name].detach() for name in ("hidden", "weight")}
    return {**head(tokens, width, entries, generator), **detached}


def summed_over_chunks(x: Inputs, dtype: torch.dtype, loss: Callable[[Tensor, Tensor, slice], Tensor]) -> list[Tensor]:
    """[value, d_hidden, d_weight] of a loss that is a sum over tokens."""
    hidden, weight = (x[name].detach().to(dtype) for name in ("hidden", "weight"))
    with torch.no_grad():
        parts = chunks(len(hidden), len(weight), hidden.device)
        value = sum((loss(hidden[p], weight, p) for p in parts), torch.zeros((), device=hidden.device))
    return [value, *gradients_in_chunks(loss, hidden, weight)]


def reference(x: Inputs, dtype: torch.dtype, kind: str) -> list[Tensor]:
    teacher_hidden, teacher_weight = (x[f"teacher_{name}"].to(dtype) for name in ("hidden", "weight"))

    def loss(hidden: Tensor, weight: Tensor, part: slice) -> Tensor:
        return eager_divergence(F.linear(hidden, weight), F.linear(teacher_hidden[part], teacher_weight), kind)

    return summed_over_chunks(x, dtype, loss)


def bare_products(x: Inputs) -> list[Callable[[], Tensor]]:
    hidden, weight = x["hidden"].detach(), x["weight"].detach()
    d_logits = torch.randn(len(hidden), len(weight), device=hidden.device, dtype=hidden.dtype)
    both = [lambda: hidden @ weight.t(), lambda: x["teacher_hidden"] @ x["teacher_weight"].t()]
    return [*both, *both, lambda: d_logits @ weight, lambda: d_logits.t() @ hidden]


def cases(device: torch.device, is_quick: bool) -> Iterator[Case]:
    peers, missing = gpu_peers(device, {"liger": ("liger_kernel.transformers.fused_linear_jsd", _liger)})
    products = Candidate(lambda chosen: [product() for product in chosen], bare_products)
    dtype = working_dtype(device)
    for shape in shapes(device, is_quick):
        tokens, width, teacher_width, entries = shape
        sizes = dict(zip("TDUV", shape, strict=True))
        once = head_bytes((tokens, width, entries), dtype)
        flops = 2.0 * tokens * entries * (4 * width + 2 * teacher_width)
        for kind in KINDS:
            losses: dict[str, Loss] = {"warpline": partial(ours, kind=kind), "eager": partial(eager, kind=kind)}
            if device.type == "cuda":
                losses["torch.compile"] = compiled(losses["eager"])
            losses |= peers if kind == "jsd" else {}
            yield Case(
                f"{kind}, forward + backward", sizes, dtype, partial(inputs_of, shape),
                {name: both_ways(loss) for name, loss in losses.items()}, partial(reference, kind=kind),
                flops=flops,
                bytes_moved=2 * once + head_bytes((tokens, teacher_width, entries), dtype), tokens=tokens,
                limits={"bare products": products}, absent=missing,
            )  # fmt: skip
        yield from cached(shape, sizes, dtype)


def cached(shape: tuple[int, int, int, int], sizes: dict[str, int], dtype: torch.dtype) -> Iterator[Case]:
    """Making the cache of the teacher's top entries, and the divergence against it."""
    tokens, width, teacher_width, entries = shape

    @torch.no_grad()
    def eager_topk(x: Inputs) -> Tensor:
        logits = F.linear(x["teacher_hidden"], x["teacher_weight"])
        return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1).topk(CACHE_ENTRIES).values

    def topk_reference(x: Inputs, dtype: torch.dtype) -> list[Tensor]:
        weight = x["teacher_weight"].to(dtype)
        hidden = x["teacher_hidden"]
        parts = chunks(tokens, entries, hidden.device)
        return [torch.cat([eager_topk({"teacher_hidden": hidden[p].to(dtype), "teacher_weight": weight}) for p in parts])]

    def our_topk(x: Inputs) -> Tensor:
        return linear_topk(x["teacher_hidden"], x["teacher_weight"], CACHE_ENTRIES)[1]

    yield Case(
        "top 64 of the teacher", sizes, dtype, partial(inputs_of, shape),
        {"warpline": Candidate(our_topk), "eager": Candidate(eager_topk)}, topk_reference,
        flops=2.0 * tokens * entries * teacher_width,
        bytes_moved=head_bytes((tokens, teacher_width, entries), dtype), tokens=tokens,
    )  # fmt: skip

    def inputs(generator: torch.Generator) -> Inputs:
        x = inputs_of(shape, generator)
        x["ids"], x["logprobs"] = linear_topk(x["teacher_hidden"], x["teacher_weight"], CACHE_ENTRIES)
        return x

    def cached_reference(x: Inputs, dtype: torch.dtype) -> list[Tensor]:
        logprobs = x["logprobs"].double() if dtype == torch.float64 else x["logprobs"]
        return summed_over_chunks(
            x, dtype, lambda hidden, weight, p: linear_topk_divergence_reference(hidden, weight, x["ids"][p], logprobs[p]).sum()
        )

    def loss_of(function: Callable[..., Tensor]) -> Candidate:
        return both_ways(lambda x: function(x["hidden"], x["weight"], x["ids"], x["logprobs"]).sum())

    yield Case(
        "forward KL of a cache of 64", sizes, dtype, inputs,
        {"warpline": loss_of(linear_topk_divergence), "eager": loss_of(linear_topk_divergence_reference)},
        cached_reference, flops=8.0 * tokens * entries * width,
        bytes_moved=2 * head_bytes((tokens, width, entries), dtype), tokens=tokens,
    )  # fmt: skip


def _liger() -> Loss:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    jsd = LigerFusedLinearJSD(jsd_beta=0.5)
    return lambda x: jsd(x["hidden"], x["weight"], x["teacher_hidden"], x["teacher_weight"]) * len(x["hidden"])
