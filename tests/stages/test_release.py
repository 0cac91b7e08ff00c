import json

import pytest
from safetensors.torch import load_file

from warpline.stages import release
from warpline.stages.parts.config import BadConfig
from warpline.stages.parts.run import RunFolder
from warpline.stages.release import ReleaseConfig, candidate, choose


def score(stage: str, accuracy: float, bits: float = 2.0, **families: float) -> dict:
    return {"stage": stage, "accuracy": accuracy, "bits_per_byte": bits, "families": families or {"sorting": accuracy}}


def entry(stage: str, accuracy: float, parameters: int, allowed: bool = True) -> dict:
    return {"stage": stage, "score": accuracy, "parameters": parameters, "allowed": allowed}


def test_the_best_allowed_wins_where_no_smaller_keeps_enough():
    entries = [entry("rl", 0.8, 100), entry("sft", 0.9, 100, allowed=False), entry("distill", 0.7, 50)]
    assert choose(entries, ReleaseConfig(smaller_keeps=0.95))[0] == "rl"


def test_a_smaller_model_that_keeps_enough_wins():
    entries = [entry("rl", 0.8, 100), entry("distill", 0.77, 50), entry("distill_control", 0.76, 50)]
    chosen, reason = choose(entries, ReleaseConfig(smaller_keeps=0.95))
    assert chosen == "distill" and "50% of the parameters of rl at 96% of its accuracy" in reason


def test_nothing_is_released_when_everything_regressed():
    assert choose([entry("rl", 0.8, 100, allowed=False)], ReleaseConfig()) == (None, "no stage passes the regression limits")


def test_models_without_a_single_right_answer_are_compared_too():
    chosen, reason = choose([entry("rl", 0.0, 100), entry("distill", 0.0, 50)], ReleaseConfig())
    assert chosen == "distill" and "100% of its accuracy (0.000 against 0.000)" in reason


def test_regressions_are_named():
    scores = {"pretrain": score("pretrain", 0.0), "sft": score("sft", 0.5, sorting=0.6, addition=0.4)}
    config = ReleaseConfig(max_bits_per_byte_increase=0.5, max_family_loss=0.1)
    forgot = candidate(score("rl", 0.7, bits=2.6, sorting=0.9, addition=0.2), 100, scores, config)
    assert not forgot["allowed"]
    assert forgot["reason"] == "bits per byte 2.600 above 2.500; addition fell from 0.400 to 0.200"
    assert candidate(score("rl", 0.7, bits=2.5, sorting=0.9, addition=0.3), 100, scores, config)["allowed"]


def test_the_export_is_the_chosen_checkpoint_without_its_training_state(stage_runner, tmp_path):
    checkpoint = stage_runner("sft", tmp_path / "run", steps=1)
    run = RunFolder(tmp_path / "run")
    for stage, accuracy in (("pretrain", 0.1), ("sft", 0.5)):
        run.replace_score(score(stage, accuracy))
    release.main(ReleaseConfig(), run, {"sft": checkpoint})
    released = json.loads((tmp_path / "run" / "release.json").read_text())
    assert released["stage"] == "sft" and released["checkpoint"] == "checkpoints/sft/step-1" and released["parameters"] > 1000
    folder = tmp_path / "run" / "release"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names
    assert not names & {"optimizer.safetensors", "state.json", "manifest.json"}
    ours, theirs = load_file(checkpoint / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_an_unscored_reference_is_refused(tmp_path):
    run = RunFolder(tmp_path)
    run.replace_score(score("sft", 0.5))
    with pytest.raises(BadConfig, match="compares with stage 'pretrain', which has no score"):
        release.main(ReleaseConfig(), run, {})
