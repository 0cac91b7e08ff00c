"""TRL's SFTTrainer: its per-token statistics through linear_logprob."""

from trl import SFTTrainer

from warpline.models.trl_head import use_linear_logprob


class LinearSFTTrainer(SFTTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.undo = use_linear_logprob(self.model, answers=("entropy", "is_top1"))
