import json
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from warpline.data.packing import Sample, pack
from warpline.models import huggingface
from warpline.models.decoder import Decoder, DecoderConfig, DecoderShape
from warpline.parallel.mesh import start_mesh
from warpline.stages.distill import DistillStageConfig, Teacher, _teacher_mesh, losses, shallow
from warpline.stages.parts.checkpoint import load_start
from warpline.stages.parts.config import BadConfig, ParallelConfig
from warpline.stages.parts.model import build, start_from
from warpline.stages.parts.run import RunFolder
from warpline.stages.parts.session import Session

SHAPE = DecoderShape(width=8, num_layers=1, num_heads=1, num_kv_heads=1, head_width=8, mlp_width=8)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_copy_of_every_layer_is_the_teacher_and_has_no_divergence(stage_runner, tmp_path):
    stage_runner("distill", tmp_path / "run", student_layers=[0, 1], steps=1)
    assert lines_of(tmp_path / "run")[0]["divergence"] == pytest.approx(0.0, abs=1e-6)


def test_the_divergence_falls(stage_runner, tmp_path):
    stage_runner("distill", tmp_path / "run", steps=30, checkpoint_every_steps=30)
    divergences = [line["divergence"] for line in lines_of(tmp_path / "run")]
    assert sum(divergences[-3:]) < 0.5 * sum(divergences[:3])


def test_a_student_of_another_width_learns_from_the_teacher(stage_runner, tmp_path):
    last = stage_runner("distill", tmp_path / "run", student_layers=None, model=SHAPE, steps=20, checkpoint_every_steps=20)
    lines = lines_of(tmp_path / "run")
    assert lines[-1]["divergence"] < lines[0]["divergence"]
    assert load_start(last, torch.device("cpu"))[0].config.width == 8


def test_labels_alone_compute_no_divergence(stage_runner, tmp_path):
    stage_runner("distill", tmp_path / "run", divergence_weight=0.0, label_weight=1.0, steps=2)
    for line in lines_of(tmp_path / "run"):
        assert line["divergence"] == 0.0 and line["loss"] == line["cross_entropy"] > 0


def test_a_shallow_student_holds_the_chosen_layers(start_folder, tiny_decoder):
    start = shallow(start_from(start_folder, start_mesh()), start_folder, [1])
    student = build(start, start_mesh(), ParallelConfig(), "fp32").decoder
    assert isinstance(student, Decoder) and len(student.layers) == student.config.num_layers == 1
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, tiny_decoder.get_parameter(name.replace("layers.0.", "layers.1."))), name
    with pytest.raises(BadConfig, match="names layer 2; the teacher has layers 0 to 1"):
        shallow(start_from(start_folder, start_mesh()), start_folder, [2])


def test_a_shallow_student_keeps_each_layers_window(tiny_decoder, tmp_path, start_of):
    shape = tiny_decoder.config.model_dump() | {"num_layers": 3, "windows": (4, 0)}
    student = shallow(start_of(Decoder(DecoderConfig(**shape))), tmp_path, [1, 2])
    assert [student.config.window(layer) for layer in range(2)] == [None, 4]


@pytest.fixture
def distilled(tmp_path, tiny_decoder, tokenizer, start_of):
    """`distilled(student_config, **changes)`: what one fp64 step of two rows measures and learns, of a student with a capped
    teacher's weights, five times the tiny decoder's."""
    capped = tiny_decoder.config.model_copy(update={"logit_softcap": 0.3})
    weights = {name: 5 * x.double() for name, x in tiny_decoder.state_dict().items()}

    def decoder_of(config: DecoderConfig) -> Decoder:
        decoder = Decoder(config).double()
        decoder.load_state_dict(weights)
        return decoder

    huggingface.save(decoder_of(capped), tmp_path / "teacher", tokenizer, own_form=True)

    def distilled(student_config: DecoderConfig, **changes):
        settings = {"steps": 1, "tokens_per_step": 8, "optimizer": {"learning_rate": 1.0}, "precision": "fp64", **changes}
        config = DistillStageConfig(teacher=str(tmp_path / "teacher"), files=["unread"], **settings)
        start = start_of(decoder_of(student_config))
        session = Session("distill", config, RunFolder(tmp_path / "run"), start_mesh(), config.parallel, lambda: start)
        teacher = Teacher(config, start_from(tmp_path / "teacher", start_mesh()), session, start_mesh())
        rows = [pack([Sample([1, 2, 3, 4], [False, True, True, True], "test")]), pack([Sample([5, 6], [False, True], "test")])]
        head = partial(losses, config, teacher, teacher.hidden(rows, [lambda: rows]), 4.0)
        divergence, cross_entropy = session.model.accumulate(rows, head, 2)
        return decoder_of, rows, session.model, teacher, divergence, cross_entropy

    return distilled


def test_both_sides_logits_are_capped(distilled, tiny_decoder):
    """A capped teacher's copy does not diverge from it; its copy without the cap does."""
    capped = tiny_decoder.config.model_copy(update={"logit_softcap": 0.3})
    divergences = [distilled(config)[4] for config in (capped, tiny_decoder.config)]
    assert abs(divergences[0]) < 1e-12 < 1e-3 < divergences[1]


def test_the_loss_and_its_gradient_are_the_weighted_sums_over_all_counted_tokens(distilled, tiny_decoder):
    """0.7 · KL(teacher‖student) + 0.3 · cross-entropy over 4 tokens, against torch on each row by itself."""
    weights = {"divergence_weight": 0.7, "label_weight": 0.3}
    decoder_of, rows, model, teacher, divergence, cross_entropy = distilled(tiny_decoder.config, **weights)
    student, kl, entropy = decoder_of(tiny_decoder.config), 0.0, 0.0
    for row in rows:
        counts = row.target_T >= 0
        raw = F.linear(teacher.model.decoder(row.tokens_T[None])[0], teacher.weight_VU)[counts].detach()
        given = (0.3 * torch.tanh(raw / 0.3)).log_softmax(-1)
        learned = F.linear(student(row.tokens_T[None])[0], student.output_weight)[counts].log_softmax(-1)
        kl = kl + F.kl_div(learned, given, reduction="sum", log_target=True)
        entropy = entropy + F.nll_loss(learned, row.target_T[counts], reduction="sum")
    assert divergence == pytest.approx(kl.item(), rel=1e-10) and cross_entropy == pytest.approx(entropy.item(), rel=1e-10)
    ((0.7 * kl + 0.3 * entropy) / 4).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, student.get_parameter(name).grad, rtol=1e-9, atol=1e-12, msg=name)
    assert all(parameter.grad is None for parameter in teacher.model.parameters()), "a teacher has no gradients"


@pytest.mark.parametrize("changes", [{"student_layers": None}, {"model": SHAPE}])
def test_a_student_given_twice_or_not_at_all_is_refused(stage_runner, tmp_path, changes):
    with pytest.raises(BadConfig, match="give one of start"):
        stage_runner("distill", tmp_path / "run", **changes)


def test_a_student_of_another_vocabulary_is_refused(stage_runner, tmp_path, tiny_decoder, tokenizer):
    config = tiny_decoder.config.model_copy(update={"vocab_size": tokenizer.vocab_size + 1})
    huggingface.save(Decoder(config), tmp_path / "other", tokenizer)
    message = f"the student has {tokenizer.vocab_size + 1} tokens and the teacher {tokenizer.vocab_size}; .* one vocabulary"
    with pytest.raises(BadConfig, match=message):
        stage_runner("distill", tmp_path / "run", student_layers=None, start=str(tmp_path / "other"))


def test_a_teachers_layout_of_another_number_of_processes_is_bad_input(tmp_path):
    layout = {"teacher_parallel": {"tensor": 3}}
    settings = {"steps": 1, "tokens_per_step": 8, "optimizer": {"learning_rate": 1.0}, **layout}
    config = DistillStageConfig(teacher="there", files=["unread"], **settings)
    with pytest.raises(BadConfig, match=r"\[teacher_parallel\]: received tensor=3 for 1 processes; .* change it"):
        _teacher_mesh(config, start_mesh())
    same = config.model_copy(update={"teacher_parallel": config.parallel})
    mesh = start_mesh()
    assert _teacher_mesh(same, mesh) is mesh
