"""`linear_logprob` as the output head of TRL's trainers: what they ask of a model, answered from hidden states.

Use       in a subclass, after TRL's own __init__: undo = use_linear_logprob(self.model, temperature=...)
Asked     The trainers of TRL 1.16 for SFT, DPO, KTO, GRPO and RLOO call model(..., labels=labels, fused_lm_head=True) and read
          log_probs, entropy, mean_logits, log_sum_sq_probs, is_top1 and loss. Their `add_fused_lm_head` gives the model the
          forward that understands it, and nothing passes another one in; so this does what theirs does, and can undo it.
Shapes    labels [B, S]; every answer [B, S − 1], or as shift_labels [B, S]; 0 where the label is −100.
Limits    The head is a plain linear layer, whole or sharded by FSDP2 (gathered once), not partitioned by DeepSpeed's ZeRO-3.
          Models that scale their logits (Cohere, Granite) and auxiliary losses of routers are refused.
Source    trl 1.16: trl.trainer.utils.add_fused_lm_head, FusedCausalLMOutput.
"""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.linear_logprob import TokenStats, linear_logprob

IGNORED = -100
ANSWERS = ("entropy", "mean_logits", "log_sum_sq_probs", "is_top1")
SCALES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")


def _refuse(received: str, expected: str, remedy: str):
    raise ValueError(f"use_linear_logprob: received {received}; expected {expected}: {remedy}")


def use_linear_logprob(
    model: Any,
    *,
    temperature: float = 1.0,
    product_dtype: torch.dtype | None = None,
    answers: Collection[str] = ANSWERS,
) -> Callable[[], None]:
    """Gives a transformers causal model the forward that TRL's trainers call, on `linear_logprob`; returns what takes it back.

    Logits are divided by `temperature` (the sampling's, for GRPO). `answers` beside log_probs are computed; entropy has a
    gradient. `product_dtype=torch.float32` is TRL's cast_lm_head_to_fp32. Calls without fused_lm_head go where they went.
    What it returns may be called twice, and in any order with those of other uses.
    """
    unknown = sorted(set(answers) - set(ANSWERS))
    if unknown:
        _refuse(f"answers {unknown}", f"some of {', '.join(ANSWERS)}", "leave the others out")
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    text_config = model.config.get_text_config()
    scaled = [name for name in SCALES if getattr(text_config, name, None) not in (None, 1.0)]
    if scaled:
        _refuse(f"a model whose config has {scaled[0]}", "logits without a scale", "keep TRL's own head for it")
    output_class = importlib.import_module("trl.trainer.utils").FusedCausalLMOutput
    previous, has_own, is_undone = model.forward, "forward" in vars(model), False

    @functools.wraps(type(model).forward)  # generate checks its arguments against this signature
    def forward(self, *args, fused_lm_head=False, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        if is_undone or not fused_lm_head:
            asked = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            asked["fused_lm_head"] = fused_lm_head or None
            return previous(*args, **{name: x for name, x in asked.items() if x is not None}, **kwargs)
        if kwargs.get("output_router_logits") or getattr(text_config, "output_router_logits", False):
            _refuse("output_router_logits", "no auxiliary loss of a router", "keep TRL's own head for it")
        hidden_BSD = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        target_BS = F.pad(labels, (0, 1), value=IGNORED)[:, 1:] if shift_labels is None else shift_labels
        softcap = getattr(text_config, "final_logit_softcapping", None)
        options = {"temperature": temperature, "softcap": softcap, "product_dtype": product_dtype}
        stats = _statistics(self.get_output_embeddings(), hidden_BSD, target_BS, answers, options)
        length = target_BS.shape[1] - (shift_labels is None)  # the last position has no label
        return output_class(**_answers(stats, target_BS, length, num_items_in_batch))

    ours = model.forward = types.MethodType(forward, model)

    def undo() -> None:
        nonlocal is_undone
        is_undone = True  # enough where another forward (a later use, accelerate's autocast) has been put over ours
        if vars(model).get("forward") is ours:
            if has_own:
                model.forward = previous
            else:
                del model.forward

    return undo


def _statistics(head: Any, hidden_BSD: Tensor, target_BS: Tensor, answers: Collection[str], options: dict) -> TokenStats:
    if not isinstance(head, torch.nn.Linear):
        _refuse(f"an output head of {type(head).__name__}", "torch.nn.Linear", "leave lm_head out of adapters and quantization")
    whole = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in (head.weight, head.bias)]
    device_type = hidden_BSD.device.type
    if options["product_dtype"] is None and torch.is_autocast_enabled(device_type):
        options["product_dtype"] = torch.get_autocast_dtype(device_type)
    return linear_logprob(
        hidden_BSD.flatten(0, 1), whole[0], target_BS.flatten(), bias_V=whole[1], entropy="entropy" in answers,
        argmax="is_top1" in answers, sum_p2="log_sum_sq_probs" in answers, mean_logit="mean_logits" in answers, **options,
    )  # fmt: skip


def _answers(stats: TokenStats, target_BS: Tensor, length: int, num_items: Tensor | int | None) -> dict[str, Tensor | None]:
    """As TRL's FusedCausalLMOutput names them; the loss is the sum over the labels, over `num_items` or their number."""
    is_label_BS = target_BS != IGNORED

    def of(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.view(target_BS.shape)[:, :length]

    mean, sum_p2, best = of(stats.mean_logit_T), of(stats.sum_p2_T), of(stats.argmax_T)
    is_label = is_label_BS[:, :length]
    return {
        "loss": -stats.logprob_T.sum() / (is_label.sum().clamp(min=1) if num_items is None else num_items),
        "log_probs": of(stats.logprob_T),
        "entropy": of(stats.entropy_T),
        "mean_logits": None if mean is None else mean.detach(),
        "log_sum_sq_probs": None if sum_p2 is None else sum_p2.detach().where(is_label, 1.0).log(),
        "is_top1": None if best is None else (best == target_BS[:, :length]) & is_label,
        "label_mask": is_label,
    }
