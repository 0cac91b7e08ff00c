"""The tables against those of transformers, which computes them in fp32."""

import warnings

import pytest
import torch
from pydantic import ValidationError

from warpline.kernels.rope import rope_tables
from warpline.models.rope_scaling import LinearRopeScaling, RopeScaling, YarnRopeScaling, scaled_rope_tables

with warnings.catch_warnings():
    # transformers' dependencies announce their own deprecations while they are imported.
    warnings.simplefilter("ignore", DeprecationWarning)
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

HEAD_WIDTH, THETA = 64, 150000.0
ORIGINAL = {"original_max_position_embeddings": 4096}
CASES = {
    "llama3": (RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_positions=4096),
               {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}),
    "linear": (LinearRopeScaling(factor=7.3), {"factor": 7.3}),
    "yarn": (YarnRopeScaling(factor=4, original_max_positions=4096), {"factor": 4.0, **ORIGINAL}),
    "yarn of gpt-oss": (YarnRopeScaling(factor=32, original_max_positions=4096, truncate=False),
                        {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, **ORIGINAL}),
    "yarn, all given": (YarnRopeScaling(factor=5, original_max_positions=99, beta_fast=7, beta_slow=2, attention_factor=0.7),
                        {"factor": 5.0, "beta_fast": 7.0, "beta_slow": 2.0, "attention_factor": 0.7,
                         "original_max_position_embeddings": 99}),
    "yarn, below 1": (YarnRopeScaling(factor=0.5, original_max_positions=4096), {"factor": 0.5, **ORIGINAL}),
    "yarn, one channel": (YarnRopeScaling(factor=3, original_max_positions=40, beta_fast=9, beta_slow=8),
                          {"factor": 3.0, "beta_fast": 9.0, "beta_slow": 8.0, "original_max_position_embeddings": 40}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_tables_are_those_of_transformers(case):
    scaling, settings = CASES[case]
    settings = {"rope_type": case.split()[0].strip(","), "rope_theta": THETA, **settings}
    config = LlamaConfig(head_dim=HEAD_WIDTH, max_position_embeddings=131072, rope_parameters=settings)
    position_BS = torch.tensor([[0, 1, 2, 63, 1000]])
    expected = LlamaRotaryEmbedding(config)(torch.ones(1), position_BS)
    plain = rope_tables(position_BS, HEAD_WIDTH, THETA)
    received = scaled_rope_tables(scaling, position_BS, HEAD_WIDTH, THETA, torch.float32)
    for ours, theirs, unscaled in zip(received, expected, plain, strict=True):
        # An angle of 1000 in fp32 is known to 6e-5, and its frequency's last bit moves it by as much.
        torch.testing.assert_close(ours, theirs[..., : HEAD_WIDTH // 2], rtol=0, atol=2e-4)
        assert (ours - unscaled).abs().max() > 0.1


@pytest.mark.parametrize("case", CASES)
def test_fp64_tables_are_fp64_and_those_in_fp32_are_near(case):
    position_S = torch.arange(64)
    wide, narrow = (
        scaled_rope_tables(CASES[case][0], position_S, 8, 1000.0, dtype) for dtype in (torch.float64, torch.float32)
    )
    for x, y in zip(wide, narrow, strict=True):
        assert x.dtype == torch.float64 and y.dtype == torch.float32 and x.shape == (64, 4)
        torch.testing.assert_close(x, y.double(), rtol=0, atol=2e-5)


def test_no_scaling_is_the_plain_table():
    position_S = torch.arange(9)
    received = scaled_rope_tables(None, position_S, 8, 100.0, torch.float64)
    for ours, plain in zip(received, rope_tables(position_S, 8, 100.0, dtype=torch.float64), strict=True):
        assert torch.equal(ours, plain)


def test_settings_of_another_scaling_are_refused():
    with pytest.raises(ValidationError, match="Extra inputs"):
        LinearRopeScaling(factor=2.0, beta_fast=3.0)
    with pytest.raises(ValidationError, match="finite"):
        YarnRopeScaling(factor=float("inf"), original_max_positions=4)
