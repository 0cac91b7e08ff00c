"""Conversations: a user's supervised samples, preference pairs and prompts, from records to tokens.

A text is plain text, tokenized as it stands; messages go through the tokenizer's chat template.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from .packing import Sample
from .record import BadRecord, Record, read_records, require
from .tokenizer import ChatTokenizer

ROLES = ("system", "user", "assistant", "tool")
TEXT_OR_MESSAGES = (str, list)


@dataclass(frozen=True)
class Pair:
    prompt_ids: list[int]
    chosen: Sample  # the whole sequence, prompt included; only the completion is supervised
    rejected: Sample
    source: str


@dataclass(frozen=True)
class Prompt:
    prompt: str | list[dict]  # as given
    ids: list[int]
    columns: dict  # every other key of the record, for reward functions
    source: str


def validate_messages(value: object, source: str) -> list[dict]:
    """The messages unchanged, or a BadRecord naming the first wrong one."""
    if not isinstance(value, list) or not value:
        raise BadRecord(source, "has no messages", "give a non-empty list of {role, content}")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else None
            raise BadRecord(source, f"message {number} has the unknown role {role!r}", f"use one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise BadRecord(source, f"message {number} has no text as its content", "make content a string")
    return value


def read_supervised(paths: Iterable[str | Path], tokenizer: ChatTokenizer, max_tokens: int | None) -> list[Sample]:
    """Samples from `messages`, or `prompt` and `completion`. One without a supervised token, or too long, is refused."""
    samples = []
    for record in _records(paths):
        if "messages" in record.value:
            messages = validate_messages(record.value["messages"], record.source)
            sample = _conversation([], messages, tokenizer, record.source)
        else:
            prompt = require(record, "prompt", TEXT_OR_MESSAGES)
            completion = require(record, "completion", TEXT_OR_MESSAGES)
            sample = _sample(prompt, completion, tokenizer, record.source)
        samples.append(_checked(sample, max_tokens))
    return samples


def read_preferences(paths: Iterable[str | Path], tokenizer: ChatTokenizer, max_tokens: int | None) -> list[Pair]:
    """Pairs from `prompt`, `chosen`, `rejected`. Two whole conversations without a prompt share it as first messages."""
    pairs = []
    for record in _records(paths):
        chosen, rejected = (require(record, key, TEXT_OR_MESSAGES) for key in ("chosen", "rejected"))
        prompt, chosen, rejected = _with_prompt(record, chosen, rejected)
        good, bad = (_checked(_sample(prompt, one, tokenizer, record.source), max_tokens) for one in (chosen, rejected))
        if good.ids == bad.ids:
            raise BadRecord(record.source, "chosen and rejected are the same", "give two different answers")
        pairs.append(Pair(_prompt_ids(prompt, tokenizer, record.source), good, bad, record.source))
    return pairs


def read_prompts(paths: Iterable[str | Path], tokenizer: ChatTokenizer) -> list[Prompt]:
    prompts = []
    for record in _records(paths):
        prompt = require(record, "prompt", TEXT_OR_MESSAGES)
        ids = _prompt_ids(prompt, tokenizer, record.source)
        if not ids:
            raise BadRecord(record.source, "the prompt is empty", "write something to complete")
        columns = {key: value for key, value in record.value.items() if key != "prompt"}
        prompts.append(Prompt(prompt, ids, columns, record.source))
    return prompts


def require_room(prompts: Iterable[Prompt], max_new_tokens: int, max_positions: int) -> None:
    """Refuse, by file and line, a prompt that leaves fewer than `max_new_tokens` of the model's positions."""
    for prompt in prompts:
        if len(prompt.ids) + max_new_tokens > max_positions:
            problem = (
                f"{len(prompt.ids)} tokens and max_new_tokens = {max_new_tokens} exceed the model's {max_positions} positions"
            )
            raise BadRecord(prompt.source, problem, "shorten the prompt or lower max_new_tokens")


def _records(paths: Iterable[str | Path]) -> Iterator[Record]:
    for path in paths:
        yield from read_records(path)


def _with_prompt(record: Record, chosen: str | list, rejected: str | list) -> tuple:
    """(prompt, chosen, rejected), the prompt taken off two whole conversations where they carry it themselves."""
    if isinstance(record.value.get("prompt"), list) or isinstance(chosen, str) or isinstance(rejected, str):
        return require(record, "prompt", TEXT_OR_MESSAGES), chosen, rejected
    chosen, rejected = (validate_messages(one, record.source) for one in (chosen, rejected))
    shared = takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
    prompt = [message for message, _ in shared]
    if len(prompt) == min(len(chosen), len(rejected)):
        raise BadRecord(record.source, "one of chosen and rejected begins with the other", "give two different answers")
    if not prompt and "prompt" not in record.value:
        raise BadRecord(record.source, "chosen and rejected share no first message", "add the prompt they answer")
    if not prompt:
        prompt = [{"role": "user", "content": require(record, "prompt", str)}]
        return prompt, chosen, rejected
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def _prompt_ids(prompt: str | list, tokenizer: ChatTokenizer, source: str) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    try:
        return tokenizer.encode_prompt(validate_messages(prompt, source))
    except BadRecord:
        raise
    except ValueError as error:
        raise BadRecord(source, *_problem_and_remedy(error)) from None


def _sample(prompt: str | list, completion: str | list, tokenizer: ChatTokenizer, source: str) -> Sample:
    if isinstance(prompt, str) and isinstance(completion, str):
        prompt_ids, completion_ids = tokenizer.encode(prompt), tokenizer.encode(completion)
        supervised = [False] * len(prompt_ids) + [True] * (len(completion_ids) + 1)
        return Sample([*prompt_ids, *completion_ids, tokenizer.end_id], supervised, source)
    if isinstance(prompt, str):
        raise BadRecord(source, "the prompt is text and its completion is messages", "give both as text or both as messages")
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return _conversation(validate_messages(prompt, source), validate_messages(completion, source), tokenizer, source)


def _conversation(prompt: list[dict], completion: list[dict], tokenizer: ChatTokenizer, source: str) -> Sample:
    """The assistant's tokens of the completion are supervised, those of the prompt are not."""
    try:
        ids, supervised = tokenizer.encode_conversation([*prompt, *completion])
        opening = tokenizer.encode_prompt(prompt) if prompt else []
    except ValueError as error:
        raise BadRecord(source, *_problem_and_remedy(error)) from None
    if completion[0]["role"] == "assistant" and ids[: len(opening)] != opening:
        problem = "the chat template renders the prompt differently once it is answered"
        raise BadRecord(source, problem, "correct the template, or give the whole as `messages`")
    boundary = len(opening) if completion[0]["role"] == "assistant" else _num_tokens(prompt, tokenizer)
    return Sample(ids, [flag and place >= boundary for place, flag in enumerate(supervised)], source)


def _num_tokens(prompt: list[dict], tokenizer: ChatTokenizer) -> int:
    """Tokens of a prompt that a non-assistant message follows."""
    return len(tokenizer.encode_conversation(prompt)[0]) if prompt else 0


def _checked(sample: Sample, max_tokens: int | None) -> Sample:
    if not any(sample.supervised[1:]):
        raise BadRecord(sample.source, "no token of the sample is supervised", "give it an assistant's answer")
    if max_tokens is not None and len(sample.ids) > max_tokens:
        raise BadRecord(
            sample.source, f"has {len(sample.ids)} tokens, more than {max_tokens}", "shorten it or raise max_tokens"
        )
    return sample


def _problem_and_remedy(error: ValueError) -> tuple[str, str]:
    problem, _, remedy = str(error).partition("; ")
    return problem, remedy or "correct the record"
