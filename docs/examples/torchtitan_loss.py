"""torchtitan: its loss through linear_cross_entropy, inside the head where FSDP has gathered the matrix; our attention."""

from dataclasses import dataclass, fields

from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.models.common.attention import VarlenAttention
from torchtitan.models.common.linear import Linear

from warpline.kernels.attention import attention
from warpline.kernels.linear_logprob import linear_cross_entropy


class LinearLossHead(Linear):
    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        pass

    def forward(self, hidden, labels=None):
        if labels is None:
            return super().forward(hidden)
        whole = {"vocab_size": self.out_features}  # a shard of the vocabulary is refused
        return linear_cross_entropy(hidden.flatten(0, 1), self.weight, labels.flatten(), reduction="sum", **whole)


class LinearLoss(ChunkedLossWrapper):
    """A chunked loss to torchtitan, which hands it the head and the hidden states; it needs no chunks."""

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        pass

    def __call__(self, pred, labels, global_valid_tokens=None, **loss_inputs):
        loss = self.lm_head(pred, labels)
        return (loss if global_valid_tokens is None else loss / global_valid_tokens), {}


class PackedAttention(VarlenAttention):
    @dataclass(kw_only=True, slots=True)
    class Config(VarlenAttention.Config):
        pass

    def forward(self, q, k, v, *, attention_masks, scale=None, **options):
        packed = (x.flatten(0, 1) for x in (q, k, v))
        return attention(*packed, cu_seqlens=attention_masks.cu_seq_q, scale=scale).unflatten(0, q.shape[:2])


def use_warpline(config):
    """A Trainer.Config of torchtitan's registry, changed: its loss, its head, and the attention of every layer."""
    model, head = config.model_spec.model, config.model_spec.model.lm_head
    config.loss = LinearLoss.Config()
    model.lm_head = LinearLossHead.Config(**{field.name: getattr(head, field.name) for field in fields(head)})
    for layer in model.layers:
        layer.attention.inner_attention = PackedAttention.Config()
    return config
