"""Sampling from a decoder with a key/value cache, in batches, with the log-probability of every sampled token.

A token is where a uniform number falls among the cumulated probabilities (fp64), so what is drawn depends on the prompt and its
own numbers, not on the batch it lies in. The reported log-probabilities come from `linear_logprob`, the function that the
trainers use, at the same temperature. Sequences that ended leave the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.linear_logprob import linear_logprob
from .decoder import KeyValueCache

DRAWN_NUMBERS = 2**24  # probabilities that are cumulated at a time


@dataclass(frozen=True)
class Completion:
    """Sampled token ids (the end token included), their log-probabilities in nats, and whether an end token was reached."""

    ids: list[int]
    logprobs: list[float]
    ended: bool


@torch.no_grad()
def generate(
    decoder: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    temperature: float = 1.0,
    uniform: Tensor | None = None,
    sequences_per_batch: int = 512,
    cache_dtype: torch.dtype | None = None,
) -> list[Completion]:
    """One completion per prompt, in the order of `prompts` (token ids, none empty).

    `decoder`: a Decoder, or what stands for one (`parallel/gather.py`). `uniform`: numbers in [0, 1), [prompts, max_new_tokens]
    on the host, that decide each token (default: drawn here). temperature 0 takes the most likely token, and reports
    log-probabilities at temperature 1. Log-probabilities are fp64 for an fp64 decoder, else fp32. `cache_dtype` defaults to the
    decoder's.
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
    if uniform is None:
        uniform = torch.rand(len(prompts), max_new_tokens, dtype=torch.float64)
    if tuple(uniform.shape) != (len(prompts), max_new_tokens):
        raise ValueError(f"uniform is {list(uniform.shape)}; expected [{len(prompts)}, {max_new_tokens}]: one number a token")
    completions = []
    for start in range(0, len(prompts), sequences_per_batch):
        rows = slice(start, start + sequences_per_batch)
        batch = _Batch(decoder, prompts[rows], max_new_tokens, tuple(end_ids), cache_dtype)
        completions += batch.run(temperature, uniform[rows].to(decoder.output_weight.device))
    return completions


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """[B]: where each row's number in [0, 1) falls among its cumulated probabilities; the last token where they are NaN."""
    found = []
    rows = max(1, DRAWN_NUMBERS // logits_BV.shape[1])
    for logits, uniform in zip(logits_BV.split(rows), uniform_B.split(rows), strict=True):
        cumulated = logits.softmax(-1).double().cumsum(-1)
        total = cumulated[:, -1:]
        # Below the total even where the product rounds to it: behind it are tokens of probability 0.
        place = torch.minimum(uniform[:, None].double() * total, torch.nextafter(total, torch.zeros_like(total)))
        found.append(torch.searchsorted(cumulated, place, right=True)[:, 0].clamp(max=logits.shape[1] - 1))
    return torch.cat(found)


class _Batch:
    """The sequences of one batch that are still growing, and the completions of all."""

    def __init__(
        self, decoder: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, end_ids: tuple[int, ...], cache_dtype
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

    def run(self, temperature: float, uniform_BS: Tensor) -> list[Completion]:
        hidden_BD, row_B = self._prefill(), list(range(len(self.prompts)))
        for num_new in range(1, self.max_new_tokens + 1):
            token_B, logprob_B = self._sample(hidden_BD, temperature, uniform_BS[:, num_new - 1])
            growing = self._record(row_B, token_B.tolist(), logprob_B.tolist())
            if not growing or num_new == self.max_new_tokens:
                break
            if len(growing) < len(row_B):
                kept = torch.tensor(growing, device=token_B.device)
                self.cache.select(kept)
                token_B, row_B, uniform_BS = token_B[kept], [row_B[index] for index in growing], uniform_BS[kept]
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

    def _sample(self, hidden_BD: Tensor, temperature: float, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
        weight_VD = self.decoder.output_weight
        softcap = self.decoder.config.logit_softcap
        logits_BV = F.linear(hidden_BD.to(weight_VD.dtype), weight_VD)
        logits_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
        if softcap is not None:
            logits_BV = torch.tanh(logits_BV / softcap).mul_(softcap)
        token_B = draw(logits_BV.div_(temperature), uniform_B) if temperature > 0 else logits_BV.argmax(-1)
        stats = linear_logprob(hidden_BD, weight_VD, token_B, softcap=softcap, temperature=temperature or 1.0)
        return token_B, stats.logprob_T

    def _record(self, row_B: list[int], tokens: list[int], logprobs: list[float]) -> list[int]:
        """Append one token to each growing sequence; return the batch indices of those that go on."""
        growing = []
        for index, (row, token, logprob) in enumerate(zip(row_B, tokens, logprobs, strict=True)):
            if not math.isfinite(logprob):
                raise ValueError(
                    f"received log-probability {logprob} for token {len(self.ids[row])} of a completion; expected finite "
                    "logits: the model's weights overflow or are not finite, use an earlier checkpoint or another precision"
                )
            self.ids[row].append(token)
            self.logprobs[row].append(logprob)
            if token in self.end_ids:
                self.ended[row] = True
            else:
                growing.append(index)
        return growing
