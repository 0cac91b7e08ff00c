"""What a rank keeps of Megatron's distributed optimiser: a slice of every parameter, flattened, and its moments.

Nothing here imports Megatron.

**Source** megatron-core 0.16.1: `optimizer/distrib_optimizer.py`.
**Limits** fp32 weights and moments: not its precision-aware or offloaded optimisers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Kept(NamedTuple):
    """A rank's slice of a flattened parameter: its weights, where it lies, and the inner optimiser's state of it."""

    weights: Tensor
    place: slice
    state: dict[str, Any]


def kept(optimizer: Any, parameter: nn.Parameter) -> Kept | None:
    """What lies here of a parameter; None where other ranks have all of it."""
    for one in _each(optimizer):
        if parameter in one.model_param_group_index_map:
            group, index = one.model_param_group_index_map[parameter]
            place = one._get_model_param_range_map(parameter)["param"]
            weights = one.optimizer.param_groups[group]["params"][index]
            return Kept(weights, slice(place.start, place.end), one.optimizer.state[weights])
    return None


def count_updates(optimizer: Any, number: int) -> None:
    """Go on after that many updates: torch's AdamW counts them by parameter, Transformer Engine's and apex's by group."""
    for one in _each(optimizer):
        for group in one.optimizer.param_groups:
            if isinstance(one.optimizer, torch.optim.Adam | torch.optim.AdamW):
                for weights in group["params"]:
                    one.optimizer.state[weights]["step"] = torch.tensor(float(number))
            else:
                group["step"] = number


def _each(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])
