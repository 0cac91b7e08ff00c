"""Learning-rate schedules: pure functions of the step."""

import math

from .config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The rate of update `step` (0-based) of `num_steps`. Warm-up is linear and reaches the peak at update `warmup_steps`."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    return config.learning_rate * warmup * SHAPES[config.schedule](config, step, num_steps)


def _constant(config: OptimizerConfig, step: int, num_steps: int) -> float:
    return 1.0


def _warmup_stable_decay(config: OptimizerConfig, step: int, num_steps: int) -> float:
    decay_steps = config.decay_fraction * num_steps
    if step < num_steps - decay_steps:
        return 1.0
    left = (num_steps - step) / decay_steps
    return config.final_fraction + (1.0 - config.final_fraction) * left


def _cosine(config: OptimizerConfig, step: int, num_steps: int) -> float:
    done = max(0, step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.final_fraction + (1.0 - config.final_fraction) * 0.5 * (1.0 + math.cos(math.pi * done))


SHAPES = {"constant": _constant, "wsd": _warmup_stable_decay, "cosine": _cosine}
