"""What the tests of the kernels share. They need nothing but torch, Triton and pytest, so that they run on a bare GPU machine."""

import pytest
import torch

from warpline.kernels.logit_block import _interprets


@pytest.fixture(scope="session")
def interprets() -> bool:
    """Whether this process runs Triton's kernels on the CPU (TRITON_INTERPRET=1): then they are what is tested."""
    return _interprets()


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    return torch.device("cuda")
