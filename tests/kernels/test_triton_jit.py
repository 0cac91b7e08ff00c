"""With Triton the names are Triton's; that every module imports without it is tested on the built wheel."""

import pytest

from warpline.kernels.triton_jit import constant, jit, tl, triton


def test_the_names_are_tritons():
    pytest.importorskip("triton")

    def kernel(x):
        pass

    assert tl is triton.language and constant(3) == tl.constexpr(3)
    assert hasattr(jit(kernel), "run")
