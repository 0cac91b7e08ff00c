import pytest

from warpline.stages.parts.config import OptimizerConfig
from warpline.stages.parts.schedule import learning_rate


def rates(num_steps: int, **changes) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, **changes)
    return [learning_rate(config, step, num_steps) for step in range(num_steps)]


def test_warmup_stable_decay_by_hand():
    got = rates(10, schedule="wsd", warmup_steps=3, decay_fraction=0.4, final_fraction=0.2)
    assert got == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.8, 0.6, 0.4])


def test_cosine_by_hand():
    got = rates(6, schedule="cosine", warmup_steps=2, final_fraction=0.0)
    assert got == pytest.approx([1 / 3, 2 / 3, 1.0, 0.8535533906, 0.5, 0.1464466094])


def test_constant_after_warmup():
    assert rates(4, warmup_steps=1) == pytest.approx([0.5, 1, 1, 1])


def test_a_decay_of_no_steps_never_divides_by_zero():
    assert rates(3, schedule="wsd", decay_fraction=0.0) == pytest.approx([1, 1, 1])
    assert rates(1, schedule="cosine", warmup_steps=1) == pytest.approx([0.5])
