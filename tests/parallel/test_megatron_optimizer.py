"""What a rank keeps, on stand-ins with the attributes that Megatron's optimiser has; `test_megatron.py` runs the real one."""

from types import SimpleNamespace

import pytest
import torch

from warpline.parallel.megatron_optimizer import count_updates, kept


def optimizer_of(parameter, start, end, inner):
    return SimpleNamespace(
        optimizer=inner,
        model_param_group_index_map={parameter: (0, 0)},
        _get_model_param_range_map=lambda given: {"param": SimpleNamespace(start=start, end=end)},
    )


@pytest.fixture
def parameters():
    return [torch.nn.Parameter(torch.arange(6.0)), torch.nn.Parameter(torch.ones(2))]


@pytest.fixture
def chained(parameters):
    """Two optimisers in a chain, as Megatron makes them: torch's, and one that counts as Transformer Engine's does."""
    first = torch.optim.AdamW([parameters[0].detach()[2:5].clone()])
    weights = parameters[1].detach().clone()
    second = SimpleNamespace(param_groups=[{"params": [weights]}], state={weights: {"exp_avg": 3.0}})
    both = [optimizer_of(parameters[0], 2, 5, first), optimizer_of(parameters[1], 0, 2, second)]
    return SimpleNamespace(chained_optimizers=both)


def test_a_rank_keeps_its_slice_of_a_parameter(chained, parameters):
    weights, place, state = kept(chained, parameters[0])
    assert weights.tolist() == [2, 3, 4] and place == slice(2, 5) and state == {}
    assert kept(chained, parameters[1]).state == {"exp_avg": 3.0}
    assert kept(chained, torch.nn.Parameter(torch.ones(1))) is None
    assert kept(chained.chained_optimizers[0], parameters[0]).place == slice(2, 5)


def test_updates_are_counted_where_each_optimiser_counts_them(chained, parameters):
    count_updates(chained, 7)
    assert kept(chained, parameters[0]).state["step"].item() == 7
    second = chained.chained_optimizers[1].optimizer
    assert second.param_groups[0]["step"] == 7 and "step" not in kept(chained, parameters[1]).state
