import pytest

from warpline.data.conversation import Prompt
from warpline.stages.parts.config import BadConfig
from warpline.stages.parts.reward import RewardConfig, load_function, rewards_of

MODULE = """
def length(prompts, completions, completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]

def opinion(prompts, completions, completion_ids, answer, **columns):
    return [None if right is None else float(right in text) for right, text in zip(answer, completions)]

def roles(prompts, completions, **columns):
    return [float(completion[0]["role"] == "assistant") for completion in completions]

def short(**columns):
    return [1.0]

def raises(prompts, answer, **columns):
    return [len(right) for right in answer]

def words(prompts, **columns):
    return ["good"] * len(prompts)

def leaves(**columns):
    raise SystemExit(0)

def broken(prompts, **columns):
    return [float("nan")] * len(prompts)
"""

TEXTS = [Prompt("1+1=", [1, 2], {"answer": "2"}, "p.jsonl:1"), Prompt("say", [3], {"answer": None}, "p.jsonl:2")]


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *__import__("sys").path])
    __import__("sys").modules.pop("my_rewards", None)


def test_rewards_are_weighted_sums_and_none_is_no_opinion():
    rewards = [RewardConfig(function="my_rewards:length", weight=0.5), RewardConfig(function="my_rewards:opinion", weight=2.0)]
    assert rewards_of(rewards, TEXTS, ["2", "hm"], [[5, 6, 7], [8]]) == [0.5 * 3 + 2.0, 0.5]


def test_conversations_receive_messages():
    prompt = Prompt([{"role": "user", "content": "x"}], [1], {}, "p.jsonl:1")
    assert rewards_of([RewardConfig(function="my_rewards:roles")], [prompt], ["y"], [[2]]) == [1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [("my_rewards:nothing", "has no attribute"), ("no_such_module_x:f", "No module named"),
     ("my_rewards:short", "returned 1 values for 2"),
     ("my_rewards:broken", "returned nan for a completion of p.jsonl:1")],
)  # fmt: skip
def test_wrong_functions_are_named_in_one_line(name, message):
    with pytest.raises(BadConfig, match=message):
        rewards_of([RewardConfig(function=name)], TEXTS, ["a", "b"], [[1], [2]])


def test_a_name_without_a_colon_is_refused():
    with pytest.raises(ValueError, match="String should match pattern"):
        RewardConfig(function="my_rewards.length")
    assert load_function("my_rewards:length")([None], ["x"], [[1, 2]]) == [2.0]


def test_columns_that_reward_functions_receive_anyway_are_refused():
    prompt = Prompt("x", [1], {"completions": "mine"}, "p.jsonl:7")
    with pytest.raises(BadConfig, match=r"p.jsonl:7: reward functions receive 'completions' themselves"):
        rewards_of([RewardConfig(function="my_rewards:length")], [prompt], ["y"], [[2]])
