import json

import numpy as np
import pytest

from warpline.data.shards import TokenShards, write_shards

DOCUMENTS = [[5, 6, 7], [], [8] * 9, [9, 10]]
STREAM = [0, 5, 6, 7, 0, 0, *[8] * 9, 0, 9, 10]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_windows_across_shards_return_the_stream(tmp_path, vocab_size, dtype):
    documents = [*DOCUMENTS, [vocab_size - 1]]
    stream = [*STREAM, 0, vocab_size - 1]
    index = write_shards(tmp_path, documents, vocab_size=vocab_size, document_id=0, tokens_per_shard=4)
    assert [shard["num_tokens"] for shard in index["shards"]] == [4, 4, 4, 4, 4]
    assert np.fromfile(tmp_path / "shard-00004.bin", dtype=dtype).tolist() == stream[16:]
    shards = TokenShards(tmp_path, verify=True)
    assert shards.num_tokens == len(stream) == 20
    for start in range(20):
        for length in range(21 - start):
            assert shards.window(start, length).tolist() == stream[start : start + length]
    with pytest.raises(ValueError, match=r"window \[15, 21\)"):
        shards.window(15, 6)


@pytest.mark.parametrize(
    ("document", "reason"),
    [([3, 16], "document 2 has token id 16, expected 0 to 15"), ([-1], "token id -1"), ([4, 0], "contains the separator 0")],
)
def test_wrong_ids_are_refused_before_an_index_exists(tmp_path, document, reason):
    with pytest.raises(ValueError, match=reason):
        write_shards(tmp_path, [[1], document], vocab_size=16, document_id=0)
    assert not (tmp_path / "index.json").exists()


def test_an_interrupted_rewrite_does_not_pass_for_the_old_shards(tmp_path):
    write_shards(tmp_path, DOCUMENTS, vocab_size=16, document_id=0, tokens_per_shard=4)

    def interrupted():
        yield [1] * 20
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, interrupted(), vocab_size=16, document_id=0, tokens_per_shard=4)
    with pytest.raises(ValueError, match="no such index"):
        TokenShards(tmp_path)


def test_damage_is_found(tmp_path):
    write_shards(tmp_path, DOCUMENTS, vocab_size=16, document_id=0, tokens_per_shard=8)
    path = tmp_path / "shard-00001.bin"
    data = path.read_bytes()
    path.write_bytes(data[:2] + bytes([data[2] ^ 1]) + data[3:])
    TokenShards(tmp_path)
    with pytest.raises(ValueError, match="digest"):
        TokenShards(tmp_path, verify=True)
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"shard-00001.bin: 15 bytes, expected 16"):
        TokenShards(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="cut or missing"):
        TokenShards(tmp_path)


def test_a_broken_index_is_refused(tmp_path):
    index = write_shards(tmp_path, DOCUMENTS, vocab_size=16, document_id=0)
    path = tmp_path / "index.json"
    changes = {"no int 'vocab_size'": {"vocab_size": "16"}, "counts": {"num_tokens": 3}, "dtype 'O'": {"dtype": "O"}}
    for reason, change in changes.items():
        path.write_text(json.dumps({**index, **change}))
        with pytest.raises(ValueError, match=reason):
            TokenShards(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        TokenShards(tmp_path)


def test_no_documents_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no documents"):
        write_shards(tmp_path, [], vocab_size=16, document_id=0)
