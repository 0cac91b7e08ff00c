"""Cluster configs are legal by construction: the mesh and the sharded model of each, of several ranks, on the meta device.

Nothing is allocated and nothing is sent: torch's fake process group stands for the other ranks. It carries no data, so this
says that a layout can be built and who holds what, not that it trains (`parallel/` compares that over gloo) nor how fast.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from warpline.models import huggingface
from warpline.models.decoder import Decoder, DecoderConfig
from warpline.parallel import pipeline
from warpline.parallel.mesh import Mesh, Sizes
from warpline.parallel.model import ParallelModel, Techniques
from warpline.stages.command import VERBS
from warpline.stages.parts.config import load_config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*/*_h100x*.toml"))
TRAINED_BYTES, FROZEN_BYTES, GPU_BYTES = 16, 4, 80e9  # a parameter: fp32 weight, gradient and two moments; weight alone
LLAMA_31 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 128256,
    "num_key_value_heads": 8, "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "initializer_range": 0.02,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
# The config.json of the models that configs start from, as their publishers have them (without what mathematics does not need).
PUBLISHED = {
    "Llama-3.1-8B": LLAMA_31
    | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
    "Llama-3.1-70B": LLAMA_31
    | {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672},
    "Llama-3.1-405B": LLAMA_31
    | {"hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128, "intermediate_size": 53248},
    "Qwen3-32B": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "vocab_size": 151936,
        "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": 25600, "attention_bias": False, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000, "max_position_embeddings": 40960,
        "tie_word_embeddings": False, "initializer_range": 0.02,
    },
}  # fmt: skip
# Numbers in the published safetensors files.
COUNTS = {
    "llama3_8b": 8_030_261_248, "llama3_70b": 70_553_706_496, "llama3_405b": 405_853_388_800, "qwen3_32b": 32_762_123_264,
}  # fmt: skip
TOKENIZER_OF_LLAMA_3 = 128256  # tokens, which a [model] table takes from its data folder


class MetaMesh(Mesh):
    """FSDP knows no meta device: its mesh is called one of CPUs, and its parameters stay on the meta device."""

    def shard_mesh(self):
        return Mesh(self.rank, self.sizes, torch.device("cpu"), groups=self.groups).shard_mesh()


@contextmanager
def one_of(sizes: Sizes, rank: int) -> Iterator[Mesh]:
    dist.init_process_group("fake", rank=rank, world_size=sizes.product, store=FakeStore())
    try:
        yield MetaMesh(rank, sizes, torch.device("meta"))
    finally:
        dist.destroy_process_group()


def load(path: Path):
    return load_config(VERBS[path.parent.name][0], path, [])


def shape_of(folder: str, tmp_path: Path) -> DecoderConfig:
    """What the published config.json reads as."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[Path(folder).name.removesuffix("-Instruct")]))
    return huggingface.read_config(tmp_path)


def trained_shape(config, tmp_path: Path) -> DecoderConfig:
    if config.start is not None:
        return shape_of(config.start, tmp_path)
    return DecoderConfig(vocab_size=TOKENIZER_OF_LLAMA_3, **config.model.model_dump())


def build(shape: DecoderConfig, mesh: Mesh, parallel) -> ParallelModel:
    techniques = Techniques(
        parallel.attention, parallel.schedule, parallel.stages_per_rank, parallel.recompute, torch.bfloat16, parallel.offload
    )
    with torch.device("meta"):
        decoder = Decoder(shape)
    return ParallelModel(decoder, mesh, techniques)


def names_of_stages(shape: DecoderConfig, names: list[str], parallel) -> list[set[str]]:
    """Which parameters each pipeline rank must hold, from the layers' split alone."""
    found = []
    fixed = pipeline.SCHEDULES[parallel.schedule][1]
    stages_per_rank = 1 if parallel.pipeline == 1 else fixed or parallel.stages_per_rank
    num_stages = parallel.pipeline * stages_per_rank
    # As `pipeline.split` weighs: a layer's matrices, and on the last stage the output matrix.
    layer_cost = shape.width * (2 * shape.head_width * (shape.num_heads + shape.num_kv_heads) + 3 * shape.mlp_width)
    ranges = pipeline.split_layers([layer_cost] * shape.num_layers, 0.0, shape.width * shape.vocab_size, num_stages)
    for rank in range(parallel.pipeline):
        stages = pipeline.stages_of(parallel.schedule, rank, parallel.pipeline, stages_per_rank)
        layers = {layer for stage in stages for layer in range(*ranges[stage])}
        outer = {"embed_tokens"} if 0 in stages else set()
        outer |= {"norm", "lm_head"} if num_stages - 1 in stages else set()
        found.append({name for name in names if _layer_of(name) in layers or name.split(".")[0] in outer})
    return found


def _layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" else None


def total(model: ParallelModel, names: list[str]) -> int:
    """Numbers of these parameters over all ranks that write them; layers are alike."""
    places = [(tensor, shard) for tensor in range(model.mesh.sizes.tensor) for shard in range(model.num_shards)]
    found: dict[str, int] = {}

    def numbers(name: str) -> int:
        kind = re.sub(r"^layers\.\d+\.", "", name)
        if kind not in found:
            held = [place for place in places if model.is_cut(name) or place[0] == 0]
            found[kind] = sum(torch.Size(model.rectangle(name, *place)[1]).numel() for place in held)
        return found[kind]

    return sum(numbers(name) for name in names)


QUICK = ("llama3_8b_h100x64", "llama3_405b_h100x16384_128k")
CASES = [pytest.param(path, id=f"{path.parent.name}/{path.stem}") for path in CONFIGS]
BUILT = [
    case if case.values[0].stem in QUICK else pytest.param(*case.values, id=case.id, marks=pytest.mark.slow) for case in CASES
]


@pytest.mark.parametrize("path", BUILT)
def test_a_cluster_config_builds_its_mesh_and_its_part_of_the_model(path, tmp_path):
    """Of the first, a middle and the last rank: the parameters its place says, in the shapes its place says."""
    config = load(path)
    shape, sizes = trained_shape(config, tmp_path), config.parallel.sizes
    middle = sizes.product // 2 + sizes.product // 3
    for rank in (0, middle, sizes.product - 1):
        with one_of(sizes, rank) as mesh:
            model = build(shape, mesh, config.parallel)
            pieces, names = model.pieces(), list(model.whole_shapes)
            expected = names_of_stages(shape, names, config.parallel)
            assert pieces.keys() == expected[mesh.place.pipeline]
            assert sum(map(len, expected)) == len(names)
            for name, piece in pieces.items():
                offset, here = model.rectangle(name, mesh.place.tensor, model.shard_rank)
                assert piece.tensor.is_meta and (piece.offset, tuple(piece.tensor.shape)) == (offset, here)
            assert total(model, names) == COUNTS[re.match(r"[a-z0-9]+_\d+b", path.stem).group()]
            assert sum(piece.tensor.numel() for piece in pieces.values()) * TRAINED_BYTES < GPU_BYTES / 4
            if model.stages:
                hidden = torch.empty(1, 1, shape.width, device="meta")
                num_rows = config.sequences_per_step // mesh.num_data
                pipeline.Pipeline(model.stages, model.pipeline_group, config.parallel.schedule, num_rows, hidden)


@pytest.mark.parametrize("path", CASES)
def test_a_cluster_config_keeps_every_rank_busy(path, tmp_path):
    """As many ranks as the file's name says, inside nodes of 8; a step divides evenly over them; rows fit the model."""
    config = load(path)
    sizes = config.parallel.sizes
    assert sizes.product == int(re.search(r"_h100x(\d+)", path.stem).group(1))
    assert 8 % sizes.tensor == 0, "tensor parallelism stays inside a node"
    num_data = sizes.replicate * sizes.shard
    positions = trained_shape(config, tmp_path).max_positions
    if path.parent.name == "pretrain":
        assert config.tokens_per_microbatch >= config.sequence_tokens <= positions
        rows = config.sequences_per_step * config.sequence_tokens // config.tokens_per_microbatch
        assert rows % (num_data * sizes.pipeline) == 0
    elif path.parent.name == "rl":
        assert config.prompts_per_step % (config.minibatches_per_step * num_data) == 0
    else:
        assert config.tokens_per_step >= num_data * config.tokens_per_microbatch and config.max_tokens <= positions


@pytest.mark.parametrize(("stem", "sizes", "sequences_per_data_rank"), [
    ("llama3_405b_h100x16384", Sizes(pipeline=16, shard=128, tensor=8), 16),
    ("llama3_405b_h100x16384_128k", Sizes(pipeline=16, shard=8, context=16, tensor=8), 16),
])  # fmt: skip
def test_the_405b_configs_are_the_published_layouts(stem, sizes, sequences_per_data_rank):
    """arXiv:2407.21783, table 4: 16 M tokens a step."""
    config = load(ROOT / "configs" / "pretrain" / f"{stem}.toml")
    assert config.parallel.sizes == sizes
    assert config.sequences_per_step == sequences_per_data_rank * sizes.replicate * sizes.shard
    assert config.sequences_per_step * config.sequence_tokens == 2**24


def test_a_teacher_of_70b_lies_beside_its_student(tmp_path):
    """The largest that a config puts on one GPU: fp32 weights of the teacher's share, and all of the student's training."""
    config = load(ROOT / "configs" / "distill" / "llama3_8b_h100x8.toml")
    assert shape_of(config.teacher, tmp_path).vocab_size == shape_of(config.start, tmp_path).vocab_size
    trained, frozen = (COUNTS[name] / config.parallel.shard for name in ("llama3_8b", "llama3_70b"))
    assert config.teacher_parallel is None and trained * TRAINED_BYTES + frozen * FROZEN_BYTES < 0.65 * GPU_BYTES


def test_no_cluster_config_is_left_out():
    names = {f"{path.parent.name}/{path.stem}" for path in CONFIGS}
    models = ("8b_h100x8", "8b_h100x64", "70b_h100x256", "405b_h100x16384", "405b_h100x16384_128k")
    wanted = {f"pretrain/llama3_{model}" for model in models} | {"pretrain/qwen3_32b_h100x64"}
    assert names == wanted | {f"{stage}/llama3_8b_h100x8" for stage in ("sft", "preference", "rl", "distill")}
