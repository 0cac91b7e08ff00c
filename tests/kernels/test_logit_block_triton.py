"""What only the Triton steps have: gradients in half the product's memory, launches, and the machine code they become."""

import pytest
import torch
from error_rule import far_apart, random
from machine_code import check_row, for_every_row

from warpline.kernels.logit_block import (
    Coefficient,
    Divergence,
    LogitMap,
    Side,
    Targets,
    Wanted,
    logit_block,
    new_statistics,
)

pytest.importorskip("triton")
from warpline.kernels import logit_block_triton as module


def table_of(product):
    """Coefficients of a loss −logprob + 0.1 entropy, about."""
    table = random(len(Coefficient), len(product), seed=5)
    table[Coefficient.MAX], table[Coefficient.LOG_SUM] = (
        product.amax(1),
        (product - product.amax(1)[:, None]).exp().sum(1).log(),
    )
    return table


@pytest.mark.interpreter
@pytest.mark.interpreter_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [4, 11])
def test_a_gradient_of_half_the_width_is_the_wide_one_rounded_and_stays_in_its_row(dtype, width, monkeypatch):
    """Three tiles of 4 columns and a ragged one; rows further apart than they are wide, with NaN between."""
    monkeypatch.setattr(module, "COLUMNS_PER_TILE", 4)
    steps, rows = logit_block(torch.device("cpu")), 3
    product = random(rows, width, seed=1)
    ids = torch.tensor([[2, 2, 9], [0, -1, 3], [width - 1, 1, 0]])
    d_target, table = random(rows, 3, seed=2), table_of(product)
    wide = product.clone()
    steps.gradient(Side(wide, None, LogitMap()), table, Targets(ids, 0), d_target, Wanted(True), wide)
    memory = torch.full((rows, 16), torch.nan)
    memory[:, :width] = product
    narrow = memory[:, :width].view(dtype)[:, :width]
    steps.gradient(Side(memory[:, :width], None, LogitMap()), table, Targets(ids, 0), d_target, Wanted(True), narrow)
    # Triton's interpreter cuts fp32 to bf16 instead of rounding it.
    expected = (wide.view(torch.int32) & -(2**16)).view(torch.float32) if dtype == torch.bfloat16 else wide
    assert torch.equal(narrow, expected.to(dtype))
    assert memory[:, width:].isnan().all()


@pytest.mark.interpreter
@pytest.mark.interpreter_only
def test_a_divergence_gradient_of_half_the_width_is_the_wide_one_rounded(monkeypatch):
    monkeypatch.setattr(module, "COLUMNS_PER_TILE", 8)
    steps, product, teacher = logit_block(torch.device("cpu")), random(3, 11, seed=1), random(3, 11, seed=2)
    tables, wide, kl = (table_of(product), table_of(teacher)), product.clone(), Divergence("reverse_kl")
    steps.divergence_gradient(Side(wide, None, LogitMap()), Side(teacher, None, LogitMap()), kl, *tables, wide)
    memory = product.clone()
    narrow = memory.view(torch.float16)[:, :11]
    steps.divergence_gradient(Side(memory, None, LogitMap()), Side(teacher, None, LogitMap()), kl, *tables, narrow)
    assert torch.equal(narrow, wide.to(torch.float16))


@pytest.mark.interpreter
@pytest.mark.interpreter_only
def test_double_precision_is_refused_with_the_remedy():
    product = torch.zeros(2, 3, dtype=torch.float64)
    steps, side = logit_block(torch.device("cpu")), Side(product, None, LogitMap())
    with pytest.raises(ValueError, match=r"received torch\.float64, expected fp32; for fp64 move the inputs to the CPU"):
        steps.statistics(side, Targets(torch.zeros(2, 1).long(), 0), product, product, Wanted())


@pytest.mark.interpreter
@pytest.mark.interpreter_only
def test_rows_further_apart_than_32_bits_can_count_are_reached(tmp_path):
    """Three rows 2^31 numbers apart, in a sparse file of 16 GiB of which only the rows exist."""
    near = random(3, 5, seed=1)
    product = far_apart(near, (2**31, 1), tmp_path)
    steps, target = logit_block(torch.device("cpu")), Targets(torch.tensor([[1], [4], [2]]), 0)
    found = []
    for values in (product, near):
        statistics, picked = new_statistics(3, 1, near)
        steps.statistics(Side(values, None, LogitMap()), target, statistics, picked, Wanted(True, True, True, True))
        steps.gradient(Side(values, None, LogitMap()), table_of(values.clone()), target, random(3, 1, seed=2), Wanted(), values)
        found.append((statistics, picked, values.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _constants(name: str) -> tuple[object, dict]:
    """(kernel, compile-time constants) of a shipped configuration."""
    tile, half = module.COLUMNS_PER_TILE, module.COLUMNS_PER_TILE // 2
    plain = {"HAS_BIAS": False, "HAS_CAP": False}
    full = {"HAS_BIAS": True, "HAS_CAP": True}
    teacher = {"TEACHER_HAS_BIAS": True, "TEACHER_HAS_CAP": True}
    nothing = {"ENTROPY": False, "ARGMAX": False, "SUM_P2": False, "MEAN_LOGIT": False}
    everything = dict.fromkeys(nothing, True)
    none, all_terms = {"HAS_B": False, "HAS_C": False, "HAS_K": False}, {"HAS_B": True, "HAS_C": True, "HAS_K": True}
    return {
        "statistics, logprob": (module.statistics_kernel, {**plain, **nothing, "TARGETS": 1, "TILE": tile}),
        "statistics, entropy": (module.statistics_kernel, {**plain, **nothing, "ENTROPY": True, "TARGETS": 1, "TILE": tile}),
        "statistics, all, 64 targets": (module.statistics_kernel, {**full, **everything, "TARGETS": 64, "TILE": tile}),
        "pair statistics, forward KL": (module.pair_statistics_kernel, {**full, **teacher, "KIND": 0, "TILE": half}),
        "pair statistics, reverse KL": (module.pair_statistics_kernel, {**full, **teacher, "KIND": 1, "TILE": half}),
        "divergence, jsd": (module.divergence_kernel, {**full, **teacher, "TILE": half}),
        "gradient, logprob": (module.gradient_kernel, {**plain, **none, "TARGETS": 1, "TILE": tile}),
        "gradient, all, 64 targets": (module.gradient_kernel, {**full, **all_terms, "TARGETS": 64, "TILE": tile}),
        "divergence gradient, forward KL": (module.divergence_gradient_kernel, {**full, **teacher, "KIND": 0, "TILE": half}),
        "divergence gradient, jsd": (module.divergence_gradient_kernel, {**full, **teacher, "KIND": 2, "TILE": half}),
    }[name]


def _type(argument: str) -> str:
    if argument in ("out", "target"):
        return {"out": "*bf16", "target": "*i64"}[argument]
    pointers = (
        "product",
        "teacher",
        "bias",
        "teacher_bias",
        "statistics",
        "picked",
        "coefficients",
        "normaliser",
        "d_target",
        "sums",
    )
    if argument in pointers:
        return "*fp32"
    return "fp32" if argument.endswith(("softcap", "temperature", "temp")) or argument.startswith("log_") else "i32"


@for_every_row("logit_block")
def test_machine_code_uses_no_more_than_the_table_says(row, architecture, compiled):
    kernel, constants = _constants(row)
    divisible = tuple(argument for argument in kernel.arg_names if argument.endswith("stride") or argument == "width")
    types = {argument: _type(argument) for argument in kernel.arg_names}
    used = compiled(kernel, types, constants, architecture, divisible, num_warps=module.NUM_WARPS)
    assert "LDG.E.128" in check_row(used, "logit_block", row, architecture), "loads of 16 bytes"
    assert used["stack"] == 0, "a spill"
