"""A Llama of transformers: its loss through linear_cross_entropy (the logits are never made), its attention ours."""

import torch.nn.functional as F
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from warpline.kernels.linear_logprob import linear_cross_entropy
from warpline.models.transformers_attention import register


class LinearLossLlamaForCausalLM(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, labels=None, num_items_in_batch=None, **kwargs):
        if labels is None:
            return super().forward(input_ids, attention_mask, **kwargs)
        hidden = self.model(input_ids, attention_mask, use_cache=False, **kwargs).last_hidden_state
        target = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()  # position i predicts token i + 1
        loss = linear_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, target, reduction="sum")
        return CausalLMOutput(loss=loss / ((target != -100).sum() if num_items_in_batch is None else num_items_in_batch))


def load(name: str) -> LinearLossLlamaForCausalLM:
    return LinearLossLlamaForCausalLM.from_pretrained(name, attn_implementation=register())
