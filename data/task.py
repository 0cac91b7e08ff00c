"""Generated tasks with a verifiable answer: seeded families, as chat `messages`, each with a grader.

A family draws a question and its only right answer from a `random.Random`. What varies is digits, written together: the
tokenizer makes each a token of its own, so that the text it was trained on has no say in how many tokens an answer has.
Whether an instance belongs to the training or the held-out side is a pure function of its question (a hash), so the two sides
are disjoint whatever the seeds and counts.
"""

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .record import BadData

HELD_OUT_ONE_IN = 8  # share of all possible instances that only evaluation sees


@dataclass(frozen=True)
class Instance:
    question: str
    answer: str


def _digits(rng: random.Random, size: int) -> list[int]:
    """`size - 2` to `size` of them, two at least."""
    return [rng.randrange(10) for _ in range(rng.randint(max(2, size - 2), size))]


def _joined(digits: Iterable[int]) -> str:
    return "".join(map(str, digits))


def addition(rng: random.Random, size: int) -> Instance:
    """The sum of a number of up to `size` digits and a digit."""
    first, second = rng.randrange(10**size), rng.randrange(10)
    return Instance(f"Add: {first} + {second}", str(first + second))


def sorting(rng: random.Random, size: int) -> Instance:
    """`size - 2` to `size` digits in ascending order."""
    digits = _digits(rng, size)
    return Instance(f"Sort: {_joined(digits)}", _joined(sorted(digits)))


def reversal(rng: random.Random, size: int) -> Instance:
    """`size - 2` to `size` digits, last first."""
    digits = _digits(rng, size)
    return Instance(f"Reverse: {_joined(digits)}", _joined(reversed(digits)))


def counting(rng: random.Random, size: int) -> Instance:
    """How often one digit occurs among `size` digits drawn from three."""
    pool = rng.sample(range(10), 3)
    digits = [rng.choice(pool) for _ in range(size)]
    return Instance(f"Count {pool[0]}: {_joined(digits)}", str(digits.count(pool[0])))


def shifting(rng: random.Random, size: int) -> Instance:
    """A number from 1 to 3 added to each of `size - 2` to `size` digits, modulo ten."""
    shift = rng.randint(1, 3)
    digits = _digits(rng, size)
    return Instance(f"Shift {shift}: {_joined(digits)}", _joined((digit + shift) % 10 for digit in digits))


FAMILIES: dict[str, Callable[[random.Random, int], Instance]] = {
    "addition": addition,
    "sorting": sorting,
    "reversal": reversal,
    "counting": counting,
    "shifting": shifting,
}


def is_held_out(question: str) -> bool:
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_ONE_IN == 0


def make_tasks(
    sizes: dict[str, int], count_per_family: int, *, held_out: bool, seed: int, wrong_share: float = 0.0
) -> list[dict]:
    """Task records, families interleaved: {family, prompt (messages), answer, messages (prompt and a demonstrated answer)}.

    `answer` is right; the demonstration is, like a person's, wrong in a share `wrong_share` of the records: a near miss.
    Instances of the held-out side are all different; training instances may repeat where a family is small.
    """
    unknown = sorted(set(sizes) - set(FAMILIES))
    if unknown:
        raise BadData(f"task family {unknown[0]!r} does not exist; choose among {', '.join(FAMILIES)}")
    per_family = [_draw(family, sizes[family], count_per_family, held_out, seed, wrong_share) for family in sizes]
    return [record for group in zip(*per_family, strict=True) for record in group]


def _draw(family: str, size: int, count: int, held_out: bool, seed: int, wrong_share: float) -> list[dict]:
    rng = random.Random(f"{seed}/{family}/{size}/{held_out}")
    slips = random.Random(f"{seed}/{family}/slips")
    records: list[dict] = []
    seen: set[str] = set()
    for _ in range(count * HELD_OUT_ONE_IN * 50):
        if len(records) == count:
            return records
        instance = FAMILIES[family](rng, size)
        if is_held_out(instance.question) != held_out or (held_out and instance.question in seen):
            continue
        seen.add(instance.question)
        prompt = [{"role": "user", "content": instance.question}]
        shown = near_miss(slips, instance.answer) if slips.random() < wrong_share else instance.answer
        messages = [*prompt, {"role": "assistant", "content": shown}]
        records.append({"family": family, "prompt": prompt, "answer": instance.answer, "messages": messages})
    if len(records) == count:
        return records
    raise BadData(
        f"task family {family!r} of size {size} has too few different held-out instances: {len(records)} found, {count} asked; "
        "raise its size or lower the count"
    )


def near_miss(rng: random.Random, answer: str) -> str:
    """A wrong answer such as a person gives: two of its digits exchanged, or, where all are equal, the last off by one."""
    parts = list(answer)
    different = [(i, j) for i in range(len(parts)) for j in range(i) if parts[i] != parts[j]]
    if different:
        i, j = rng.choice(different)
        parts[i], parts[j] = parts[j], parts[i]
    else:
        parts[-1] = str((int(parts[-1]) + rng.choice((1, 9))) % 10)
    return "".join(parts)


def completion_text(completion: str | Sequence[dict]) -> str:
    """The text of a completion given as plain text or as messages."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def exact_match(prompts, completions, completion_ids, answer, **columns) -> list[float]:
    """The grader of every family, as a reward function: 1.0 where the completion, stripped, is the answer, else 0.0."""
    return [float(completion_text(text).strip() == right) for text, right in zip(completions, answer, strict=True)]
