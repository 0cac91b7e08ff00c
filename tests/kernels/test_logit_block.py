"""The steps on blocks of logits against the reference on the whole vocabulary: torch's, and where Triton interprets, Triton's.

Every looped dimension has three tiles or more, the last ragged: blocks of 7 columns of a vocabulary of 17, and in Triton tiles
of 4 columns. What a step must not touch is NaN.
"""

import pytest
import torch

from warpline.kernels.logit_block import (
    Coefficient,
    Divergence,
    LogitBlock,
    LogitMap,
    PairStatistic,
    Side,
    Statistic,
    Targets,
    Wanted,
    divergence_reference,
    logit_block,
    logit_block_reference,
    new_pair_statistics,
    new_statistics,
)

pytestmark = pytest.mark.interpreter
ROWS, ENTRIES, WIDTH = 5, 17, 7
FORMS = [(False, LogitMap()), (True, LogitMap(0.7)), (False, LogitMap(1.0, 3.0)), (True, LogitMap(1.3, 2.0))]
KINDS = [Divergence("forward_kl"), Divergence("reverse_kl"), Divergence("jsd", 0.3)]


@pytest.fixture
def steps(interprets, monkeypatch):
    if interprets:
        from warpline.kernels import logit_block_triton

        monkeypatch.setattr(logit_block_triton, "COLUMNS_PER_TILE", 4)
    return logit_block(torch.device("cpu"))


@pytest.fixture
def dtype(interprets):
    return torch.float32 if interprets else torch.float64


def random(*shape, seed, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product_of(dtype, seed, scale=2.0):
    return random(ROWS, ENTRIES, seed=seed, scale=scale).to(dtype)


def bias_of(has_bias, dtype, seed=9):
    return random(ENTRIES, seed=seed).to(dtype) if has_bias else None


def blocks(side):
    """Blocks of the vocabulary, each a strided view whose surroundings are NaN."""
    for start in range(0, ENTRIES, WIDTH):
        stop = min(start + WIDTH, ENTRIES)
        memory = side.product.new_full((ROWS, 2 * WIDTH), torch.nan)
        memory[:, : stop - start] = side.product[:, start:stop]
        bias = None if side.bias_W is None else side.bias_W[start:stop]
        yield start, stop, Side(memory[:, : stop - start], bias, side.map)


def close(actual, expected, factor=1.0):
    """Within a few roundings of the reference's largest number."""
    limit = factor * 50 * torch.finfo(actual.dtype).eps * max(1.0, expected.abs().max().item())
    assert (actual.double() - expected.double()).abs().max() <= limit


def targets(num_targets):
    ids = torch.randint(0, ENTRIES, (ROWS, num_targets), generator=torch.Generator().manual_seed(3))
    ids[1, 0] = -1  # ignored
    if num_targets > 2:
        ids[2] = 4  # all the same
    return ids


def statistics_of(steps, side, ids, wanted):
    statistics, picked = new_statistics(ROWS, ids.shape[1], side.product)
    for start, _, block in blocks(side):
        before = block.product.clone()
        steps.statistics(block, Targets(ids, start), statistics, picked, wanted)
        assert block.product.equal(before) or before.isnan().any(), "statistics only read the product"
    return statistics, picked


@pytest.mark.parametrize(("has_bias", "form"), FORMS)
@pytest.mark.parametrize("num_targets", [1, 3])
def test_statistics_folded_over_blocks_are_those_of_the_whole(steps, dtype, has_bias, form, num_targets):
    side, ids = Side(product_of(dtype, 1), bias_of(has_bias, dtype), form), targets(num_targets)
    statistics, picked = statistics_of(steps, side, ids, Wanted(True, True, True, True))
    truth, _ = logit_block_reference(Side(side.product.double(), side.bias_W, form), Targets(ids, 0))
    log_sum = statistics[Statistic.SUM].log()
    close(statistics[Statistic.MAX] + log_sum, truth["lse"])
    close(log_sum - statistics[Statistic.SUM_Z] / statistics[Statistic.SUM], truth["entropy"])
    close(statistics[Statistic.SUM_SQUARES] / statistics[Statistic.SUM].square(), truth["sum_p2"])
    close(statistics[Statistic.SUM_LOGITS] / ENTRIES, truth["mean_logit"])
    assert torch.equal(statistics[Statistic.ARGMAX].long(), truth["argmax"])
    found = ids >= 0
    close((picked - statistics[Statistic.MAX][:, None] - log_sum[:, None])[found], truth["logprob"][found])
    assert (picked[~found] == -torch.inf).all()


def test_statistics_that_are_not_wanted_are_left_alone(steps, dtype):
    side, ids = Side(product_of(dtype, 1), None, LogitMap()), targets(1)
    statistics, _ = statistics_of(steps, side, ids, Wanted())
    assert (statistics[Statistic.SUM_Z :] == 0).all()


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_statistics_do_not_suffer_from_a_shift_of_all_logits(steps, dtype, shift):
    product = (product_of(dtype, 1, 4.0) + shift).to(dtype)
    statistics, _ = statistics_of(steps, Side(product, None, LogitMap()), targets(1), Wanted(entropy=True))
    truth, _ = logit_block_reference(Side(product.double(), None, LogitMap()), Targets(targets(1), 0))
    entropy = statistics[Statistic.SUM].log() - statistics[Statistic.SUM_Z] / statistics[Statistic.SUM]
    close(entropy, truth["entropy"])


def test_a_growing_maximum_rescales_what_came_before(steps, dtype):
    """Each block's logits are 40 above the last one's: sums that are not rescaled are off by exp(40)."""
    product = product_of(dtype, 1) + 40 * (torch.arange(ENTRIES) // WIDTH).to(dtype)
    statistics, _ = statistics_of(steps, Side(product, None, LogitMap()), targets(1), Wanted(True, False, True, True))
    truth, _ = logit_block_reference(Side(product.double(), None, LogitMap()), Targets(targets(1), 0))
    close(statistics[Statistic.MAX] + statistics[Statistic.SUM].log(), truth["lse"])
    close(statistics[Statistic.SUM_SQUARES] / statistics[Statistic.SUM].square(), truth["sum_p2"])


def test_an_entry_turned_off_by_its_bias_has_no_probability(steps, dtype):
    bias = torch.zeros(ENTRIES, dtype=dtype)
    bias[:WIDTH], bias[-1] = -torch.inf, -torch.inf  # a whole block, and a single entry
    side, keep = Side(product_of(dtype, 1), bias, LogitMap()), slice(WIDTH, ENTRIES - 1)
    statistics, _ = statistics_of(steps, side, targets(1), Wanted(entropy=True))
    truth, _ = logit_block_reference(Side(side.product[:, keep].double(), None, LogitMap()), Targets(targets(1), 0))
    close(statistics[Statistic.MAX] + statistics[Statistic.SUM].log(), truth["lse"])
    close(statistics[Statistic.SUM].log() - statistics[Statistic.SUM_Z] / statistics[Statistic.SUM], truth["entropy"])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter: inf − inf
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_logit_that_is_not_finite_is_not_hidden(steps, dtype, value):
    product = product_of(dtype, 1)
    product[2, 9] = value
    statistics, _ = statistics_of(steps, Side(product, torch.zeros(ENTRIES, dtype=dtype), LogitMap()), targets(1), Wanted())
    assert statistics[Statistic.SUM].isnan().tolist() == [False, False, True, False, False]


def coefficients_of(values, upstream, ids, dtype):
    """As `token_statistics` folds them: from the reference's values and upstream gradients by name."""
    row, table = Coefficient, torch.zeros(len(Coefficient), ROWS, dtype=torch.float64)
    table[row.MAX] = values["lse"].mean()  # any shift that is taken back by LOG_SUM
    table[row.LOG_SUM] = values["lse"] - table[row.MAX]
    zero = torch.zeros(ROWS, dtype=torch.float64)
    d_target = upstream["logprob"].masked_fill(ids < 0, 0.0) if "logprob" in upstream else None
    table[row.A] = upstream.get("lse", zero) - (0 if d_target is None else d_target.sum(1))
    table[row.A] -= upstream.get("entropy", zero) * values["entropy"] + 2 * upstream.get("sum_p2", zero) * values["sum_p2"]
    table[row.B], table[row.C] = -upstream.get("entropy", zero), 2 * upstream.get("sum_p2", zero)
    table[row.K] = upstream.get("mean_logit", zero) / ENTRIES
    return table.to(dtype), None if d_target is None else d_target.to(dtype)


ASKED = [
    ("logprob",),
    ("lse",),
    ("entropy",),
    ("sum_p2",),
    ("mean_logit",),
    ("logprob", "lse", "entropy", "sum_p2", "mean_logit"),
]


@pytest.mark.parametrize(("has_bias", "form"), FORMS)
@pytest.mark.parametrize("names", ASKED, ids="+".join)
@pytest.mark.parametrize("num_targets", [1, 3])
def test_gradient_of_every_block_is_autograds_of_the_whole(steps, dtype, has_bias, form, names, num_targets):
    side, ids = Side(product_of(dtype, 1), bias_of(has_bias, dtype), form), targets(num_targets)
    shapes = {"logprob": (ROWS, num_targets)}
    upstream = {name: random(*shapes.get(name, (ROWS,)), seed=20 + i) for i, name in enumerate(names)}
    wide = Side(side.product.double(), None if side.bias_W is None else side.bias_W.double(), form)
    values, expected = logit_block_reference(wide, Targets(ids, 0), upstream)
    table, d_target = coefficients_of(values, upstream, ids, dtype)
    present = Wanted("entropy" in names, False, "sum_p2" in names, "mean_logit" in names)
    for start, stop, block in blocks(side):
        steps.gradient(block, table, Targets(ids, start), d_target, present, block.product)
        close(block.product, expected[:, start:stop])


def pair_of(dtype, has_bias, form, teacher_form, scale=2.0):
    student = Side(product_of(dtype, 1, scale), bias_of(has_bias, dtype), form)
    return student, Side(product_of(dtype, 2, scale), bias_of(not has_bias, dtype, 8), teacher_form)


def whole_divergence(student, teacher, divergence):
    """(value, gradient of Σ g·value in the student's product, g), in fp64."""
    wide = [Side(s.product.double(), None if s.bias_W is None else s.bias_W.double(), s.map) for s in (student, teacher)]
    product = wide[0].product.clone().requires_grad_()
    value = divergence_reference(wide[0]._replace(product=product), wide[1], divergence)
    upstream = random(ROWS, seed=30)
    return value.detach(), torch.autograd.grad(value, product, upstream)[0], upstream


def pair_statistics_of(steps, student, teacher, divergence):
    statistics = new_pair_statistics(ROWS, student.product)
    for (_, _, one), (_, _, other) in zip(blocks(student), blocks(teacher), strict=True):
        steps.pair_statistics(one, other, divergence, statistics)
    return statistics


def normalisers_of(statistics, dtype):
    row, tables = PairStatistic, []
    for maximum, total in ((row.MAX, row.SUM), (row.TEACHER_MAX, row.TEACHER_SUM)):
        table = torch.zeros(len(Coefficient), ROWS, dtype=dtype)
        table[Coefficient.MAX], table[Coefficient.LOG_SUM] = statistics[maximum], statistics[total].log()
        tables.append(table)
    return tables


@pytest.mark.parametrize("divergence", KINDS, ids=lambda d: d.kind)
@pytest.mark.parametrize(("has_bias", "form"), FORMS)
def test_divergence_and_its_gradient_over_blocks_are_those_of_the_whole(steps, dtype, divergence, has_bias, form):
    student, teacher = pair_of(dtype, has_bias, form, LogitMap(form.temperature, 1.5))
    value, expected, upstream = whole_divergence(student, teacher, divergence)
    statistics, row = pair_statistics_of(steps, student, teacher, divergence), PairStatistic
    table, teacher_table = normalisers_of(statistics, dtype)
    if divergence.kind == "jsd":
        sums = torch.zeros(2, ROWS, dtype=dtype)
        for (_, _, one), (_, _, other) in zip(blocks(student), blocks(teacher), strict=True):
            steps.divergence(one, other, divergence.beta, (table, teacher_table), sums)
        close(divergence.beta * sums[0] + (1 - divergence.beta) * sums[1], value)
        table[Coefficient.B] = sums[1]
    else:
        pair = (row.TEACHER_SUM, row.SUM) if divergence.kind == "forward_kl" else (row.SUM, row.TEACHER_SUM)
        actual = statistics[row.CROSS] / statistics[pair[0]] + (statistics[pair[1]] / statistics[pair[0]]).log()
        close(actual, value)
        table[Coefficient.B] = actual
    table[Coefficient.A] = upstream.to(dtype)
    for (start, stop, one), (_, _, other) in zip(blocks(student), blocks(teacher), strict=True):
        before = other.product.clone()
        steps.divergence_gradient(one, other, divergence, table, teacher_table, one.product)
        close(one.product, expected[:, start:stop])
        assert torch.equal(other.product, before), "the teacher's product is only read"


@pytest.mark.parametrize("divergence", KINDS[:2], ids=lambda d: d.kind)
def test_pair_statistics_survive_maxima_that_grow_block_by_block(steps, dtype, divergence):
    student, teacher = pair_of(dtype, False, LogitMap(), LogitMap())
    steep = 40 * (torch.arange(ENTRIES) // WIDTH).to(dtype)
    student, teacher = student._replace(product=student.product + steep), teacher._replace(product=teacher.product + steep)
    value, _, _ = whole_divergence(student, teacher, divergence)
    statistics, row = pair_statistics_of(steps, student, teacher, divergence), PairStatistic
    pair = (row.TEACHER_SUM, row.SUM) if divergence.kind == "forward_kl" else (row.SUM, row.TEACHER_SUM)
    close(statistics[row.CROSS] / statistics[pair[0]] + (statistics[pair[1]] / statistics[pair[0]]).log(), value, 20)


def test_equal_distributions_have_no_divergence_to_the_last_bit(steps, dtype):
    student, _ = pair_of(dtype, False, LogitMap(), LogitMap())
    for divergence in KINDS[:2]:
        statistics = pair_statistics_of(steps, student, student._replace(product=student.product.clone()), divergence)
        assert (statistics[PairStatistic.CROSS] == 0).all()
        assert torch.equal(statistics[PairStatistic.SUM], statistics[PairStatistic.TEACHER_SUM])


def test_a_device_without_kernels_is_refused():
    with pytest.raises(ValueError, match="no implementation for device 'meta'; expected cpu or cuda"):
        logit_block(torch.device("meta"))


INSIDE = "inside = columns < width"
FOUND = "found = (local >= 0) & (local < width) & (entry < num_targets)\n"
PICK = "tl.load(target + row * target_stride + entry, mask=entry < num_targets, other=-1) - first_column\n    "
STORE = "tl.store(out + columns, d.to(out.dtype.element_ty), mask="
STORE_TARGET = "tl.store(out + local, d_at_target.to(out.dtype.element_ty), mask=found"
EACH_TARGET = "tl.where(is_same, tl.load(d_target"
JSD_TERM = "tl.exp(log_t) * (log_t - log_m)"
# Each, made in the Triton source, must turn the checks above red: what was there, and what stands there instead.
MUTATIONS = {
    "the block is read past its end": (INSIDE, f"{INSIDE} + 1"),
    "the last column is dropped": (INSIDE, f"{INSIDE} - 1"),
    "columns past the width count as logits": (
        'shown = tl.where(inside, z, -float("inf"))',
        "shown = tl.where(inside, z, 1e3)",
    ),
    "exp of columns past the width is summed": ("e = tl.where(inside, tl.exp(centred), 0.0)", "e = tl.exp(centred)"),
    "logits past the width are summed": (
        "total_logits += tl.sum(tl.where(inside, z, 0.0), 0)",
        "total_logits += tl.sum(z + 1, 0)",
    ),
    "no temperature": ("z = z * inverse_temperature", "z = z * 1.0"),
    "no bias": ("z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)", "z += 0.0"),
    "no softcap": ("z = softcap * tanh(z / softcap)", "z = z * 1.0"),
    "the softcap does not divide": ("z = softcap * tanh(z / softcap)", "z = softcap * tanh(z)"),
    "no slope of the softcap": ("slope = inverse_temperature * (1.0 - capped * capped)", "slope = inverse_temperature"),
    "a slope without temperature": ("slope = inverse_temperature\n", "slope = 1.0\n"),
    "old sums are not rescaled": ("total = factor * total + tl.sum(e, 0)", "total = total + tl.sum(e, 0)"),
    "the entropy's sum is not moved": ("factor * (total_z + moved * total)", "factor * total_z"),
    "squares are rescaled once": ("factor * factor * total_squares", "factor * total_squares"),
    "the argmax ignores the tile": ("tile_place = first_column + start + tl.argmax", "tile_place = first_column + tl.argmax"),
    "the argmax ignores the block": ("tile_place = first_column + start", "tile_place = start"),
    "the argmax is the last tile's": (
        "tl.where(tile_maximum > maximum, tile_place",
        "tl.where(tile_maximum > -1e9, tile_place",
    ),
    "targets ignore the block": (f"{PICK}{FOUND}    raw", f"{PICK.replace(' - first_column', '')}{FOUND}    raw"),
    "targets of another row": ("tl.load(target + row * target_stride + entry", "tl.load(target + entry"),
    "a forward KL's sum is not moved": ("factor_t * (cross + (moved_t - moved_s) * total_t)", "factor_t * cross"),
    "a reverse KL's sum is not moved": ("factor_s * (cross + (moved_s - moved_t) * total_s)", "factor_s * cross"),
    "a KL weighs by the other side": ("tl.sum(e_t * (centred_t - centred_s), 0)", "tl.sum(e_s * (centred_t - centred_s), 0)"),
    "the teacher is read without its stride": ("teacher += row * teacher_stride", "teacher += row"),
    "the mixture has equal weights": ("x, y = log_t + log_beta, log_s + log_rest", "x, y = log_t + log_beta, log_s + log_beta"),
    "the jsd counts columns past the width": (f"tl.sum(tl.where(inside, {JSD_TERM}, 0.0), 0)", f"tl.sum({JSD_TERM}, 0)"),
    "the gradient has no a": ("    factor = a\n", "    factor = 0.0 * a\n"),
    "the gradient has no b": ("factor = factor + b * lp", "factor = factor + 0.0"),
    "the gradient has no c": ("factor = factor + c * p", "factor = factor + 0.0"),
    "the gradient has no k": ("        d += k", "        d += 0.0"),
    "a target's gradient counts once": (f"d_at_target += {EACH_TARGET}", f"d_at_target = {EACH_TARGET}"),
    "a target's gradient is not written": (STORE_TARGET, f"{STORE_TARGET} & (local < 0)"),
    "the gradient does not normalise": ("d = _softmax_gradient((z - shift) - log_sum", "d = _softmax_gradient((z - shift)"),
    "the reverse KL's gradient lacks its value": ("s * ((log_s - log_t) - value)", "s * (log_s - log_t)"),
    "the jsd's gradient lacks its weight": ("upstream * tl.exp(log_rest) * s", "upstream * s"),
    "only one tile of the gradient is written": (f"{STORE}inside)", f"{STORE}columns < TILE)"),
}


def check_everything(steps, dtype) -> None:
    """Every option once, in the steps given."""
    for has_bias, form in FORMS[1:]:
        test_statistics_folded_over_blocks_are_those_of_the_whole(steps, dtype, has_bias, form, 3)
        test_gradient_of_every_block_is_autograds_of_the_whole(steps, dtype, has_bias, form, ASKED[-1], 3)
    for divergence in KINDS:
        test_divergence_and_its_gradient_over_blocks_are_those_of_the_whole(steps, dtype, divergence, *FORMS[3])
    test_a_growing_maximum_rescales_what_came_before(steps, dtype)


@pytest.mark.slow
@pytest.mark.interpreter_only
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", [None, *MUTATIONS])
def test_every_mutation_of_the_kernels_is_noticed(name, mutated):
    old, new = MUTATIONS[name] if name else ("", "")
    module = mutated("logit_block_triton", old, new)
    module.COLUMNS_PER_TILE = 4
    names = ("statistics", "pair_statistics", "divergence", "gradient", "divergence_gradient")
    steps = LogitBlock(*(getattr(module, name) for name in names))
    if name is None:
        check_everything(steps, torch.float32)
    else:
        with pytest.raises(AssertionError):
            check_everything(steps, torch.float32)
