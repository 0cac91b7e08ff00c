"""Top-k caches and the divergences from them, against full logits."""

import math

import pytest
import torch

from warpline.kernels.linear_divergence import linear_divergence, linear_topk, linear_topk_divergence
from warpline.kernels.linear_topk import linear_topk_divergence_reference, linear_topk_reference
from warpline.kernels.vocabulary_sweep import BLOCKING, Blocking

SMALL = Blocking(rows=8, columns=4, elements=32, backward_columns=5, backward_elements=80, kept_elements=176)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Products of 8 rows; three blocks of columns or more in each direction, the last ragged; chunks of 16 tokens."""
    monkeypatch.setitem(BLOCKING, "cpu", SMALL)


def make(num_tokens=27, width=5, teacher_width=7, num_entries=11):
    """Student (hidden, weight, bias), which need gradients, and the teacher's (hidden, weight)."""
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (num_tokens, width),
        (num_entries, width),
        (num_entries,),
        (num_tokens, teacher_width),
        (num_entries, teacher_width),
    ]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.requires_grad_() for x in tensors[:3]], tensors[3:]


def same(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_topk_finds_the_most_probable_ids():
    (hidden, weight, bias), _ = make()
    ids_TC, logprobs_TC = linear_topk(hidden, weight, 4, bias_V=bias, temperature=0.6, softcap=2.0)
    expected_ids, expected = linear_topk_reference(hidden, weight, 4, bias_V=bias, temperature=0.6, softcap=2.0)
    assert (ids_TC == expected_ids).all()
    same(logprobs_TC, expected.detach())
    assert not logprobs_TC.requires_grad
    with pytest.raises(ValueError, match="k is 12; expected an int from 1 to the vocabulary's 11"):
        linear_topk(hidden, weight, 12)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("tail", ["bucket", "renormalise", "ignore"])
def test_topk_divergence_and_its_gradients_are_those_of_full_logits(kind, tail):
    student, teacher = make()
    ids_TC, logprobs_TC = linear_topk(*teacher[:2], 4)
    ids_TC[3, 2:], ids_TC[5] = -100, -100
    logprobs_TC[3, 2:] = torch.nan
    counted_T = torch.arange(27) % 5 != 2
    counted_T[5] = True
    options = {"kind": kind, "tail": tail, "temperature": 0.8, "mask_T": counted_T}
    value_T = linear_topk_divergence(*student[:2], ids_TC, logprobs_TC, bias_V=student[2], **options)
    options["mask_T"] = counted_T & (torch.arange(27) != 5)
    clean_TC = logprobs_TC.nan_to_num()
    truth_T = linear_topk_divergence_reference(*student[:2], ids_TC, clean_TC, bias_V=student[2], **options)
    same(value_T, torch.where(options["mask_T"], truth_T, 0.0))
    upstream_T = torch.randn(27, dtype=torch.float64) * options["mask_T"]
    keep = options["mask_T"].nonzero()[:, 0]
    truth = torch.autograd.grad(truth_T[keep], student, upstream_T[keep], allow_unused=True)
    for value, expected in zip(torch.autograd.grad(value_T, student, upstream_T), truth, strict=True):
        same(value, expected, 1e-11)


def test_topk_gradients_follow_the_closed_forms():
    """In the student's logits z: forward with a bucket is s − t~, renormalised s − t', ignored T_K s − t."""
    z = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    teacher = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    eye = torch.eye(9, dtype=torch.float64)
    ids_TC, logprobs_TC = linear_topk(teacher, eye, 3)
    s, t_K = z.detach().softmax(1), torch.zeros(6, 9, dtype=torch.float64).scatter(1, ids_TC, logprobs_TC.exp())
    mass, off = t_K.sum(1, keepdim=True), t_K == 0
    bucket = t_K + off * (1 - mass) * s / (s * off).sum(1, keepdim=True)
    expected = {"bucket": s - bucket, "renormalise": s - t_K / mass, "ignore": mass * s - t_K}
    for tail, d_z in expected.items():
        value_T = linear_topk_divergence(z, eye, ids_TC, logprobs_TC, tail=tail)
        same(torch.autograd.grad(value_T.sum(), z)[0], d_z)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_a_cache_of_the_whole_vocabulary_is_the_full_divergence(kind):
    student, teacher = make()
    cache = linear_topk(*teacher[:2], 11)
    full_T = linear_divergence(*student[:2], *teacher[:2], kind=kind)
    for tail in ("renormalise", "ignore"):
        same(linear_topk_divergence(*student[:2], *cache, kind=kind, tail=tail), full_T)
    same(linear_topk_divergence(*student[:2], *cache, kind=kind), full_T, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bucket_of_a_peaked_teacher_is_as_exact_as_its_cache(dtype):
    """All but 1e-10 of the teacher's mass on its first token: 1 − t rounds to 0 in fp32."""
    outside = 1e-10
    ids_TC, logprobs_TC = torch.tensor([[2, 4]]), torch.tensor([[0.0, -30.0]], dtype=torch.float64)
    logprobs_TC[0, 0] = math.log1p(-outside - math.exp(-30.0))
    hidden, weight = torch.zeros(1, 3, dtype=dtype), torch.zeros(5, 3, dtype=dtype)  # the student is uniform
    t_o, s_o = outside, 3 / 5
    rest = sum(0.2 * (math.log(0.2) - float(x)) for x in logprobs_TC[0])
    expected = rest + s_o * math.log(s_o / t_o)
    value_T = linear_topk_divergence(hidden, weight, ids_TC, logprobs_TC.to(dtype), kind="reverse_kl")
    assert abs(float(value_T) - expected) <= 10 * torch.finfo(dtype).eps * expected


def test_products_in_another_dtype_are_those_of_rounded_operands():
    hidden, weight = (x.detach().float() for x in make()[0][:2])
    rounded = (x.bfloat16().float() for x in (hidden, weight))
    mine, expected = linear_topk(hidden, weight, 3, product_dtype=torch.bfloat16), linear_topk(*rounded, 3)
    assert torch.equal(mine[0], expected[0]) and torch.equal(mine[1], expected[1])


def test_a_cache_in_fp64_makes_the_divergence_fp64():
    ids_TC, logprobs_TC = torch.tensor([[2, 4]]), torch.tensor([[-0.5, -1.5]], dtype=torch.float64)
    assert linear_topk_divergence(torch.zeros(1, 3), torch.zeros(5, 3), ids_TC, logprobs_TC).dtype == torch.float64


def test_bad_input_is_named_with_its_remedy():
    (hidden, weight, _), (teacher_hidden, teacher_weight) = make()
    with pytest.raises(ValueError, match="tail is 'drop'"):
        linear_topk_divergence(hidden, weight, *linear_topk(teacher_hidden, teacher_weight, 2), tail="drop")
    with pytest.raises(ValueError, match=r"expected \[T, C\] twice"):
        linear_topk_divergence(hidden, weight, torch.zeros(27, 2).long(), torch.zeros(27, 3))
    for logprobs in (torch.zeros(27, 2).long(), torch.zeros(27, 2, device="meta")):
        with pytest.raises(ValueError, match=r"the cache's log-probabilities are .*; expected floats on cpu"):
            linear_topk_divergence(hidden, weight, torch.zeros(27, 2).long(), logprobs)
    with pytest.raises(ValueError, match=r"mask is torch\.bool of shape \(27,\) on meta"):
        cache = torch.zeros(27, 2).long(), torch.zeros(27, 2)
        linear_topk_divergence(hidden, weight, *cache, mask_T=torch.ones(27, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match=r"k is 2\.0; expected an int"):
        linear_topk(hidden, weight, 2.0)
