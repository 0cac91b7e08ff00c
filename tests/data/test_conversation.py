import json

import pytest

from warpline.data.conversation import read_preferences, read_prompts, read_supervised, validate_messages
from warpline.data.packing import pack
from warpline.data.record import BadRecord
from warpline.data.tokenizer import DEFAULT_CHAT_TEMPLATE, ChatTokenizer, train_tokenizer

USER = {"role": "user", "content": "Sort: b a"}
GOOD = {"role": "assistant", "content": "a b"}
BAD = {"role": "assistant", "content": "b a"}


@pytest.fixture(scope="module")
def chat() -> ChatTokenizer:
    return ChatTokenizer(train_tokenizer(["Sort: b a", "a b"], 270))


@pytest.fixture
def write(tmp_path):
    def write(*values: dict) -> list:
        path = tmp_path / "some.jsonl"
        path.write_text("\n" + "".join(json.dumps(value) + "\n" for value in values))  # records start on line 2
        return [path]

    return write


def taught(chat: ChatTokenizer, sample) -> str:
    return chat.decode([i for i, flag in zip(sample.ids, sample.supervised, strict=True) if flag], skip_special=False)


def test_every_supervised_form_teaches_the_same_answer(chat, write):
    paths = write(
        {"messages": [USER, GOOD], "family": "sorting"},
        {"prompt": [USER], "completion": [GOOD]},
        {"prompt": [USER], "completion": "a b"},
        {"prompt": "Sort: b a\n", "completion": "a b"},
    )
    samples = read_supervised(paths, chat, max_tokens=64)
    assert [taught(chat, sample) for sample in samples] == ["a b<|end|>"] * 4
    assert samples[0].ids == samples[1].ids == samples[2].ids
    assert chat.decode(samples[0].ids, skip_special=False) == "<|user|>Sort: b a<|end|><|assistant|>a b<|end|>"
    assert chat.decode(samples[3].ids, skip_special=False) == "Sort: b a\na b<|end|>"
    assert [sample.source for sample in samples] == [f"{paths[0]}:{line}" for line in (2, 3, 4, 5)]
    assert int((pack(samples).target_T != -100).sum()) == sum(sum(sample.supervised) for sample in samples)


def test_only_the_completion_of_a_longer_prompt_is_supervised(chat, write):
    paths = write(
        {"prompt": [USER, BAD, USER], "completion": [GOOD]},
        {"prompt": [USER, BAD], "completion": [USER, GOOD, USER, GOOD]},
    )
    first, second = read_supervised(paths, chat, None)
    assert taught(chat, first) == "a b<|end|>"
    assert taught(chat, second) == "a b<|end|>" * 2


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"messages": [USER]}, "no token of the sample is supervised"),
        ({"messages": []}, "has no messages"),
        ({"messages": "hi"}, "has no messages"),
        ({"messages": [{"role": "human", "content": "hi"}]}, "message 1 has the unknown role 'human'; use one of system"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2 has no text as its content"),
        ({"messages": [USER, "hi"]}, "message 2 has the unknown role None"),
        ({"messages": [USER, {"role": "tool", "content": "4"}, GOOD]}, "this chat template has no role tool"),
        ({"messages": [USER, {"role": "assistant", "content": "a b " * 40}]}, "tokens, more than 64"),
        ({"prompt": "x"}, "has no key 'completion'"),
        ({"prompt": "x", "completion": [GOOD]}, "the prompt is text and its completion is messages"),
        ({"prompt": 3, "completion": "x"}, "'prompt' is integer; make it string or array"),
    ],
)
def test_an_unusable_sample_is_refused_with_file_and_line(chat, write, value, reason):
    paths = write({"messages": [USER, GOOD]}, value)
    with pytest.raises(BadRecord) as caught:
        read_supervised(paths, chat, max_tokens=64)
    message = str(caught.value)
    assert message.startswith(f"{paths[0]}:3: ")
    assert reason in message
    assert message.count(str(paths[0])) == 1


def test_a_template_that_changes_an_answered_prompt_is_refused(chat, write):
    template = DEFAULT_CHAT_TEMPLATE.replace("{%- if add_generation_prompt -%}", "{%- if add_generation_prompt -%}!")
    paths = write({"prompt": [USER], "completion": [GOOD]})
    with pytest.raises(BadRecord, match=r"jsonl:2: .*renders the prompt differently"):
        read_supervised(paths, ChatTokenizer(chat.tokenizer, template), None)


def test_every_preference_form_gives_the_same_pair(chat, write):
    paths = write(
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "a b", "rejected": "b a"},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": USER["content"], "chosen": [GOOD], "rejected": [BAD]},
    )
    pairs = read_preferences(paths, chat, max_tokens=64)
    for pair in pairs:
        assert pair.prompt_ids == chat.encode_prompt([USER])
        assert (pair.chosen.ids, pair.rejected.ids) == (pairs[0].chosen.ids, pairs[0].rejected.ids)
        assert (taught(chat, pair.chosen), taught(chat, pair.rejected)) == ("a b<|end|>", "b a<|end|>")
        assert pair.chosen.ids[: len(pair.prompt_ids)] == pair.prompt_ids


def test_a_preference_in_text_is_tokenized_as_text(chat, write):
    (pair,) = read_preferences(write({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}), chat, None)
    assert pair.prompt_ids == chat.encode("1 + 1 =")
    assert (taught(chat, pair.chosen), taught(chat, pair.rejected)) == (" 2<|end|>", " 3<|end|>")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"chosen": "a", "rejected": "b"}, "has no key 'prompt'"),
        ({"prompt": "x", "chosen": "a"}, "has no key 'rejected'"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "begins with the other"),
        ({"chosen": [USER, GOOD], "rejected": [GOOD]}, "share no first message"),
        ({"prompt": [USER], "chosen": "a b " * 40, "rejected": "b"}, "tokens, more than 64"),
    ],
)
def test_an_unusable_pair_is_refused_with_file_and_line(chat, write, value, reason):
    paths = write(value)
    with pytest.raises(BadRecord, match=reason) as caught:
        read_preferences(paths, chat, max_tokens=64)
    assert str(caught.value).startswith(f"{paths[0]}:2: ")


def test_prompts_keep_every_other_column_and_their_form(chat, write):
    paths = write({"prompt": [USER], "answer": "a b", "family": "sorting"}, {"prompt": "1 + 1 =", "answer": None})
    first, second = read_prompts(paths, chat)
    assert (first.prompt, first.columns) == ([USER], {"answer": "a b", "family": "sorting"})
    assert first.ids == chat.encode_prompt([USER])
    assert (second.prompt, second.columns, second.ids) == ("1 + 1 =", {"answer": None}, chat.encode("1 + 1 ="))
    assert second.source == f"{paths[0]}:3"


def test_an_empty_prompt_is_refused(chat, write):
    with pytest.raises(BadRecord, match=r"jsonl:2: the prompt is empty"):
        read_prompts(write({"prompt": ""}), chat)


def test_valid_messages_pass_unchanged():
    messages = [{"role": "tool", "content": "", "name": "clock"}, USER]
    assert validate_messages(messages, "f:1") is messages
