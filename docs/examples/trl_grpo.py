"""TRL's GRPOTrainer: the log-probabilities and entropies of its completions through linear_logprob."""

import torch
from trl import GRPOTrainer

from warpline.models.trl_head import use_linear_logprob


class LinearGRPOTrainer(GRPOTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        product_dtype = torch.float32 if self.args.cast_lm_head_to_fp32 else None
        settings = {"temperature": self.temperature, "product_dtype": product_dtype}
        use_linear_logprob(self.model, answers=("entropy",), **settings)
        if self.ref_model is not None:
            use_linear_logprob(self.ref_model, answers=(), **settings)
