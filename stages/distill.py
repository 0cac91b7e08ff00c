"""Logit distillation: a student learns a teacher's whole next-token distribution on given conversations.

Run     warpline distill configs/distill/own_data.toml
Reads   `teacher` (a model folder), `files` as for SFT, and the student: `start`, or [model], or `student_layers` of the
        teacher
Writes  RUN/checkpoints/distill/step-N, RUN/metrics.jsonl
Expect  loss = divergence_weight · divergence + label_weight · cross-entropy, each a mean in nats per counted token
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor

from ..data.conversation import read_supervised
from ..data.packing import PackedBatch
from ..kernels.linear_divergence import linear_divergence
from ..models import huggingface
from ..models.decoder import DecoderConfig, DecoderShape
from ..parallel.checkpoint import Piece
from ..parallel.mesh import Mesh, other_layout
from ..parallel.model import Loss, View
from .parts.config import BadConfig, ParallelConfig
from .parts.model import Start, fresh, frozen, start_from
from .parts.run import RunFolder
from .parts.seed import seed_of
from .parts.session import Session, StopSignal
from .parts.tokens import microbatches, num_targets, num_tokens, sample_order, summed_cross_entropy
from .sft import SftConfig, TextMix


class DistillConfig(SftConfig):
    """Give one of `model` (a new shape) and `student_layers` (the teacher's layers that the student begins with), or a
    `start`.
    """

    kind: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: float = Field(0.5, gt=0, lt=1)
    temperature: PositiveFloat = 1.0
    divergence_weight: NonNegativeFloat = 1.0
    label_weight: NonNegativeFloat = 0.0
    model: DecoderShape | None = None
    student_layers: list[NonNegativeInt] | None = Field(None, min_length=1)


class DistillStageConfig(DistillConfig):
    """The stage by itself."""

    teacher: str
    files: list[str] = Field(min_length=1)
    start: str | None = None
    text: str | None = None
    seed: NonNegativeInt = 0
    parallel: ParallelConfig = ParallelConfig()
    teacher_parallel: ParallelConfig | None = None


def main(
    config: DistillStageConfig, run: RunFolder, mesh: Mesh, stop: StopSignal | None = None, stage: str = "distill"
) -> Path:
    """Train to `config.steps`; returns the last checkpoint. `stage` names the metrics and the checkpoint folder."""
    # -- Whence: the teacher, and the student from its last checkpoint or its start --------------------------------------------
    begin, teacher_mesh = start_from(Path(config.teacher), mesh), _teacher_mesh(config, mesh)
    session = Session(stage, config, run, mesh, config.parallel, lambda: _student(config, begin, mesh), stop)
    if session.model.config.vocab_size != begin.config.vocab_size:
        raise BadConfig(
            f"the student has {session.model.config.vocab_size} tokens and the teacher {begin.config.vocab_size}; "
            "distillation compares token by token: give both one vocabulary"
        )
    teacher = Teacher(config, begin, session, teacher_mesh)

    # -- What: conversations, and text -----------------------------------------------------------------------------------------
    samples = read_supervised(
        [Path(path) for path in config.files], session.tokenizer, min(config.max_tokens, session.model.config.max_positions)
    )
    text = TextMix(config.text, config, session.tokenizer, seed_of(config.seed, "distill", "text"))
    order = sample_order(
        [len(sample.ids) for sample in samples], config.tokens_per_step, seed_of(config.seed, "distill", "order"), session.step
    )

    def batches_of(indices: Sequence[int], windows: list[int]) -> list[PackedBatch]:
        return [*microbatches([[samples[i]] for i in indices], config.tokens_per_microbatch), *text.batches(windows)]

    # -- The loop --------------------------------------------------------------------------------------------------------------
    for step in session.steps():
        parts = list(zip(mesh.shares(next(order)), mesh.shares(text.windows(step)), strict=True))  # of every data rank
        batches = batches_of(*parts[mesh.data_rank])
        counted, read = mesh.sum_data([num_targets(batches), num_tokens(batches)])  # over all ranks and microbatches
        hidden = teacher.hidden(batches, [partial(batches_of, *part) for part in parts])
        head = partial(losses, config, teacher, hidden, max(counted, 1))
        divergence, cross_entropy = (value / max(counted, 1) for value in session.model.accumulate(batches, head, 2))
        loss = config.divergence_weight * divergence + config.label_weight * cross_entropy
        session.update(loss)
        session.finish_step(loss, read, divergence=divergence, cross_entropy=cross_entropy)
    return session.checkpoint


def _teacher_mesh(config: DistillStageConfig, mesh: Mesh) -> Mesh:
    if config.teacher_parallel in (None, config.parallel):
        return mesh
    try:
        return other_layout(mesh, config.teacher_parallel.sizes)
    except ValueError as error:
        raise BadConfig(f"[teacher_parallel]: {error}") from error


class Teacher:
    """The frozen teacher, under the student's layout or its own, and the rows of its output matrix that this rank's losses
    need."""

    def __init__(self, config: DistillStageConfig, start: Start, session: Session, mesh: Mesh):
        self.is_needed, self.student = config.divergence_weight > 0, session.model
        if not self.is_needed:
            return
        parallel = config.teacher_parallel or config.parallel
        self.has_other_layout = parallel != config.parallel
        self.model = frozen(start, mesh, parallel, session.precision)
        self.softcap, self.weight_VU = start.config.logit_softcap, self._output_rows(config, start.config)

    def _output_rows(self, config: DistillStageConfig, teacher: DecoderConfig) -> Tensor:
        """[V, U], or the rows of this rank's part of the vocabulary; nothing where no loss is computed."""
        first, stop = self.student.vocabulary if self.student.computes_losses else (0, 0)
        weight = torch.empty(stop - first, teacher.width, dtype=self.model.hidden_dtype, device=self.student.mesh.device)
        name = "embed_tokens.weight" if teacher.tie_embeddings else "lm_head.weight"
        huggingface.load_pieces(Path(config.teacher), {name: Piece(weight, (teacher.vocab_size, teacher.width), (first, 0))})
        return weight

    def hidden(self, batches: Sequence[PackedBatch], of_ranks: Sequence[Callable[[], list[PackedBatch]]]) -> list[Tensor]:
        """The final hidden states of each of this rank's rows ([t, U] of the tokens that are here, where losses are computed).
        A teacher of another layout computes the rows of every data rank, which `of_ranks` make, in shares of its own."""
        if not self.is_needed:
            return []
        mine = self.student.mesh.data_rank
        if not self.has_other_layout:
            return self.model.evaluate(batches, lambda view, hidden_TU, weight: hidden_TU)
        rows = [make() for make in of_ranks]
        owners, flat = [owner for owner, part in enumerate(rows) for _ in part], [row for part in rows for row in part]
        places = self.model.mesh.share(list(range(len(flat))))
        found = self.model.evaluate([flat[place] for place in places], lambda view, hidden_TU, weight: (view, hidden_TU))
        computed = dict(zip(places, found, strict=False)) if self.model.mesh.place.tensor == 0 else {}
        kept = []
        for place, (owner, row) in enumerate(zip(owners, flat, strict=True)):
            whole_TU = torch.zeros(
                len(row.tokens_T), self.model.config.width, dtype=self.model.hidden_dtype, device=self.student.mesh.device
            )  # fmt: skip
            if place in computed:
                view, hidden_TU = computed[place]
                index_t = view.places[: len(hidden_TU)]
                is_real_t = index_t < len(whole_TU)
                whole_TU[index_t[is_real_t]] = hidden_TU[is_real_t].to(whole_TU)
            dist.all_reduce(whole_TU)  # a row that every rank receives: T·U numbers
            if owner == mine:
                kept.append(whole_TU)
        return kept

    def here(self, view: View, hidden: Sequence[Tensor]) -> Tensor:
        return view.local(hidden[view.index]) if self.has_other_layout else hidden[view.index]


def losses(
    config: DistillConfig, teacher: Teacher, hidden: Sequence[Tensor], counted: float,
    view: View, hidden_TD: Tensor, weight_VD: Tensor,
) -> Loss:  # fmt: skip
    """A row's share of the loss over `counted` tokens; divergence and cross-entropy, summed over its tokens that count. One of
    weight 0 is not computed, and is 0."""
    divergence = cross_entropy = hidden_TD.new_zeros((), dtype=torch.float32)
    if config.divergence_weight:
        divergence = linear_divergence(
            hidden_TD, weight_VD, teacher.here(view, hidden), teacher.weight_VU, kind=config.kind, beta=config.beta,
            temperature=config.temperature, mask_T=view.target_T >= 0, teacher_softcap=teacher.softcap, **view.options,
        ).sum()  # fmt: skip
    if config.label_weight:
        cross_entropy = summed_cross_entropy(view, hidden_TD, weight_VD)
    loss = (config.divergence_weight * divergence + config.label_weight * cross_entropy) / counted
    return Loss(loss, torch.stack([divergence.detach().double(), cross_entropy.detach().double()]))


def _student(config: DistillStageConfig, teacher: Start, mesh: Mesh) -> Start:
    given = [name for name in ("start", "model", "student_layers") if getattr(config, name) is not None]
    if len(given) == 1:
        if config.start is not None:
            return start_from(Path(config.start), mesh)
        if config.model is not None:
            return fresh(config.model, teacher.tokenizer, config.seed, "distill")
        if config.student_layers is not None:
            return shallow(teacher, Path(config.teacher), config.student_layers)
    raise BadConfig(
        f"the student is given by {' and '.join(given) or 'nothing'}; give one of start, [model] and student_layers"
    )


def shallow(teacher: Start, folder: Path, layers: Sequence[int]) -> Start:
    """A decoder of the teacher's widths that begins with these of its layers, its embeddings and its norms."""
    if max(layers) >= teacher.config.num_layers:
        raise BadConfig(
            f"student_layers names layer {max(layers)}; the teacher has layers 0 to {teacher.config.num_layers - 1}"
        )
    windows = [teacher.config.window(layer) or 0 for layer in layers]
    config = DecoderConfig(**(teacher.config.model_dump() | {"num_layers": len(layers), "windows": windows}))

    def fill(pieces: dict[str, Piece]) -> None:
        read = huggingface.reader(folder)
        read({name: piece for name, piece in pieces.items() if not name.startswith("layers.")})
        for index, layer in enumerate(layers):
            prefix = f"layers.{index}."
            named = {f"layers.{layer}.{name.removeprefix(prefix)}": x for name, x in pieces.items() if name.startswith(prefix)}
            read(named)

    return Start(config, teacher.tokenizer, fill)
