import pytest
import torch

from warpline.data.packing import Sample, pack
from warpline.kernels.linear_logprob import linear_logprob
from warpline.models.decoder import Decoder, DecoderConfig
from warpline.models.generation import DRAWN_NUMBERS, draw, generate

VOCAB, END = 61, 60


CAPPED = {
    "query_key_norm": False, "windows": (4, 0), "attention_softcap": 1.0, "logit_softcap": 2.0, "attention_sinks": True,
    "zero_centred_norms": True, "post_norms": True, "scale_embeddings": True, "tie_embeddings": False,
}  # fmt: skip


def decoder_of(dtype: torch.dtype, width: int = 32, layers: int = 3, **changes) -> Decoder:
    config = DecoderConfig(
        vocab_size=VOCAB, width=width, num_layers=layers, num_heads=4, num_kv_heads=2, head_width=8, mlp_width=3 * width,
        **{"query_key_norm": True, "init_std": 0.15, **changes},
    )  # fmt: skip
    return Decoder(config).initialise(torch.Generator().manual_seed(1)).to(dtype)


def prompts_of(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def uniform_of(count: int, max_new_tokens: int, seed: int) -> torch.Tensor:
    return torch.rand(count, max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def trainer_logprobs(decoder: Decoder, prompts, completions, temperature: float) -> torch.Tensor:
    """What a trainer computes for the sampled tokens: one packed forward over prompts and completions."""
    samples = [
        Sample([*prompt, *completion.ids], [False] * len(prompt) + [True] * len(completion.ids), "test")
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    batch = pack(samples)

    def head(hidden, weight):
        return linear_logprob(
            hidden[0], weight, batch.target_T, temperature=temperature, softcap=decoder.config.logit_softcap
        ).logprob_T

    return decoder(batch.tokens_T[None], cu_seqlens=batch.cu_seqlens, head=head)[batch.target_T >= 0].detach()


@pytest.mark.parametrize("changes", [{}, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reported_logprobs_equal_the_trainers_in_fp64(temperature, changes):
    decoder, prompts = decoder_of(torch.float64, **changes), prompts_of(40)
    completions = generate(
        decoder, prompts, max_new_tokens=20, end_ids=[END], temperature=temperature, uniform=uniform_of(40, 20, 3),
        sequences_per_batch=17,
    )  # fmt: skip
    reported = torch.tensor([value for completion in completions for value in completion.logprobs], dtype=torch.float64)
    trained = trainer_logprobs(decoder, prompts, completions, temperature)
    assert len(reported) > 200
    assert (reported - trained).abs().max() <= 1e-9


def test_reported_logprobs_are_close_to_the_trainers_in_fp32():
    decoder, prompts = decoder_of(torch.float32, width=64, layers=4), prompts_of(200)
    completions = generate(decoder, prompts, max_new_tokens=24, end_ids=[END], uniform=uniform_of(200, 24, 3))
    reported = torch.tensor([value for completion in completions for value in completion.logprobs])
    difference = (reported - trainer_logprobs(decoder, prompts, completions, 1.0)).abs().double()
    assert difference.mean() <= 1e-6
    assert difference.quantile(0.999) <= 1e-5


def test_greedy_tokens_are_the_full_forwards_argmax():
    decoder, prompts = decoder_of(torch.float64), prompts_of(9)
    for prompt, completion in zip(
        prompts, generate(decoder, prompts, max_new_tokens=8, end_ids=[END], temperature=0.0), strict=True
    ):
        ids = list(prompt)
        for token in completion.ids:
            hidden = decoder(torch.tensor([ids]))[0, -1]
            assert int((decoder.output_weight @ hidden).argmax()) == token
            ids.append(token)


@pytest.mark.parametrize("changes", [{}, {**CAPPED, "logit_softcap": 0.7}], ids=["plain", "capped"])
def test_sampling_follows_the_models_distribution(changes):
    decoder = decoder_of(torch.float64, **changes)
    prompt = [3, 5, 7]
    completions = generate(decoder, [prompt] * 20000, max_new_tokens=1, end_ids=[END], uniform=uniform_of(20000, 1, 4))
    counts = torch.bincount(torch.tensor([completion.ids[0] for completion in completions]), minlength=VOCAB).double()
    logits, cap = (decoder(torch.tensor([prompt]))[0, -1] @ decoder.output_weight.T).double(), decoder.config.logit_softcap
    expected = (logits if cap is None else cap * torch.tanh(logits / cap)).softmax(0).detach() * 20000
    likely = expected > 5
    chi_squared = ((counts - expected)[likely] ** 2 / expected[likely]).sum() / likely.sum()
    assert chi_squared < 1.8


@torch.no_grad()
def test_sampling_from_large_equal_bf16_logits_is_uniform():
    decoder = decoder_of(torch.bfloat16, tie_embeddings=False)
    decoder.lm_head.weight[:] = decoder(torch.tensor([[3]]))[0, -1]  # every logit is |hidden|² = 32
    completions = generate(decoder, [[3]] * 20000, max_new_tokens=1, end_ids=[], uniform=uniform_of(20000, 1, 4))
    counts = torch.bincount(torch.tensor([completion.ids[0] for completion in completions]), minlength=VOCAB).double()
    expected = 20000 / VOCAB
    assert ((counts - expected) ** 2 / expected).sum() / VOCAB < 1.8


def test_a_completion_ends_at_an_end_token_or_at_the_limit():
    decoder, prompts = decoder_of(torch.float64), prompts_of(60)
    completions = generate(decoder, prompts, max_new_tokens=30, end_ids=[END, 0, 1, 2], uniform=uniform_of(60, 30, 5))
    assert any(completion.ended for completion in completions)
    for completion in completions:
        assert len(completion.ids) == len(completion.logprobs)
        assert not set(completion.ids[:-1]) & {END, 0, 1, 2}
        assert completion.ended == (completion.ids[-1] in {END, 0, 1, 2})
        assert completion.ended or len(completion.ids) == 30


def test_equal_numbers_give_equal_completions_and_others_give_others():
    decoder, prompts = decoder_of(torch.float32), prompts_of(10)
    first, second, other = (
        generate(decoder, prompts, max_new_tokens=5, end_ids=[END], uniform=uniform_of(10, 5, seed)) for seed in (6, 6, 7)
    )
    assert first == second != other


def test_what_a_prompt_is_given_depends_on_no_other_prompt_and_on_no_batch():
    """Alone, in batches of 4, and backwards: the same tokens. In fp64, so that a product's rounding (which does depend on
    its rows) falls between no number and its token."""
    decoder, prompts = decoder_of(torch.float64), prompts_of(10)
    uniform, options = uniform_of(10, 8, 8), {"max_new_tokens": 8, "end_ids": [END, 0, 1, 2, 3]}
    together = [completion.ids for completion in generate(decoder, prompts, uniform=uniform, **options)]
    assert len({len(ids) for ids in together}) > 3, "sequences leave the batch at different times"
    for size in (1, 4):
        found = generate(decoder, prompts, uniform=uniform, sequences_per_batch=size, **options)
        assert [completion.ids for completion in found] == together
    backwards = generate(decoder, prompts[::-1], uniform=uniform.flip(0), **options)
    assert [completion.ids for completion in backwards][::-1] == together


def test_drawn_tokens_follow_the_probabilities():
    """χ² of 100,000 draws over 6 tokens: 99.9 % of fair draws stay below 20.5 at 5 degrees of freedom."""
    weight = torch.tensor([0.5, 0.25, 0.125, 0.1, 0.02, 0.005], dtype=torch.float64)
    logits_BV = weight.log().expand(100_000, -1)
    counts = torch.bincount(draw(logits_BV, uniform_of(100_000, 1, 9)[:, 0]), minlength=6)
    expected = 100_000 * weight
    assert ((counts - expected) ** 2 / expected).sum() < 20.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_token_of_probability_zero_is_drawn_even_at_the_ends(dtype):
    """0, the largest number below 1, and numbers at the borders between tokens, where tokens before, among and behind are
    impossible."""
    impossible = float("-inf")
    logits_V = torch.tensor([impossible, 0.0, impossible, impossible, 1.0, 0.5, impossible], dtype=dtype)
    borders = logits_V.softmax(0).double().cumsum(0)
    places = torch.cat([torch.tensor([0.0, 1 - 2.0**-53, 1 - 2.0**-24], dtype=torch.float64), borders[borders < 1]])
    drawn = draw(logits_V.expand(len(places), -1), places)
    assert drawn.tolist()[:3] == [1, 5, 5] and set(drawn.tolist()) == {1, 4, 5}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value, temperature):
    decoder = decoder_of(torch.float32, tie_embeddings=False)
    with torch.no_grad():
        decoder.lm_head.weight[7, 0] = value
    with pytest.raises(ValueError, match="log-probability nan for token 0 of a completion; expected finite logits"):
        generate(decoder, prompts_of(3), max_new_tokens=2, end_ids=[], temperature=temperature)


def test_rows_are_drawn_in_parts_as_at_once(monkeypatch):
    logits_BV, uniform = torch.randn(50, 11, generator=torch.Generator().manual_seed(1)), uniform_of(50, 1, 10)[:, 0]
    at_once = draw(logits_BV, uniform)
    assert DRAWN_NUMBERS > 50 * 11
    monkeypatch.setattr("warpline.models.generation.DRAWN_NUMBERS", 40)  # three rows at a time
    assert torch.equal(draw(logits_BV, uniform), at_once)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "prompt 0 has no token"),
        ([[1] * 4090], {"max_new_tokens": 10}, "at most 4086 fit"),
        ([[1]], {"temperature": -1.0}, "temperature is -1"),
        ([[1], [2]], {"uniform": torch.zeros(1, 3)}, r"uniform is \[1, 3\]; expected \[2, 3\]"),
    ],
)
def test_impossible_requests_are_refused(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(decoder_of(torch.float32), prompts, **{"max_new_tokens": 3, "end_ids": [END], **options})
