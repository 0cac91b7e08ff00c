"""transformers' models with our attention against the same models with transformers' eager one."""

import warnings

import pytest
import torch

from warpline.models.transformers_attention import register

with warnings.catch_warnings():
    # transformers' dependencies announce their own deprecations while they are imported.
    warnings.simplefilter("ignore", DeprecationWarning)
    from transformers import AutoModelForCausalLM as Auto
    from transformers import (
        Gemma2Config,
        Gemma3TextConfig,
        GptOssConfig,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        Qwen3Config,
    )
    from transformers.masking_utils import create_causal_mask

SIZES = {
    "vocab_size": 53, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 96, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 2.0, "original_max_position_embeddings": 48, "truncate": False}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "gemma2": Gemma2Config(**SIZES, sliding_window=5, attn_logit_softcapping=2.0, query_pre_attn_scalar=6),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
    "qwen3": Qwen3Config(**SIZES),
    "gpt_oss": GptOssConfig(**SIZES, sliding_window=5, num_local_experts=2, num_experts_per_tok=1, rope_parameters=YARN),
}
TOLERANCE = {"rtol": 1e-4, "atol": 3e-5}  # two correct fp32 models of these sizes differ by up to 6e-6
IDS_BS = torch.randint(3, 53, (3, 12), generator=torch.Generator().manual_seed(1))
PADDED_BS = torch.ones(3, 12, dtype=torch.long)
PADDED_BS[0, :4] = PADDED_BS[1, 9:] = PADDED_BS[2, :2] = PADDED_BS[2, 10:] = 0
PACKED_BS = torch.stack([torch.cat([torch.arange(n), torch.arange(12 - n)]) for n in (5, 1, 11)])


@pytest.fixture(params=CONFIGS)
def model(request):
    register()
    torch.manual_seed(0)
    return Auto.from_config(CONFIGS[request.param], attn_implementation="eager").eval()


@pytest.fixture
def llama():
    register()
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(CONFIGS["llama"], attn_implementation="warpline")


def both(model, function):
    """(ours, eager) of a function of the model."""
    results = []
    for name in ("warpline", "eager"):
        model.set_attn_implementation(name)
        results.append(function())
    return results


@pytest.mark.parametrize(
    "inputs", [{}, {"attention_mask": PADDED_BS}, {"position_ids": PACKED_BS}], ids=["plain", "pad", "pack"]
)
def test_logits_and_every_gradient_are_those_of_eager_attention(model, inputs):
    counts = (inputs.get("attention_mask", torch.ones_like(IDS_BS)) == 1)[..., None]

    def run():
        model.zero_grad()
        logits = model(IDS_BS, use_cache=False, **inputs).logits.where(counts, 0.0)
        logits.square().mean().backward()
        return logits, {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}

    (ours, our_grads), (eager, eager_grads) = both(model, run)
    torch.testing.assert_close(ours, eager, **TOLERANCE)
    assert our_grads.keys() == eager_grads.keys()
    for name, expected in eager_grads.items():
        error = (our_grads[name] - expected).abs().max()
        assert error <= 1e-4 * expected.abs().max() + 1e-7, name


STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.mark.parametrize("cache", [{}, pytest.param(STATIC, marks=pytest.mark.slow)], ids=["dynamic", "static"])
def test_generation_with_left_padding_past_the_window_is_that_of_eager_attention(model, cache):
    left_BS = torch.ones(3, 12, dtype=torch.long)
    left_BS[0, :4] = left_BS[2, :2] = 0
    options = {"max_new_tokens": 7, "do_sample": False, "return_dict_in_generate": True, "output_logits": True, **cache}

    def run():
        return torch.stack(model.generate(IDS_BS, attention_mask=left_BS, eos_token_id=None, **options).logits)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about eos_token_id None
        ours, eager = both(model, run)
    torch.testing.assert_close(ours, eager, **TOLERANCE)


def test_documents_given_by_cu_seq_lens_do_not_see_each_other(llama):
    bounds = torch.tensor([0, 5, 12], dtype=torch.int64)
    packed = llama(IDS_BS[:1], position_ids=PACKED_BS[:1], cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, use_cache=False).logits
    alone = torch.cat([llama(IDS_BS[:1, :5], use_cache=False).logits, llama(IDS_BS[:1, 5:], use_cache=False).logits], 1)
    torch.testing.assert_close(packed, alone, **TOLERANCE)
    # By the boundaries alone: position_ids that say nothing of documents, moved by rope's invariance.
    shifted = llama(IDS_BS[:1], cu_seq_lens_q=bounds, cu_seq_lens_k=bounds.clone(), use_cache=False).logits
    torch.testing.assert_close(shifted, alone, **TOLERANCE)


def test_a_model_that_is_not_causal_sees_both_ways_and_no_padding(llama):
    llama.config.is_causal = False
    for layer in llama.model.layers:
        layer.self_attn.is_causal = False

    def run():
        return torch.stack([llama(IDS_BS, attention_mask=mask, use_cache=False).logits for mask in (None, PADDED_BS)])

    with torch.no_grad():
        ours, eager = both(llama, run)
        llama.config.is_causal = True
        assert (llama(IDS_BS, use_cache=False).logits - eager[0]).abs().max() > 0.1
    torch.testing.assert_close(ours[0], eager[0], **TOLERANCE)
    torch.testing.assert_close(ours[1][PADDED_BS == 1], eager[1][PADDED_BS == 1], **TOLERANCE)


def test_autocast_casts_queries_and_keys_that_rope_left_in_fp32(llama):
    def run():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return llama(IDS_BS, use_cache=False).logits.float()

    ours, eager = both(llama, run)
    with torch.no_grad():
        exact = llama(IDS_BS, use_cache=False).logits
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max()


def test_what_it_cannot_do_is_refused_in_one_line(llama):
    holes = torch.ones_like(IDS_BS)
    holes[1, 4] = 0
    additive = torch.zeros(3, 1, 12, 12)

    def odd_pairs(batch, head, query, key):
        return (query + key) % 2 == 1

    cases = [
        ("zeros between ones", lambda: llama(IDS_BS, attention_mask=holes)),
        (r"mask of torch.float32 \[3, 1, 12, 12\]", lambda: llama(IDS_BS, attention_mask=additive)),
        ("received output_attentions", lambda: llama(IDS_BS, output_attentions=True)),
        ("or_mask", lambda: create_causal_mask(llama.config, additive[:, 0], None, None, or_mask_function=odd_pairs)),
        ("odd_pairs", lambda: create_causal_mask(llama.config, additive[:, 0], None, None, and_mask_function=odd_pairs)),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=words) as refusal:
            call()
        assert "expected" in str(refusal.value) and "\n" not in str(refusal.value)
    for layer in llama.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attention dropout of 0\.1"):
        llama.train()(IDS_BS)
    llama.eval()(IDS_BS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's, where it goes on behind a break
def test_a_padded_batch_compiles_whole_and_any_other_with_a_break(llama):
    for inputs, is_whole in (({"attention_mask": PADDED_BS}, True), ({}, False), ({"position_ids": PACKED_BS}, False)):
        torch.compiler.reset()
        compiled = torch.compile(llama, backend="aot_eager", fullgraph=is_whole)
        logits = compiled(IDS_BS, use_cache=False, **inputs).logits
        torch.testing.assert_close(logits, llama(IDS_BS, use_cache=False, **inputs).logits, **TOLERANCE)
        logits.sum().backward()
