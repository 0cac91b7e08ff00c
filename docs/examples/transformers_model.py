"""A Llama of transformers: it trains through linear_cross_entropy (the logits are never made), its attention is ours."""

from functools import wraps

import torch.nn.functional as F
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import can_return_tuple

from warpline.kernels.linear_logprob import linear_cross_entropy
from warpline.models.transformers_attention import register


class LinearLossLlamaForCausalLM(LlamaForCausalLM):
    @can_return_tuple
    @wraps(LlamaForCausalLM.forward)  # Trainer and generate read its signature
    def forward(self, *args, labels=None, **kwargs):
        if labels is None or not self.training:
            return super().forward(*args, labels=labels, **kwargs)
        num_items, target = kwargs.pop("num_items_in_batch", None), kwargs.pop("shift_labels", None)
        hidden = self.model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        target = F.pad(labels, (0, 1), value=-100)[:, 1:] if target is None else target  # position i predicts token i + 1
        loss = linear_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, target.flatten(), reduction="sum")
        return CausalLMOutput(loss=loss / ((target != -100).sum() if num_items is None else num_items))


LinearLossLlamaForCausalLM.__name__ = LlamaForCausalLM.__name__  # by it Trainer knows a causal model, and config.json names it


def load(name: str) -> LinearLossLlamaForCausalLM:
    return LinearLossLlamaForCausalLM.from_pretrained(name, attn_implementation=register())
