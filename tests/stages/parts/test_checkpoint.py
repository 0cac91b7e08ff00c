import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from warpline.models import huggingface
from warpline.parallel.checkpoint import Piece, SaveFailed, Saver, write_manifest
from warpline.stages.parts.checkpoint import (
    Checkpoints,
    checkpoints,
    damage,
    load_moments,
    load_start,
    moment_names,
    save_checkpoint,
)
from warpline.stages.parts.config import BadConfig


def latest_checkpoint(folder: Path, warn) -> Path | None:
    return Checkpoints(folder, Saver(None), keep=1).latest(warn)


def moments_of(checkpoint: Path, decoder) -> tuple[dict[str, torch.Tensor], dict]:
    """The moments by their names, and state.json."""
    parameters = dict(decoder.named_parameters())
    pieces = {name: Piece.of(torch.empty_like(p)) for of, p in parameters.items() for name in moment_names(of)}
    state = load_moments(checkpoint, pieces)
    return {name: piece.tensor for name, piece in pieces.items()}, state


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
    moments, state = moments_of(saved / "step-2", decoder)
    assert state == {"step": 2, "num_updates": 1}
    generator = torch.Generator().manual_seed(2)
    for name, parameter in decoder.named_parameters():
        expected = torch.randn(parameter.shape, generator=generator) * 0.1
        assert torch.allclose(moments[f"exp_avg.{name}"], expected, atol=1e-7)


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


def pieces_of(decoder, seed: int) -> tuple[dict[str, Piece], dict[str, Piece]]:
    """Whole parameters and seeded moments, by name."""
    generator, model, moments = torch.Generator().manual_seed(seed), {}, {}
    for name, parameter in decoder.named_parameters():
        model[name] = Piece.of(parameter)
        for moment in moment_names(name):
            moments[moment] = Piece.of(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model, moments


def test_pieces_in_shards_come_back_under_another_cut_with_their_state(tmp_path, tiny_decoder, tokenizer):
    kept, saver = {name: tensor.clone() for name, tensor in tiny_decoder.state_dict().items()}, Saver(None)
    model, moments = pieces_of(tiny_decoder, 0)
    expected, state = {name: piece.tensor.clone() for name, piece in moments.items()}, {"num_updates": 7, "seconds": 0.5}
    stage = Checkpoints(tmp_path, saver, keep=2, max_shard_bytes=10_000)
    stage.save(3, tiny_decoder.config, tokenizer, state, model, moments)
    for piece in (*model.values(), *moments.values()):
        piece.tensor.zero_()
    state["num_updates"] = 8
    saver.wait()
    assert stage.latest(pytest.fail) == tmp_path / "step-3"
    assert {len(list(tmp_path.glob(f"step-3/{stem}-*-of-*.safetensors"))) > 1 for stem in ("model", "optimizer")} == {True}
    decoder, loaded_tokenizer = load_start(tmp_path / "step-3", torch.device("cpu"))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in decoder.state_dict().items())
    assert loaded_tokenizer.encode("def add") == tokenizer.encode("def add")
    last = {
        name: Piece(torch.zeros(1, *tensor.shape[1:]), tuple(tensor.shape), (len(tensor) - 1, *[0] * (tensor.ndim - 1)))
        for name, tensor in expected.items()
    }
    assert load_moments(tmp_path / "step-3", last) == {"num_updates": 7, "seconds": 0.5}
    assert all(torch.equal(piece.tensor, expected[name][-1:].float()) for name, piece in last.items())


def test_moments_of_another_model_are_refused_in_one_line(saved):
    with pytest.raises(
        BadConfig, match=r"the optimiser of .*step-2 does not fit the model: .*tensor exp_avg\.norm\.weight has"
    ) as e:
        load_moments(saved / "step-2", {"exp_avg.norm.weight": Piece.of(torch.zeros(3))})
    assert "\n" not in str(e.value)


def test_a_save_that_fails_keeps_the_checkpoints_before(saved, tiny_decoder, tokenizer):
    optimizer = optimizer_of(tiny_decoder, 3)
    with pytest.raises(TypeError, match="object is not JSON serializable"):
        save_checkpoint(saved, 3, tiny_decoder, optimizer, tokenizer, {"loss": object()}, keep=2)
    with pytest.raises(SaveFailed, match=r"rank 0: Not a directory: '.*state\.json/run"):
        save_checkpoint(saved / "step-2" / "state.json" / "run", 3, tiny_decoder, optimizer, tokenizer, {}, keep=2)
    assert {path.name for path in saved.iterdir()} == {"step-1", "step-2"}
    assert latest_checkpoint(saved, pytest.fail) == saved / "step-2"


RANKS = """
import json, sys, torch, torch.distributed as dist
from pathlib import Path
from warpline.models import huggingface
from warpline.parallel.checkpoint import Piece, Saver
from warpline.stages.parts.checkpoint import Checkpoints, load_moments, load_start, moment_names
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, size, start, folder = dist.get_rank(), dist.get_world_size(), Path(sys.argv[1]), Path(sys.argv[2])
decoder, tokenizer = load_start(start, torch.device("cpu"))
saver = Saver(dist.new_group(backend="gloo"))

def rows(tensor):
    step = -(-len(tensor) // size)
    offset = (min(rank * step, len(tensor)), *[0] * (tensor.ndim - 1))
    return Piece(tensor[rank * step : (rank + 1) * step], tuple(tensor.shape), offset)

parameters = dict(decoder.named_parameters())
model = {name: rows(parameter.detach()) for name, parameter in parameters.items()}
moments = {moment: rows(parameter.detach() + 1) for name, parameter in parameters.items() for moment in moment_names(name)}
stage = Checkpoints(folder, saver, keep=2)
seen = []
for step in (1, 2, 3):
    stage.save(step, decoder.config, tokenizer, {"step": step}, model, moments)
saver.wait()
for path, name in ((folder / "step-3", "model"), (folder / "step-2", "optimizer")):
    if rank == 0:
        content = bytearray((path / f"{name}.safetensors").read_bytes())
        content[-1] ^= 1
        (path / f"{name}.safetensors").write_bytes(content)
    saver.gather(None)
    warnings = []
    latest = stage.latest(warnings.append)
    seen.append([latest.name if latest else None, len(warnings)])
Path(f"{folder}-{rank}.json").write_text(json.dumps(seen))  # lines that ranks print together may mix
del stage, saver  # a gloo group that is alive when the interpreter ends may abort it
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_find_the_newest_good_checkpoint_together(tmp_path, start_folder):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", str(script)]
    done = subprocess.run([*command, str(start_folder), str(tmp_path / "run")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(3):
        seen = json.loads((tmp_path / f"run-{rank}.json").read_text())
        assert seen == [["step-2", int(rank == 0)], [None, 2 * (rank == 0)]]
    for step in (2, 3):  # the flipped bits back
        path = tmp_path / "run" / f"step-{step}" / {2: "optimizer.safetensors", 3: "model.safetensors"}[step]
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
        assert damage(path.parent) is None
    decoder, began = huggingface.load(tmp_path / "run" / "step-3"), huggingface.load(start_folder)
    assert all(torch.equal(tensor, began.state_dict()[name]) for name, tensor in decoder.state_dict().items())
    moments, _ = moments_of(tmp_path / "run" / "step-3", decoder)
    assert all(torch.equal(moments[name], p + 1) for of, p in decoder.named_parameters() for name in moment_names(of))


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
from warpline.stages.parts.checkpoint import load_start, save_checkpoint
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
