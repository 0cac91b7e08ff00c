"""What lets Megatron-core 0.16.1 run on a CPU for tests: it asks for CUDA by name in many places. Never in the product.

| asked for                                    | where                                    | stands in                   |
|----------------------------------------------|------------------------------------------|-----------------------------|
| `torch.cuda.current_device()`                | mappings, layers, buffers, pipeline      | the CPU                     |
| `torch.zeros(…, device="cuda")` and its like | schedules, optimiser, norms of gradients | the same on the CPU         |
| `torch.cuda.synchronize()`                   | pipeline                                 | nothing                     |
| `tensor.cuda()`                              | tied embeddings                          | the tensor                  |
| `tensor.type() == "torch.cuda.FloatTensor"`  | optimiser                                | CUDA's name of the CPU type |
| the tracker of CUDA's random states          | sequence parallelism                     | none: there is no dropout   |
"""

import contextlib

import torch
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker


def _on_cpu(make):
    def made(*arguments, **options):
        if "cuda" in str(options.get("device", "")):
            options["device"] = "cpu"
        return make(*arguments, **options)

    return made


def _type_of(plain):
    def type_of(self, *arguments, **options):
        name = plain(self, *arguments, **options)
        return name.replace("torch.", "torch.cuda.") if isinstance(name, str) else name

    return type_of


def install() -> None:
    """For the rest of the process."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda device=None: None
    for name in ("zeros", "ones", "empty", "tensor"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *arguments, **options: self
    torch.Tensor.type = _type_of(torch.Tensor.type)
    CudaRNGStatesTracker.add = lambda self, name, seed: None
    CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
