"""Promises of the tree: imports point down, files stay small, names say something, nothing unpickles."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "kernels": set(),
    "parallel": {"kernels"},
    "models": {"kernels", "parallel"},
    "data": set(),
    "stages": {"kernels", "parallel", "models", "data"},
    "bench": {"kernels", "parallel", "models", "data", "stages"},
}
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "base", "core"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 100
PICKLE = re.compile(r"\bpickle\b|torch\.(load|save)\b|\bmarshal\b|\bshelve\b|joblib|allow_pickle")
ENVIRONMENT = re.compile(r"os\.environ|os\.getenv|putenv")

SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a source file imports from, relative imports resolved against warpline.<room>."""
    package = ("warpline", *path.relative_to(ROOT).with_suffix("").parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        targets = []
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level] if node.level else ()
            base = parent + tuple((node.module or "").split("."))
            targets = [(*base, alias.name) for alias in node.names]
        found |= {target[1] for target in targets if target[0] == "warpline" and len(target) > 1}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_imports_point_down_only(path):
    room = room_of(path)
    assert imported_rooms(path) - {room} <= ROOMS[room]


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_code_inside_the_package_imports_relatively(path):
    tree = ast.parse(path.read_text())
    absolute = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    assert not [name for name in absolute if name and name.split(".")[0] in {"warpline", *ROOMS}]


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=names(SOURCES + TESTS))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{node.name} is too long"


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_names_and_habits(path):
    text = path.read_text()
    assert path.stem not in BANNED_NAMES
    assert ast.get_docstring(ast.parse(text)), "a file begins by saying what it is"
    assert not PICKLE.search(text) or path.name == "huggingface.py", "nothing unpickles"
    if path != ROOT / "parallel" / "mesh.py":
        assert not ENVIRONMENT.search(text), "only parallel/mesh.py reads the environment"
    for node in ast.walk(ast.parse(text)):
        assert not isinstance(node, ast.Global)
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in {"everything", "Exception", "BaseException"}


def test_rooms_have_no_init_and_one_link_each():
    assert not [path for room in ROOMS for path in (ROOT / room).rglob("__init__.py")]
    for room in ROOMS:
        link = ROOT / "src" / "warpline" / room
        assert link.is_symlink() and str(link.readlink()) == f"../../{room}"
    assert {path.name for path in (ROOT / "src" / "warpline").iterdir()} == set(ROOMS)


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_every_source_file_has_its_test(path):
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "bench":
        pytest.skip("a bench is run, not tested")
    # A backward is tested with its forward.
    assert (ROOT / "tests" / relative.with_name(f"test_{relative.stem.removesuffix('_backward')}.py")).exists()


KERNELS = sorted((ROOT / "kernels").glob("*.py"))
# Parts of the kernel of the same stem, in files of their own: a CPU process never imports what is in Triton.
TRITON = re.compile("_triton(_backward)?$")
PART = re.compile("_(triton|triton_backward|torch|backend)$")
# What several kernels walk with; the kernels' own tests and benches cover it.
MACHINERY = {"vocabulary_sweep", "token_statistics", "triton_jit", "backend"}


@pytest.mark.parametrize("path", KERNELS, ids=names(KERNELS))
def test_every_kernel_has_a_header_a_reference_and_a_public_function_of_its_name(path):
    tree = ast.parse(path.read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    header = ast.get_docstring(tree)
    assert all(section in header for section in ("Math", "Shapes", "Source"))
    if PART.search(path.stem):
        assert path.with_name(f"{PART.sub('', path.stem)}.py") in KERNELS
    elif path.stem not in MACHINERY and not path.stem.endswith("_loss"):  # in pure formulas each is its own reference
        assert {path.stem, f"{path.stem}_reference"} <= functions


@pytest.mark.parametrize("path", KERNELS, ids=names(KERNELS))
def test_triton_is_imported_in_one_place_and_a_kernel_in_it_has_a_bench(path):
    text = path.read_text()
    assert bool(re.search(r"^\s*(import triton|from triton)", text, re.MULTILINE)) == (path.stem == "triton_jit")
    assert bool(re.search("^from .triton_jit", text, re.MULTILINE)) == bool(TRITON.search(path.stem))
    assert not TRITON.search(path.stem) or (ROOT / "bench" / f"{TRITON.sub('', path.stem)}.py").exists()


def test_readme_maps_the_tree():
    readme = (ROOT / "README.md").read_text()
    mapped = set(re.findall(r"^\| `(\w+)/` \|", readme, re.MULTILINE))
    assert mapped == {*ROOMS, "configs", "tests", "docs"}
    assert all((ROOT / name).is_dir() for name in mapped)


def test_every_pinned_dependency_is_in_constraints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {re.split(r"[<>=;\[ ]", name)[0].lower() for name in wanted} <= pinned


def test_importing_a_kernel_does_nothing_but_import():
    code = "import sys, torch; before = set(sys.modules)\nimport warpline.kernels.linear_logprob, warpline.kernels.attention\n"
    code += "new = {name.split('.')[0] for name in set(sys.modules) - before}\nprint(sorted(new - {'warpline'}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    foreign = set(ast.literal_eval(result.stdout)) - set(sys.stdlib_module_names)
    assert not foreign & {"triton", "numpy", "transformers", "tokenizers"}
