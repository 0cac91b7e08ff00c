"""config.json both ways; the weights' side and the comparison with transformers are in `test_huggingface.py`."""

import json
import warnings
from pathlib import Path

import pytest

from warpline.models.decoder import DecoderConfig
from warpline.models.huggingface_config import FAMILIES, BadCheckpoint, read_settings, write_settings
from warpline.models.rope_scaling import LinearRopeScaling, RopeScaling, YarnRopeScaling

with warnings.catch_warnings():
    # transformers' dependencies announce their own deprecations while they are imported.
    warnings.simplefilter("ignore", DeprecationWarning)
    from transformers import AutoConfig, LlamaConfig

PATH = Path("model/config.json")
SIZES = {"vocab_size": 11, "width": 16, "num_layers": 5, "num_heads": 4, "num_kv_heads": 2, "head_width": 4, "mlp_width": 24}
GEMMA = {"zero_centred_norms": True, "post_norms": True, "scale_embeddings": True, "activation": "gelu_tanh"}
# As published, without what only tokenizers and caches read.
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
}  # fmt: skip
GEMMA2_27B = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attention_bias": False, "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 128, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608, "initializer_range": 0.02, "intermediate_size": 36864,
    "max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 46, "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
}  # fmt: skip
GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attention_bias": False,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152, "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
    "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
    "sliding_window_pattern": 6, "vocab_size": 262144,
}  # fmt: skip
LLAMA = LlamaConfig(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4).to_dict()
LLAMA["architectures"] = ["LlamaForCausalLM"]


def read(settings: dict) -> DecoderConfig:
    return read_settings(settings, PATH)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_embeddings": False, "attention_bias": True, "mlp_bias": True, "norm_eps": 3e-5}),
        ("llama", {"rope_scaling": RopeScaling(
            factor=2.5, low_freq_factor=1.5, high_freq_factor=3.5, original_max_positions=64)}),
        ("llama", {"rope_scaling": YarnRopeScaling(factor=3, original_max_positions=9, attention_factor=2, truncate=False)}),
        ("qwen3", {"query_key_norm": True, "head_width": 10, "rope_theta": 123456.5, "init_std": 0.0123}),
        ("mistral", {"windows": (3,), "rope_scaling": LinearRopeScaling(factor=1.7)}),
        ("mistral", {"width": 18}),
        ("gemma2", {**GEMMA, "windows": (3, 0), "attention_softcap": 5.5, "logit_softcap": 7.5, "query_scalar": 3}),
        ("gemma2", {**GEMMA, "tie_embeddings": False, "attention_bias": True}),
        ("gemma3_text", {**GEMMA, "windows": (3, 3, 0), "query_key_norm": True, "local_rope_theta": 77.0, "rope_theta": 1e6,
                         "rope_scaling": LinearRopeScaling(factor=8)}),
        ("gemma3_text", {**GEMMA, "windows": (0, 3), "query_key_norm": True, "logit_softcap": 4.0}),
        ("warpline", {"windows": (3, 0), "attention_sinks": True, "attention_bias": True,
                      "rope_scaling": YarnRopeScaling(factor=32, original_max_positions=16)}),
        ("warpline", {"windows": (3, 2), "query_key_norm": True, "mlp_bias": True}),
    ],
)  # fmt: skip
def test_a_shape_is_of_its_family_and_round_trips_exactly(kind, changes):
    config = DecoderConfig(**(SIZES | {"max_positions": 77} | changes))
    settings = json.loads(json.dumps(write_settings(config, own_form=True)))
    assert settings["model_type"] == kind
    assert read(settings) == config
    if kind == "warpline":
        with pytest.raises(BadCheckpoint, match="no architecture of transformers computes this decoder; the nearest, "):
            write_settings(config)
    else:
        assert settings == json.loads(json.dumps(write_settings(config)))


def test_gemmas_beside_what_transformers_computes_are_refused_or_written_so_that_it_loads_them():
    gemma3 = DecoderConfig(**SIZES, **GEMMA, query_key_norm=True, windows=(3, 0), local_rope_theta=50.0)
    yarn = {"rope_scaling": YarnRopeScaling(factor=2, original_max_positions=9)}
    with pytest.raises(BadCheckpoint, match="nearest, gemma3_text, asks for linear rope_scaling or none"):
        write_settings(gemma3.model_copy(update=yarn))
    full = write_settings(gemma3.model_copy(update={"windows": (0,)}))
    assert full["sliding_window"] == 4096, "transformers makes the mask of a window even where no layer has one"


@pytest.mark.parametrize("settings", [MISTRAL_7B, GEMMA2_27B, GEMMA3_1B], ids=["mistral", "gemma2", "gemma3"])
def test_published_configurations_mean_what_transformers_reads(settings, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    theirs = AutoConfig.from_pretrained(tmp_path).to_dict()
    config = read(settings)
    assert read(theirs | {"architectures": settings["architectures"]}) == config
    written = write_settings(config)
    (tmp_path / "config.json").write_text(json.dumps(written))
    back = AutoConfig.from_pretrained(tmp_path).to_dict()
    ignored = {"dtype", "_name_or_path", "cache_implementation", "hidden_act", "sliding_window_pattern"}
    ignored |= {"bos_token_id", "eos_token_id", "pad_token_id"}
    differing = {name for name in written.keys() | theirs.keys() if back.get(name) != theirs.get(name)} - ignored
    assert not differing


def test_published_configurations_have_their_windows_scales_and_rotations():
    mistral, gemma2, gemma3 = (read(settings) for settings in (MISTRAL_7B, GEMMA2_27B, GEMMA3_1B))
    assert mistral.windows == (4096,) and mistral.head_width == 128
    assert gemma2.windows == (4096, 0) and gemma2.query_scalar == 144 and gemma2.tie_embeddings
    assert (gemma2.attention_softcap, gemma2.logit_softcap) == (50.0, 30.0)
    assert gemma3.windows == (512,) * 5 + (0,) and gemma3.query_scalar is None
    assert (gemma3.rope_theta, gemma3.local_rope_theta, gemma3.rope_scaling) == (1e6, 1e4, None)
    scaled = read(GEMMA3_1B | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert scaled == gemma3.model_copy(update={"rope_scaling": LinearRopeScaling(factor=8)})
    assert read(MISTRAL_7B | {"sliding_window": None}).windows == (0,)
    silent = {name: value for name, value in GEMMA2_27B.items() if "softcapping" not in name and name != "sliding_window"}
    assert read(silent) == gemma2


def test_configurations_from_before_transformers_5_mean_the_same():
    rope = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    expected = read(LLAMA | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1000.0, **rope}})
    absent = ("head_dim", "architectures", "attention_bias", "mlp_bias", "pretraining_tp", "tie_word_embeddings")
    old = {name: value for name, value in LLAMA.items() if name not in (*absent, "rope_parameters")}
    old |= {"rope_theta": 1000.0, "torch_dtype": "float32"}
    for scaling in ({"rope_type": "llama3", **rope}, {"type": "llama3", **rope}):
        assert read(old | {"rope_scaling": scaling}) == expected
    plain = read(old | {"rope_scaling": None, "num_key_value_heads": None})
    assert plain == expected.model_copy(update={"rope_scaling": None, "num_kv_heads": 4})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LLAMA | {"model_type": "gpt2"}, f"model_type is 'gpt2'; supported are {', '.join(FAMILIES)}"),
        ({"model_type": "gpt_oss"}, r"model_type is 'gpt_oss' \(its MLP is a mixture of experts, .*; supported are llama"),
        ({"model_type": "gemma3"}, r"model_type is 'gemma3' \(it sees images; export its text model as gemma3_text\)"),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "architectures is .'LlamaForSequenceClassification'"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; only 'silu' is"),
        (LLAMA | {"pretraining_tp": 2}, "pretraining_tp=2 is not supported"),
        (LLAMA | {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        (LLAMA | {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.* is not supported"),
        (LLAMA | {"quantization_config": {"quant_method": "fp8"}}, "quantization_config=.* is not supported"),
        (LLAMA | {"rope_parameters": {"rope_type": "dynamic"}}, "rope_type='dynamic' is not supported; supported are def"),
        (LLAMA | {"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, "rope_type='longrope' is not"),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters and rope_scaling differ"),
        (LLAMA | {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type llama3 lacks low_freq_factor"),
        (LLAMA | {"rope_parameters": {"rope_type": "linear"}}, "rope_type linear lacks factor"),
        (LLAMA | {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale=0.7 with rope_type yarn"),
        (LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": -2.0}}, "factor: Input should be greater than 0"),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
        (LLAMA | {"rope_parameters": [1]}, "rope_parameters is .1.; it must be an object"),
        (LLAMA | {"rope_parameters": {"full_attention": {}}}, "rope_parameters by layer type are not supported for llama"),
        (LLAMA | {"hidden_size": None}, "hidden_size is None; it must be a number"),
        (LLAMA | {"vocab_size": "many"}, "vocab_size is 'many'; it must be a number"),
        (LLAMA | {"num_attention_heads": 0}, "num_heads: Input should be greater than 0"),
        (LLAMA | {"num_key_value_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        (LLAMA | {"rms_norm_eps": "small"}, "norm_eps: Input should be a valid number"),
        (MISTRAL_7B | {"sliding_window": 0}, "sliding_window is 0; it must be a number of tokens, at least 1"),
        (MISTRAL_7B | {"layer_types": ["sliding_attention"] * 32}, "layer_types is not supported for mistral"),
        (GEMMA2_27B | {"hidden_activation": "silu"}, "hidden_activation='silu' is not supported; only 'gelu_pytorch_tanh' is"),
        (GEMMA2_27B | {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        (GEMMA2_27B | {"sliding_window": None}, "sliding_window is None; it must be a number of tokens"),
        (GEMMA2_27B | {"layer_types": ["sliding_attention"]}, "layer_types with 1 entries is not supported; .* the 46 layers"),
        (GEMMA2_27B | {"layer_types": ["chunked_attention"] * 46}, "layer_types with chunked_attention is not supported"),
        (GEMMA2_27B | {"final_logit_softcapping": 0.0}, "logit_softcap: Input should be greater than 0"),
        (GEMMA2_27B | {"query_pre_attn_scalar": 0.5}, "query_scalar: Input should be a valid integer"),
        (GEMMA3_1B | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
        (GEMMA3_1B | {"sliding_window_pattern": 0}, "sliding_window_pattern is 0; it must be a number of layers"),
        (GEMMA3_1B | {"rope_parameters": {"rope_type": "default"}}, "must hold full_attention and sliding_attention"),
        (GEMMA3_1B | {"rope_parameters": {"sliding_attention": 3}}, "rope_parameters is 3; it must be an object"),
        (GEMMA3_1B | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type of full_attention is not supported"),
        (GEMMA3_1B | {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
         "rope_type of sliding_attention is not supported; only default is"),
        ({"model_type": "warpline", "decoder": SIZES | {"widht": 3}}, "widht: Extra inputs are not permitted"),
        ({"model_type": "warpline"}, "Input should be a valid dictionary"),
    ],
)  # fmt: skip
def test_settings_that_this_decoder_does_not_compute_are_refused_by_name(settings, message):
    with pytest.raises(BadCheckpoint, match=message) as caught:
        read(settings)
    assert str(caught.value).startswith(f"{PATH}: ") and "\n" not in str(caught.value)
