"""TRL's DPOTrainer: the log-probabilities of policy and reference through linear_logprob."""

from trl import DPOTrainer

from warpline.models.trl_head import use_linear_logprob


class LinearDPOTrainer(DPOTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        use_linear_logprob(self.model)
        if self.ref_model is not None:
            use_linear_logprob(self.ref_model, answers=())
