import itertools
import json
import os
import pickle
import stat
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from warpline.data.tokenizer import ChatTokenizer, train_tokenizer
from warpline.models.decoder import Decoder, DecoderConfig
from warpline.models.generation import generate
from warpline.models.huggingface import BadCheckpoint, describe, load, load_pieces, read_config, save, their_name, wholes
from warpline.parallel.tensor_file import Piece, create, plan, write

with warnings.catch_warnings():
    # transformers' dependencies announce their own deprecations while they are imported.
    warnings.simplefilter("ignore", DeprecationWarning)
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        Gemma2Config,
        Gemma3TextConfig,
        LlamaConfig,
        MistralConfig,
        Qwen3Config,
    )

SIZES = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA = {"pad_token_id": None, "query_pre_attn_scalar": 24, "num_hidden_layers": 3}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
# Windows are shorter than the 48 tokens that are compared, softcaps small enough to bend.
VARIANTS = {
    "llama": (LlamaConfig, {}),
    "llama_tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama_rope_scaled": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE, "rms_norm_eps": 1e-3}),
    "llama_biased": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama_wide_heads": (LlamaConfig, {"head_dim": 12, "num_key_value_heads": 1}),
    "qwen3": (Qwen3Config, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-3}),
    "qwen3_tied_biased": (Qwen3Config, {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 16}),
    "qwen3_yarn": (Qwen3Config, {"rope_parameters": YARN}),
    "mistral": (MistralConfig, {"sliding_window": 6}),
    "mistral_window_1": (
        MistralConfig,
        {"sliding_window": 1, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 6},
    ),
    "mistral_long_window": (MistralConfig, {"sliding_window": 80, "tie_word_embeddings": True, "rope_parameters": YARN}),
    "gemma2": (Gemma2Config, GEMMA | {"sliding_window": 5, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}),
    "gemma2_untied": (
        Gemma2Config,
        GEMMA
        | {
            "sliding_window": 9,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gemma3": (Gemma3TextConfig, GEMMA | {"sliding_window": 5, "sliding_window_pattern": 3, "rope_parameters": GEMMA3_ROPE}),
    "gemma3_capped": (
        Gemma3TextConfig,
        GEMMA
        | {
            "sliding_window": 7,
            "final_logit_softcapping": 2.0,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
}
TOKENS_BS = torch.randint(0, SIZES["vocab_size"], (2, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads on tensors this small wait for each other: 360 ms instead of 30 for one `generate` (2 cores)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_theirs(variant: str):
    """A random model of transformers, its norms and biases random too."""
    config_class, changes = VARIANTS[variant]
    torch.manual_seed(11)
    # Eager attention, as transformers' default forgets Gemma 2's softcap.
    model = AutoModelForCausalLM.from_config(config_class(**(SIZES | changes)), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good folder that a test then spoils."""
    make_theirs("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@torch.no_grad()
def logits_of(decoder: Decoder, tokens_BS: Tensor = TOKENS_BS) -> Tensor:
    logits, cap = decoder(tokens_BS) @ decoder.output_weight.T, decoder.config.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def test_bf16_logits_are_as_near_to_fp32s_as_those_of_transformers(tmp_path):
    for variant in ("mistral", "gemma2", "gemma3"):
        theirs = make_theirs(variant)
        theirs.save_pretrained(tmp_path)
        with torch.no_grad():
            truth, rounded = theirs(TOKENS_BS).logits, theirs.to(torch.bfloat16)(TOKENS_BS).logits.float()
        received = logits_of(load(tmp_path, dtype=torch.bfloat16)).float()
        assert (received - truth).abs().max() <= 2 * (rounded - truth).abs().max(), variant


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_imported_models_give_the_logits_of_transformers(variant, max_shard_size, tmp_path):
    theirs = make_theirs(variant)
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1) == (max_shard_size == "20KB")
    with torch.no_grad():
        expected = theirs(TOKENS_BS).logits
    received = logits_of(load(tmp_path))
    assert expected.std() > 0.3
    assert (received - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_models_are_the_same_in_transformers(variant, max_shard_bytes, tmp_path):
    theirs = make_theirs(variant)
    theirs.save_pretrained(tmp_path / "theirs")
    decoder = load(tmp_path / "theirs")
    save(decoder, tmp_path / "ours", max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists() == (max_shard_bytes == 20_000)
    back, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    back.set_attn_implementation("eager")
    assert not any(report.values()), report
    assert type(back) is type(theirs)
    original = theirs.state_dict()
    assert original.keys() == back.state_dict().keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, original[name]), name
    with torch.no_grad():
        assert torch.equal(back(TOKENS_BS).logits, theirs(TOKENS_BS).logits)
    # At window 1 transformers' cache forgets nothing (keys[-window + 1:] is keys[0:]).
    use_cache = variant != "mistral_window_1"
    generated = back.generate(TOKENS_BS[:1, :5], do_sample=False, max_new_tokens=16, use_cache=use_cache)
    ours = generate(decoder, [TOKENS_BS[0, :5].tolist()], max_new_tokens=16, end_ids=[], temperature=0.0)
    assert generated[0, 5:].tolist() == ours[0].ids
    row = TOKENS_BS[:1, :5]
    for _ in range(16):
        row = torch.cat([row, logits_of(decoder, row)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, row)


def test_a_shape_and_its_weights_round_trip_bitwise(tmp_path):
    sizes = {"vocab_size": 11, "width": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_width": 4}
    config = DecoderConfig(**sizes, mlp_width=24, windows=(3, 0), attention_sinks=True, rope_theta=123456.5)
    decoder = Decoder(config).initialise(torch.Generator().manual_seed(1))
    save(decoder, tmp_path, max_shard_bytes=2_000, own_form=True)
    assert read_config(tmp_path) == config
    back = load(tmp_path).state_dict()
    assert back.keys() == decoder.state_dict().keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in decoder.state_dict().items())


def test_the_files_dtype_is_kept_unless_another_is_asked_for(tmp_path):
    theirs = make_theirs("llama").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    weight = theirs.model.layers[1].mlp.up_proj.weight
    for dtype, expected in ((None, weight), (torch.float64, weight.double())):
        received = load(tmp_path, dtype=dtype).layers[1].mlp.up_proj.weight
        assert received.dtype == expected.dtype and torch.equal(received, expected)
    save(load(tmp_path), tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").dtype == torch.bfloat16


def test_tensors_of_several_dtypes_need_a_choice(folder):
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].half()}))
    with pytest.raises(BadCheckpoint, match="tensors have dtypes F16 and F32; choose one with dtype="):
        load(folder)
    assert load(folder, dtype=torch.float32).norm.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"tensor model\.layers\.1\.mlp\.up_proj\.weight is miss"),
        (lambda t: t.pop("lm_head.weight"), r"tensor lm_head\.weight is missing"),
        (lambda t: [t.pop(name) for name in [*t][:3]], r"is missing|\(and 2 more\) is missing"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}), r"layers\.2\.mlp\.up_proj.* not part"),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), r"norm\.weight has shape \[31\], not .* \[32\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), r"norm\.weight has dtype I8; deq"),
    ],
)
def test_missing_extra_and_wrongly_shaped_tensors_are_refused_by_name(change, message, folder):
    edit_weights(folder, change)
    with pytest.raises(BadCheckpoint, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_stored_inverse_frequency_table_is_ignored(folder):
    expected = logits_of(load(folder))
    edit_weights(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert torch.equal(logits_of(load(folder)), expected)


def test_a_tied_model_may_store_its_head_but_not_another_one(tmp_path):
    make_theirs("llama_tied").save_pretrained(tmp_path)
    expected = logits_of(load(tmp_path))
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    decoder = load(tmp_path)
    assert torch.equal(logits_of(decoder), expected)
    assert decoder.output_weight is decoder.embed_tokens.weight
    edit_weights(tmp_path, lambda t: t["lm_head.weight"][3, 4].add_(1e-3))
    with pytest.raises(BadCheckpoint, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, but config"):
        load(tmp_path)
    for first, is_refused in ((0, True), (4, False)):  # a rank compares the rows that it holds
        rows = {"embed_tokens.weight": Piece(torch.zeros(4, 32), (53, 32), (first, 0))}
        with pytest.raises(BadCheckpoint, match="lm_head") if is_refused else nullcontext():
            load_pieces(tmp_path, rows)


def halves(decoder: Decoder, rank: int) -> dict[str, Piece]:
    """What one of two ranks holds: rows of the embeddings, columns of the other matrices, all of the vectors."""
    pieces = {}
    for name, parameter in decoder.named_parameters():
        dim = 0 if "embed" in name or name == "lm_head.weight" else parameter.ndim - 1
        half = -(-parameter.shape[dim] // 2)
        start, size = (
            (rank * half, min(half, parameter.shape[dim] - rank * half)) if parameter.ndim > 1 else (0, parameter.shape[0])
        )
        offset = tuple(start if d == dim else 0 for d in range(parameter.ndim))
        part = parameter.detach().narrow(dim, start, size)
        pieces[name] = Piece(part, tuple(parameter.shape), offset, parameter.ndim > 1 or rank == 1)
    return pieces


@pytest.mark.parametrize("variant", ["qwen3_tied_biased", "gemma2_untied"])
def test_a_rank_reads_its_part_of_a_folder_of_transformers(variant, tmp_path):
    make_theirs(variant).save_pretrained(tmp_path, max_shard_size="20KB")
    whole = load(tmp_path)
    for rank in range(2):
        empty = {name: piece._replace(tensor=torch.zeros_like(piece.tensor)) for name, piece in halves(whole, rank).items()}
        load_pieces(tmp_path, empty)
        assert all(torch.equal(empty[name].tensor, piece.tensor) for name, piece in halves(whole, rank).items())
        assert len(empty) == len(list(whole.parameters()))
    alone = Piece.of(torch.zeros_like(whole.embed_tokens.weight, dtype=torch.float64))
    load_pieces(tmp_path, {"embed_tokens.weight": alone})
    assert torch.equal(alone.tensor, whole.embed_tokens.weight.double())


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_ranks_write_the_folder_that_one_process_saves_and_transformers_loads_it(max_shard_bytes, tmp_path):
    theirs = make_theirs("qwen3_tied_biased")
    theirs.save_pretrained(tmp_path / "theirs")
    decoder = load(tmp_path / "theirs")
    save(decoder, tmp_path / "one", max_shard_bytes=max_shard_bytes)
    (tmp_path / "two").mkdir()
    layout = plan(wholes(decoder.config, torch.float32), "model", max_shard_bytes)
    create(layout, tmp_path / "two")
    for rank in range(2):
        write(layout, tmp_path / "two", {their_name(name): piece for name, piece in halves(decoder, rank).items()})
    describe(decoder.config, tmp_path / "two", dtype=torch.float32)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir()) and len(files) >= 3
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "two").state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in theirs.state_dict().items())


def test_pieces_of_another_model_and_folders_of_another_are_refused_by_name(folder):
    for name, message in (("norm.weight", r"norm\.weight is \[3\] in the model but \[32\] in"), ("x", "x is .* but absent in")):
        with pytest.raises(BadCheckpoint, match=f"{message} config\\.json; load a folder of this model"):
            load_pieces(folder, {name: Piece.of(torch.zeros(3))})
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(BadCheckpoint, match=r"tensor lm_head\.weight is missing"):
        load_pieces(folder, {"norm.weight": Piece.of(torch.zeros(32))})


class Malice:
    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


def test_a_pickle_is_refused_and_never_opened(folder, tmp_path):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malice(tmp_path / "executed")))
    load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"pytorch_model\.bin: a pickle runs code when it is opened, .*save_pretrained"):
        load(folder)
    assert not (tmp_path / "executed").exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "executed").exists(), "the planted file must be able to do harm, or the test proves nothing"


def test_broken_folders_are_refused_by_file(folder, tmp_path):
    with pytest.raises(BadCheckpoint, match=r"nowhere/config\.json: there is no such file"):
        load(tmp_path / "nowhere")
    good = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(good[:-10])
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors: not a readable safetensors file"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"holds neither model\.safetensors nor"):
        load(folder)
    index = folder / "model.safetensors.index.json"
    for weight_map, message in (
        (None, "weight_map must name the file of every tensor"),
        ({"a": 3}, "weight_map must name the file of every tensor"),
        ({"a": "model-00001-of-00002.safetensors"}, "lists model-00001-of-00002.safetensors, which is not a file"),
        ({"a": "../model.safetensors"}, r"lists \.\./model\.safetensors, which is not a file of this folder"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        (tmp_path / "model.safetensors").write_bytes(good)
        with pytest.raises(BadCheckpoint, match=message):
            load(folder)
    for text, message in (("{", "not readable as JSON"), ("[]", "holds a JSON list, not an object")):
        (folder / "config.json").write_text(text)
        with pytest.raises(BadCheckpoint, match=message):
            load(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    make_theirs("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second)
    with pytest.raises(BadCheckpoint, match=f"{second.name}: tensor {name} is also in {first.name}"):
        load(tmp_path)


def test_files_beside_the_model_are_ignored(folder):
    expected = logits_of(load(folder))
    save_file({"exp_avg": torch.ones(3)}, folder / "optimizer.safetensors")
    for name in ("state.json", "manifest.json"):
        (folder / name).write_text("not even JSON")
    assert torch.equal(logits_of(load(folder)), expected)


def test_a_loaded_decoder_does_not_depend_on_its_files(folder):
    decoder = load(folder)
    expected = logits_of(decoder)
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"\x7f" * 1000)
    assert torch.equal(logits_of(decoder), expected)
    assert all(parameter.requires_grad for parameter in decoder.parameters())


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_get_the_permissions_that_the_umask_grants(umask, mode, folder, tmp_path):
    decoder, before = load(folder), os.umask(umask)
    try:
        save(decoder, tmp_path / "ours", max_shard_bytes=20_000)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "ours").iterdir()}
    assert len(modes) > 4 and set(modes.values()) == {mode}, modes


def test_shards_keep_their_limit_and_their_index_is_complete(folder, tmp_path):
    decoder, limit = load(folder), 20_000
    save(decoder, tmp_path, max_shard_bytes=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in tmp_path.glob("model-*.safetensors")}
    totals = [sum(tensor.nbytes for tensor in shards[name].values()) for name in sorted(shards)]
    assert max(totals) <= limit
    assert all(first + second > limit for first, second in itertools.pairwise(totals)), totals
    assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in decoder.parameters())


def test_saving_again_replaces_the_earlier_weights_and_leaves_other_files(folder, tmp_path):
    first, second = load(folder), load(folder)
    with torch.no_grad():
        second.norm.weight += 1.0
    (tmp_path / "notes.txt").write_text("mine")
    save(first, tmp_path, max_shard_bytes=20_000)
    save(second, tmp_path)
    assert torch.equal(load(tmp_path).norm.weight, second.norm.weight)
    save(first, tmp_path, max_shard_bytes=20_000)
    assert torch.equal(load(tmp_path).norm.weight, first.norm.weight)
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_half_written_folder_is_refused(folder):
    def stop(_folder: Path) -> None:
        raise OSError("no space left")

    decoder = load(folder)
    with pytest.raises(OSError, match="no space left"):
        save(decoder, folder, SimpleNamespace(save=stop, end_ids=(1,), document_id=0, pad_id=2))
    with pytest.raises(BadCheckpoint, match=r"config\.json: there is no such file"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_key_norm": True, "mlp_bias": True}, "the nearest, llama, asks for query_key_norm=False: to export"),
        ({"num_heads": 3, "attention_bias": True}, r"llama, asks for a width that is a multiple of num_heads=3 \(it is 8\)"),
        ({"windows": (4,), "attention_sinks": True}, "the nearest, mistral, asks for attention_sinks=False"),
        ({"windows": (4,), "local_rope_theta": 5.0}, "the nearest, mistral, asks for local_rope_theta=None"),
        ({"windows": (4, 8)}, "the nearest, llama, asks for no windows"),
        ({"post_norms": True, "query_scalar": 7}, "llama, asks for query_scalar=None, post_norms=False"),
    ],
)
def test_a_decoder_without_a_hugging_face_architecture_is_refused_before_anything_is_written(changes, message, tmp_path):
    sizes = {"vocab_size": 5, "width": 8, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_width": 4}
    with pytest.raises(ValueError, match=message):
        save(Decoder(DecoderConfig(**(sizes | {"mlp_width": 8} | changes))), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_end_ids_stop_generate(folder, tmp_path):
    decoder = load(folder)
    prompt = TOKENS_BS[:1, :5]
    free = [int(token) for token in logits_of(decoder, prompt)[0, -1].topk(1).indices]
    for end_ids, stored in (([free[0]], free[0]), ([SIZES["vocab_size"] - 1, free[0]], [52, free[0]])):
        save(decoder, tmp_path, end_ids=end_ids)
        assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == stored
        back = AutoModelForCausalLM.from_pretrained(tmp_path)
        generated = back.generate(prompt, do_sample=False, max_new_tokens=9, pad_token_id=0)
        assert generated[0, 5:].tolist() == free


def test_generate_works_with_the_exported_tokenizer(tmp_path):
    texts = ["the cat sat on the mat", "12 + 30 = 42", "def f(x): return x"]
    tokenizer = ChatTokenizer(train_tokenizer(texts * 20, 300))
    sizes = {"width": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_width": 8, "mlp_width": 24}
    config = DecoderConfig(vocab_size=tokenizer.vocab_size, **sizes)
    decoder = Decoder(config).initialise(torch.Generator().manual_seed(5))
    save(decoder, tmp_path / "ours", tokenizer)
    theirs, model = AutoTokenizer.from_pretrained(tmp_path / "ours"), AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    messages = [{"role": "user", "content": "what is 12 + 30?"}]
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert prompt["input_ids"][0].tolist() == tokenizer.encode_prompt(messages)
    assert theirs.eos_token_id == tokenizer.end_id and model.generation_config.pad_token_id == tokenizer.pad_id
    generated = model.generate(**prompt, do_sample=False, max_new_tokens=6)
    row = prompt["input_ids"]
    while row.shape[1] < generated.shape[1]:
        row = torch.cat([row, logits_of(decoder, row)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, row) and row.shape[1] > prompt["input_ids"].shape[1]
