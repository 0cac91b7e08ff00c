"""Attention in torch operations: how much memory it takes. Its values are tested in test_attention.py."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from warpline.kernels import attention_torch as module
from warpline.kernels.attention import attention, attention_reference


def boundaries(*lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def random_inputs(shape_q, shape_k):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in (shape_q, shape_k, shape_k)]


def run(tensors, **keywords):
    """Forward and backward; the output."""
    leaves = [x.requires_grad_() for x in tensors]
    outputs = attention(*leaves, **keywords)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(sum(x.sum() for x in outputs), leaves)
    return outputs[0].detach()


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            size = x.untyped_storage().nbytes() // x.element_size() if isinstance(x, torch.Tensor) else 0
            self.num_elements = max(self.num_elements, size)
        return result


@pytest.mark.parametrize("keywords", [{}, {"softcap": 5.0}, {"return_lse": True}], ids=str)
def test_memory_of_many_documents_is_linear_in_them(keywords):
    length = 64
    q, k, v = random_inputs((64 * length, 4, 8), (64 * length, 2, 8))
    with LargestTensor() as largest:
        run((q, k, v), cu_seqlens=boundaries(*[length] * 64), **keywords)
    assert largest.num_elements <= module.MAX_BLOCK_ELEMENTS
    assert (64 * length) ** 2 > 30 * module.MAX_BLOCK_ELEMENTS


def test_one_document_of_8192_tokens_stays_under_the_stated_block():
    q, k, v = random_inputs((8192, 1, 2), (8192, 1, 2))
    with LargestTensor() as largest:
        mine = run((q, k, v), cu_seqlens=boundaries(8192), window=100)
        run((q, k, v), cu_seqlens=boundaries(8192))
        attention(q, k, v, cu_seqlens=boundaries(8192), softcap=9.0)
    assert largest.num_elements <= module.MAX_BLOCK_ELEMENTS
    tail = slice(8192 - 150, 8192)
    expected = attention_reference(q[None, tail], k[None, tail], v[None, tail], window=100)[0]
    torch.testing.assert_close(mine[8192 - 50 :], expected[-50:], rtol=0, atol=1e-5)
