"""Every call by which ranks speak to each other, and which line of which header's table promises it.

A call is known by words of its chain (see wire.py). REMOVALS are taken away one by one, and a comparison with one process must
notice. NOT_REMOVED would not give other numbers, but leave ranks waiting for each other.
"""

from typing import NamedTuple


class Removal(NamedTuple):
    """`row`: file: the beginning of a line of the table in its header; `kind` and all words of one of `calls` tell the call."""

    row: str
    kind: str
    calls: tuple[tuple[str, ...], ...]

    def is_of(self, kind: str, chain: str) -> bool:
        return kind in self.kind.split() and any(all(word in chain for word in words) for words in self.calls)


def _one(row: str, kind: str, *words: str) -> Removal:
    return Removal(row, kind, (words,))


LOSSES = "tensor: the losses' own"
REMOVALS = {
    # Tensor and sequence parallelism.
    "tokens are not gathered before a block": _one(
        "tensor: forward: 2 all-gathers", "all_gather", "tensor._Gather.forward", "_hook.<locals>.gather:"
    ),
    "a block's parts are not summed": _one(
        "tensor: forward: 2 reduce-scatters", "reduce_scatter", "tensor._SumAndScatter.forward", "_hook.<locals>.scatter:"
    ),
    "gradients are not gathered behind a block": _one(
        "tensor: backward: their conjugates", "all_gather", "tensor._SumAndScatter.backward"
    ),
    "gradients are not summed before a block": _one("tensor: backward: their", "reduce_scatter", "tensor._Gather.backward"),
    "embeddings are not summed": _one("tensor: once a row", "reduce_scatter", "_VocabularyEmbedding.forward"),
    "tokens are not gathered before the output matrix": _one(
        "tensor: once a row", "all_gather", "_hook.<locals>.gather_normed:"
    ),
    "replicated gradients are not summed": _one(
        "tensor: once an update", "all_reduce", "_sum_flat(same, self.tensor_shards.group)"
    ),
    # Losses over a vocabulary that is cut.
    "statistics are not gathered": _one(LOSSES, "all_gather", "token_statistics.forward: parts = gather("),
    "hidden gradients are not summed": _one(LOSSES, "all_reduce", "reduce_d_hidden", "token_statistics."),
    "a divergence's statistics are not gathered": _one(LOSSES, "all_gather", "gather(statistics, call.shard), kind)"),
    "a JSD's sums are not gathered": _one(LOSSES, "all_gather", "gather(sums, pair.call.shard)"),
    "a divergence's hidden gradients are not summed": _one(LOSSES, "all_reduce", "reduce_d_hidden", "linear_divergence."),
    "normalisers of the best are not gathered": _one(
        LOSSES, "all_gather", "combine_statistics(gather(statistics, shard), Wanted())"
    ),
    "the best are not gathered": _one(LOSSES, "all_gather", "torch.float", "gather(best_TC, shard), gather(ids_TC, shard)"),
    "the ids of the best are not gathered": _one(
        LOSSES, "all_gather", "torch.int", "gather(best_TC, shard), gather(ids_TC, shard)"
    ),
    # Context parallelism.
    "keys do not travel": _one("context: forward", "send", "context._RingAttention.forward"),
    "keys do not travel backwards": _one("context: backward", "send", "_RingAttention.backward: coming = _Exchange(flat"),
    "gradients of keys do not travel": _one(
        "context: backward", "send", "_RingAttention.backward: d_coming = _Exchange(d_flat"
    ),
    "tokens are not exchanged for heads": _one("context: forward", "all_to_all", "context._heads_of:", "_AllToAll.forward"),
    "heads are not exchanged for tokens": _one("context: forward", "all_to_all", "context._tokens_of:", "_AllToAll.forward"),
    "gradients of tokens are not exchanged": _one(
        "context: backward", "all_to_all", "context._heads_of:", "_AllToAll.backward"
    ),
    "gradients of heads are not exchanged": _one(
        "context: backward", "all_to_all", "context._tokens_of:", "_AllToAll.backward"
    ),
    "a sequence's tokens are not summed": _one("context: sums over sequences", "all_reduce", "_SumOverRanks.forward"),
    # Data, sharded and not.
    "parameters are not gathered": _one("shard: forward: all-gather", "all_gather", "FSDPParamGroup.pre_forward"),
    "parameters are not gathered again": _one("shard: backward: all-gather", "all_gather", "FSDPParamGroup.pre_backward"),
    "gradients are not scattered": _one(
        "shard: backward: reduce-scatter", "reduce_scatter", "_fsdp_collectives.foreach_reduce"
    ),
    "replicas' gradients are not summed": _one("shard: HSDP", "all_reduce", "_fsdp_collectives.foreach_reduce"),
    "data ranks' gradients are not summed": _one(
        "model: shard = 1", "all_reduce", "_sum_flat(self.parameters(), self.data_group)"
    ),
    # Pipelines.
    "hidden states do not travel": Removal(
        "pipeline: forward", "receive send", (("_retrieve_recv_activations",), ("get_fwd_send_ops",))
    ),
    "hidden gradients do not travel": Removal(
        "pipeline: backward", "receive send", (("_retrieve_recv_grads",), ("get_bwd_send_ops",))
    ),
    "hidden states do not travel without gradients": _one("pipeline: forward", "receive send", "pipeline.forward: "),
    "a tied embedding's gradients are not summed": _one(
        "model: pipeline, tied", "all_reduce", "_sum_flat([self.decoder.embed_tokens.weight], self.tied_group)"
    ),
    # Whole layers, for generation.
    "a layer's parts are not gathered": _one("gather: a layer", "all_gather", "gather.WholeDecoder._parts"),
    "a layer is not sent to the other stages": _one(
        "gather: the same, to the other", "broadcast", "gather.WholeDecoder._gathered"
    ),
    # Numbers.
    "a step's numbers are not summed": _one("mesh: `sum`", "all_reduce", "model.ParallelModel._summed"),
    "global counts are not summed": _one("mesh: `sum`", "all_reduce", "mesh.Mesh.sum_data"),
    "the gradient's norm is not summed": _one("mesh: `sum`", "all_reduce", "model.ParallelModel.grad_norm"),
    "weights that are not finite elsewhere are not seen": _one("mesh: `sum`", "all_reduce", "ParallelModel.has_finite_weights"),
    "ranks' items are not gathered": _one("mesh: `gather`", "all_gather", "mesh.Mesh.gather: rows ="),
}
NOT_REMOVED = {
    "the most rows of a rank": _one("mesh: `sum`", "all_reduce", "mesh.Mesh.max"),  # each would make its own number of passes
    "who is still generating": _one("gather: who is still", "all_reduce", "WholeDecoder._someone_goes_on"),  # one leaves early
    "who has a layer": _one("gather: once: who has", "all_gather", "WholeDecoder._owners"),  # broadcasts of different roots
    "how long ranks' items are": _one("mesh: `gather`", "all_gather", "mesh.Mesh.gather: lengths ="),  # of different sizes
}
