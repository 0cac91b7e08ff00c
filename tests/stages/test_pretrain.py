import json

import pytest

from warpline.models.decoder import DecoderShape
from warpline.stages.parts.config import BadConfig
from warpline.stages.pretrain import data_folder


def test_training_lowers_the_loss_and_held_out_bits_per_byte(stage_runner, tmp_path):
    stage_runner("pretrain", tmp_path / "run", steps=40, evaluate_every_steps=20, checkpoint_every_steps=40)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    bits = [line["held_out_bits_per_byte"] for line in lines if "held_out_bits_per_byte" in line]
    assert len(losses) == 40 and losses[-1] < 0.6 * losses[0]
    assert len(bits) == 2 and bits[1] < bits[0]
    assert lines[-1]["seconds"] > 0


def test_microbatches_change_nothing_but_rounding(stage_runner, tmp_path):
    for name, size in (("whole", 4096), ("parts", 32)):
        stage_runner("pretrain", tmp_path / name, tokens_per_microbatch=size)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
        for name in ("whole", "parts")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_start_and_a_shape_together_are_refused(stage_runner, tmp_path, start_folder):
    with pytest.raises(BadConfig, match="not both"):
        stage_runner("pretrain", tmp_path / "run", start=str(start_folder))


def test_a_tokenizer_larger_than_the_model_is_refused(stage_runner, tmp_path, tokenizer):
    from warpline.models import huggingface
    from warpline.models.decoder import Decoder, DecoderConfig

    shape = DecoderShape(width=8, num_layers=1, num_heads=1, num_kv_heads=1, head_width=8, mlp_width=8)
    huggingface.save(Decoder(DecoderConfig(vocab_size=100, **shape.model_dump())), tmp_path / "small", tokenizer)
    with pytest.raises(BadConfig, match="vocabulary only 100"):
        stage_runner("pretrain", tmp_path / "run", start=str(tmp_path / "small"), model=None)


def test_a_window_longer_than_the_text_is_refused(stage_runner, tmp_path):
    with pytest.raises(ValueError, match="sequence_tokens"):
        stage_runner("pretrain", tmp_path / "run", sequence_tokens=10**7)


def test_a_folder_without_data_is_named(tmp_path):
    with pytest.raises(BadConfig, match="make it with `warpline data`"):
        data_folder(str(tmp_path))


def test_data_of_another_tokenizer_is_refused(stage_runner, tmp_path, text_run, tiny_decoder):
    from warpline.data.tokenizer import ChatTokenizer, train_tokenizer
    from warpline.models import huggingface

    other = ChatTokenizer(train_tokenizer(["zebra crossing " * 9], 270))
    huggingface.save(tiny_decoder, tmp_path / "other", other)
    with pytest.raises(BadConfig, match="another tokenizer than the model's"):
        stage_runner("pretrain", tmp_path / "run", start=str(tmp_path / "other"), model=None)
    with pytest.raises(BadConfig, match="another tokenizer than the model's"):
        stage_runner("sft", tmp_path / "chat", start=str(tmp_path / "other"))


def test_damaged_shards_and_too_long_windows_are_refused(stage_runner, tmp_path, text_run):
    import shutil

    with pytest.raises(BadConfig, match="sequence_tokens=256 exceeds the model's 128 positions"):
        stage_runner("pretrain", tmp_path / "long", sequence_tokens=256)
    shutil.copytree(text_run, tmp_path / "damaged")
    shard = next((tmp_path / "damaged" / "data" / "train").glob("*.bin"))
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(ValueError, match=r"token id 65535 .*the shards are damaged, make them again"):
        stage_runner("pretrain", tmp_path / "run", data=str(tmp_path / "damaged"))
