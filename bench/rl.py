"""A GRPO step with its generation: our stage beside a plain transformers and torch loop (`generate`, then full logits).

Run     warpline bench rl [--quick] [--out DIR]
Expect  a row each, see `stage`. The same prompts and numbers of completions; what is drawn differs, so losses are not compared,
        and a step's tokens are those that its update reads. Passes: generation, old log-probabilities, and 3 of the update.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..data.conversation import Prompt, read_prompts
from ..data.packing import windows_of_step
from ..data.task import exact_match
from ..data.tokenizer import ChatTokenizer
from ..stages import rl
from ..stages.parts.seed import seed_of
from .stage import StageCase, ground, measure_stage, model_folder, optimizer, our_loop, plain_loop, size_of, stage_dtype

measure_case = measure_stage
GROUP, NEW_TOKENS = 4, 16


def cases(device: torch.device, is_quick: bool) -> Iterator[StageCase]:
    size = size_of(device, is_quick)
    folder, model = ground(device, size), model_folder(device, size)
    file = folder / "data" / "rl.jsonl"
    per_step = max(2, size.tokens_per_step // (GROUP * 64))
    tokenizer = ChatTokenizer.load(model)

    def config(steps: int) -> rl.RlStageConfig:
        return rl.RlStageConfig(
            steps=steps, optimizer=optimizer(), prompts_per_step=per_step, completions_per_prompt=GROUP,
            max_new_tokens=NEW_TOKENS, checkpoint_every_steps=10**6, start=str(model), files=[str(file)],
        )  # fmt: skip

    def batches(steps: int) -> Iterator[tuple[ChatTokenizer, list[Prompt]]]:
        prompts = read_prompts([file], tokenizer)
        for step in range(steps):
            order = windows_of_step(len(prompts), per_step, step, seed_of(0, "rl", "order"))
            yield tokenizer, [prompts[index] for index in order]

    yield StageCase(
        "rl", size, model,
        {"warpline": our_loop("rl", rl.main, config), "transformers + torch": plain_loop(model, device, batches, grpo_step)},
        5.0, stage_dtype(device), is_checked=False,
    )  # fmt: skip


def grpo_step(model: Any, batch: tuple[ChatTokenizer, list[Prompt]]) -> tuple[Tensor, float]:
    """Left-padded generation, rewards, group advantages, and the clipped loss at its first update."""
    tokenizer, prompts = batch
    device = next(model.parameters()).device
    width = max(len(prompt.ids) for prompt in prompts)
    tokens = torch.tensor([[0] * (width - len(prompt.ids)) + list(prompt.ids) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts], device=device)
    end = tokenizer.end_id
    drawn = model.generate(
        tokens, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=NEW_TOKENS,
        num_return_sequences=GROUP, pad_token_id=0, eos_token_id=end,
    )  # fmt: skip
    completions = drawn[:, width:]
    is_after_end = ((completions == end).cumsum(1) - (completions == end).long()) > 0
    counted = ~is_after_end
    rewards = rewards_of(tokenizer, prompts, completions, counted).to(device)
    groups = rewards.view(-1, GROUP)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    whole_mask = torch.cat([mask.repeat_interleave(GROUP, 0), counted.long()], 1)
    with torch.no_grad():
        old = completion_logprobs(model, drawn, whole_mask, width)
    ratio = (completion_logprobs(model, drawn, whole_mask, width) - old).exp()
    surrogate = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    return -(surrogate * counted).sum() / counted.sum(), float(whole_mask.sum())


def completion_logprobs(model: nn.Module, tokens: Tensor, mask: Tensor, width: int) -> Tensor:
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(tokens, attention_mask=mask, position_ids=positions).logits[:, width - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, tokens[:, width:, None])[..., 0]


def rewards_of(tokenizer: ChatTokenizer, prompts: list[Prompt], completions: Tensor, counted: Tensor) -> Tensor:
    texts = [tokenizer.decode(row[keep].tolist()) for row, keep in zip(completions.cpu(), counted.cpu(), strict=True)]
    repeated = [prompt for prompt in prompts for _ in range(GROUP)]
    answers = [prompt.columns["answer"] for prompt in repeated]
    return torch.tensor(exact_match(repeated, texts, completions.tolist(), answers))
