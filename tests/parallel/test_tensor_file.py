"""Files against bytes worked by hand and safetensors' own; rectangles written under one cut and read under another."""

import ast
import json
import resource
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from warpline.parallel import checkpoint, tensor_file
from warpline.parallel.tensor_file import BadCheckpoint, Piece, Whole, create, plan, read_into, runs, stored_tensors, write

DTYPES = [torch.int64, torch.float64, torch.float32, torch.int32, torch.bfloat16, torch.float16, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool]


def random_tensor(shape, dtype=torch.float32, seed=0):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers > 0 if dtype == torch.bool else (numbers * 40).abs().to(dtype)


def save_whole(folder, tensors, stem="model", **options):
    wholes = {name: Whole(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    layout = plan(wholes, stem, **options)
    folder.mkdir(exist_ok=True)
    create(layout, folder)
    write(layout, folder, {name: Piece.of(tensor) for name, tensor in tensors.items()})
    return layout


def test_the_bytes_of_a_file_are_those_worked_by_hand():
    wholes = {"b": Whole((2, 3), torch.float32), "a": Whole((4,), torch.bfloat16), "c": Whole((), torch.int64)}
    layout = plan(wholes, "model")
    header = (
        b'{"__metadata__":{"format":"pt"},"c":{"dtype":"I64","shape":[],"data_offsets":[0,8]},'
        b'"b":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]},"a":{"dtype":"BF16","shape":[4],"data_offsets":[32,40]}}'
    )
    assert len(header) == 196  # four spaces make it a multiple of 8
    assert layout.heads == {"model.safetensors": bytes([200, 0, 0, 0, 0, 0, 0, 0]) + header + b"    "}
    assert layout.sizes == {"model.safetensors": 8 + 200 + 40}
    assert {name: place.start for name, place in layout.places.items()} == {"b": 216, "a": 240, "c": 208}


def test_files_are_byte_for_byte_those_of_safetensors(tmp_path):
    tensors = {f"{dtype}".removeprefix("torch."): random_tensor((3, 5), dtype) for dtype in DTYPES}
    tensors |= {'é"\\x': random_tensor(()), "empty": random_tensor((0, 3)), "a.10": random_tensor(7), "a.9": random_tensor(1)}
    save_whole(tmp_path, tensors)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards_keep_their_limit_in_the_order_given_and_a_large_tensor_has_its_own(tmp_path):
    tensors = {name: random_tensor(size, seed=size) for name, size in (("d", 5), ("c", 5), ("large", 40), ("a", 3), ("b", 8))}
    save_whole(tmp_path, tensors, "optimizer", max_shard_bytes=44)
    index = json.loads((tmp_path / "optimizer.safetensors.index.json").read_text())
    files = [f"optimizer-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert index["weight_map"] == {"d": files[0], "c": files[0], "large": files[1], "a": files[2], "b": files[2]}
    assert index["metadata"] == {"total_size": 61 * 4}
    for file in files:
        names = [name for name, of in index["weight_map"].items() if of == file]
        save_file({name: tensors[name] for name in names}, tmp_path / "theirs", metadata={"format": "pt"})
        assert (tmp_path / file).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_rectangle_is_the_runs_worked_by_hand():
    assert runs((2, 5), (4, 5), (1, 0)) == (10, [5])  # rows: one run
    assert runs((3, 2), (3, 5), (0, 3)) == (2, [3, 8, 13])  # columns: one a row
    assert runs((2, 2, 3), (3, 4, 3), (1, 2, 0)) == (6, [18, 30])
    assert runs((2, 1, 2), (2, 3, 4), (0, 1, 2)) == (2, [6, 18])
    assert runs((2, 4, 1), (2, 4, 1), (0, 0, 0)) == (8, [0])
    assert runs((), (), ()) == (1, [0])
    assert runs((0, 5), (4, 5), (4, 0)) == runs((3, 0), (3, 2), (0, 2)) == (0, [])


CUTS = {  # of every dim into so many parts, as torch.chunk cuts them: uneven, some empty
    "whole": (1, 1, 1),
    "rows": (4, 1, 1),
    "columns": (1, 3, 1),
    "both": (2, 3, 1),
    "depth": (1, 1, 4),
    "all": (3, 2, 2),
}
SHAPES = [(7,), (1,), (5, 7), (2, 3), (3, 4, 5), (1, 6, 2), (2, 2, 3, 2)]


def cut(tensor, parts):
    """Every rectangle of the cut, empty ones too: (offset, rectangle)."""
    found = [((0,) * tensor.ndim, tensor)]
    for dim, count in enumerate(parts[: tensor.ndim]):
        step, size, split = -(-tensor.shape[dim] // count), tensor.shape[dim], []
        for offset, part in found:
            for index in range(count):
                start, stop = min(index * step, size), min((index + 1) * step, size)
                moved = (*offset[:dim], start, *offset[dim + 1 :])
                split.append((moved, part.narrow(dim, start, stop - start)))
        found = split
    return found


@pytest.mark.parametrize("written", CUTS)
@pytest.mark.parametrize("read", CUTS)
def test_what_one_cut_writes_another_reads_bitwise(written, read, tmp_path):
    tensors = {f"{shape}": random_tensor(shape, DTYPES[i % 6], seed=i) for i, shape in enumerate(SHAPES)}
    wholes = {name: Whole(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    layout = plan(wholes, "model", max_shard_bytes=150)
    create(layout, tmp_path)
    for name, tensor in tensors.items():
        for offset, part in cut(tensor, CUTS[written]):  # views: strided where columns are cut
            write(layout, tmp_path, {name: Piece(part, tuple(tensor.shape), offset)})
    for name, tensor in tensors.items():
        back = torch.full_like(tensor, 77)
        for offset, part in cut(back, CUTS[read]):
            read_into(tmp_path, "model", {name: Piece(part, tuple(tensor.shape), offset)})
        assert torch.equal(back, tensor), name
    save_file(tensors, tmp_path / "theirs")
    ours = {name: tensor for path in tmp_path.glob("model-*") for name, tensor in load_file(path).items()}
    assert all(torch.equal(tensor, ours[name]) for name, tensor in tensors.items())


def test_pieces_take_the_files_dtype_and_give_it_back_in_theirs(tmp_path):
    tensor = random_tensor((4, 6), torch.float64)
    create(layout := plan({"x": Whole((4, 6), torch.bfloat16)}, "model"), tmp_path)
    write(layout, tmp_path, {"x": Piece.of(tensor)})
    back = torch.empty(6, 4, dtype=torch.float32).T
    read_into(tmp_path, "model", {"x": Piece.of(back)})
    assert torch.equal(back, tensor.bfloat16().float())


def test_pieces_that_another_rank_writes_are_not_written(tmp_path):
    layout = save_whole(tmp_path, {"x": torch.ones(3)})
    write(layout, tmp_path, {"x": Piece(torch.zeros(3), (3,), (0,), writes=False)})
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], torch.ones(3))


def test_a_rank_reads_and_writes_its_own_bytes_alone(tmp_path):
    """A file of 64 GiB, 2^34 numbers, almost all of them a hole of the file system: whoever touched it all would not end."""
    shape, started = (2**20, 2**14), time.monotonic()
    create(layout := plan({"x": Whole(shape, torch.float32)}, "model"), tmp_path)
    numbers = random_tensor((2, 2**14))
    write(layout, tmp_path, {"x": Piece(numbers, shape, (2**20 - 3, 0))})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    back = torch.empty(3, 5)
    read_into(tmp_path, "model", {"x": Piece(back, shape, (2**20 - 3, 2**14 - 5))})
    assert torch.equal(back, torch.cat([numbers, torch.zeros(1, 2**14)])[:, -5:])
    path = tmp_path / "model.safetensors"
    assert path.stat().st_size > 2**36 and path.stat().st_blocks * 512 < 2**20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**14, "KiB"
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ({"y": Piece.of(torch.zeros(2, 3))}, "received a piece of y; expected a tensor of the plan"),
        ({"x": Piece.of(torch.zeros(3, 2))}, r"tensor x has shape \[3, 2\]; expected the plan's \[2, 3\]"),
        (
            {"x": Piece(torch.zeros(2, 2), (2, 3), (0, 2))},
            r"a piece \[2, 2\] at \[0, 2\] of tensor x; expected one inside \[2, 3\]",
        ),
        ({"x": Piece(torch.zeros(2, 2), (2, 3), (0, -1))}, "expected one inside"),
        ({"x": Piece(torch.zeros(2), (2, 3), (0, 0))}, "expected one inside"),
    ],
)
def test_a_piece_that_is_no_rectangle_of_the_plan_is_refused(piece, message, tmp_path):
    layout = save_whole(tmp_path, {"x": torch.ones(2, 3)})
    with pytest.raises(ValueError, match=message):
        write(layout, tmp_path, piece)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], torch.ones(2, 3))


def test_what_a_plan_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"tensor x has dtype torch\.complex64; expected one of torch\.int64, .*: cast it"):
        plan({"x": Whole((2,), torch.complex64)}, "model")


def test_missing_and_misshapen_tensors_are_named_with_their_file(tmp_path):
    save_whole(tmp_path, {"x": torch.ones(2, 3)}, "optimizer")
    with pytest.raises(BadCheckpoint, match=f"{tmp_path}: tensor y is missing from its optimizer files; take another"):
        read_into(tmp_path, "optimizer", {"y": Piece.of(torch.zeros(2))})
    with pytest.raises(
        BadCheckpoint, match=r"optimizer\.safetensors: tensor x has shape \[2, 3\], not the model's \[3, 2\]; take"
    ):
        read_into(tmp_path, "optimizer", {"x": Piece.of(torch.zeros(3, 2))})
    with pytest.raises(BadCheckpoint, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        read_into(tmp_path, "model", {})
    path = tmp_path / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadCheckpoint, match=r"optimizer\.safetensors: not a readable safetensors file"):
        read_into(tmp_path, "optimizer", {"x": Piece.of(torch.zeros(2, 3))})


def test_an_existing_file_is_not_written_over_and_a_missing_one_is_named(tmp_path):
    layout = save_whole(tmp_path, {"x": torch.ones(2)})
    with pytest.raises(FileExistsError, match=r"model\.safetensors"):
        create(layout, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        write(layout, tmp_path, {"x": Piece.of(torch.ones(2))})


def test_headers_tell_shape_and_dtype_without_reading_data(tmp_path):
    save_whole(tmp_path, {"x": torch.ones(2, 3), "y": torch.ones(4).bfloat16()}, max_shard_bytes=10)
    stored = stored_tensors(tmp_path, "model")
    assert {name: (entry.path.name, entry.shape, entry.dtype) for name, entry in stored.items()} == {
        "x": ("model-00001-of-00002.safetensors", (2, 3), "F32"),
        "y": ("model-00002-of-00002.safetensors", (4,), "BF16"),
    }
    with safe_open(tmp_path / "model-00001-of-00002.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("module", [tensor_file, checkpoint])
def test_nothing_that_could_unpickle_is_imported(module):
    imported = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(node.module.split(".")[0])
        elif isinstance(node, ast.Attribute):
            assert node.attr not in {"all_gather_object", "broadcast_object_list", "gather_object", "save", "load"}
    allowed = {"__future__", "collections", "concurrent", "contextlib", "dataclasses", "errno", "functools", "hashlib", "json"}
    allowed |= {"math", "os", "pathlib", "re", "safetensors", "secrets", "shutil", "torch", "typing"}
    assert imported <= allowed
