import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from warpline.models.decoder import INITIAL_NUMBERS, Decoder, DecoderConfig, KeyValueCache, initial_values, num_parameters
from warpline.models.rope_scaling import LinearRopeScaling, RopeScaling, YarnRopeScaling

LLAMA = DecoderConfig(
    vocab_size=17, width=12, num_layers=2, num_heads=4, num_kv_heads=2, head_width=6, mlp_width=20, init_std=0.4
)
SCALING = RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8)
QWEN = LLAMA.model_copy(
    update={
        "query_key_norm": True,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_embeddings": False,
        "rope_scaling": SCALING,
    }
)
MISTRAL = LLAMA.model_copy(update={"windows": (3,), "num_heads": 3, "num_kv_heads": 1})
GEMMA2 = LLAMA.model_copy(
    update={
        "windows": (3, 0),
        "attention_softcap": 2.0,
        "logit_softcap": 3.0,
        "query_scalar": 10,
        "zero_centred_norms": True,
        "post_norms": True,
        "activation": "gelu_tanh",
        "scale_embeddings": True,
    }
)
GEMMA3 = GEMMA2.model_copy(
    update={
        "attention_softcap": None,
        "logit_softcap": None,
        "query_key_norm": True,
        "local_rope_theta": 50.0,
        "rope_scaling": LinearRopeScaling(factor=8.0),
    }
)
GPT_OSS = LLAMA.model_copy(
    update={
        "windows": (4, 0),
        "attention_sinks": True,
        "attention_bias": True,
        "tie_embeddings": False,
        "rope_scaling": YarnRopeScaling(factor=4.0, original_max_positions=8, truncate=False),
    }
)
SHAPES = {"llama": LLAMA, "qwen3": QWEN, "mistral": MISTRAL, "gemma2": GEMMA2, "gemma3": GEMMA3, "gpt_oss": GPT_OSS}
EVERY = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
LENGTHS = (5, 1, 9, 0, 3)


def make(config: DecoderConfig) -> Decoder:
    """An fp64 decoder in which norms and biases are random too."""
    generator = torch.Generator().manual_seed(7)
    decoder = Decoder(config).double().initialise(generator)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return decoder


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, LLAMA.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def gradients(decoder: Decoder, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*decoder.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def loss_of(decoder: Decoder, hidden: Tensor, direction: Tensor) -> Tensor:
    """A scalar through every parameter, the output matrix included."""
    return (torch.log_softmax(hidden @ decoder.output_weight.T, -1) * direction).sum()


@EVERY
def test_packed_documents_give_what_separate_documents_give(config):
    decoder, total = make(config), sum(LENGTHS)
    row, direction = tokens(1, total), torch.randn(total, config.vocab_size, dtype=torch.float64)
    boundaries = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    packed = decoder(row, cu_seqlens=boundaries)[0]
    separate = torch.cat([decoder(part[None])[0] for part in row[0].split(LENGTHS) if part.numel()])
    close(packed, separate)
    expected = gradients(decoder, loss_of(decoder, separate, direction))
    received = gradients(decoder, loss_of(decoder, packed, direction))
    assert all(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in received.items():
        close(gradient, expected[name])


def test_tokens_after_the_last_boundary_change_nothing_before_it():
    decoder, boundaries = make(LLAMA), torch.tensor([0, 4, 9], dtype=torch.int32)
    row = tokens(1, 12)
    other = row.clone()
    other[0, 9:] = (other[0, 9:] + 1) % LLAMA.vocab_size
    close(decoder(row, cu_seqlens=boundaries)[0, :9], decoder(other, cu_seqlens=boundaries)[0, :9])
    close(decoder(row, cu_seqlens=boundaries)[:, :9], decoder(row[:, :9], cu_seqlens=boundaries))


@EVERY
def test_a_later_token_changes_nothing_before_it_and_everything_after(config):
    decoder, row = make(config), tokens(1, 10)
    other = row.clone()
    other[0, 6] = (other[0, 6] + 1) % config.vocab_size
    before, after = decoder(row)[0], decoder(other)[0]
    close(before[:6], after[:6])
    assert (before[6:] - after[6:]).abs().amax(-1).min() > 1e-3


@EVERY
@torch.no_grad()
def test_decoding_one_token_at_a_time_equals_the_full_forward(config):
    decoder, rows = make(config), tokens(3, 11)
    full, cache = decoder(rows), KeyValueCache(config, 3, 11, torch.device("cpu"), torch.float64)
    for position in range(11):
        close(decoder(rows[:, position : position + 1], cache=cache)[:, 0], full[:, position])
        cache.length_B += 1
        cache.longest += 1


@EVERY
@torch.no_grad()
def test_rows_of_different_lengths_decode_as_if_alone_and_survive_selection(config):
    decoder, rows, prompt_lengths = make(config), tokens(4, 14), torch.tensor([4, 1, 7, 2], dtype=torch.int32)
    cache = KeyValueCache(config, 4, 14, torch.device("cpu"), torch.float64)
    alone = [decoder(row[None])[0] for row in rows]
    prefilled = decoder(rows[:, :7].clone(), cache=cache)
    cache.length_B, cache.longest = prompt_lengths.clone(), 7
    for row, length in enumerate(prompt_lengths.tolist()):
        close(prefilled[row, :length], alone[row][:length])
    kept = torch.tensor([0, 1, 2, 3])
    for step in range(6):
        if step == 3:
            cache.select(torch.tensor([3, 1]))
            kept = torch.tensor([3, 1])
        position_B = cache.length_B.long()
        hidden = decoder(rows[kept, position_B][:, None], cache=cache)[:, 0]
        close(hidden, torch.stack([alone[row][at] for row, at in zip(kept, position_B, strict=True)]))
        cache.length_B += 1
        cache.longest += 1


@EVERY
@torch.no_grad()
def test_several_tokens_continue_a_cache(config):
    decoder, rows = make(config), tokens(2, 9)
    cache = KeyValueCache(config, 2, 9, torch.device("cpu"), torch.float64)
    decoder(rows[:, :4], cache=cache)
    cache.length_B += 4
    cache.longest = 4
    close(decoder(rows[:, 4:], cache=cache), decoder(rows)[:, 4:])


@pytest.mark.parametrize(("windows", "reach"), [((1,), 0), ((3,), 4), ((2, 4), 4), ((11,), 11), ((1000,), 11), ((1, 0), 11)])
@torch.no_grad()
def test_a_token_reaches_as_far_as_the_windows_of_all_layers_and_no_further(windows, reach):
    decoder, row = make(GEMMA2.model_copy(update={"windows": windows})), tokens(1, 12)
    before = decoder(row)[0]
    row[0, 0] = (row[0, 0] + 1) % LLAMA.vocab_size
    moved = (decoder(row)[0] - before).abs().amax(-1)
    assert bool((moved[: reach + 1] > 1e-6).all()) and bool((moved[reach + 1 :] <= 1e-12).all())


@torch.no_grad()
def test_a_window_of_the_whole_sequence_is_none():
    rows, windowed = tokens(2, 9), make(GEMMA2.model_copy(update={"windows": (9,)}))
    for windows in ((0,), (10, 0), (1000, 9)):
        full = make(GEMMA2.model_copy(update={"windows": windows}))
        close(windowed(rows), full(rows))


@torch.no_grad()
def test_layers_with_a_window_rotate_by_their_own_theta():
    rows = tokens(2, 9)
    local = make(GEMMA3.model_copy(update={"windows": (1000, 1000)}))(rows)
    plain = {"windows": (0,), "local_rope_theta": None, "rope_scaling": None}
    close(local, make(GEMMA3.model_copy(update=plain | {"rope_theta": 50.0}))(rows))
    everywhere = make(GEMMA3.model_copy(update={"windows": (0,)}))(rows)
    assert (local - everywhere).abs().max() > 1e-3


def test_no_tokens_give_no_hidden_states():
    assert make(GEMMA2)(tokens(2, 0)).shape == (2, 0, 12)
    assert make(GEMMA2)(tokens(1, 0), cu_seqlens=torch.tensor([0, 0], dtype=torch.int32)).shape == (1, 0, 12)


def test_scaled_embeddings_are_rounded_to_their_dtype():
    decoder = make(GEMMA2).to(torch.bfloat16)
    scale = torch.tensor(12**0.5).to(torch.bfloat16)
    assert scale.item() != 12**0.5
    expected = decoder.embed_tokens.weight[tokens(2, 5)] * scale
    assert torch.equal(decoder.embed(tokens(2, 5)), expected)


@EVERY
def test_bf16_autocast_keeps_the_residual_stream_and_stays_near_fp32(config):
    decoder, row, boundaries = make(config).float(), tokens(1, 12), torch.tensor([0, 5, 12], dtype=torch.int32)
    expected = decoder(row, cu_seqlens=boundaries)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = decoder(row, cu_seqlens=boundaries)
    assert hidden.dtype == torch.float32
    # bf16 keeps 8 bits: 2 layers of products, each 0.4 % off.
    assert (hidden - expected).norm() <= 0.05 * expected.norm()
    hidden.square().sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in decoder.parameters() if parameter.grad is not None)


def test_the_gradient_of_a_tied_matrix_is_the_sum_of_its_two_uses():
    tied, untied = make(LLAMA), Decoder(LLAMA.model_copy(update={"tie_embeddings": False})).double()
    untied.load_state_dict(tied.state_dict() | {"lm_head.weight": tied.output_weight.detach().clone()})
    row, direction = tokens(2, 7), torch.randn(2, 7, LLAMA.vocab_size, dtype=torch.float64)
    received = gradients(tied, loss_of(tied, tied(row), direction))
    expected = gradients(untied, loss_of(untied, untied(row), direction))
    close(received["embed_tokens.weight"], expected["embed_tokens.weight"] + expected["lm_head.weight"])
    assert expected["embed_tokens.weight"].abs().max() > 1e-3 < expected["lm_head.weight"].abs().max()
    assert num_parameters(untied) - num_parameters(tied) == LLAMA.vocab_size * LLAMA.width


@EVERY
def test_gradients_agree_with_finite_differences(config):
    decoder, row = make(config), tokens(2, 6)
    direction = torch.randn(2, 6, config.vocab_size, dtype=torch.float64)
    step = {name: torch.randn_like(parameter) for name, parameter in decoder.named_parameters()}
    analytic = sum(
        (gradient * step[name]).sum()
        for name, gradient in gradients(decoder, loss_of(decoder, decoder(row), direction)).items()
    )
    losses = []
    with torch.no_grad():
        for sign in (1, -2):
            for name, parameter in decoder.named_parameters():
                parameter += sign * 1e-6 * step[name]
            losses.append(loss_of(decoder, decoder(row), direction))
    torch.testing.assert_close((losses[0] - losses[1]) / 2e-6, analytic, rtol=1e-6, atol=1e-6)


@EVERY
def test_a_head_inside_forward_sees_the_hidden_states_and_the_output_matrix(config):
    decoder, row = make(config), tokens(2, 5)
    logits = decoder(row, head=lambda hidden, weight: hidden @ weight.T)
    close(logits, decoder(row) @ decoder.output_weight.T)
    expected = decoder.embed_tokens.weight if config.tie_embeddings else decoder.lm_head.weight
    assert decoder(row, head=lambda _, weight: weight) is expected


@pytest.mark.parametrize(("shape", "neutral"), [(QWEN, 1.0), (GEMMA3, 0.0), (GPT_OSS, 1.0)])
def test_initialisation_is_a_function_of_the_seed(shape, neutral):
    config = shape.model_copy(update={"width": 64, "mlp_width": 128, "num_layers": 8, "init_std": 0.05})
    first, again, other = (Decoder(config).initialise(torch.Generator().manual_seed(seed)).state_dict() for seed in (3, 3, 4))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        expected = neutral if name.endswith("norm.weight") else 0.0
        assert not torch.equal(tensor, other[name]) if tensor.ndim == 2 else bool((tensor == expected).all()), name
    assert first["layers.3.mlp.up_proj.weight"].std().item() == pytest.approx(0.05, rel=0.05)
    assert first["layers.3.mlp.down_proj.weight"].std().item() == pytest.approx(0.05 / 4, rel=0.05)
    assert first["layers.3.self_attn.o_proj.weight"].std().item() == pytest.approx(0.05 / 4, rel=0.1)


def test_initial_values_of_a_part_are_the_part_of_the_whole():
    """A matrix of four blocks: rows within one, across two and three, columns, nothing; and another seed or name is another."""
    name, whole, nowhere = "layers.1.mlp.up_proj.weight", (5000, 700), (0, 0)
    assert 3 < whole[0] * whole[1] / INITIAL_NUMBERS < 4
    full = initial_values(LLAMA, name, 3, whole, nowhere, whole)
    parts = {
        (0, 0): (10, 700), (1490, 0): (20, 700), (1400, 350): (3200, 350), (4999, 699): (1, 1), (5000, 0): (0, 700),
        (2500, 0): (0, 700),
    }  # fmt: skip
    for offset, shape in parts.items():
        expected = full[offset[0] : offset[0] + shape[0], offset[1] : offset[1] + shape[1]]
        assert torch.equal(initial_values(LLAMA, name, 3, whole, offset, shape), expected)
    blocks = [full[start : start + 1000].flatten() for start in range(0, 5000, 1000)]
    assert all(block.std().item() == pytest.approx(LLAMA.init_std, rel=0.01) for block in blocks)
    assert all(abs(block.mean().item()) < 5 * LLAMA.init_std / 700_000**0.5 for block in blocks)
    rows_per_block = INITIAL_NUMBERS // 700
    assert not torch.equal(full[:10], full[rows_per_block : rows_per_block + 10]), "blocks have generators of their own"
    for other in (
        initial_values(LLAMA, name, 4, whole, nowhere, (1, 9)),
        initial_values(LLAMA, "x", 3, whole, nowhere, (1, 9)),
    ):
        assert not torch.equal(full[:1, :9], other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "not a multiple of num_kv_heads=3"),
        ({"head_width": 5}, "head_width=5 is odd"),
        ({"width": 0}, "greater than 0"),
        ({"windows": ()}, "at least 1 item"),
        ({"windows": (4, -1)}, "greater than or equal to 0"),
        ({"logit_softcap": 0.0}, "greater than 0"),
        ({"attention_softcap": float("inf")}, "finite"),
        ({"activation": "relu"}, "'silu' or 'gelu_tanh'"),
        ({"rope_scaling": {"factor": 2.0, "beta_fast": 3.0}}, "original_max_positions"),
        ({"widht": 12}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        DecoderConfig(**(LLAMA.model_dump() | changes))


def test_misused_inputs_are_refused_by_name():
    decoder, boundaries = make(LLAMA), torch.tensor([0, 4], dtype=torch.int32)
    cache = KeyValueCache(LLAMA, 1, 4, torch.device("cpu"), torch.float64)
    with pytest.raises(ValueError, match=r"tokens have shape \(4,\)"):
        decoder(tokens(4))
    with pytest.raises(ValueError, match=r"received 2 row\(s\)"):
        decoder(tokens(2, 4), cu_seqlens=boundaries)
    with pytest.raises(ValueError, match="and a cache"):
        decoder(tokens(1, 4), cu_seqlens=boundaries, cache=cache)
    with pytest.raises(ValueError, match="holds 4 positions"):
        decoder(tokens(1, 5), cache=cache)
    with pytest.raises(ValueError, match="holds 1 sequences"):
        decoder(tokens(2, 3), cache=cache)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_row_over_a_context_group_has_one_process_loss_and_gradients(num_ranks):
    """Four layers with windows, softcap, sinks and query/key norms, tied embeddings, documents across every border."""
    worker = Path(__file__).parent / "context_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), str(worker)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for errors in json.loads(done.stdout).values():
        assert errors["loss"] < 1e-12 and errors["gradients"] < 1e-11
