import json

import pytest
import torch

from warpline.data.packing import Sample, pack
from warpline.models.decoder import Decoder, DecoderConfig, DecoderShape
from warpline.stages.distill import DistillConfig, _losses, shallow_copy
from warpline.stages.parts.checkpoint import load_start
from warpline.stages.parts.config import BadConfig

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


def test_a_shallow_copy_holds_the_chosen_layers(tiny_decoder):
    student = shallow_copy(tiny_decoder, [1])
    assert isinstance(student, Decoder) and student.config.num_layers == 1
    assert torch.equal(student.layers[0].mlp.up_proj.weight, tiny_decoder.layers[1].mlp.up_proj.weight)
    assert torch.equal(student.embed_tokens.weight, tiny_decoder.embed_tokens.weight)
    with pytest.raises(BadConfig, match="names layer 2; the teacher has layers 0 to 1"):
        shallow_copy(tiny_decoder, [2])


def test_a_shallow_copy_keeps_each_layers_window(tiny_decoder):
    shape = tiny_decoder.config.model_dump() | {"num_layers": 3, "windows": (4, 0)}
    student = shallow_copy(Decoder(DecoderConfig(**shape)), [1, 2])
    assert [student.config.window(layer) for layer in range(2)] == [None, 4]


def test_both_sides_logits_are_capped(tiny_decoder):
    """A capped teacher's copy does not diverge from it; its copy without the cap does."""
    capped = tiny_decoder.config.model_copy(update={"logit_softcap": 0.3})
    batch = pack([Sample([1, 2, 3, 4], [False, True, True, True], "test")])
    config = DistillConfig(steps=1, tokens_per_step=8, optimizer={"learning_rate": 1.0})
    divergences = []
    for student_config in (capped, tiny_decoder.config):
        decoders = [Decoder(c).double() for c in (student_config, capped)]
        for decoder in decoders:
            decoder.load_state_dict({name: 5 * x for name, x in tiny_decoder.state_dict().items()})
        divergences.append(_losses(config, *decoders, batch)[0].item())
    assert abs(divergences[0]) < 1e-12 < 1e-3 < divergences[1]


@pytest.mark.parametrize("changes", [{"student_layers": None}, {"model": SHAPE}])
def test_a_student_given_twice_or_not_at_all_is_refused(stage_runner, tmp_path, changes):
    with pytest.raises(BadConfig, match="give one of start"):
        stage_runner("distill", tmp_path / "run", **changes)
