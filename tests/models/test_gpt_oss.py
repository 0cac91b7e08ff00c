"""gpt-oss's attention against transformers' eager one: sinks, alternating windows, biases and YaRN.

Its mixture of experts is not built: in the whole model a dense MLP stands in for it, on both sides.
"""

import warnings

import pytest
import torch
from torch import nn

from warpline.kernels.attention import attention
from warpline.models.decoder import Decoder, DecoderConfig
from warpline.models.rope_scaling import YarnRopeScaling

with warnings.catch_warnings():
    # transformers' dependencies announce their own deprecations while they are imported.
    warnings.simplefilter("ignore", DeprecationWarning)
    from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward
    from transformers.models.llama.modeling_llama import LlamaMLP

SIZES = {
    "vocab_size": 53, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 96, "initializer_range": 0.15,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "beta_fast": 8.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 24,
}  # fmt: skip
SHAPE = DecoderConfig(
    vocab_size=53, width=32, mlp_width=40, num_layers=4, num_heads=6, num_kv_heads=2, head_width=10, max_positions=96,
    windows=(7, 0), attention_sinks=True, attention_bias=True, tie_embeddings=False, norm_eps=1e-5, rope_theta=1000.0,
    rope_scaling=YarnRopeScaling(factor=4.0, beta_fast=8.0, original_max_positions=24, truncate=False),
)  # fmt: skip


@pytest.mark.parametrize("window", [None, 1, 4, 50])
def test_attention_with_sinks_is_the_eager_attention_of_transformers(window):
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, 13, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2))
    sinks_N = torch.randn(6, dtype=torch.float64, requires_grad=True)
    owner = nn.Module()
    owner.sinks, owner.num_key_value_groups, owner.training = sinks_N, 3, False
    distance = torch.arange(13)[:, None] - torch.arange(13)
    hidden = (distance < 0) | (distance >= (window or 13))
    mask = torch.zeros(13, 13, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    expected, _ = eager_attention_forward(owner, *(x.transpose(1, 2) for x in (q, k, v)), mask, scaling=0.3)
    received = attention(q, k, v, window=window, sinks_N=sinks_N, scale=0.3)
    torch.testing.assert_close(received, expected, rtol=1e-12, atol=1e-12)
    inputs, direction = (q, k, v, sinks_N), torch.randn_like(received)
    for ours, theirs in zip(
        torch.autograd.grad(received, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


class _Dense(nn.Module):
    """A Llama's MLP in the place of gpt-oss's experts, which also return their router's scores."""

    def __init__(self):
        super().__init__()
        self.dense = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=40))

    def forward(self, hidden):
        return self.dense(hidden), None


@torch.no_grad()
def test_a_decoder_with_sinks_gives_the_logits_of_gpt_oss_with_a_dense_mlp():
    torch.manual_seed(5)
    config = GptOssConfig(**SIZES, sliding_window=7, num_local_experts=2, num_experts_per_tok=1, rope_parameters=YARN)
    theirs = GptOssForCausalLM._from_config(config, attn_implementation="eager").eval()
    for layer in theirs.model.layers:
        layer.mlp = _Dense()
    for parameter in theirs.parameters():
        parameter.normal_(0.0, 0.2 if parameter.ndim > 1 else 1.0)
    decoder = Decoder(SHAPE)
    decoder.load_state_dict({
        name.removeprefix("model.").replace("mlp.dense.", "mlp."): tensor for name, tensor in theirs.state_dict().items()
    })  # fmt: skip
    tokens_BS = torch.randint(0, 53, (2, 48))
    expected = theirs(tokens_BS).logits
    received = decoder(tokens_BS) @ decoder.output_weight.T
    assert expected.std() > 0.3
    # fp32 on both sides, 2.1e-6 seen; transformers computes the rotary tables in fp32 whatever the model's dtype.
    assert (received - expected).abs().max() <= 1e-5
    for layer in decoder.layers:
        layer.self_attn.sinks.zero_()
    assert (decoder(tokens_BS) @ decoder.output_weight.T - expected).abs().max() > 0.1
