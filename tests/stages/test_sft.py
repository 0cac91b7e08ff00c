import json

import pytest
import torch

from warpline.data.conversation import read_supervised
from warpline.stages.parts.checkpoint import load_start
from warpline.stages.parts.config import BadConfig


def test_the_loss_is_the_mean_over_assistant_tokens_alone(stage_runner, tmp_path, text_run, start_folder):
    """The first step's loss, against each conversation by itself with plain log_softmax."""
    files = [str(text_run / "data" / "sft.jsonl")]
    stage_runner("sft", tmp_path / "run", steps=1, tokens_per_step=100_000, text_tokens_per_step=0)
    decoder, tokenizer = load_start(start_folder, torch.device("cpu"))
    nats, counted = 0.0, 0
    for sample in read_supervised(files, tokenizer, None):
        logprobs = (decoder(torch.tensor([sample.ids]))[0] @ decoder.output_weight.T).log_softmax(-1)
        chosen = [(place - 1, token) for place, token in enumerate(sample.ids) if sample.supervised[place]]
        nats -= sum(logprobs[place, token].item() for place, token in chosen)
        counted += len(chosen)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(nats / counted, rel=1e-5)


def test_training_lowers_the_loss(stage_runner, tmp_path):
    stage_runner("sft", tmp_path / "run", steps=30, checkpoint_every_steps=30)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [{"role": "user", "content": "x"}]}', r"bad.jsonl:2: .*supervised"),
        ('{"messages": [{"role": "wizard", "content": "x"}]}', r"bad.jsonl:2: .*unknown role 'wizard'"),
        ('{"messages": ', r"bad.jsonl:2: "),
        ('{"prompt": "x"}', r"bad.jsonl:2: .*completion"),
    ],
)
def test_a_bad_sample_is_refused_with_file_and_line(stage_runner, tmp_path, line, message):
    good = '{"prompt": "1", "completion": "2"}\n'
    (tmp_path / "bad.jsonl").write_text(good + line + "\n" + good)
    with pytest.raises(ValueError, match=message):
        stage_runner("sft", tmp_path / "run", files=[str(tmp_path / "bad.jsonl")])


def test_an_empty_file_is_refused(stage_runner, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty.jsonl"):
        stage_runner("sft", tmp_path / "run", files=[str(tmp_path / "empty.jsonl")])


def test_text_without_a_folder_is_refused(stage_runner, tmp_path):
    with pytest.raises(BadConfig, match="text is not; give the folder"):
        stage_runner("sft", tmp_path / "run", text=None)
