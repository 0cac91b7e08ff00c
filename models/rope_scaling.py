"""Rotary tables beyond the trained length: three ways to stretch the frequencies, each with its settings.

Math      plain frequencies f_c = theta^(−2c/H), c < H/2. Linear: f_c / factor. Llama 3: see `kernels/rope.py`. YaRN: channels
          that turn less than `beta_slow` times in the original length get f_c / factor, more than `beta_fast` times f_c, a ramp
          between; cos and sin are multiplied by `attention_factor` (default 0.1·ln(factor) + 1).
Shapes    positions [...] to cos, sin [..., H/2].
Dtypes    angles in fp64 for fp64 tables, else fp32.
Source    YaRN, arXiv:2309.00071; Llama 3.1, arXiv:2407.21783.
"""

import math

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt
from torch import Tensor

from ..kernels.rope import Llama3Scaling, rope_tables

_STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RopeScaling(BaseModel):
    """Llama 3's frequency scaling; lengths in positions."""

    model_config = _STRICT
    factor: PositiveFloat
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_positions: PositiveInt

    def tables(self, positions: Tensor, head_width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        llama3 = Llama3Scaling(self.factor, self.low_freq_factor, self.high_freq_factor, self.original_max_positions)
        return rope_tables(positions, head_width, theta, scaling=llama3, dtype=dtype)


class LinearRopeScaling(BaseModel):
    """Every frequency divided by `factor`."""

    model_config = _STRICT
    factor: PositiveFloat

    def tables(self, positions: Tensor, head_width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frequency = _frequencies(positions, head_width, theta, dtype) / self.factor
        return _tables(positions, frequency, 1.0, dtype)


class YarnRopeScaling(BaseModel):
    """YaRN; `truncate` rounds the ramp's ends outward to whole channels (gpt-oss does not)."""

    model_config = _STRICT
    factor: PositiveFloat
    original_max_positions: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    attention_factor: PositiveFloat | None = None
    truncate: bool = True

    def tables(self, positions: Tensor, head_width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frequency = _frequencies(positions, head_width, theta, dtype)
        first, last = (self._channel(turns, head_width, theta) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_width - 1)
        last = last + 0.001 if first == last else last
        channel = torch.arange(frequency.numel(), device=frequency.device, dtype=frequency.dtype)
        stretched = ((channel - first) / (last - first)).clamp(0.0, 1.0)
        frequency = frequency / self.factor * stretched + frequency * (1 - stretched)
        attention_factor = self.attention_factor or max(1.0, 0.1 * math.log(self.factor) + 1)
        return _tables(positions, frequency, attention_factor, dtype)

    def _channel(self, turns: float, head_width: int, theta: float) -> float:
        """The channel, not whole, that turns so often over the original length."""
        return head_width * math.log(self.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))


AnyRopeScaling = RopeScaling | LinearRopeScaling | YarnRopeScaling


def scaled_rope_tables(
    scaling: AnyRopeScaling | None, positions: Tensor, head_width: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [..., head_width/2] of integer positions [...]; `scaling` None keeps the frequencies."""
    if scaling is None:
        return rope_tables(positions, head_width, theta, dtype=dtype)
    return scaling.tables(positions, head_width, theta, dtype)


def _frequencies(positions: Tensor, head_width: int, theta: float, dtype: torch.dtype) -> Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return 1.0 / theta ** (torch.arange(0, head_width, 2, device=positions.device, dtype=wide) / head_width)


def _tables(positions: Tensor, frequency: Tensor, amplitude: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = positions[..., None].to(frequency.dtype) * frequency
    return (angle.cos() * amplitude).to(dtype), (angle.sin() * amplitude).to(dtype)
