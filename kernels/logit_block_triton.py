"""The steps of `logit_block` in Triton: one program per token and block, memory-bound, no matrix product.

**Math** and **Shapes** as in `logit_block`; the host functions at the end have the signatures of its torch functions.
**Dtypes** product, bias and everything per token fp32; the gradient is written into the product's own memory:
  the first half of each row where its dtype is half as wide. A program owns its row, and a barrier stands
  between reading a tile and writing over it.
**Traffic** statistics read 4 bytes an element; the gradient reads 4 and writes 2 or 4; both of a teacher's block 4 more.
**Source** see `logit_block`.
**Limits** fp64 is refused: the CPU path has it. No float in a kernel is fp64, whatever the scalar arguments' type.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from .logit_block import KINDS, LOWEST, Coefficient, Divergence, PairStatistic, Side, Statistic, Targets, Wanted
from .triton_jit import constant, jit, tanh, tl, triton

# Columns of one tile of a row and warps of a program: 16 elements a thread, 8 of each side where there are two. Unmeasured on
# a GPU: chosen so that no kernel spills on sm_80, sm_90 and sm_100 (tests/kernels/resources.json; with 4096 columns of
# two sides the pair statistics spill 8 bytes on sm_80).
COLUMNS_PER_TILE = 4096
NUM_WARPS = 8

_LOWEST = constant(LOWEST)
# Rows of the statistics and the coefficients; a maximum is row 0 of each.
_MAX, _SUM = constant(int(Statistic.MAX)), constant(int(Statistic.SUM))
_SUM_Z, _SUM_SQUARES = constant(int(Statistic.SUM_Z)), constant(int(Statistic.SUM_SQUARES))
_SUM_LOGITS, _ARGMAX = constant(int(Statistic.SUM_LOGITS)), constant(int(Statistic.ARGMAX))
_TEACHER_MAX, _TEACHER_SUM = constant(int(PairStatistic.TEACHER_MAX)), constant(int(PairStatistic.TEACHER_SUM))
_CROSS, _LOG_SUM = constant(int(PairStatistic.CROSS)), constant(int(Coefficient.LOG_SUM))
_A, _B = constant(int(Coefficient.A)), constant(int(Coefficient.B))
_C, _K = constant(int(Coefficient.C)), constant(int(Coefficient.K))
_KIND_NUMBER = {kind: number for number, kind in enumerate(KINDS)}
_FORWARD_KL, _REVERSE_KL = constant(_KIND_NUMBER["forward_kl"]), constant(_KIND_NUMBER["reverse_kl"])


@jit
def _logit(product, bias, columns, inside, softcap, inverse_temperature, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    z = product
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_CAP:
        z = softcap * tanh(z / softcap)
    z = z * inverse_temperature
    if HAS_BIAS:
        z = tl.where(z < _LOWEST, _LOWEST, z)  # a comparison that lets NaN through
    return z


@jit
def _slope(z, softcap, inverse_temperature, HAS_CAP: tl.constexpr):
    slope = inverse_temperature
    if HAS_CAP:
        capped = z / (inverse_temperature * softcap)
        slope = inverse_temperature * (1.0 - capped * capped)
    return slope


@jit
def _log_mixture(log_s, log_t, log_beta, log_rest):
    x, y = log_t + log_beta, log_s + log_rest
    top = tl.maximum(x, y)
    return top + tl.log(1.0 + tl.exp(tl.minimum(x, y) - top))


@jit
def statistics_kernel(
    product, product_stride, bias, target, target_stride, statistics, statistics_stride, picked, picked_stride,
    num_targets, first_column, width, softcap, inverse_temperature,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, ARGMAX: tl.constexpr, SUM_P2: tl.constexpr,
    MEAN_LOGIT: tl.constexpr, TARGETS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Folds one block's row into the token's running statistics, and picks the logits of its targets."""
    row = tl.program_id(0).to(tl.int64)
    product += row * product_stride
    statistics += row
    maximum = tl.load(statistics + _MAX * statistics_stride)
    total = tl.load(statistics + _SUM * statistics_stride)
    total_z = tl.load(statistics + _SUM_Z * statistics_stride)
    total_squares = tl.load(statistics + _SUM_SQUARES * statistics_stride)
    total_logits = tl.load(statistics + _SUM_LOGITS * statistics_stride)
    place = tl.load(statistics + _ARGMAX * statistics_stride)
    for start in range(0, width, TILE):
        columns = start + tl.arange(0, TILE)
        inside = columns < width
        raw = tl.load(product + columns, mask=inside, other=0.0)
        z = _logit(raw, bias, columns, inside, softcap, inverse_temperature, HAS_BIAS, HAS_CAP)
        shown = tl.where(inside, z, -float("inf"))
        tile_maximum = tl.max(shown, 0)
        if ARGMAX:
            tile_place = first_column + start + tl.argmax(shown, 0)
            place = tl.where(tile_maximum > maximum, tile_place.to(tl.float32), place)
        if MEAN_LOGIT:
            total_logits += tl.sum(tl.where(inside, z, 0.0), 0)
        new_maximum = tl.maximum(maximum, tile_maximum)
        moved = maximum - new_maximum
        factor = tl.exp(moved)
        centred = tl.where(inside, z - new_maximum, 0.0)
        e = tl.where(inside, tl.exp(centred), 0.0)
        if ENTROPY:
            total_z = factor * (total_z + moved * total) + tl.sum(e * centred, 0)
        if SUM_P2:
            total_squares = factor * factor * total_squares + tl.sum(e * e, 0)
        total = factor * total + tl.sum(e, 0)
        maximum = new_maximum
    tl.store(statistics + _MAX * statistics_stride, maximum)
    tl.store(statistics + _SUM * statistics_stride, total)
    if ENTROPY:
        tl.store(statistics + _SUM_Z * statistics_stride, total_z)
    if SUM_P2:
        tl.store(statistics + _SUM_SQUARES * statistics_stride, total_squares)
    if MEAN_LOGIT:
        tl.store(statistics + _SUM_LOGITS * statistics_stride, total_logits)
    if ARGMAX:
        tl.store(statistics + _ARGMAX * statistics_stride, place)
    entry = tl.arange(0, TARGETS)
    local = tl.load(target + row * target_stride + entry, mask=entry < num_targets, other=-1) - first_column
    found = (local >= 0) & (local < width) & (entry < num_targets)
    raw = tl.load(product + local, mask=found, other=0.0)
    logit = _logit(raw, bias, local, found, softcap, inverse_temperature, HAS_BIAS, HAS_CAP)
    tl.store(picked + row * picked_stride + entry, logit, mask=found)


@jit
def pair_statistics_kernel(
    product, product_stride, bias, softcap, inverse_temperature,
    teacher, teacher_stride, teacher_bias, teacher_softcap, teacher_inverse_temp,
    statistics, statistics_stride, width,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, TEACHER_HAS_BIAS: tl.constexpr, TEACHER_HAS_CAP: tl.constexpr,
    KIND: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Folds one row of a student's and a teacher's block into the token's running pair statistics."""
    row = tl.program_id(0).to(tl.int64)
    product += row * product_stride
    teacher += row * teacher_stride
    statistics += row
    maximum_s = tl.load(statistics + _MAX * statistics_stride)
    total_s = tl.load(statistics + _SUM * statistics_stride)
    maximum_t = tl.load(statistics + _TEACHER_MAX * statistics_stride)
    total_t = tl.load(statistics + _TEACHER_SUM * statistics_stride)
    cross = tl.load(statistics + _CROSS * statistics_stride)
    for start in range(0, width, TILE):
        columns = start + tl.arange(0, TILE)
        inside = columns < width
        raw_s = tl.load(product + columns, mask=inside, other=0.0)
        raw_t = tl.load(teacher + columns, mask=inside, other=0.0)
        z_s = _logit(raw_s, bias, columns, inside, softcap, inverse_temperature, HAS_BIAS, HAS_CAP)
        z_t = _logit(
            raw_t, teacher_bias, columns, inside, teacher_softcap, teacher_inverse_temp, TEACHER_HAS_BIAS, TEACHER_HAS_CAP
        )
        new_s = tl.maximum(maximum_s, tl.max(tl.where(inside, z_s, -float("inf")), 0))
        new_t = tl.maximum(maximum_t, tl.max(tl.where(inside, z_t, -float("inf")), 0))
        moved_s, moved_t = maximum_s - new_s, maximum_t - new_t
        factor_s, factor_t = tl.exp(moved_s), tl.exp(moved_t)
        centred_s, centred_t = tl.where(inside, z_s - new_s, 0.0), tl.where(inside, z_t - new_t, 0.0)
        e_s, e_t = tl.where(inside, tl.exp(centred_s), 0.0), tl.where(inside, tl.exp(centred_t), 0.0)
        if KIND == _FORWARD_KL:
            cross = factor_t * (cross + (moved_t - moved_s) * total_t) + tl.sum(e_t * (centred_t - centred_s), 0)
        if KIND == _REVERSE_KL:
            cross = factor_s * (cross + (moved_s - moved_t) * total_s) + tl.sum(e_s * (centred_s - centred_t), 0)
        total_s = factor_s * total_s + tl.sum(e_s, 0)
        total_t = factor_t * total_t + tl.sum(e_t, 0)
        maximum_s, maximum_t = new_s, new_t
    tl.store(statistics + _MAX * statistics_stride, maximum_s)
    tl.store(statistics + _SUM * statistics_stride, total_s)
    tl.store(statistics + _TEACHER_MAX * statistics_stride, maximum_t)
    tl.store(statistics + _TEACHER_SUM * statistics_stride, total_t)
    tl.store(statistics + _CROSS * statistics_stride, cross)


@jit
def divergence_kernel(
    product, product_stride, bias, softcap, inverse_temperature, coefficients, coefficients_stride,
    teacher, teacher_stride, teacher_bias, teacher_softcap, teacher_inverse_temp, normaliser, normaliser_stride,
    sums, sums_stride, width, log_beta, log_rest,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, TEACHER_HAS_BIAS: tl.constexpr, TEACHER_HAS_CAP: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Adds one row's Σ t log(t/m) and Σ s log(s/m) to the token's sums."""
    row = tl.program_id(0).to(tl.int64)
    product += row * product_stride
    teacher += row * teacher_stride
    shift_s = tl.load(coefficients + row)
    log_sum_s = tl.load(coefficients + _LOG_SUM * coefficients_stride + row)
    shift_t = tl.load(normaliser + row)
    log_sum_t = tl.load(normaliser + _LOG_SUM * normaliser_stride + row)
    sum_t = tl.load(sums + row)
    sum_s = tl.load(sums + sums_stride + row)
    for start in range(0, width, TILE):
        columns = start + tl.arange(0, TILE)
        inside = columns < width
        raw_s = tl.load(product + columns, mask=inside, other=0.0)
        raw_t = tl.load(teacher + columns, mask=inside, other=0.0)
        z_s = _logit(raw_s, bias, columns, inside, softcap, inverse_temperature, HAS_BIAS, HAS_CAP)
        z_t = _logit(
            raw_t, teacher_bias, columns, inside, teacher_softcap, teacher_inverse_temp, TEACHER_HAS_BIAS, TEACHER_HAS_CAP
        )
        log_s, log_t = (z_s - shift_s) - log_sum_s, (z_t - shift_t) - log_sum_t
        log_m = _log_mixture(log_s, log_t, log_beta, log_rest)
        sum_t += tl.sum(tl.where(inside, tl.exp(log_t) * (log_t - log_m), 0.0), 0)
        sum_s += tl.sum(tl.where(inside, tl.exp(log_s) * (log_s - log_m), 0.0), 0)
    tl.store(sums + row, sum_t)
    tl.store(sums + sums_stride + row, sum_s)


@jit
def gradient_kernel(
    product, product_stride, bias, softcap, inverse_temperature, coefficients, coefficients_stride,
    target, target_stride, d_target, d_target_stride, num_targets, first_column, out, out_stride, width,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_B: tl.constexpr, HAS_C: tl.constexpr, HAS_K: tl.constexpr,
    TARGETS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """d_product of one row, over its product; the entries of targets are made from logits read before, and written last."""
    row = tl.program_id(0).to(tl.int64)
    product += row * product_stride
    out += row * out_stride
    coefficients += row
    shift = tl.load(coefficients)
    log_sum = tl.load(coefficients + _LOG_SUM * coefficients_stride)
    a = tl.load(coefficients + _A * coefficients_stride)
    b = tl.load(coefficients + _B * coefficients_stride)
    c = tl.load(coefficients + _C * coefficients_stride)
    k = tl.load(coefficients + _K * coefficients_stride)
    if TARGETS > 0:
        entry = tl.arange(0, TARGETS)
        local = tl.load(target + row * target_stride + entry, mask=entry < num_targets, other=-1) - first_column
        found = (local >= 0) & (local < width) & (entry < num_targets)
        raw_at_target = tl.load(product + local, mask=found, other=0.0)
        z_at_target = _logit(raw_at_target, bias, local, found, softcap, inverse_temperature, HAS_BIAS, HAS_CAP)
        lp_at_target = (z_at_target - shift) - log_sum
        d_at_target = _softmax_gradient(lp_at_target, a, b, c, k, HAS_B, HAS_C, HAS_K)
        # A target that is there twice gets both upstream gradients, and both stores then write the same number.
        for other in range(num_targets):
            is_same = local == tl.load(target + row * target_stride + other) - first_column
            d_at_target += tl.where(is_same, tl.load(d_target + row * d_target_stride + other), 0.0)
        d_at_target = d_at_target * _slope(z_at_target, softcap, inverse_temperature, HAS_CAP)
        tl.debug_barrier()
    for start in range(0, width, TILE):
        columns = start + tl.arange(0, TILE)
        inside = columns < width
        raw = tl.load(product + columns, mask=inside, other=0.0)
        z = _logit(raw, bias, columns, inside, softcap, inverse_temperature, HAS_BIAS, HAS_CAP)
        d = _softmax_gradient((z - shift) - log_sum, a, b, c, k, HAS_B, HAS_C, HAS_K)
        d = d * _slope(z, softcap, inverse_temperature, HAS_CAP)
        tl.debug_barrier()
        tl.store(out + columns, d.to(out.dtype.element_ty), mask=inside)
    if TARGETS > 0:
        tl.debug_barrier()
        tl.store(out + local, d_at_target.to(out.dtype.element_ty), mask=found)


@jit
def _softmax_gradient(lp, a, b, c, k, HAS_B: tl.constexpr, HAS_C: tl.constexpr, HAS_K: tl.constexpr):
    p = tl.exp(lp)
    factor = a
    if HAS_B:
        factor = factor + b * lp
    if HAS_C:
        factor = factor + c * p
    d = p * factor
    if HAS_K:
        d += k
    return d


@jit
def divergence_gradient_kernel(
    product, product_stride, bias, softcap, inverse_temperature, coefficients, coefficients_stride,
    teacher, teacher_stride, teacher_bias, teacher_softcap, teacher_inverse_temp, normaliser, normaliser_stride,
    out, out_stride, width, log_beta, log_rest,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, TEACHER_HAS_BIAS: tl.constexpr, TEACHER_HAS_CAP: tl.constexpr,
    KIND: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """d_product of the student's row of a divergence, over its product."""
    row = tl.program_id(0).to(tl.int64)
    product += row * product_stride
    teacher += row * teacher_stride
    out += row * out_stride
    shift_s = tl.load(coefficients + row)
    log_sum_s = tl.load(coefficients + _LOG_SUM * coefficients_stride + row)
    upstream = tl.load(coefficients + _A * coefficients_stride + row)
    value = tl.load(coefficients + _B * coefficients_stride + row)
    shift_t = tl.load(normaliser + row)
    log_sum_t = tl.load(normaliser + _LOG_SUM * normaliser_stride + row)
    for start in range(0, width, TILE):
        columns = start + tl.arange(0, TILE)
        inside = columns < width
        raw_s = tl.load(product + columns, mask=inside, other=0.0)
        raw_t = tl.load(teacher + columns, mask=inside, other=0.0)
        z_s = _logit(raw_s, bias, columns, inside, softcap, inverse_temperature, HAS_BIAS, HAS_CAP)
        z_t = _logit(
            raw_t, teacher_bias, columns, inside, teacher_softcap, teacher_inverse_temp, TEACHER_HAS_BIAS, TEACHER_HAS_CAP
        )
        log_s, log_t = (z_s - shift_s) - log_sum_s, (z_t - shift_t) - log_sum_t
        s = tl.exp(log_s)
        if KIND == _FORWARD_KL:
            d = upstream * (s - tl.exp(log_t))
        elif KIND == _REVERSE_KL:
            d = upstream * s * ((log_s - log_t) - value)
        else:
            log_m = _log_mixture(log_s, log_t, log_beta, log_rest)
            d = upstream * tl.exp(log_rest) * s * ((log_s - log_m) - value)
        d = d * _slope(z_s, softcap, inverse_temperature, HAS_CAP)
        tl.debug_barrier()
        tl.store(out + columns, d.to(out.dtype.element_ty), mask=inside)


# ---- The host's side ----


def statistics(side: Side, target: Targets, statistics: Tensor, picked_RC: Tensor, wanted: Wanted) -> None:
    num_targets = target.id_RC.shape[1]
    _launch(
        statistics_kernel, side,
        side.product, side.product.stride(0), side.bias_W, target.id_RC, target.id_RC.stride(0), statistics,
        statistics.stride(0), picked_RC, picked_RC.stride(0), num_targets, target.first_column, side.product.shape[1],
        *_map(side), **_flags(side), ENTROPY=wanted.entropy, ARGMAX=wanted.argmax, SUM_P2=wanted.sum_p2,
        MEAN_LOGIT=wanted.mean_logit, TARGETS=triton.next_power_of_2(num_targets),
    )  # fmt: skip


def pair_statistics(student: Side, teacher: Side, divergence: Divergence, statistics: Tensor) -> None:
    _launch(
        pair_statistics_kernel, student,
        *_side(student), *_side(teacher), statistics, statistics.stride(0), student.product.shape[1],
        **_flags(student), **_flags(teacher, "TEACHER_"), KIND=_KIND_NUMBER[divergence.kind],
    )  # fmt: skip


def divergence(student: Side, teacher: Side, beta: float, normalisers: tuple[Tensor, Tensor], sums: Tensor) -> None:
    _launch(
        divergence_kernel, student,
        *_side(student), normalisers[0], normalisers[0].stride(0), *_side(teacher), normalisers[1], normalisers[1].stride(0),
        sums, sums.stride(0), student.product.shape[1], math.log(beta), math.log1p(-beta),
        **_flags(student), **_flags(teacher, "TEACHER_"),
    )  # fmt: skip


def gradient(
    side: Side, coefficients: Tensor, target: Targets, d_target_RC: Tensor | None, present: Wanted, out: Tensor
) -> None:
    num_targets = 0 if d_target_RC is None else target.id_RC.shape[1]
    _launch(
        gradient_kernel, side,
        *_side(side), coefficients, coefficients.stride(0), target.id_RC, target.id_RC.stride(0), d_target_RC,
        0 if d_target_RC is None else d_target_RC.stride(0), num_targets, target.first_column, out, out.stride(0),
        out.shape[1], **_flags(side), HAS_B=present.entropy, HAS_C=present.sum_p2, HAS_K=present.mean_logit,
        TARGETS=triton.next_power_of_2(num_targets) if num_targets else 0,
    )  # fmt: skip


def divergence_gradient(
    student: Side, teacher: Side, divergence: Divergence, coefficients: Tensor, normaliser: Tensor, out: Tensor
) -> None:
    _launch(
        divergence_gradient_kernel, student,
        *_side(student), coefficients, coefficients.stride(0), *_side(teacher), normaliser, normaliser.stride(0),
        out, out.stride(0), out.shape[1], math.log(divergence.beta), math.log1p(-divergence.beta),
        **_flags(student), **_flags(teacher, "TEACHER_"), KIND=_KIND_NUMBER[divergence.kind],
    )  # fmt: skip


def _launch(kernel, side: Side, *arguments, **constants) -> None:
    """One program per row of the side's product, on its device."""
    product = side.product
    if product.dtype != torch.float32:
        raise ValueError(f"the Triton kernels received {product.dtype}, expected fp32; for fp64 move the inputs to the CPU")
    num_sides = 2 if "TEACHER_HAS_BIAS" in constants else 1
    tile = min(COLUMNS_PER_TILE // num_sides, triton.next_power_of_2(product.shape[1]))
    with torch.cuda.device(product.device) if product.is_cuda else nullcontext():
        kernel[(product.shape[0],)](*arguments, **constants, TILE=tile, num_warps=NUM_WARPS, enable_fp_fusion=True)


def _side(side: Side) -> tuple:
    return side.product, side.product.stride(0), side.bias_W, *_map(side)


def _map(side: Side) -> tuple[float, float]:
    return side.map.softcap or 0.0, 1.0 / side.map.temperature


def _flags(side: Side, prefix: str = "") -> dict[str, bool]:
    return {f"{prefix}HAS_BIAS": side.bias_W is not None, f"{prefix}HAS_CAP": side.map.softcap is not None}
