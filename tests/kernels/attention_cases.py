"""Requests to attention, small and odd, and what is computed of them: for every test of its Triton kernels."""

import itertools
from typing import NamedTuple

import torch

from warpline.kernels.attention import attention, attention_reference


def boundaries(*lengths, device="cpu"):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


class Case(NamedTuple):
    """Head counts and widths, the lengths of queries and keys (lists of lengths are packed documents), and the options."""

    heads: int
    key_heads: int
    width: int
    value_width: int
    lengths: int | tuple
    key_lengths: int | tuple | None = None
    offset: int | tuple | None = None
    options: dict = {}
    sinks: tuple | None = None
    tail: int = 0
    batch: int = 2

    def inputs(self, dtype, device="cpu", scale=1.0):
        """q, k, v and the sinks (fp32 or None): views with gaps between heads and rows, which hold NaN."""
        is_packed, key_lengths = isinstance(self.lengths, tuple), self.key_lengths or self.lengths
        rows, keys = ((sum(x) + self.tail,) if is_packed else (self.batch, x) for x in (self.lengths, key_lengths))
        sizes = ((rows, self.heads, self.width), (keys, self.key_heads, self.width), (keys, self.key_heads, self.value_width))
        tensors = []
        for seed, (lead, heads, width) in enumerate(sizes):
            values = random(*lead, heads, width, seed=seed, device=device).mul(scale).to(dtype)
            memory = torch.full((*lead[:-1], heads + 1, lead[-1], width + 8), torch.nan, dtype=dtype, device=device)
            view = memory.transpose(-2, -3)[..., :heads, :width]
            tensors.append(view.copy_(values))
        sinks = None if self.sinks is None else torch.tensor(self.sinks, device=device)
        return (*tensors, sinks)

    def keywords(self, device="cpu"):
        keywords = dict(self.options)
        if isinstance(self.lengths, tuple):
            keywords["cu_seqlens"] = boundaries(*self.lengths, device=device)
            if self.key_lengths is not None:
                keywords["cu_seqlens_k"] = boundaries(*self.key_lengths, device=device)
        if self.offset is not None:
            is_one = isinstance(self.offset, int)
            keywords["query_offset"] = self.offset if is_one else torch.tensor(self.offset, dtype=torch.int32, device=device)
        return keywords


def random(*shape, seed, device="cpu"):
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), dtype=torch.float64, device=device)


def outputs_and_gradients(function, inputs, keywords):
    """[output, lse, d_q, d_k, d_v, d_sinks] under random upstream gradients; where lse is not finite it has none."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    *qkv, sinks = leaves
    out, lse = function(*qkv, sinks_N=sinks, return_lse=True, **keywords)
    is_finite = lse.isfinite()
    d_out, d_lse = (random(*x.shape, seed=9, device=x.device).to(x.dtype) for x in (out, lse))
    upstream = d_out, torch.where(is_finite, d_lse, 0.0)
    gradients = torch.autograd.grad((out, lse), [x for x in leaves if x is not None], upstream)
    return [out.detach(), lse.detach(), *gradients]


def check(inputs, keywords, function=attention):
    """‖error‖∞ ≤ 2·‖eager's error‖∞ + 2·eps(output)·‖truth‖∞ against fp64, infinities where they belong."""
    results = [outputs_and_gradients(function, inputs, keywords), outputs_and_gradients(attention_reference, inputs, keywords)]
    doubled = [None if x is None else x.double() for x in inputs]
    truth = outputs_and_gradients(attention_reference, doubled, keywords)
    for index, (a, e, t) in enumerate(zip(*results, truth, strict=True)):
        assert torch.equal(a.isfinite(), t.isfinite()), f"infinities of result {index}"
        if t.isfinite().any():
            error, eager_error = ((x.double() - t)[t.isfinite()].abs().max() for x in (a, e))
            limit = 2 * eager_error + 2 * torch.finfo(a.dtype).eps * t[t.isfinite()].abs().max()
            assert error <= limit, f"result {index}: error {error:.3g}, allowed {limit:.3g}"


# Every feature, alone and with those it interacts with; with tiles of 16, three and a ragged one in every walk.
CASES = {
    "causal": Case(4, 2, 16, 16, 53),
    "everyone sees everyone": Case(2, 1, 16, 16, 53, options={"causal": False}),
    "one key head for four": Case(4, 1, 24, 24, 37, options={"scale": 0.3}),
    "values narrower than keys": Case(2, 2, 24, 16, 37),
    "a window": Case(2, 1, 16, 16, 53, options={"window": 9}),
    "a window of one": Case(2, 2, 16, 16, 37, options={"window": 1}),
    "a window on both sides": Case(2, 1, 16, 16, 53, options={"window": 20, "causal": False}),
    "softcap": Case(2, 1, 16, 16, 37, options={"softcap": 2.0}),
    "softcap, window and sinks of 20": Case(2, 1, 16, 16, 53, options={"softcap": 3.0, "window": 18}, sinks=(20.0, -20.0)),
    "sinks": Case(4, 2, 16, 16, 37, sinks=(0.5, -1.0, float("-inf"), 3.0)),
    "documents": Case(4, 2, 16, 16, (1, 0, 39, 35, 1, 16), sinks=(0.1, 0.2, -0.3, 0.0), tail=5),
    "documents with windows": Case(2, 1, 16, 16, (1, 0, 39, 17, 2), options={"window": 5, "causal": False}, tail=20),
    "documents and other keys": Case(
        2, 1, 16, 16, (30, 0, 21, 3), (40, 5, 0, 33), (-20, 0, 3, 30), options={"window": 14}, sinks=(0.5, -1.0), tail=1
    ),
    "documents that see everything of others": Case(2, 1, 16, 16, (30, 0, 21), (40, 5, 37), 0, options={"causal": False}),
    "queries behind their keys": Case(2, 1, 16, 16, 33, 70, 37),
    "one query behind its keys": Case(2, 1, 16, 16, 1, 70, (69, 20)),
    "queries before their keys": Case(2, 1, 16, 16, 40, 40, (-21, 3), sinks=(1.0, float("-inf"))),
    "more queries than keys": Case(2, 1, 16, 16, 40, 5, 0, options={"softcap": 1.5}),
}  # fmt: skip
