"""The package beside what it must live with: transformers and Hugging Face's `kernels`; and without what it may lack: triton.

Every check is a fresh process with `-S`, so that no `.pth` file brings the checkout in, standing in the repository root, whose
folder `kernels/` must not hide the package of that name.
"""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SITE = Path(sysconfig.get_path("purelib"))
ROOMS = sorted(link.name for link in (ROOT / "src" / "warpline").iterdir() if link.is_symlink())

NEIGHBOURS = """
import pathlib, sys
import kernels
assert callable(kernels.get_kernel), "this is not Hugging Face's kernels"
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_kernels_available
assert is_kernels_available(), "transformers did not find kernels"
sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
logits = LlamaForCausalLM(LlamaConfig(**sizes))(torch.arange(5)[None]).logits
assert logits.shape == (1, 5, 9) and logits.isfinite().all()
import warpline
import warpline.kernels.attention as module
home = pathlib.Path(sys.argv[1]).resolve()
assert [pathlib.Path(path).resolve() for path in warpline.__path__] == [home / "warpline"], list(warpline.__path__)
assert pathlib.Path(module.__file__).is_relative_to(home), module.__file__
query, key, value = torch.randn(3, 1, 6, 2, 4, dtype=torch.float64).unbind()
score = torch.einsum("bsnh,btnh->bnst", query, key) / 2
score = score.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
expected = torch.einsum("bnst,btnh->bsnh", score.softmax(-1), value)
torch.testing.assert_close(module.attention(query, key, value), expected, rtol=1e-12, atol=1e-12)
"""

WITHOUT_TRITON = """
import importlib, pathlib, sys
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoTriton())
names = [f"warpline.{room}.{path.stem}" for room in ("kernels", "models") for path in sorted(pathlib.Path(room).glob("*.py"))]
assert "warpline.kernels.attention" in names and "warpline.models.decoder" in names
for name in names:
    importlib.import_module(name)
assert "triton" not in sys.modules
import torch
from warpline.kernels.linear_logprob import linear_cross_entropy
from warpline.models.decoder import Decoder, DecoderConfig
sizes = dict(vocab_size=9, width=8, num_layers=1, num_heads=2, num_kv_heads=1, head_width=4, mlp_width=8, query_key_norm=True)
decoder = Decoder(DecoderConfig(**sizes)).initialise(torch.Generator().manual_seed(0))
optimizer = torch.optim.SGD(decoder.parameters(), lr=1.0)
row = torch.tensor([[1, 2, 3, 4, 1, 2, 3]])
boundaries = torch.tensor([0, 4, 7], dtype=torch.int32)
target = torch.tensor([2, 3, 4, -100, 2, 3, -100])
losses = []
for _ in range(30):
    loss = decoder(row, cu_seqlens=boundaries, head=lambda hidden, weight: linear_cross_entropy(hidden[0], weight, target))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.5 * losses[0], losses
"""


def run(code: str, *arguments: str, path: list[Path], home: Path) -> None:
    """Run `code` in a fresh interpreter that sees the standard library and `path` alone."""
    environment = {"PYTHONPATH": ":".join(map(str, path)), "HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-S", "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that a build leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    (copy / "src" / "warpline").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "src" / "warpline" / room).symlink_to(Path("..", "..", room))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(copy)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.mark.slow
def test_the_wheel_offers_one_name_and_every_module_of_every_room(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"warpline"}
    assert len(tops) == 2
    assert not [name for name in names if name.endswith("__init__.py")]
    expected = {
        f"warpline/{path.relative_to(ROOT)}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert {name for name in names if name.endswith(".py")} == expected


@pytest.mark.slow
def test_the_installed_wheel_lives_beside_transformers_and_its_kernels(installed, tmp_path):
    run(NEIGHBOURS, str(installed), path=[installed, SITE], home=tmp_path)


@pytest.mark.slow
def test_the_uninstalled_checkout_lives_beside_transformers_and_its_kernels(tmp_path):
    run(NEIGHBOURS, str(ROOT / "src"), path=[ROOT / "src", SITE], home=tmp_path)


def test_kernels_and_models_import_and_train_without_triton(tmp_path):
    run(WITHOUT_TRITON, path=[ROOT / "src", SITE], home=tmp_path)
