"""TRL's GRPOTrainer: the log-probabilities and entropies of its completions through linear_logprob."""

from trl import GRPOTrainer

from warpline.models.trl_head import use_linear_logprob


class LinearGRPOTrainer(GRPOTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        use_linear_logprob(self.model, temperature=self.temperature, answers=("entropy",))
        if self.ref_model is not None:
            use_linear_logprob(self.ref_model, temperature=self.temperature, answers=())
