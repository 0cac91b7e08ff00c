"""One rank of a tensor group, alone and with a context group: a decoder's loss and gradients against one process, in fp64.

Run     torchrun --nproc-per-node N tests/parallel/tensor_worker.py
Prints  on rank 0, one JSON object: for each case the error of the loss and of every parameter's gradient, gathered; and the
        collectives of one forward and backward
"""

import json
import sys
from collections import Counter

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from warpline.kernels.linear_logprob import linear_cross_entropy
from warpline.models.decoder import Decoder, DecoderConfig
from warpline.parallel import tensor
from warpline.parallel.context import ContextBatch

NUM_TOKENS, BOUNDS = 53, (0, 20, 21, 45, 53)
LLAMA = DecoderConfig(
    vocab_size=37, width=16, num_layers=4, num_heads=4, num_kv_heads=2, head_width=8, mlp_width=24, tie_embeddings=True
)
CONFIGS = {
    "tied": LLAMA,
    "K=1, biases, untied": LLAMA.model_copy(
        update={"num_kv_heads": 1, "attention_bias": True, "mlp_bias": True, "tie_embeddings": False}
    ),
    "Gemma with sinks": LLAMA.model_copy(
        update={"windows": (7, 0), "attention_softcap": 3.0, "attention_sinks": True, "query_key_norm": True,
                "post_norms": True, "zero_centred_norms": True, "scale_embeddings": True, "activation": "gelu_tanh",
                "logit_softcap": 5.0}
    ),
}  # fmt: skip


def build(config):
    generator = torch.Generator().manual_seed(0)
    decoder = Decoder(config).initialise(generator).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return decoder


def batch():
    generator = torch.Generator().manual_seed(1)
    tokens_T, target_T = (torch.randint(0, 37, (NUM_TOKENS,), generator=generator) for _ in range(2))
    return tokens_T, target_T.index_fill(0, torch.arange(0, NUM_TOKENS, 5), -100)


def loss_of(decoder, tokens_T, target_T, options, **where):
    def head(hidden_BSD, weight_VD):
        softcap = decoder.config.logit_softcap
        return linear_cross_entropy(hidden_BSD[0], weight_VD, target_T, reduction="sum", softcap=softcap, **options)

    return decoder(tokens_T[None], head=head, **where)


def sum_replicated_gradients(decoder, shards):
    """What whoever applies tensor parallelism owes it: each rank's part of them comes from its own tokens and heads. One rank
    alone adds a bias, and has its gradient."""
    for name, parameter in decoder.named_parameters():
        if shards.parts[name] is None:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=shards.group)


def gathered(shards, name, x):
    """A parameter, or its gradient, of all ranks in one piece."""
    if shards.parts[name] is None:
        return x
    dim, bounds = shards.parts[name]
    shape = [list(x.shape) for _ in bounds]
    for size, (start, stop) in zip(shape, bounds, strict=True):
        size[dim] = stop - start
    parts = [x.new_zeros(size) for size in shape]
    parts[shards.group.rank()].copy_(x)
    for part in parts:
        dist.all_reduce(part, group=shards.group)
    return torch.cat(parts, dim)


def compare(config, tensor_group, context_group, kind="ring", sum_replicated=sum_replicated_gradients):
    """(error of the loss, largest error of a parameter's gradient)."""
    whole, (tokens_T, target_T) = build(config), batch()
    expected = loss_of(whole, tokens_T, target_T, {}, cu_seqlens=torch.tensor(BOUNDS, dtype=torch.int32))
    expected.backward()
    decoder = build(config)
    shards = tensor.apply(decoder, tensor_group)
    shared = ContextBatch.of(BOUNDS, NUM_TOKENS, context_group, torch.device("cpu"), kind)
    part = loss_of(decoder, shared.local(tokens_T), shared.local(target_T), shards.head, shared=shared)
    part.backward()
    loss = part.detach().clone()
    sum_replicated(decoder, shards)
    if context_group is not None:
        dist.all_reduce(loss, group=context_group)
        for parameter in decoder.parameters():
            dist.all_reduce(parameter.grad, group=context_group)
    norm = torch.stack([p.grad.norm() for p in whole.parameters()]).norm()
    errors = {}
    for (name, parameter), truth in zip(decoder.named_parameters(), whole.parameters(), strict=True):
        d_truth = truth.grad
        error = gathered(shards, name, parameter.grad) - d_truth
        errors[name] = (error.norm() / d_truth.norm().clamp(min=1e-6 * norm)).item()
        assert torch.equal(gathered(shards, name, parameter.detach()), truth.detach())
    return {"loss": ((loss - expected).abs() / expected.abs()).item(), "gradients": max(errors.values())}


# Each of these takes one collective of `apply` away, and must be noticed.
REMOVALS = {
    "the sum behind a block": ("_reduce_scatter", lambda x, group: _own(x, group)),
    "the gather before a block": ("_all_gather", lambda x, group, n: x.repeat(1, group.size(), *[1] * (x.dim() - 2))[:, :n]),
}


def _own(x, group):
    share = -(-x.shape[1] // group.size())
    padded = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, share * group.size() - x.shape[1]))
    return padded[:, group.rank() * share : (group.rank() + 1) * share].contiguous()


def without(name):
    attribute, replacement = REMOVALS[name]
    plain = getattr(tensor, attribute)
    setattr(tensor, attribute, replacement)
    try:
        return compare(CONFIGS["tied"], dist.group.WORLD, None)
    finally:
        setattr(tensor, attribute, plain)


def collectives():
    decoder = build(CONFIGS["tied"])
    shards, (tokens_T, target_T) = tensor.apply(decoder, dist.group.WORLD), batch()
    with CommDebugMode() as mode:
        loss = loss_of(decoder, tokens_T, target_T, shards.head, cu_seqlens=torch.tensor(BOUNDS, dtype=torch.int32))
        loss.backward()
    return Counter({str(name).partition(".")[2]: count for name, count in mode.get_comm_counts().items()})


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    found = {name: compare(config, dist.group.WORLD, None) for name, config in CONFIGS.items()}
    if size == 4:
        tensor_groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        context_groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        for kind in ("ring", "ulysses"):
            groups = tensor_groups[rank // 2], context_groups[rank % 2]
            found[f"tensor 2 × context 2, {kind}"] = compare(CONFIGS["Gemma with sinks"], *groups, kind)
    removed = {name: without(name) for name in REMOVALS}
    unsummed = compare(CONFIGS["tied"], dist.group.WORLD, None, sum_replicated=lambda decoder, shards: None)
    removed["the sum of replicated gradients"] = unsummed
    results = {"errors": found, "removed": removed, "collectives": collectives()}
    if rank == 0:
        json.dump(results, sys.stdout)
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
