"""Weights to Megatron's names and back: orders worked by hand, and no number lost."""

import pytest
import torch

from warpline.models.decoder import Decoder, DecoderConfig
from warpline.parallel.megatron_weights import parts, shard, unshard

SHAPE = DecoderConfig(vocab_size=5, width=4, num_layers=2, num_heads=4, num_kv_heads=2, head_width=2, mlp_width=6)
EVERYTHING = SHAPE.model_copy(
    update={"attention_bias": True, "mlp_bias": True, "attention_sinks": True, "query_key_norm": True, "post_norms": True,
            "tie_embeddings": False}
)  # fmt: skip


def numbered(num_rows, first):
    """A matrix [num_rows, 4] whose rows are their numbers."""
    return torch.arange(first, first + num_rows)[:, None].expand(num_rows, 4)


def test_query_heads_stand_before_their_key_and_value():
    names = [f"layers.1.self_attn.{name}_proj.weight" for name in "qkv"]
    weights = dict(zip(names, (numbered(8, 0), numbered(4, 100), numbered(4, 200)), strict=True))
    part = parts(SHAPE)["decoder.layers.1.self_attention.linear_qkv.weight"]
    first = shard(part, weights, SHAPE, 0, 2)
    assert first[:, 0].tolist() == [0, 1, 2, 3, 100, 101, 200, 201]
    second = shard(part, weights, SHAPE, 1, 2)
    assert second[:, 0].tolist() == [4, 5, 6, 7, 102, 103, 202, 203]
    # More ranks than key heads: a rank's rows are cut from the whole order.
    assert shard(part, weights, SHAPE, 1, 4)[:, 0].tolist() == [100, 101, 200, 201]


def test_a_ranks_gate_stands_before_its_up():
    weights = {"layers.0.mlp.gate_proj.weight": numbered(6, 0), "layers.0.mlp.up_proj.weight": numbered(6, 100)}
    part = parts(SHAPE)["decoder.layers.0.mlp.linear_fc1.weight"]
    assert shard(part, weights, SHAPE, 1, 2)[:, 0].tolist() == [3, 4, 5, 103, 104, 105]


def test_a_vocabulary_is_padded_with_zeros():
    part = parts(SHAPE)["embedding.word_embeddings.weight"]
    weights = {"embed_tokens.weight": numbered(5, 1)}
    assert shard(part, weights, SHAPE, 1, 2)[:, 0].tolist() == [4, 5, 0]
    assert parts(SHAPE)["output_layer.weight"].names == ("embed_tokens.weight",)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("shape", [SHAPE, EVERYTHING], ids=["tied", "everything"])
def test_every_weight_goes_there_and_back(shape, num_ranks):
    weights = Decoder(shape).initialise(torch.Generator().manual_seed(0)).state_dict()
    back = {}
    for part in parts(shape).values():
        shards = [shard(part, weights, shape, rank, num_ranks) for rank in range(num_ranks)]
        assert len({x.shape for x in shards}) == 1
        back |= unshard(part, shards, shape)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], x) for name, x in weights.items())


def test_missing_weights_are_named():
    with pytest.raises(ValueError, match=r"without 'norm\.weight'; expected a state dict of this config's decoder"):
        shard(parts(SHAPE)["decoder.final_layernorm.weight"], {}, SHAPE, 0, 1)
