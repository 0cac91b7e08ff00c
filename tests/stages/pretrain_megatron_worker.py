"""One rank of `warpline pretrain --engine megatron` on a CPU, with the stand-ins that tests need for what asks of CUDA.

Run     torchrun --nproc-per-node N tests/stages/pretrain_megatron_worker.py CONFIG RUN [key=value …]
"""

import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Megatron misses Transformer Engine and apex
    import megatron_shims

from warpline.stages.command import app

if __name__ == "__main__":
    torch.set_num_threads(1)
    megatron_shims.install()
    config, run, *overrides = sys.argv[1:]
    app(["pretrain", config, *overrides, "--run", run, "--engine", "megatron"])
