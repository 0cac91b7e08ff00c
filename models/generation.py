"""Sampling from a decoder with a key/value cache, in batches, with the log-probability of every sampled token.

Tokens are drawn by the Gumbel-max rule from the logits; the reported log-probabilities come from `linear_logprob`, the function
that the trainers use, at the same temperature. Sequences that ended leave the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.linear_logprob import linear_logprob
from .decoder import Decoder, KeyValueCache


@dataclass(frozen=True)
class Completion:
    """Sampled token ids (the end token included), their log-probabilities in nats, and whether an end token was reached."""

    ids: list[int]
    logprobs: list[float]
    ended: bool


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    sequences_per_batch: int = 512,
    cache_dtype: torch.dtype | None = None,
) -> list[Completion]:
    """One completion per prompt, in the order of `prompts` (token ids, none empty).

    temperature 0 takes the most likely token, and reports log-probabilities at temperature 1. Log-probabilities are fp64 for an
    fp64 decoder, else fp32. `cache_dtype` defaults to the decoder's.
    """
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; use 0 for the most likely token or a positive number")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} has no token; give every prompt at least one, such as the document token")
        limit = decoder.config.max_positions - max_new_tokens
        if len(prompt) > limit:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} and max_positions="
                f"{decoder.config.max_positions} at most {limit} fit: shorten the prompt or the completion"
            )
    completions = []
    for start in range(0, len(prompts), sequences_per_batch):
        batch = _Batch(decoder, prompts[start : start + sequences_per_batch], max_new_tokens, tuple(end_ids), cache_dtype)
        completions += batch.run(temperature, generator)
    return completions


class _Batch:
    """The sequences of one batch that are still growing, and the completions of all."""

    def __init__(
        self, decoder: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, end_ids: tuple[int, ...], cache_dtype
    ):
        self.decoder, self.prompts, self.max_new_tokens, self.end_ids = decoder, prompts, max_new_tokens, end_ids
        weight = decoder.output_weight
        longest = max(len(prompt) for prompt in prompts)
        self.cache = KeyValueCache(
            decoder.config, len(prompts), longest + max_new_tokens, weight.device, cache_dtype or weight.dtype
        )
        self.ids: list[list[int]] = [[] for _ in prompts]
        self.logprobs: list[list[float]] = [[] for _ in prompts]
        self.ended = [False] * len(prompts)

    def run(self, temperature: float, generator: torch.Generator | None) -> list[Completion]:
        hidden_BD, row_B = self._prefill(), list(range(len(self.prompts)))
        for num_new in range(1, self.max_new_tokens + 1):
            token_B, logprob_B = self._sample(hidden_BD, temperature, generator)
            growing = self._record(row_B, token_B.tolist(), logprob_B.tolist())
            if not growing or num_new == self.max_new_tokens:
                break
            if len(growing) < len(row_B):
                kept = torch.tensor(growing, device=token_B.device)
                self.cache.select(kept)
                token_B, row_B = token_B[kept], [row_B[index] for index in growing]
            hidden_BD = self.decoder(token_B[:, None], cache=self.cache)[:, 0]
            self.cache.length_B += 1
            self.cache.longest += 1
        return [Completion(*parts) for parts in zip(self.ids, self.logprobs, self.ended, strict=True)]

    def _prefill(self) -> Tensor:
        device = self.decoder.output_weight.device
        length_B = torch.tensor([len(prompt) for prompt in self.prompts], dtype=torch.int32)
        longest = int(length_B.max())
        tokens_BS = torch.zeros(len(self.prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(self.prompts):
            tokens_BS[row, : len(prompt)] = torch.tensor(prompt)
        hidden_BSD = self.decoder(tokens_BS.to(device), cache=self.cache)
        self.cache.length_B = length_B.to(device)
        self.cache.longest = longest
        return hidden_BSD[torch.arange(len(self.prompts), device=device), self.cache.length_B.long() - 1]

    def _sample(self, hidden_BD: Tensor, temperature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        weight_VD = self.decoder.output_weight
        softcap = self.decoder.config.logit_softcap
        # At least fp32: around 32, bf16 goes in steps of 0.25, noise would tie and the first index win.
        logits_BV = F.linear(hidden_BD.to(weight_VD.dtype), weight_VD)
        logits_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
        if softcap is not None:
            logits_BV = torch.tanh(logits_BV / softcap).mul_(softcap)
        if temperature > 0:
            noise_BV = torch.empty_like(logits_BV).exponential_(generator=generator)
            logits_BV = logits_BV.div_(temperature).sub_(noise_BV.log_())
        token_B = logits_BV.argmax(-1)
        stats = linear_logprob(hidden_BD, weight_VD, token_B, softcap=softcap, temperature=temperature or 1.0)
        return token_B, stats.logprob_T

    def _record(self, row_B: list[int], tokens: list[int], logprobs: list[float]) -> list[int]:
        """Append one token to each growing sequence; return the batch indices of those that go on."""
        growing = []
        for index, (row, token, logprob) in enumerate(zip(row_B, tokens, logprobs, strict=True)):
            self.ids[row].append(token)
            self.logprobs[row].append(logprob)
            if token in self.end_ids:
                self.ended[row] = True
            else:
                growing.append(index)
        return growing
