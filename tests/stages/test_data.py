import json
import zlib

import pytest
import torch

from warpline.data.shards import TokenShards
from warpline.data.text import Document, read_documents
from warpline.data.tokenizer import ChatTokenizer
from warpline.parallel.mesh import Mesh, Sizes, start_mesh
from warpline.stages import data
from warpline.stages.parts.config import BadConfig
from warpline.stages.parts.run import RunFolder


def test_the_folder_holds_tokenizer_shards_tasks_and_counts(text_run):
    counts = json.loads((text_run / "data.json").read_text())
    tokenizer, shards = (
        ChatTokenizer.load(text_run / "data" / "tokenizer"),
        TokenShards(text_run / "data" / "train", verify=True),
    )
    assert counts["documents"] == 24 == counts["train_documents"] + counts["held_out_documents"]
    assert counts["train_tokens"] == shards.num_tokens and shards.vocab_size == tokenizer.vocab_size == counts["vocab_size"]
    stream = shards.window(0, shards.num_tokens)
    assert (stream == tokenizer.document_id).sum() == counts["train_documents"]
    assert [
        len((text_run / "data" / name).read_text().splitlines()) for name in ("sft.jsonl", "rl.jsonl", "held_out_tasks.jsonl")
    ] == [120, 80, 12]


def test_train_text_holds_no_held_out_document(text_run):
    tokenizer, shards = ChatTokenizer.load(text_run / "data" / "tokenizer"), TokenShards(text_run / "data" / "train")
    text = tokenizer.decode(shards.window(0, shards.num_tokens).tolist())
    held_out = list(read_documents([text_run / "data" / "held_out.jsonl"]))
    assert held_out and not [document for document in held_out if document.text in text]


def test_a_second_call_makes_nothing_again(text_run):
    before = {path: path.stat().st_mtime_ns for path in (text_run / "data").rglob("*")}
    data.main(data.DataStageConfig(text=["nowhere"], vocab_size=300), RunFolder(text_run), start_mesh())
    assert before == {path: path.stat().st_mtime_ns for path in (text_run / "data").rglob("*")}


class Turns:
    """As much of a watch as a rank needs that waits for the first one."""

    where = ""

    def __init__(self):
        self.waited: list[int] = []

    def next_turn(self) -> int:
        return len(self.waited)

    def wait_for(self, turn: int) -> None:
        self.waited.append(turn)


def test_a_rank_that_comes_after_the_data_was_made_waits_its_turn_all_the_same(text_run):
    """Else it takes the first rank's next turn for this one, and goes on before that is done."""
    turns = Turns()
    mesh = Mesh(1, Sizes(replicate=2), torch.device("cpu"), watch=turns)
    data.main(data.DataStageConfig(text=["nowhere"], vocab_size=300), RunFolder(text_run, writes=False), mesh)
    assert turns.waited == [0]


def test_too_little_text_is_refused_in_one_line(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text("the same text\n")
    config = data.DataStageConfig(text=[str(tmp_path)], vocab_size=300)
    with pytest.raises(ValueError, match=r"held out|held-out|held_out"):
        data.main(config, RunFolder(tmp_path / "run"), start_mesh())


def test_held_out_text_is_an_equal_share_of_every_document_in_whole_lines():
    line = "0123456789abcde\n"  # 16 bytes
    documents = [Document(line * count, f"file {count}") for count in (50, 1, 3, 40)]
    excerpts = data._excerpts(documents, 16 * 20)
    assert [len(excerpt.text) // 16 for excerpt in excerpts] == [8, 1, 3, 8]
    assert all(document.text.startswith(excerpt.text) for document, excerpt in zip(documents, excerpts, strict=True))
    assert data._excerpts([Document("ü\nüü\n", "a")], 7)[0].text == "ü\n"


def test_the_baseline_is_zlib_at_its_best_level():
    documents = [Document("abc" * 50, "a"), Document("déf", "b")]
    content = ("abc" * 50 + "déf").encode()
    assert data.zlib_baseline(documents) == {
        "zlib_bits_per_byte": round(8 * len(zlib.compress(content, 9)) / len(content), 4),
        "bytes": 154,
    }


def test_the_line_needs_tasks_and_data_needs_text(tmp_path):
    with pytest.raises((BadConfig, ValueError)):
        data.main(
            data.DataStageConfig(text=[str(tmp_path / "missing.txt")], vocab_size=300),
            RunFolder(tmp_path / "run"),
            start_mesh(),
        )
