"""torchtitan's debug Llama 3 on the CPU, untouched and with docs/examples/torchtitan_loss.py: ten steps, alone or under FSDP2.

Writes one JSON line on rank 0: the largest differences of losses and weights, and the first and last loss.
"""

import json
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3.config_registry import llama3_debugmodel_varlen_attn

from warpline.bench.use_in_your_trainer import example

STEPS, ROWS, TOKENS = 10, 2, 64


def whole(x):
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def train(is_ours, mesh, rank):
    config = llama3_debugmodel_varlen_attn()
    if is_ours:
        config = example("torchtitan_loss").use_warpline(config)
    else:
        for layer in config.model_spec.model.layers:  # its own varlen attention runs on CUDA only
            layer.attention.inner_attention = ScaledDotProductAttention.Config()
    torch.manual_seed(0)
    model, loss_function = config.model_spec.model.build(), config.loss.build()
    model.init_states(buffer_device=torch.device("cpu"))
    if mesh is not None:
        for part in (*model.layers.values(), model.lm_head, model):
            fully_shard(part, mesh=mesh)
    loss_function.set_lm_head(model.lm_head)  # these two as torchtitan's Trainer does
    model._skip_lm_head = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    position_BS = torch.arange(TOKENS).repeat(ROWS, 1)
    losses = []
    for _ in range(STEPS):
        tokens = torch.randint(0, config.model_spec.model.vocab_size, (2, ROWS, TOKENS + 1), generator=generator)[rank]
        masks = model.get_attention_masks(position_BS) if is_ours else None
        hidden = model(tokens[:, :-1], position_BS, masks)
        loss, _ = loss_function(hidden, tokens[:, 1:].contiguous(), torch.tensor(float(ROWS * TOKENS)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: whole(x) for name, x in model.state_dict().items() if x.is_floating_point()}


def main():
    torch.set_num_threads(1)
    mesh, rank = None, 0
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        mesh, rank = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank()
    (plain, plain_weights), (ours, our_weights) = (train(is_ours, mesh, rank) for is_ours in (False, True))
    loss_error = max(abs(a - b) for a, b in zip(plain, ours, strict=True))
    weight_error = max((x - our_weights[name]).abs().max().item() for name, x in plain_weights.items())
    if rank == 0:
        print(json.dumps({"loss": loss_error, "weight": weight_error, "first": plain[0], "last": plain[-1]}))
    if mesh is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
