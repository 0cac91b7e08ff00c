import re

import pytest

from warpline.data.task import FAMILIES, exact_match, is_held_out, make_tasks
from warpline.data.tokenizer import train_tokenizer

SIZES = {"addition": 2, "sorting": 6, "reversal": 6, "counting": 8, "shifting": 5}


def question(record):
    return record["prompt"][0]["content"]


def test_train_and_held_out_instances_are_disjoint_for_any_seeds():
    held_out = {question(record) for seed in (0, 7) for record in make_tasks(SIZES, 60, held_out=True, seed=seed)}
    train = {question(record) for seed in (0, 7, 1_000_003) for record in make_tasks(SIZES, 3000, held_out=False, seed=seed)}
    assert len(held_out) > 500 and len(train) > 8_000
    assert not held_out & train
    assert all(map(is_held_out, held_out)) and not any(map(is_held_out, train))


def test_held_out_instances_are_all_different():
    records = make_tasks(SIZES, 90, held_out=True, seed=3)
    assert len({question(record) for record in records}) == len(records) == 450


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_right(family):
    for record in make_tasks({family: 5}, 50, held_out=False, seed=1):
        kind, _, body = question(record).partition(": ")
        key = kind[-1]
        right = {
            "Add": lambda text: str(sum(int(number) for number in text.split(" + "))),
            "Sort": lambda text: "".join(sorted(text)),
            "Reverse": lambda text: text[::-1],
            "Shift": lambda text, key=key: "".join(str((int(digit) + int(key)) % 10) for digit in text),
            "Count": lambda text, key=key: str(text.count(key)),
        }[kind.split()[0]](body)
        assert record["answer"] == right
        assert record["messages"] == [*record["prompt"], {"role": "assistant", "content": right}]


def test_what_varies_is_one_token_a_character_whatever_the_tokenizer_has_read():
    digits = ["Sort: 1234 12 34", "7 77 777 5 + 3 = 8"] * 50
    for texts in (["some text", "and other"], digits):
        tokenizer = train_tokenizer(texts, 300)
        for record in make_tasks(SIZES, 20, held_out=False, seed=5):
            for text in (question(record), record["answer"]):
                tokens = tokenizer.encode(text).tokens
                assert [token for token in tokens if re.search("[0-9]", token)] == re.findall("[0-9]", text)


def test_demonstrations_are_wrong_in_the_share_asked_and_answers_never():
    clean = make_tasks(SIZES, 400, held_out=False, seed=4)
    slipped = make_tasks(SIZES, 400, held_out=False, seed=4, wrong_share=0.25)
    assert [record["answer"] for record in clean] == [record["answer"] for record in slipped]
    wrong = [record for record in slipped if record["messages"][-1]["content"] != record["answer"]]
    assert 0.21 < len(wrong) / len(slipped) < 0.29
    assert all(
        sorted(record["messages"][-1]["content"]) == sorted(record["answer"])
        for record in wrong
        if record["family"] == "sorting"
    )


def test_families_are_interleaved_and_seeded():
    records = make_tasks(SIZES, 5, held_out=False, seed=2)
    assert [record["family"] for record in records] == list(SIZES) * 5
    assert records == make_tasks(SIZES, 5, held_out=False, seed=2) != make_tasks(SIZES, 5, held_out=False, seed=3)


def test_the_grader_takes_texts_and_messages_and_nothing_but_the_answer():
    completions = ["4", " 4\n", "4 5", [{"role": "assistant", "content": "4"}], ""]
    assert exact_match([None] * 5, completions, [[]] * 5, ["4"] * 5, family=["x"] * 5) == [1.0, 1.0, 0.0, 1.0, 0.0]


def test_impossible_tasks_are_refused():
    with pytest.raises(ValueError, match="'juggling' does not exist"):
        make_tasks({"juggling": 3}, 1, held_out=False, seed=0)
    with pytest.raises(ValueError, match="too few different held-out instances"):
        make_tasks({"addition": 1}, 500, held_out=True, seed=0)
