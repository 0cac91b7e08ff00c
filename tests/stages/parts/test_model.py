import pytest
import torch

from warpline.models import huggingface
from warpline.models.decoder import Decoder, DecoderConfig, DecoderShape, initial_values
from warpline.parallel.mesh import Mesh, Sizes, start_mesh
from warpline.parallel.model import ParallelModel
from warpline.stages.parts.checkpoint import save_checkpoint
from warpline.stages.parts.config import BadConfig, ParallelConfig
from warpline.stages.parts.model import Start, build, fresh, frozen, start_from, whole
from warpline.stages.parts.seed import seed_of
from warpline.stages.parts.tokens import completion_sample, microbatches, token_stats

SHAPE = DecoderShape(width=8, num_layers=2, num_heads=2, num_kv_heads=1, head_width=4, mlp_width=8, init_std=0.05)


def made(start: Start, precision: str = "fp32") -> ParallelModel:
    return build(start, start_mesh(), ParallelConfig(), precision)


def equal(left: ParallelModel, right: ParallelModel) -> bool:
    pairs = zip(left.named_parameters(), right.named_parameters(), strict=True)
    return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)


# ---- Where weights come from ----


def test_a_folder_gives_its_configuration_tokenizer_and_weights(start_folder, tiny_decoder, tokenizer):
    start = start_from(start_folder, start_mesh())
    assert start.config == tiny_decoder.config and start.tokenizer.vocab_size == tokenizer.vocab_size
    model = made(start)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tiny_decoder.get_parameter(name)) and parameter.requires_grad, name


def test_a_checkpoint_is_a_start_unless_it_is_damaged(tmp_path, tiny_decoder, tokenizer):
    optimizer = torch.optim.AdamW(tiny_decoder.parameters())
    folder = save_checkpoint(tmp_path, 1, tiny_decoder, optimizer, tokenizer, {"num_updates": 0}, keep=1)
    assert torch.equal(made(start_from(folder, start_mesh())).decoder.embed_tokens.weight, tiny_decoder.embed_tokens.weight)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(BadConfig, match=r"checkpoint .*step-1 is damaged: model.safetensors .*; use an earlier one"):
        start_from(folder, start_mesh())


def test_what_is_no_start_is_refused_in_one_line(tmp_path, start_folder, tokenizer):
    with pytest.raises(BadConfig, match=r"nowhere: no such folder; give a checkpoint \(…/step-N\) or a Hugging Face folder"):
        start_from(tmp_path / "nowhere", start_mesh())
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(BadConfig, match=r"is a run; give one of its checkpoints"):
        start_from(tmp_path / "run", start_mesh())
    config = DecoderConfig(vocab_size=tokenizer.vocab_size - 1, **SHAPE.model_dump())
    huggingface.save(Decoder(config), tmp_path / "small", tokenizer)
    with pytest.raises(BadConfig, match=f"tokenizer has {tokenizer.vocab_size} tokens but .* only {tokenizer.vocab_size - 1};"):
        start_from(tmp_path / "small", start_mesh())


def test_fresh_weights_depend_on_the_seeds_parts_alone(tokenizer):
    torch.manual_seed(1)
    first = made(fresh(SHAPE, tokenizer, 7, "pretrain"))
    torch.manual_seed(2)
    again, other = made(fresh(SHAPE, tokenizer, 7, "pretrain")), made(fresh(SHAPE, tokenizer, 8, "pretrain"))
    assert equal(first, again) and not equal(first, other)
    assert first.config.vocab_size == tokenizer.vocab_size
    name, weight = "layers.1.mlp.down_proj.weight", first.decoder.layers[1].mlp.down_proj.weight
    expected = initial_values(first.config, name, seed_of(7, "pretrain", "weights"), (8, 8), (0, 0), (8, 8))
    assert torch.equal(weight, expected) and weight.std().item() == pytest.approx(0.05 / 2, rel=0.5)


# ---- What is built ----


@pytest.mark.parametrize(
    ("precision", "stored", "products"),
    [("fp32", torch.float32, None), ("bf16", torch.float32, torch.bfloat16), ("fp64", torch.float64, None)],
)
def test_precision_decides_how_weights_are_stored_and_products_made(precision, stored, products, tokenizer, start_of):
    config = DecoderConfig(vocab_size=tokenizer.vocab_size, logit_softcap=3.0, **SHAPE.model_dump(exclude={"logit_softcap"}))
    model = made(start_of(Decoder(config)), precision)
    assert {parameter.dtype for parameter in model.parameters()} == {stored}
    batches = microbatches([[completion_sample([5, 6], [7, 8])]], 100)
    (options,) = model.evaluate(batches, lambda view, hidden, weight: view.options)
    assert options == {"softcap": 3.0, "product_dtype": products}
    logprobs = [made(start_of(model.decoder), one).evaluate(batches, lambda *seen: token_stats(*seen).logprob_T)[0]
                for one in (precision, "fp64")]  # fmt: skip
    assert (logprobs[0] - logprobs[1]).abs().max() < (1e-2 if products else 1e-6)


def test_a_layout_that_the_model_cannot_have_is_a_bad_config(start_folder):
    start, mesh = start_from(start_folder, start_mesh()), Mesh(0, Sizes(tensor=3), torch.device("cpu"))
    with pytest.raises(BadConfig, match=r"\[parallel\] tensor=3 does not fit the model: .* the nearest legal layout is"):
        build(start, mesh, ParallelConfig(tensor=3), "fp32")


def test_a_frozen_model_has_no_gradients_and_stays_what_it_is_beside_training(start_folder):
    start = start_from(start_folder, start_mesh())
    reference, model = frozen(start, start_mesh(), ParallelConfig(), "fp32"), made(start)
    assert not any(parameter.requires_grad for parameter in reference.parameters()) and not reference.decoder.training
    batches = microbatches([[completion_sample([5, 6], [7, 8])]], 100)
    (logprob_T,) = reference.evaluate(batches, lambda *seen: token_stats(*seen).logprob_T)
    assert not logprob_T.requires_grad and logprob_T.any()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert equal(reference, made(start)) and all(parameter.grad is None for parameter in reference.parameters())


# ---- What generation takes ----


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_generation_takes_the_decoder_itself_without_gradients_under_its_precision(precision, dtype, start_folder):
    model = made(start_from(start_folder, start_mesh()), precision)
    with whole(model) as decoder:
        assert decoder is model.decoder
        hidden = decoder(torch.tensor([[1, 2, 3]]))
        assert not hidden.requires_grad and (decoder.layers[0].mlp.up_proj(hidden)).dtype == dtype
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_weights_that_are_gone_when_they_are_needed_are_named(start_folder):
    start = start_from(start_folder, start_mesh())
    (start_folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        made(start)
