import gzip
import json
import sys

import pytest

from warpline.data.record import BadRecord, Record, read_records, require, write_records

VALUES = [{"text": "eins"}, {"text": "zwei ✓", "n": 2}, {"text": "drei\nZeilen"}]


def json_lines(values) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def write_plain(path, data):
    path.write_bytes(data)


def write_gzip(path, data):
    path.write_bytes(gzip.compress(data[:20]) + gzip.compress(data[20:]))


def write_zstandard(path, data):
    zstandard = pytest.importorskip("zstandard")
    one = zstandard.ZstdCompressor()
    path.write_bytes(one.compress(data[:20]) + one.compress(data[20:]))


WRITERS = {".jsonl": write_plain, ".jsonl.gz": write_gzip, ".jsonl.zst": write_zstandard}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_compression_reads_the_same_records_with_physical_lines(tmp_path, suffix):
    path = tmp_path / f"some{suffix}"
    WRITERS[suffix](path, b"\n" + json_lines(VALUES[:1]) + b"  \n" + json_lines(VALUES[1:]))
    records = list(read_records(path))
    assert [record.value for record in records] == VALUES
    assert [record.source for record in records] == [f"{path}:{line}" for line in (2, 4, 5)]


def test_parquet_reads_rows_across_row_groups(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "some.parquet"
    rows = [{"text": str(i), "messages": [{"role": "user", "content": "x"}]} for i in range(10)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    records = list(read_records(path))
    assert [record.value for record in records] == rows
    assert records[9].source == f"{path}:10"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"secret": 1', "is not JSON: Expecting ',' delimiter at column 13"),
        (b'["secret"]', "is a JSON array, not an object"),
        (b'{"secret": "\xff"}', "is not UTF-8 at byte 13"),
        (b'{"secret": "\\ud800"}', "half a surrogate pair"),
        (b'{"secret": ' + b"9" * 5000 + b"}", "not JSON this program can hold"),
        (b'{"secret": ' + b"[" * 200_000, "not JSON"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_line_without_its_content(tmp_path, line, reason):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(BadRecord) as caught:
        list(read_records(path))
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ")
    assert reason in message
    assert "; " in message
    assert "secret" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("empty.jsonl", b"\n \n", "holds no record"),
        ("some.csv", b"a,b\n", "unknown suffix '.csv'"),
        ("cut.jsonl.gz", gzip.compress(json_lines(VALUES))[:-9], "cannot be read"),
        ("not.jsonl.gz", json_lines(VALUES), "cannot be read"),
        ("not.parquet", b"not parquet at all", "not readable parquet"),
        ("not.jsonl.zst", json_lines(VALUES), "cannot be read"),
    ],
)
def test_an_unusable_file_is_one_clear_line(tmp_path, name, data, reason):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(BadRecord, match=reason) as caught:
        list(read_records(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_zstandard_file_that_was_cut_is_refused(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "cut.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(json_lines(VALUES * 1000))[:-40])
    with pytest.raises(BadRecord, match="cut off"):
        list(read_records(path))


def test_a_missing_file_is_refused(tmp_path):
    for name in ("absent.jsonl", "absent.parquet"):
        with pytest.raises(BadRecord, match="does not exist"):
            list(read_records(tmp_path / name))


@pytest.mark.parametrize(("package", "name"), [("zstandard", "a.jsonl.zst"), ("pyarrow", "a.parquet")])
def test_a_missing_optional_package_is_named(tmp_path, monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BadRecord, match=r"pip install warpline\[text\]"):
        list(read_records(tmp_path / name))


def test_written_records_are_read_back_and_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "new" / "some.jsonl"
    write_records(path, VALUES)
    assert [record.value for record in read_records(path)] == VALUES

    def interrupted():
        yield {"text": "half"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(path, interrupted())
    assert [record.value for record in read_records(path)] == VALUES
    assert list(path.parent.iterdir()) == [path]


def test_require_names_key_and_types():
    record = Record({"n": True, "text": "x"}, "f:7")
    assert require(record, "text", str) == "x"
    with pytest.raises(BadRecord, match="f:7: 'n' is boolean; make it integer"):
        require(record, "n", int)
    with pytest.raises(BadRecord, match="f:7: has no key 'messages'; add it as array or string"):
        require(record, "messages", (list, str))
