"""The models of a stage: where their weights come from, and how they lie over the ranks.

A `Start` knows a configuration, a tokenizer and how to fill the part of each tensor that a rank holds: from a Hugging Face
folder (a checkpoint is one), which every rank reads its own bytes of, or freshly drawn.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...data.tokenizer import ChatTokenizer
from ...models import huggingface
from ...models.decoder import Decoder, DecoderConfig, DecoderShape, initial_values
from ...parallel.checkpoint import Piece, damage
from ...parallel.gather import WholeDecoder
from ...parallel.mesh import Mesh
from ...parallel.model import ParallelModel, Techniques
from .checkpoint import read_start
from .config import BadConfig, ParallelConfig
from .precision import autocast, choose_precision, product_dtype
from .seed import seed_of


@dataclass(frozen=True)
class Start:
    """What a model begins as; `fill` gives pieces of its parameters their values."""

    config: DecoderConfig
    tokenizer: ChatTokenizer
    fill: Callable[[dict[str, Piece]], None]


def start_from(folder: Path, mesh: Mesh) -> Start:
    """A checkpoint of ours (the ranks share out the verification of its digests) or any Hugging Face folder."""

    def damage_of(folder: Path) -> str | None:
        found = mesh.gather([damage(folder, mesh.rank, mesh.size)], *mesh.sizes._fields)
        return next((problem for problem in found if problem), None)

    config, tokenizer = read_start(folder, damage_of)
    return Start(config, tokenizer, huggingface.reader(folder))


def fresh(shape: DecoderShape, tokenizer: ChatTokenizer, *seed_parts: object) -> Start:
    """Freshly drawn weights for this tokenizer, which depend on `seed_parts` alone."""
    config = DecoderConfig(vocab_size=tokenizer.vocab_size, **shape.model_dump())
    seed = seed_of(*seed_parts, "weights")

    def fill(pieces: dict[str, Piece]) -> None:
        for name, piece in pieces.items():
            piece.tensor.copy_(initial_values(config, name, seed, piece.shape, piece.offset, tuple(piece.tensor.shape)))

    return Start(config, tokenizer, fill)


def build(start: Start, mesh: Mesh, parallel: ParallelConfig, precision: str) -> ParallelModel:
    """This rank's part of the model, under the layout, filled."""
    precision = choose_precision(precision, mesh.device)
    techniques = Techniques(
        parallel.attention, parallel.schedule, parallel.stages_per_rank, parallel.recompute,
        torch.bfloat16 if precision == "bf16" else None, parallel.offload,
    )  # fmt: skip

    def options() -> dict[str, Any]:
        return {"softcap": start.config.logit_softcap, "product_dtype": product_dtype(mesh.device)}

    try:
        model = ParallelModel(
            _on_meta(start.config, precision), mesh, techniques, options, lambda: autocast(precision, mesh.device)
        )
    except ValueError as error:
        raise BadConfig(str(error)) from error
    start.fill(model.pieces())
    return model


def frozen(start: Start, mesh: Mesh, parallel: ParallelConfig, precision: str) -> ParallelModel:
    """A model that is not trained."""
    model = build(start, mesh, parallel, precision)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    return model


@contextmanager
def whole(model: ParallelModel) -> Iterator[Any]:
    """What generation takes for a decoder. Enter and leave it on every rank, with prompts or without."""
    with torch.no_grad(), model.precision():
        if model.is_whole:
            yield model.decoder
        else:
            precision = "fp64" if model.parameters()[0].dtype == torch.float64 else "fp32"
            with WholeDecoder(model, _on_meta(model.config, precision)) as decoder:
                yield decoder


def _on_meta(config: DecoderConfig, precision: str) -> Decoder:
    with torch.device("meta"):
        return Decoder(config).to(torch.float64 if precision == "fp64" else torch.float32)
