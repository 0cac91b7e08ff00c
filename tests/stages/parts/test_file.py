import pytest

from warpline.stages.parts.file import read_json, write_atomic, write_json


def test_writing_replaces_and_leaves_nothing_beside(tmp_path):
    write_json(tmp_path / "deep" / "a.json", {"x": [1, "ü"]})
    write_atomic(tmp_path / "deep" / "a.json", b"[2]\n")
    assert read_json(tmp_path / "deep" / "a.json") == [2]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    assert read_json(tmp_path / "a.json") == 1
