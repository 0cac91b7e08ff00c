import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from warpline.models.decoder import DecoderConfig
from warpline.parallel.mesh import ALONE, Mesh, Sizes, check_sizes, nearest_sizes, other_layout, problem_of, start_mesh

CPU = torch.device("cpu")
SHAPE = DecoderConfig(
    vocab_size=5, width=8, num_layers=6, num_heads=4, num_kv_heads=2, head_width=2, mlp_width=12
)  # fmt: skip


def ranks_of(sizes: Sizes) -> list[Mesh]:
    return [Mesh(rank, sizes, CPU) for rank in range(sizes.product)]


def test_alone_everything_is_here():
    mesh = start_mesh()
    assert mesh.sizes == ALONE and mesh.size == 1 and mesh.is_first and mesh.leads and str(mesh.sizes) == "one process"
    assert mesh.sum([1.5, 2]) == mesh.max([1.5, 2]) == mesh.sum_data([1.5, 2]) == [1.5, 2]
    assert mesh.share([3, 1, 2]) == mesh.gather([3, 1, 2], "tensor", "shard") == [3, 1, 2]
    assert mesh.group(*Sizes._fields) is None and mesh.shard_mesh() is None


def test_a_ranks_place_counts_the_inner_axes_first():
    """2 × 1 × 3 × 1 × 2 ranks: pipeline outermost, tensor innermost."""
    sizes = Sizes(pipeline=2, shard=3, tensor=2)
    places = [mesh.place for mesh in ranks_of(sizes)]
    assert places[:4] == [Sizes(0, 0, 0, 0, 0), Sizes(0, 0, 0, 0, 1), Sizes(0, 0, 1, 0, 0), Sizes(0, 0, 1, 0, 1)]
    assert places[6] == Sizes(1, 0, 0, 0, 0) and len(set(places)) == 12
    assert [mesh.leads for mesh in ranks_of(sizes)] == [True, False] * 3 + [False] * 6


def test_a_groups_ranks_differ_in_its_axes_alone():
    mesh = Mesh(7, Sizes(pipeline=2, shard=3, tensor=2), CPU)  # pipeline 1, shard 0, tensor 1
    assert mesh.ranks("tensor") == [6, 7] and mesh.ranks("shard") == [7, 9, 11] and mesh.ranks("pipeline") == [1, 7]
    assert mesh.ranks("shard", "tensor") == [6, 7, 8, 9, 10, 11] and mesh.ranks("context", "replicate") == [7]


def test_shares_are_disjoint_and_complete_and_one_model_group_has_one():
    sizes, items = Sizes(pipeline=2, replicate=3, shard=2), list(range(11))
    meshes = ranks_of(sizes)
    assert meshes[0].num_data == 6
    by_rank = {mesh.data_rank: mesh.share(items) for mesh in meshes}
    assert sorted(item for share in by_rank.values() for item in share) == items
    assert {len(share) for share in by_rank.values()} == {1, 2}
    assert all(mesh.share(items) == mesh.shares(items)[mesh.data_rank] == by_rank[mesh.data_rank] for mesh in meshes)


def test_items_are_dealt_over_the_ranks_of_some_axes():
    meshes = ranks_of(Sizes(shard=2, context=3))
    assert [mesh.deal(list("abcde"), "context") for mesh in meshes] == [["a", "d"], ["b", "e"], ["c"]] * 2


@pytest.mark.parametrize(
    ("wanted", "num_ranks", "nearest"),
    [
        (Sizes(tensor=2), 1, Sizes()),
        (Sizes(tensor=2), 8, Sizes(replicate=4, tensor=2)),
        (Sizes(shard=8), 16, Sizes(replicate=2, shard=8)),
        (Sizes(replicate=2, tensor=4), 16, Sizes(replicate=4, tensor=4)),
        (Sizes(pipeline=4, tensor=8), 24, Sizes(pipeline=3, tensor=8)),
    ],
)
def test_the_nearest_layout_keeps_the_models_axes_where_it_can(wanted, num_ranks, nearest):
    found = nearest_sizes(wanted, num_ranks)
    assert found.product == num_ranks and found == nearest


def test_no_layout_is_nearest_where_none_is_legal():
    assert nearest_sizes(Sizes(tensor=2), 2, lambda sizes: False) is None


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (Sizes(tensor=3), r"tensor=3 does not divide its 4 query heads; the nearest legal layout is replicate=3"),
        (Sizes(tensor=8), r"tensor=8 does not divide its 4 query heads; the nearest legal layout is replicate=2, tensor=4"),
        (Sizes(pipeline=8), r"pipeline=8 exceeds its 6 layers; the nearest legal layout is pipeline=4, replicate=2"),
    ],
)
def test_a_layout_the_model_cannot_have_is_refused_with_the_nearest_it_can(sizes, message):
    with pytest.raises(ValueError, match=message):
        check_sizes(sizes, SHAPE)


def test_every_problem_of_a_layout_is_named():
    assert problem_of(Sizes(tensor=4, pipeline=6, context=64, shard=64), SHAPE) is None
    assert "MLP's width 12" in problem_of(Sizes(tensor=8), SHAPE.model_copy(update={"num_heads": 8}))
    assert "exceeds its 5 tokens" in problem_of(Sizes(tensor=8), SHAPE.model_copy(update={"num_heads": 8, "mlp_width": 16}))


def test_how_an_axis_works_decides_too():
    assert problem_of(Sizes(context=8), SHAPE) is None
    assert "attention='ulysses' cuts heads by context=8, which does not divide its 4" in problem_of(
        Sizes(context=8), SHAPE, "ulysses"
    )
    assert "context=4 and tensor=2, which" in problem_of(Sizes(context=4, tensor=2), SHAPE, "ulysses")
    assert problem_of(Sizes(context=2, tensor=2), SHAPE, "ulysses") is None
    assert "pipeline=4 of 2 stages a rank exceeds its 6 layers" in problem_of(Sizes(pipeline=4), SHAPE, stages_per_rank=2)
    assert problem_of(Sizes(shard=4), SHAPE, stages_per_rank=9) is None, "no pipeline"
    with pytest.raises(
        ValueError, match=r"does not fit the model: attention='ulysses'.*nearest legal layout is replicate=2, context=4"
    ):
        check_sizes(Sizes(context=8), SHAPE, "ulysses")


def test_a_layout_that_does_not_match_the_processes_names_the_remedy():
    with pytest.raises(
        ValueError,
        match=r"\[parallel\] replicate=4 is 4 rank\(s\) but 1 process\(es\) were started; start torchrun with 4, or set the "
        "nearest legal layout: one process",
    ):
        start_mesh(Sizes(replicate=4))


def test_another_layout_has_as_many_ranks():
    mesh = Mesh(5, Sizes(shard=8), CPU)
    assert other_layout(mesh, Sizes(tensor=8)).place == Sizes(0, 0, 0, 0, 5)
    with pytest.raises(ValueError, match="received tensor=4 for 8 processes; expected a layout of as many"):
        other_layout(mesh, Sizes(tensor=4))


CONFIG = """
start = "{start}"
files = ["{files}"]
text = "{text}"
steps = 3
tokens_per_step = 256
text_tokens_per_step = 64
text_window_tokens = 32
optimizer = {{ learning_rate = 1e-2 }}
"""


def test_two_processes_train_what_one_does(tmp_path, start_folder, text_run):
    """The same global batches on 1 and 2 ranks: losses to 1e-5, weights to 1/500 of an update but for one in 1000.

    fp32 sums come in another order, and AdamW divides a gradient by its own size: of one near zero, rounding decides the
    direction (seen at a rate of 1e-2: one weight in a thousand 5e-6 off, one in 6,000 6e-5).
    """
    data = text_run / "data"
    (tmp_path / "sft.toml").write_text(CONFIG.format(start=start_folder, files=data / "sft.jsonl", text=text_run))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    one = [sys.executable, "-m", "warpline.stages.command", "sft", str(tmp_path / "sft.toml"), "--run", str(tmp_path / "one")]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--no-python",
        "--",
    ]
    two = [*torchrun, *one[:-1], str(tmp_path / "two"), "parallel.replicate=2"]
    for command in (one, two):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
    metrics = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("one", "two")
    ]
    assert len(metrics[0]) == len(metrics[1]) == 3
    for first, second in zip(*metrics, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-5) and second["tokens"] == first["tokens"]
    weights = [load_file(weight_file(tmp_path / name)) for name in ("one", "two")]
    errors = torch.cat([(tensor - weights[1][name]).abs().flatten() for name, tensor in weights[0].items()])
    assert errors.quantile(0.999) <= 2e-5 and errors.max() <= 1e-3


def weight_file(run: Path) -> Path:
    return run / "checkpoints" / "sft" / "step-3" / "model.safetensors"
