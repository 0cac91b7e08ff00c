import pytest
import torch

from warpline.data.packing import Sample, pack
from warpline.kernels.linear_logprob import linear_logprob
from warpline.models.decoder import Decoder, DecoderConfig
from warpline.models.generation import generate

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
        decoder, prompts, max_new_tokens=20, end_ids=[END], temperature=temperature,
        generator=torch.Generator().manual_seed(3), sequences_per_batch=17,
    )  # fmt: skip
    reported = torch.tensor([value for completion in completions for value in completion.logprobs], dtype=torch.float64)
    trained = trainer_logprobs(decoder, prompts, completions, temperature)
    assert len(reported) > 200
    assert (reported - trained).abs().max() <= 1e-9


def test_reported_logprobs_are_close_to_the_trainers_in_fp32():
    decoder, prompts = decoder_of(torch.float32, width=64, layers=4), prompts_of(200)
    completions = generate(decoder, prompts, max_new_tokens=24, end_ids=[END], generator=torch.Generator().manual_seed(3))
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
    completions = generate(
        decoder, [prompt] * 20000, max_new_tokens=1, end_ids=[END], generator=torch.Generator().manual_seed(4)
    )
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
    completions = generate(decoder, [[3]] * 20000, max_new_tokens=1, end_ids=[], generator=torch.Generator().manual_seed(4))
    counts = torch.bincount(torch.tensor([completion.ids[0] for completion in completions]), minlength=VOCAB).double()
    expected = 20000 / VOCAB
    assert ((counts - expected) ** 2 / expected).sum() / VOCAB < 1.8


def test_a_completion_ends_at_an_end_token_or_at_the_limit():
    decoder, prompts = decoder_of(torch.float64), prompts_of(60)
    completions = generate(
        decoder, prompts, max_new_tokens=30, end_ids=[END, 0, 1, 2], generator=torch.Generator().manual_seed(5)
    )
    assert any(completion.ended for completion in completions)
    for completion in completions:
        assert len(completion.ids) == len(completion.logprobs)
        assert not set(completion.ids[:-1]) & {END, 0, 1, 2}
        assert completion.ended == (completion.ids[-1] in {END, 0, 1, 2})
        assert completion.ended or len(completion.ids) == 30


def test_equal_seeds_give_equal_completions():
    decoder, prompts = decoder_of(torch.float32), prompts_of(10)
    first, second = (
        generate(decoder, prompts, max_new_tokens=5, end_ids=[END], generator=torch.Generator().manual_seed(6))
        for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "prompt 0 has no token"),
        ([[1] * 4090], {"max_new_tokens": 10}, "at most 4086 fit"),
        ([[1]], {"temperature": -1.0}, "temperature is -1"),
    ],
)
def test_impossible_requests_are_refused(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(decoder_of(torch.float32), prompts, **{"max_new_tokens": 3, "end_ids": [END], **options})
