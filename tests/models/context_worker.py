"""One rank of a context group: a decoder's loss and gradients against the same batch on one process, in fp64.

Run     torchrun --nproc-per-node N tests/models/context_worker.py
Prints  on rank 0, one JSON object: for each kind, the error of the loss and the largest of the parameters' gradients
"""

import json
import sys

import torch
import torch.distributed as dist

from warpline.kernels.linear_logprob import linear_cross_entropy
from warpline.models.decoder import Decoder, DecoderConfig
from warpline.parallel.context import ContextBatch

NUM_TOKENS, BOUNDS = 53, (0, 20, 21, 45, 53)
CONFIG = DecoderConfig(
    vocab_size=37, width=16, num_layers=4, num_heads=4, num_kv_heads=2, head_width=8, mlp_width=24, windows=(7, 0),
    attention_softcap=3.0, attention_sinks=True, query_key_norm=True, tie_embeddings=True,
)  # fmt: skip


def loss_of(decoder, tokens_T, target_T, **where):
    def head(hidden_BSD, weight_VD):
        return linear_cross_entropy(hidden_BSD[0], weight_VD, target_T, reduction="sum")

    return decoder(tokens_T[None], head=head, **where)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    decoder = Decoder(CONFIG).initialise(generator).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    tokens_T, target_T = (torch.randint(0, 37, (NUM_TOKENS,), generator=generator) for _ in range(2))
    target_T[::5] = -100
    parameters = list(decoder.parameters())
    loss = loss_of(decoder, tokens_T, target_T, cu_seqlens=torch.tensor(BOUNDS, dtype=torch.int32))
    expected = torch.autograd.grad(loss, parameters)
    found = {}
    for kind in ("ring", "ulysses"):
        batch = ContextBatch.of(BOUNDS, NUM_TOKENS, dist.group.WORLD, torch.device("cpu"), kind)
        part = loss_of(decoder, batch.local(tokens_T), batch.local(target_T), shared=batch)
        gradients = torch.autograd.grad(part, parameters)
        whole = part.detach().clone()
        for x in (whole, *gradients):
            dist.all_reduce(x)
        norm = torch.stack([d.norm() for d in expected]).norm()
        errors = [((a - b).norm() / b.norm().clamp(min=1e-6 * norm)).item() for a, b in zip(gradients, expected, strict=True)]
        found[kind] = {"loss": ((whole - loss).abs() / loss.abs().clamp(min=1)).item(), "gradients": max(errors)}
    if dist.get_rank() == 0:
        json.dump(found, sys.stdout)
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
