"""Logit distillation: a student learns a teacher's whole next-token distribution on given conversations.

Run     warpline distill configs/distill/own_data.toml
Reads   `teacher` (a model folder), `files` as for SFT, and the student: `start`, or [model], or `student_layers` of the
        teacher
Writes  RUN/checkpoints/distill/step-N, RUN/metrics.jsonl
Expect  loss = divergence_weight · divergence + label_weight · cross-entropy, each a mean in nats per counted token
"""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from ..data.conversation import read_supervised
from ..data.packing import PackedBatch
from ..data.tokenizer import ChatTokenizer
from ..kernels.linear_divergence import linear_divergence
from ..models.decoder import Decoder, DecoderConfig, DecoderShape
from ..parallel.mesh import Mesh
from .parts.checkpoint import load_start
from .parts.config import BadConfig, ParallelConfig
from .parts.run import RunFolder
from .parts.session import Session, StopSignal, seed_of
from .parts.tokens import (
    head_options,
    microbatches,
    num_targets,
    num_tokens,
    on_batch,
    sample_order,
    summed_cross_entropy,
)
from .pretrain import new_decoder
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


def main(
    config: DistillStageConfig, run: RunFolder, mesh: Mesh, stop: StopSignal | None = None, stage: str = "distill"
) -> Path:
    """Train to `config.steps`; returns the last checkpoint. `stage` names the metrics and the checkpoint folder."""
    # -- Whence: the teacher, and the student from its last checkpoint or its start --------------------------------------------
    teacher, tokenizer = load_start(Path(config.teacher), mesh.device)
    teacher.requires_grad_(False)
    session = Session(stage, config, run, mesh, lambda: _student(config, teacher, tokenizer, mesh), stop)
    if session.decoder.config.vocab_size != teacher.config.vocab_size:
        raise BadConfig(
            f"the student has {session.decoder.config.vocab_size} tokens and the teacher {teacher.config.vocab_size}; "
            "distillation compares token by token: give both one vocabulary"
        )

    # -- What: conversations, and text -----------------------------------------------------------------------------------------
    samples = read_supervised(
        [Path(path) for path in config.files], session.tokenizer, min(config.max_tokens, session.decoder.config.max_positions)
    )
    text = TextMix(config.text, config, session.tokenizer, seed_of(config.seed, "distill", "text"))
    order = sample_order(
        [len(sample.ids) for sample in samples], config.tokens_per_step, seed_of(config.seed, "distill", "order"), session.step
    )

    # -- The loop --------------------------------------------------------------------------------------------------------------
    for step in session.steps():
        mine = [[samples[index]] for index in mesh.share(next(order))]
        batches = [*microbatches(mine, config.tokens_per_microbatch), *text.batches(step, mesh)]
        counted, read = mesh.sum([num_targets(batches), num_tokens(batches)])  # over all ranks and microbatches
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            with session.autocast():
                divergence, cross_entropy = _losses(config, session.decoder, teacher, batch)
            loss = config.divergence_weight * divergence + config.label_weight * cross_entropy
            (loss / counted).backward()
            sums += torch.stack([divergence.detach(), cross_entropy.detach()]).double().cpu()  # the step's sync
        means = [value / counted for value in mesh.sum(sums.tolist())]
        mean_loss = config.divergence_weight * means[0] + config.label_weight * means[1]
        session.update(mean_loss)
        session.finish_step(mean_loss, read, divergence=means[0], cross_entropy=means[1])
    return session.checkpoint


def _losses(config: DistillConfig, student: Decoder, teacher: Decoder, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence and cross-entropy, summed over the batch's counted tokens; a loss of weight 0 is not computed and is 0."""

    def head(hidden_TD, weight_VD, target_T):
        zero = hidden_TD.new_zeros((), dtype=torch.float32)
        divergence = cross_entropy = zero
        if config.divergence_weight:
            with torch.no_grad():
                teacher_hidden_TU = on_batch(teacher, batch, lambda hidden, weight, target: hidden)
            divergence = linear_divergence(
                hidden_TD, weight_VD, teacher_hidden_TU, teacher.output_weight, kind=config.kind, beta=config.beta,
                temperature=config.temperature, mask_T=target_T >= 0, teacher_softcap=teacher.config.logit_softcap,
                **head_options(student),
            ).sum()  # fmt: skip
        if config.label_weight:
            cross_entropy = summed_cross_entropy(hidden_TD, weight_VD, target_T, **head_options(student))
        return divergence, cross_entropy

    return on_batch(student, batch, head)


def _student(
    config: DistillStageConfig, teacher: Decoder, tokenizer: ChatTokenizer, mesh: Mesh
) -> tuple[Decoder, ChatTokenizer]:
    given = [name for name in ("start", "model", "student_layers") if getattr(config, name) is not None]
    if len(given) == 1:
        if config.start is not None:
            return load_start(Path(config.start), mesh.device)
        if config.model is not None:
            return new_decoder(config.model, tokenizer, mesh.device, config.seed, "distill")
        if config.student_layers is not None:
            return shallow_copy(teacher, config.student_layers), tokenizer
    raise BadConfig(
        f"the student is given by {' and '.join(given) or 'nothing'}; give one of start, [model] and student_layers"
    )


@torch.no_grad()
def shallow_copy(teacher: Decoder, layers: list[int]) -> Decoder:
    """A new decoder of the teacher's widths that begins with these of its layers, its embeddings and its norms."""
    if max(layers) >= teacher.config.num_layers:
        raise BadConfig(
            f"student_layers names layer {max(layers)}; the teacher has layers 0 to {teacher.config.num_layers - 1}"
        )
    windows = [teacher.config.window(layer) or 0 for layer in layers]
    shape = teacher.config.model_dump() | {"num_layers": len(layers), "windows": windows}
    student = Decoder(DecoderConfig(**shape)).to(teacher.output_weight.device)
    tensors = teacher.state_dict()
    for name in student.state_dict():
        head, _, rest = name.partition(".")
        if head == "layers":
            index, _, tail = rest.partition(".")
            student.state_dict()[name].copy_(tensors[f"layers.{layers[int(index)]}.{tail}"])
        else:
            student.state_dict()[name].copy_(tensors[name])
    return student
