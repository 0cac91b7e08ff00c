"""Times the fused losses against plain torch on the device at hand: the table says ratios of medians.

Run     .venv/bin/python -m warpline.bench.linear_logprob
Expect  one line per shape and function: median time of forward + backward, its interquartile range, the ratio to plain torch
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.benchmark import Measurement, Timer

from ..kernels.linear_divergence import linear_divergence
from ..kernels.linear_logprob import linear_cross_entropy, linear_logprob

SHAPES = ((4096, 128, 1024), (1024, 512, 8192))  # T, D, V: the laptop line's heads, and one four times as wide


def inputs(num_tokens: int, width: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(num_tokens, width, generator=generator).requires_grad_()
    weight_VD = (0.1 * torch.randn(vocab_size, width, generator=generator)).requires_grad_()
    return hidden_TD, weight_VD, torch.randint(0, vocab_size, (num_tokens,), generator=generator)


def plain_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_TD, weight_VD), target_T)


def plain_divergence(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    teacher_TV = F.linear(hidden_TD.detach().flip(0), weight_VD.detach()).log_softmax(-1)
    return F.kl_div(F.linear(hidden_TD, weight_VD).log_softmax(-1), teacher_TV, reduction="sum", log_target=True)


def fused_divergence(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    return linear_divergence(hidden_TD, weight_VD, hidden_TD.detach().flip(0), weight_VD.detach()).sum()


def logprob(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    return -linear_logprob(hidden_TD, weight_VD, target_T).logprob_T.mean()


PAIRS = (
    ("linear_cross_entropy", linear_cross_entropy, plain_cross_entropy),
    ("linear_logprob", logprob, plain_cross_entropy),
    ("linear_divergence", fused_divergence, plain_divergence),
)


def measure(function, arguments: tuple[Tensor, Tensor, Tensor]) -> Measurement:
    timer = Timer(
        "function(*arguments).backward()",
        globals={"function": function, "arguments": arguments},
        num_threads=torch.get_num_threads(),
    )
    return timer.blocked_autorange(min_run_time=2.0)


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, forward + backward")
    for shape in SHAPES:
        arguments = inputs(*shape)
        for name, fused, plain in PAIRS:
            ours, theirs = measure(fused, arguments), measure(plain, arguments)
            speed = f"{ours.median * 1e3:8.1f} ms (IQR {ours.iqr * 1e3:.1f})"
            baseline = f"plain torch {theirs.median * 1e3:8.1f} ms (IQR {theirs.iqr * 1e3:.1f})"
            label = f"T={shape[0]} D={shape[1]} V={shape[2]} {name:<21}"
            print(f"{label}{speed}, {baseline}, ratio {ours.median / theirs.median:.2f}")


if __name__ == "__main__":
    main()
