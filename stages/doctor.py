"""What is here: the machine, versions and GPUs, for every operation with several implementations which of them would run, and
whether a GPU is bad.

Run     warpline doctor        [torchrun --nnodes N --nproc-per-node 8 --no-python -- warpline doctor]
Reads   nothing but the machine
Writes  standard output, as wide as the terminal
Expect  a package counts as here if its distribution is installed and really imports; without a GPU the answers are for the CPU.
        With GPUs each is checked (`parts/gpu_check.py`; the checks were not run on GPUs yet); exit code 4 if one is bad. Under
        torchrun every rank's device is checked, and the rest is not printed
"""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..kernels import attention_backend, rms_norm, swiglu
from ..kernels.attention_torch import Rule
from ..kernels.backend import Backend
from ..parallel.mesh import Mesh, Sizes, end_mesh, num_processes, start_mesh
from .parts.gpu_check import Reading, check, problems

GIB = 2**30


# ---- The operations, and calls of each that not every implementation serves; the first is the plain one ----


def _attention_calls(device: torch.device) -> Iterator[attention_backend.Request]:
    q, k = (torch.zeros(1, 8, heads, 64, dtype=torch.bfloat16, device=device) for heads in (4, 2))
    cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
    rule = Rule(causal=True, window=None, softcap=None, scale=0.125, return_lse=False, out_dtype=q.dtype)
    plain = attention_backend.Request(q, k, k, None, None, None, rule, 0)
    packed = plain._replace(q=q[0], k=k[0], v=k[0], cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens)
    yield plain
    yield packed
    yield packed._replace(max_seqlen=5)
    for option in ({"window": 4}, {"softcap": 20.0}, {"return_lse": True}, {"out_dtype": torch.float32}):
        yield plain._replace(rule=rule._replace(**option))
    yield plain._replace(sinks_N=torch.zeros(4, device=device))
    yield plain._replace(offset=3)
    yield plain._replace(v=k[..., :32])
    yield plain._replace(q=q.clone().requires_grad_())
    for dtype in (torch.float32, torch.float64):
        yield plain._replace(q=q.to(dtype), k=k.to(dtype), v=k.to(dtype), rule=rule._replace(out_dtype=dtype))


def _rms_norm_calls(device: torch.device) -> Iterator[rms_norm.Request]:
    x, weight = (torch.zeros(shape, dtype=torch.bfloat16, device=device) for shape in ((2, 64), (64,)))
    yield rms_norm.Request(x, weight)
    yield rms_norm.Request(x, weight, residual=x)
    yield rms_norm.Request(x, weight, zero_centred=True)
    yield rms_norm.Request(x, weight.float())
    yield rms_norm.Request(x[:, :1].expand(2, 2**24), weight[:1].expand(2**24))
    yield rms_norm.Request(x.double(), weight.double())


def _swiglu_calls(device: torch.device) -> Iterator[swiglu.Request]:
    for dtype in (torch.bfloat16, torch.float64):
        gate = torch.zeros(2, 64, dtype=dtype, device=device)
        yield swiglu.Request(gate, gate)


class Operation(NamedTuple):
    """A table of implementations, those that "auto" takes in order, and calls to ask them about."""

    table: Mapping[str, Backend]
    auto: Sequence[str]
    calls: Callable[[torch.device], Iterator[Any]]


OPERATIONS = {
    "attention": Operation(attention_backend.TABLE, attention_backend.AUTO, _attention_calls),
    "rms_norm": Operation(rms_norm.TABLE, rms_norm.AUTO, _rms_norm_calls),
    "swiglu": Operation(swiglu.TABLE, swiglu.AUTO, _swiglu_calls),
}


class Finding(NamedTuple):
    """`status` is "auto" (taken without being named), "by name", or "absent"; `note` says why, or what it cannot do."""

    status: str
    name: str
    note: str


def findings(operation: Operation, device: torch.device) -> list[Finding]:
    """One per implementation, those that "auto" takes first."""
    calls = list(operation.calls(device))
    chosen = next(name for name in operation.auto if _serves(operation.table[name], calls[0], device))
    found = [_finding(name, operation, calls, chosen, device) for name in operation.table]
    return sorted(found, key=lambda x: (("auto", "by name", "absent").index(x.status), x.name != chosen))


def _serves(backend: Backend, call: Any, device: torch.device) -> bool:
    return backend.absent(device) is None and backend.cannot(call) is None


def _finding(name: str, operation: Operation, calls: list, chosen: str, device: torch.device) -> Finding:
    backend = operation.table[name]
    absent = backend.absent(device)
    if absent is not None:
        # Without a GPU, what would be missing with one says more.
        return Finding("absent", name, backend.absent(torch.device("cuda")) or absent)
    refused = dict.fromkeys(reason for reason in map(backend.cannot, calls) if reason is not None)
    note = f"cannot do {'; '.join(refused)}" if refused else "takes every call"
    if name not in operation.auto:
        return Finding("by name", name, _version(name) + note)
    return Finding("auto", name, note if name == chosen else f"takes what {chosen} cannot")


def _version(distribution: str) -> str:
    """The version of a package that is called as its entry is, with a comma; nothing for parts of torch."""
    try:
        return f"version {importlib.metadata.version(distribution)}, "
    except importlib.metadata.PackageNotFoundError:
        return ""


# ---- The machine ----


def machine() -> dict[str, str]:
    """What this is, one line each."""
    from ..kernels.triton_jit import triton  # here: every other verb starts without it

    driver, gpus = _gpus()
    built_for = torch.version.cuda or torch.version.hip
    torch_line = f"{torch.__version__}, built {f'for CUDA {built_for}' if built_for else 'without CUDA'}"
    if gpus and not torch.cuda.is_available():
        torch_line += ": it cannot use the GPUs here; install a build for this driver"
    lines = {
        "machine": f"{platform.system()} {platform.release()}, {_processor()}, {os.cpu_count()} cores{_memory()}",
        "python": platform.python_version(),
        "torch": torch_line,
        "triton": triton.__version__ if triton is not None else "not installed: no kernel of ours runs on a GPU",
        "driver": driver,
    }
    return lines | {f"GPU {index}": gpu for index, gpu in enumerate(gpus)}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory() -> str:
    names = {"SC_PHYS_PAGES", "SC_PAGE_SIZE"}
    if not names <= os.sysconf_names.keys():
        return ""
    return f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.0f} GiB"


def _gpus() -> tuple[str, list[str]]:
    """The driver, and each NVIDIA GPU, as the driver's own library tells."""
    try:
        import pynvml
    except ImportError:
        return "unknown: nvidia-ml-py is not installed", []
    try:
        pynvml.nvmlInit()
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        driver = f"{pynvml.nvmlSystemGetDriverVersion()}, up to CUDA {cuda // 1000}.{cuda % 1000 // 10}"
        return driver, [_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        return f"no NVIDIA driver answers: {error}", []


def _gpu(pynvml: Any, index: int) -> str:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total / GIB
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return f"{pynvml.nvmlDeviceGetName(handle)}, {memory:.0f} GiB, sm_{major}{minor}"


# ---- What is printed ----

LEGEND = (
    ("auto", 'taken without being named: backend="auto", the default'),
    ("by name", "taken only if it is named, as backend=..."),
    ("absent", "named, it raises with this reason; so does any that cannot do a call"),
)


def main() -> bool:
    """Whether nothing is wrong."""
    if num_processes() > 1:
        mesh = start_mesh(Sizes(replicate=num_processes()))
        try:
            return check_ranks(mesh)
        finally:
            end_mesh(mesh)
    report()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        return subprocess.call([sys.executable, *torchrun, "-m", "warpline.stages.command", "doctor"]) == 0
    return check_ranks(start_mesh()) if count else True


def check_ranks(mesh: Mesh) -> bool:
    """Checks every rank's device, and prints on the first rank."""
    readings, sweep = check(mesh)
    found = problems(readings)
    if mesh.is_first:
        console = Console(highlight=False)
        console.print("\n[bold]checks[/bold]")
        console.print(_grid([("device", "TFLOP/s", "GB/s", "MHz", "bits"), *map(_row, readings)]))
        if sweep:
            console.print("\n[bold]all-reduce[/bold], bus bandwidth")
            console.print(_grid((f"{size / 2**20:g} MiB", f"{rate:.3g} GB/s") for size, rate in sweep))
        console.print("")
        console.print("\n".join(found) or "nothing is wrong", markup=False)
    return not found


def _row(reading: Reading) -> tuple[str, ...]:
    clock = "–" if reading.clock_mhz is None else f"{reading.clock_mhz} of {reading.max_clock_mhz}"
    return reading.where, f"{reading.product_tflops:.3g}", f"{reading.copy_gbytes:.4g}", clock, reading.digest


def report() -> None:
    console, device = Console(highlight=False), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console.print(_grid(machine().items()))
    for name, operation in OPERATIONS.items():
        console.print(f"\n[bold]{name}[/bold], on {device.type}")
        console.print(_grid(findings(operation, device), _longest_name()))
    console.print()
    console.print(_grid(LEGEND))


def _longest_name() -> int:
    return max(len(name) for operation in OPERATIONS.values() for name in operation.table)


def _grid(rows: Iterable[Sequence[str]], name_width: int = 0) -> Table:
    """Columns as wide as their cells, the last folded at the terminal's edge."""
    *_, last = rows = list(rows)
    grid = Table.grid(padding=(0, 2))
    for index in range(len(last)):
        is_text = index == len(last) - 1
        grid.add_column(min_width=(7, name_width, 0, 0)[index] if not is_text else None, no_wrap=not is_text, overflow="fold")
    for cells in rows:
        grid.add_row(*map(escape, cells))
    return grid
