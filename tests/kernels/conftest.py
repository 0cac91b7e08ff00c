"""What the tests of the kernels share. They need nothing but torch, Triton and pytest, so that they run on a bare GPU machine.

With TRITON_INTERPRET=1 the process runs Triton's kernels on the CPU, and only the tests marked `interpreter` are selected;
without it those marked `interpreter_only` are not.
"""

import importlib.util
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from warpline.kernels.backend import interprets as interprets_triton

KERNELS = Path(__file__).parents[2] / "kernels"


def pytest_collection_modifyitems(config, items) -> None:
    mark = "interpreter" if interprets_triton() else None
    dropped = [
        item for item in items if (mark and mark not in item.keywords) or (not mark and "interpreter_only" in item.keywords)
    ]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


@pytest.fixture(scope="session")
def interprets() -> bool:
    """Whether this process runs Triton's kernels on the CPU: then they are what is tested."""
    return interprets_triton()


@pytest.fixture
def nan_memory():
    """What nobody writes is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def mutated(tmp_path) -> Callable[[str, str, str], ModuleType]:
    """`mutated(kernel, old, new)`: the kernel's module with every `old` of its source replaced; there must be one."""

    def load(kernel: str, old: str, new: str) -> ModuleType:
        source = (KERNELS / f"{kernel}.py").read_text()
        assert old in source, "the mutation is stale: its text is not in the source"
        path = tmp_path / f"{kernel}_mutated.py"
        path.write_text(source.replace(old, new) if old else source)
        spec = importlib.util.spec_from_file_location(f"warpline.kernels.{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def compiled(tmp_path) -> Callable[..., dict]:
    """`compiled(kernel, types, constants, architecture, num_warps=…)`: what the machine code for sm_80, sm_90 or sm_100 uses.

    Registers a thread, bytes of stack a thread (where spills go), bytes of shared memory, and the disassembly, without a GPU.
    Pointers are aligned, and the integers named in `divisible` are multiples of 16, as the launcher finds them.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def compile_(kernel, types: dict, constants: dict, architecture: int, divisible: tuple = (), **options) -> dict:
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types[name] for name in names}
        aligned = [name for name in names if signature[name].startswith("*") or name in divisible]
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        source = ASTSource(kernel, signature, constants, attributes)
        target = GPUTarget("cuda", architecture, 32)
        result = triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(result.asm["cubin"])
        usage, code = (
            subprocess.run([tool, flag, binary], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        return {"registers": int(registers), "stack": int(stack), "shared": result.metadata.shared, "code": code}

    return compile_
