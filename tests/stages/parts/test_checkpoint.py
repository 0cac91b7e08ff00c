import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from warpline.stages.parts.checkpoint import (
    checkpoints,
    damage,
    latest_checkpoint,
    load_start,
    load_state,
    save_checkpoint,
    write_manifest,
)
from warpline.stages.parts.config import BadConfig


def optimizer_of(decoder, seed: int) -> torch.optim.Optimizer:
    """AdamW after one update on seeded gradients, so that its moments are not zero."""
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(seed)
    for parameter in decoder.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return optimizer


@pytest.fixture
def saved(tmp_path, tiny_decoder, tokenizer) -> Path:
    """Two checkpoints, of steps 1 and 2, with different weights."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        optimizer = optimizer_of(tiny_decoder, step)
        save_checkpoint(folder, step, tiny_decoder, optimizer, tokenizer, {"step": step, "num_updates": 1}, keep=2)
    return folder


def test_a_checkpoint_returns_weights_moments_and_state(saved, tiny_decoder):
    decoder, _ = load_start(saved / "step-2", torch.device("cpu"))
    assert all(torch.equal(tensor, tiny_decoder.state_dict()[name]) for name, tensor in decoder.state_dict().items())
    optimizer = torch.optim.AdamW(decoder.parameters(), fused=True)
    assert load_state(saved / "step-2", decoder, optimizer) == {"step": 2, "num_updates": 1}
    generator = torch.Generator().manual_seed(2)
    for parameter in decoder.parameters():
        expected = torch.randn(parameter.shape, generator=generator) * 0.1
        assert torch.allclose(optimizer.state[parameter]["exp_avg"], expected, atol=1e-7)


def test_only_the_newest_are_kept(saved, tiny_decoder, tokenizer):
    save_checkpoint(saved, 10, tiny_decoder, optimizer_of(tiny_decoder, 3), tokenizer, {"num_updates": 1}, keep=2)
    assert [path.name for path in checkpoints(saved)] == ["step-10", "step-2"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json", "config.json", "manifest.json"]
)
def test_one_flipped_bit_anywhere_is_found_and_the_previous_checkpoint_taken(saved, name):
    path = saved / "step-2" / name
    original = path.read_bytes()
    for position in range(0, len(original), max(1, len(original) // 20)):
        changed = bytearray(original)
        changed[position] ^= 1
        path.write_bytes(bytes(changed))
        messages = []
        assert latest_checkpoint(saved, messages.append) == saved / "step-1", position
        assert len(messages) == 1 and "step-2 is damaged" in messages[0]
    path.write_bytes(original)
    assert latest_checkpoint(saved, messages.append) == saved / "step-2"


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def mix(folder: Path) -> None:
    (folder / "optimizer.safetensors").write_bytes((folder.parent / "step-1" / "optimizer.safetensors").read_bytes())


@pytest.mark.parametrize(
    "harm",
    [truncate, mix, lambda folder: (folder / "state.json").unlink(), lambda folder: (folder / "manifest.json").unlink(),
     lambda folder: (folder / "extra.bin").write_bytes(b"x"), lambda folder: (folder / "manifest.json").write_text("[1]")],
)  # fmt: skip
def test_truncated_missing_extra_and_mixed_files_are_refused(saved, harm):
    harm(saved / "step-2")
    assert damage(saved / "step-2")
    assert latest_checkpoint(saved, lambda message: None) == saved / "step-1"


def test_a_damaged_start_is_refused_in_one_line(saved):
    truncate(saved / "step-2")
    with pytest.raises(BadConfig, match=r"step-2 is damaged: model.safetensors does not match its digest; use an earlier one"):
        load_start(saved / "step-2", torch.device("cpu"))


class Planted:
    def __reduce__(self):
        return (os.system, ("touch PLANTED",))


def test_a_planted_pickle_is_never_run(saved, tmp_path, monkeypatch):
    import pickle

    monkeypatch.chdir(tmp_path)
    for name in ("model.safetensors", "optimizer.safetensors"):
        (saved / "step-2" / name).write_bytes(pickle.dumps(Planted()))
    write_manifest(saved / "step-2")
    with pytest.raises((BadConfig, ValueError)):
        load_start(saved / "step-2", torch.device("cpu"))
    assert not (tmp_path / "PLANTED").exists()


SAVER = """
import sys, torch
from pathlib import Path
from warpline.stages.parts.checkpoint import load_start, load_state, save_checkpoint
start, folder = Path(sys.argv[1]), Path(sys.argv[2])
decoder, tokenizer = load_start(start, torch.device("cpu"))
optimizer = torch.optim.AdamW(decoder.parameters())
print("ready", flush=True)
for step in range(3, 10000):
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(step)
    save_checkpoint(folder, step, decoder, optimizer, tokenizer, {"step": step, "num_updates": 0}, keep=2)
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_of_saving_leaves_a_good_checkpoint(saved, tmp_path):
    for trial in range(12):
        command = [sys.executable, "-c", SAVER, str(saved / checkpoints(saved)[0].name), str(saved)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.05 + 0.037 * trial)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        newest = latest_checkpoint(saved, lambda message: pytest.fail(message))
        step = json.loads((newest / "state.json").read_text())["step"]
        decoder, _ = load_start(newest, torch.device("cpu"))
        assert step < 3 or all(bool((tensor == step).all()) for tensor in decoder.state_dict().values())
