"""sequence_sum against its reference and hand-worked numbers."""

import pytest
import torch

from warpline.kernels.sequence_sum import (
    check_cu_seqlens,
    check_vectors,
    counted_length,
    counted_tokens,
    sequence_sum,
    sequence_sum_reference,
    spread,
)

CU = torch.tensor([0, 3, 3, 7], dtype=torch.int32)


@pytest.mark.parametrize("has_weight", [False, True])
def test_values_and_gradients_equal_the_fp64_reference(has_weight):
    results = []
    for function in (sequence_sum, sequence_sum_reference):
        generator = torch.Generator().manual_seed(0)
        leaves = [torch.randn(9, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
        leaves = leaves[: 1 + has_weight]
        sum_B = function(leaves[0], CU, weight_T=leaves[1] if has_weight else None)
        results.append([sum_B.detach(), *torch.autograd.grad((sum_B * torch.tensor([1.0, 5.0, -2.0])).sum(), leaves)])
    for mine, truth in zip(*results, strict=True):
        torch.testing.assert_close(mine, truth, rtol=0, atol=1e-14)


def test_gradients_pass_gradcheck():
    values_T, weight_T = (torch.randn(9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for function in (sequence_sum, sequence_sum_reference):
        assert torch.autograd.gradcheck(lambda v, w, f=function: f(v, CU, weight_T=w), (values_T, weight_T))


def test_tokens_past_the_last_boundary_count_for_nothing_even_as_nan():
    values_T = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, torch.nan, torch.inf], requires_grad=True)
    sum_B = sequence_sum(values_T, CU)
    assert sum_B.tolist() == [6, 0, 22]
    sum_B.backward(torch.tensor([1.0, torch.nan, 3.0]))
    assert values_T.grad.tolist() == [1, 1, 1, 3, 3, 3, 3, 0, 0]


def test_bf16_values_are_summed_in_fp32():
    values_T = torch.ones(4097, dtype=torch.bfloat16, requires_grad=True)
    sum_B = sequence_sum(values_T, torch.tensor([0, 4097]))
    assert sum_B.dtype == torch.float32 and sum_B.tolist() == [4097]
    sum_B.sum().backward()
    assert values_T.grad.dtype == torch.bfloat16 and (values_T.grad == 1).all()


def test_no_sequences_give_an_empty_sum_with_zero_gradient():
    values_T = torch.ones(3, requires_grad=True)
    sum_B = sequence_sum(values_T, torch.tensor([0], dtype=torch.int32))
    sum_B.sum().backward()
    assert sum_B.tolist() == [] and values_T.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("cu", [[0, 5], [1, 3], [0, 3, 2], [], [[0, 4]], [0.0, 4.0]], ids=str)
def test_bad_boundaries_are_refused(cu):
    with pytest.raises(ValueError, match=r"cu_seqlens is .*; expected .*: cumulate the lengths"):
        sequence_sum(torch.zeros(4), torch.tensor(cu, dtype=None if cu == [0.0, 4.0] else torch.int32))


def test_boundaries_end_at_what_is_checked():
    assert [check_cu_seqlens(torch.tensor(cu), 4) for cu in ([0], [0, 0, 3, 3], [0, 4])] == [0, 3, 4]


def test_what_counts_is_in_the_mask_of_a_weight_and_before_the_last_boundary():
    values_T, mask_T, weight_T = torch.zeros(5), torch.tensor([0, 1, 1, 1, 1]).bool(), torch.tensor([1.0, 1, 0, -2, 1])
    assert counted_tokens(values_T).tolist() == [True] * 5
    is_counted_T = counted_tokens(values_T, mask_T=mask_T, weight_T=weight_T, cu_seqlens=torch.tensor([0, 2, 4]))
    assert is_counted_T.tolist() == [False, True, False, True, False]


def test_lengths_are_counted_exactly_and_spread_back_over_their_tokens():
    cu, is_counted_T = torch.tensor([0, 300, 300, 304]), torch.arange(306) != 1
    length_B = counted_length(is_counted_T, cu)
    assert length_B.dtype == torch.int64 and length_B.tolist() == [299, 0, 4]
    assert spread(length_B, cu, 306).tolist() == [299] * 300 + [4] * 4 + [0] * 2


def test_strided_boundaries_are_read_without_a_warning():
    cu = torch.tensor([0, 9, 2, 9, 4, 9])[::2]
    assert sequence_sum(torch.ones(4), cu).tolist() == [2, 2] and spread(torch.tensor([5, 7]), cu, 4).tolist() == [5, 5, 7, 7]


def test_vectors_of_different_shapes_or_of_integers_are_refused():
    check_vectors(one=torch.zeros(3), other=torch.zeros(3, dtype=torch.bfloat16))
    for other in (torch.zeros(3, 1), torch.zeros(1), torch.zeros(())):
        with pytest.raises(ValueError, match=r"received \{'one': \[3\], 'other': .*\}; expected one shape"):
            check_vectors(one=torch.zeros(3), other=other)
    with pytest.raises(ValueError, match=r"expected one shape of one dimension"):
        check_vectors(one=torch.zeros(3, 1), other=torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"received \{'other': 'torch.int64'\}; expected floating-point"):
        check_vectors(one=torch.zeros(3), other=torch.zeros(3, dtype=torch.int64))


def test_bad_shapes_and_devices_are_refused():
    cu = torch.tensor([0, 4])
    with pytest.raises(ValueError, match=r"weights \[3\]"):
        sequence_sum(torch.zeros(4), cu, weight_T=torch.zeros(3))
    with pytest.raises(ValueError, match="meta"):
        sequence_sum(torch.zeros(4, device="meta"), cu)
