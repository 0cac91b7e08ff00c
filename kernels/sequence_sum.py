"""Sums of per-token values over the sequences of a packed batch.

Math      sum_b = Σ_{t in sequence b} w_t·x_t;  dx_t = w_t·dsum_b(t);  dw_t = x_t·dsum_b(t).
Shapes    values_T, weight_T [T]; cu_seqlens int32 or int64 [B+1]; output [B].
Dtypes    in: fp64, fp32, bf16, fp16; summed and returned in fp64 if an input is fp64, else fp32.
Traffic   forward 2 reads per token, backward 2 reads and a write for each gradient.
Source    GSPO's sequence ratios, arXiv:2507.18071, and DPO's sequence log-probabilities, arXiv:2305.18290.
          With a `group`, whose ranks hold parts of the same B sequences (context parallelism): one all-reduce of [B] forward,
          none backward, since every rank has the whole dsum.
Limits    Tokens past the last boundary count for nothing, whatever they hold; an empty sequence sums to 0.
          Tokens of a sequence are added in one order, so equal inputs give equal bits.
"""

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def sequence_sum_reference(values_T: Tensor, cu_seqlens: Tensor, *, weight_T: Tensor | None = None) -> Tensor:
    """One slice and one sum per sequence."""
    weighted_T = values_T if weight_T is None else values_T * weight_T
    bounds = cu_seqlens.tolist()
    return torch.stack([weighted_T[a:b].sum() for a, b in pairwise(bounds)] or [weighted_T.new_zeros(0)]).view(-1)


def check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> int:
    """The last boundary, once all of them are known to bound sequences among `num_tokens` tokens. Reads them on the host."""
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        received = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens is {received}; expected int32 or int64 [B + 1]: cumulate the lengths, from 0")
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] > num_tokens or any(start > stop for start, stop in pairwise(bounds)):
        expected = f"0, then ends that do not decrease and are at most {num_tokens}"
        raise ValueError(f"cu_seqlens is {bounds[:16]}; expected {expected}: cumulate the lengths")
    return bounds[-1]


def check_vectors(**named: Tensor) -> None:
    """Refuse tensors that are not floating-point numbers of one shape [T] or [B]: nothing is broadcast."""
    shapes = {name: list(tensor.shape) for name, tensor in named.items()}
    if len({tensor.shape for tensor in named.values()}) != 1 or next(iter(named.values())).dim() != 1:
        raise ValueError(f"received {shapes}; expected one shape of one dimension: flatten, and pack what belongs together")
    dtypes = {name: str(tensor.dtype) for name, tensor in named.items() if not tensor.is_floating_point()}
    if dtypes:
        raise ValueError(f"received {dtypes}; expected floating-point numbers: convert with .float()")


def counted_tokens(
    like_T: Tensor, *, mask_T: Tensor | None = None, weight_T: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """bool [T], True where a token counts: in the mask, of a weight that is not 0, before the last boundary. Checks them."""
    is_counted_T = torch.ones(like_T.shape, dtype=torch.bool, device=like_T.device)
    if mask_T is not None:
        if mask_T.dtype != torch.bool or mask_T.shape != like_T.shape:
            received = f"{mask_T.dtype} {list(mask_T.shape)}"
            raise ValueError(f"mask is {received}; expected torch.bool {list(like_T.shape)}: True where a token counts")
        is_counted_T = mask_T
    if weight_T is not None:
        check_vectors(values=like_T, weight=weight_T)
        is_counted_T = is_counted_T & (weight_T != 0)
    if cu_seqlens is not None:
        num_used = check_cu_seqlens(cu_seqlens, len(like_T))
        is_counted_T = is_counted_T & (torch.arange(len(like_T), device=like_T.device) < num_used)
    return is_counted_T


def sequence_of_token(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """int64 [T]: each token's sequence, B past the last boundary."""
    token_T = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long().contiguous(), token_T, right=True)


def spread(values_B: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[T]: each token's own sequence's value; 0 for tokens past the last boundary."""
    return torch.cat([values_B, values_B.new_zeros(1)])[sequence_of_token(cu_seqlens, num_tokens)]


def counted_length(is_counted_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """int64 [B]: how many tokens of each sequence count, exactly, whatever the dtype of the values."""
    before_T = torch.cat([is_counted_T.new_zeros(1, dtype=torch.long), is_counted_T.cumsum(0)])
    return before_T[cu_seqlens.long()].diff()


class _SequenceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values_T, weight_T, cu_seqlens, num_used):
        boundaries = cu_seqlens.long()
        dtype = torch.float64 if torch.float64 in (values_T.dtype, weight_T.dtype) else torch.float32
        sequence_T = torch.repeat_interleave(boundaries.diff(), output_size=num_used)
        ctx.save_for_backward(values_T, weight_T, sequence_T)
        weighted_T = values_T[:num_used].to(dtype) * weight_T[:num_used].to(dtype)
        # Not index_add, whose CUDA kernel adds atomically, in any order.
        return torch.segment_reduce(weighted_T, "sum", lengths=boundaries.diff(), unsafe=True, initial=0)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_sum_B):
        values_T, weight_T, sequence_T = ctx.saved_tensors
        d_T = d_sum_B.index_select(0, sequence_T)
        pairs = ((values_T, weight_T), (weight_T, values_T))
        needed = ctx.needs_input_grad[:2]
        gradients = [_scaled(d_T, *pair) if need else None for pair, need in zip(pairs, needed, strict=True)]
        return *gradients, None, None


def _scaled(d_T: Tensor, like_T: Tensor, factor_T: Tensor) -> Tensor:
    gradient_T = torch.zeros_like(like_T)
    gradient_T[: d_T.numel()] = d_T * factor_T[: d_T.numel()]
    return gradient_T


class _SumOverRanks(torch.autograd.Function):
    """Every rank goes on with the whole sum, so its gradient is whole, and no rank's part is counted twice."""

    @staticmethod
    def forward(ctx, sum_B, group):
        total_B = sum_B.clone()
        dist.all_reduce(total_B, group=group)
        return total_B

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total_B):
        return d_total_B, None


def sequence_sum(
    values_T: Tensor, cu_seqlens: Tensor, *, weight_T: Tensor | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Per-sequence sums, differentiable in values and weights; with `group`, of all its ranks' parts of each sequence (a
    rank without a part has an empty sequence there). On CPU and CUDA torch's segmented sum; it reads the boundaries on the
    host."""
    num_tokens = values_T.numel()
    if values_T.dim() != 1 or (weight_T is not None and weight_T.shape != values_T.shape):
        received = f"values {list(values_T.shape)}, weights {None if weight_T is None else list(weight_T.shape)}"
        raise ValueError(f"sequence_sum: received {received}, expected one shape [T]; flatten the tokens")
    num_used = check_cu_seqlens(cu_seqlens, num_tokens)
    if values_T.device.type not in ("cpu", "cuda"):
        raise ValueError(f"sequence_sum: received device {values_T.device.type}, expected one of cpu, cuda; move it")
    weight_T = values_T.new_ones(()).expand(num_tokens) if weight_T is None else weight_T
    sum_B = _SequenceSum.apply(values_T, weight_T, cu_seqlens, num_used)
    return sum_B if group is None else _SumOverRanks.apply(sum_B, group)
