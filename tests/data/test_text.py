import gzip
import json

import pytest

from warpline.data.record import BadRecord
from warpline.data.text import Document, read_documents, split, standard_library_documents


def test_the_standard_library_is_read_without_its_tests():
    documents = standard_library_documents()
    sources = [document.source for document in documents]
    assert sources == sorted(set(sources))
    assert {"argparse.py", "json/decoder.py"} <= set(sources)
    assert not [s for s in sources if {"test", "tests", "idle_test", "site-packages"} & set(s.split("/")[:-1])]
    assert all(document.text for document in documents)
    argparse = next(document for document in documents if document.source == "argparse.py")
    assert "Command-line parsing library" in argparse.text


def test_a_folder_is_walked_sorted_and_every_format_gives_the_same_documents(tmp_path):
    (tmp_path / "b.txt").write_text("zwei", encoding="utf-8")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("eins ✓".encode()))
    (tmp_path / "c.jsonl").write_text(json.dumps({"body": "drei"}) + "\n\n" + json.dumps({"body": "vier"}) + "\n")
    (tmp_path / "notes.md").write_text("not a document")
    documents = list(read_documents([tmp_path], text_field="body"))
    assert [document.text for document in documents] == ["eins ✓", "zwei", "drei", "vier"]
    assert documents[3].source == f"{tmp_path / 'c.jsonl'}:3"


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.jsonl", b'{"title": "x"}\n', "a.jsonl:1: has no key 'text'; add it as string"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl:1: 'text' is integer; make it string"),
        ("a.txt", b"line\n\xff\n", "a.txt:2: is not UTF-8"),
        ("a.txt", b" \n", "holds no text"),
        ("a.pdf", b"x", "unknown suffix '.pdf'"),
    ],
)
def test_bad_text_is_refused_with_its_place(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadRecord, match=reason):
        list(read_documents([tmp_path / name]))


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(BadRecord, match="the folder holds no text"):
        list(read_documents([tmp_path]))


def test_the_split_is_disjoint_complete_and_independent_of_order():
    documents = [Document(str(i), f"file{i}.py") for i in range(2000)]
    train, held_out = split(documents, 0.1, seed=1)
    assert sorted(d.source for d in train + held_out) == sorted(d.source for d in documents)
    assert not {d.source for d in train} & {d.source for d in held_out}
    assert 140 < len(held_out) < 260  # 200 expected, standard deviation 13
    assert {d.source for d in split(documents[::-1], 0.1, seed=1)[1]} == {d.source for d in held_out}
    assert {d.source for d in split(documents, 0.1, seed=2)[1]} != {d.source for d in held_out}
    assert {d.source for d in held_out} <= {d.source for d in split(documents, 0.2, seed=1)[1]}
    moved = [Document(d.text, f"/elsewhere/{i}") for i, d in enumerate(documents)]
    assert {d.text for d in split(moved, 0.1, seed=1)[1]} == {d.text for d in held_out}


def test_a_split_with_an_empty_side_is_refused():
    with pytest.raises(ValueError, match="some on each side"):
        split([Document("x", "only.txt")], 0.5, seed=0)
    with pytest.raises(ValueError, match=r"held_out_fraction is 1\.5"):
        split([], 1.5, seed=0)
