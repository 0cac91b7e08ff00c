"""The cases of the parity suite: every stage × layout, on two models, and how each is configured."""

from pathlib import Path
from typing import Any, NamedTuple

from warpline.stages import distill, evaluate, preference, pretrain, rl, sft
from warpline.stages.parts.config import ParallelConfig

STEPS = 20
SHAPE = {
    "width": 16, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_width": 8, "mlp_width": 24, "max_positions": 256,
    "init_std": 0.2,
}  # fmt: skip
MODELS = {"tied, K=2": SHAPE, "untied, K=1": SHAPE | {"num_kv_heads": 1, "tie_embeddings": False, "query_key_norm": True}}
TIED, UNTIED = MODELS
VOCABULARY = 307  # a prime: nothing divides it

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2},
    "tp4": {"tensor": 4},
    "pp2 gpipe": {"pipeline": 2, "schedule": "gpipe"},
    "pp2 1f1b": {"pipeline": 2},
    "pp2 interleaved": {"pipeline": 2, "schedule": "interleaved", "stages_per_rank": 2},
    "pp2 zero-bubble": {"pipeline": 2, "schedule": "zero_bubble", "stages_per_rank": 2},
    "pp2 zbv": {"pipeline": 2, "schedule": "zbv"},
    "cp2 ring": {"context": 2},
    "cp4 ring": {"context": 4},
    "cp2 Ulysses": {"context": 2, "attention": "ulysses"},
    "cp4 Ulysses": {"context": 4, "attention": "ulysses"},
    "fsdp2": {"shard": 2},
    "fsdp4": {"shard": 4, "recompute": "attention"},
    "dp2": {"replicate": 2},
    "hsdp 2×2": {"replicate": 2, "shard": 2, "recompute": "full"},
    "tp2×pp2": {"tensor": 2, "pipeline": 2},
    "tp2×cp2": {"tensor": 2, "context": 2},
    "tp2×fsdp2": {"tensor": 2, "shard": 2},
    "pp2×cp2": {"pipeline": 2, "context": 2},
    "pp2×fsdp2": {"pipeline": 2, "shard": 2},
    "cp2×fsdp2": {"context": 2, "shard": 2},
    "tp2×pp2×cp2": {"tensor": 2, "pipeline": 2, "context": 2},
    "tp2×pp2×fsdp2": {"tensor": 2, "pipeline": 2, "shard": 2},
}
OTHER_STAGES = ("sft", "preference", "rl", "distill", "evaluate")
OTHER_LAYOUTS = ("tp2", "pp2 1f1b", "cp2 ring", "fsdp2", "tp2×pp2×cp2")


class Case(NamedTuple):
    stage: str
    layout: str
    model: str
    precision: str = "fp64"
    teacher: str = ""  # the teacher's layout, where it is another

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.stage, self.layout, self.model, self.precision, self.teacher) if part)

    @property
    def reference(self) -> str:
        return f"{self.stage} {self.model} {self.precision}"

    @property
    def num_ranks(self) -> int:
        return ParallelConfig(**LAYOUTS[self.layout]).sizes.product


def _cases() -> list[Case]:
    models = [TIED, UNTIED]
    cases = [Case("pretrain", layout, models[index % 2]) for index, layout in enumerate(LAYOUTS)]
    cases += [Case("pretrain", layout, TIED) for layout in ("pp2 1f1b", "pp2 zbv", "tp2×pp2")]  # where tied embeddings part
    cases += [
        Case(stage, layout, models[(place + index) % 2])
        for place, stage in enumerate(OTHER_STAGES)
        for index, layout in enumerate(OTHER_LAYOUTS)
    ]
    cases.append(Case("distill", "tp2", TIED, teacher="fsdp2"))
    cases += [Case(stage, "tp2×pp2×cp2", TIED, "fp32") for stage in ("pretrain", *OTHER_STAGES[:-1])]
    return list(dict.fromkeys(cases))


CASES = {case.name: case for case in _cases()}
REFERENCES = {case.reference: Case(case.stage, "one", case.model, case.precision) for case in CASES.values()}
LAYOUTS["one"] = {}
CASES |= {case.name: case for case in REFERENCES.values()}


def config_of(case: Case, inputs: Path) -> Any:
    """The stage's configuration; `inputs` has run/ (of the data stage), pairs.jsonl and a folder per model."""
    run, start = inputs / "run", str(inputs / case.model)
    sizes = ParallelConfig(**LAYOUTS[case.layout]).sizes
    num_data = sizes.replicate * sizes.shard  # rows are the shorter, so that every rank has at least four a step
    training = {
        "steps": STEPS, "optimizer": {"learning_rate": 2e-3, "warmup_steps": 2, "weight_decay": 0.1}, "seed": 3,
        "precision": case.precision, "checkpoint_every_steps": STEPS, "tokens_per_microbatch": 92 // num_data,
    }  # fmt: skip
    chat = {
        "files": [str(run / "data" / "sft.jsonl")], "text": str(run), "text_tokens_per_step": 92, "text_window_tokens": 23,
        "tokens_per_step": 256, "tokens_per_microbatch": 64 // num_data,
    }  # fmt: skip
    kinds = {
        "pretrain": (
            pretrain.PretrainStageConfig,
            {"data": str(run), "start": start, "sequence_tokens": 23, "sequences_per_step": 16, "evaluate_every_steps": STEPS},
        ),
        "sft": (sft.SftStageConfig, {"start": start, **chat}),
        "preference": (
            preference.PreferenceStageConfig,
            {"start": start, "files": [str(inputs / "pairs.jsonl")], "tokens_per_step": 400, "sft_weight": 0.2,
             "tokens_per_microbatch": 100 // num_data},
        ),
        "rl": (
            rl.RlStageConfig,
            {"start": start, "files": [str(run / "data" / "rl.jsonl")], "prompts_per_step": 8, "completions_per_prompt": 2,
             "minibatches_per_step": 2, "max_new_tokens": 4, "kl_coefficient": 0.1, "tokens_per_microbatch": 50,
             "rewards": [{"function": "parity_cases:even_tokens"}]},
        ),
        "distill": (
            distill.DistillStageConfig,
            {"teacher": start, "student_layers": [0, 2, 3], "label_weight": 0.5, "kind": "jsd", **chat},
        ),
        "evaluate": (
            evaluate.EvaluateStageConfig,
            {"model": start, "text": [str(run / "data" / "held_out.jsonl")],
             "tasks": [str(run / "data" / "held_out_tasks.jsonl")],
             "window_tokens": 23, "max_new_tokens": 6, "precision": case.precision, "seed": 3,
             "rewards": [{"function": "parity_cases:even_tokens"}], "right_from": 0.75},
        ),
    }  # fmt: skip
    kind, inputs_of_stage = kinds[case.stage]
    settings = {**({} if case.stage == "evaluate" else training), **inputs_of_stage, "parallel": LAYOUTS[case.layout]}
    if case.teacher:
        settings["teacher_parallel"] = LAYOUTS[case.teacher]
    return kind.model_validate(settings)


def even_tokens(prompts, completions, completion_ids, **columns) -> list[float]:
    """A reward that an untrained model gets some of: a quarter for each even token id, so that ranks' sums are exact."""
    return [sum(token % 2 == 0 for token in ids) / 4 for ids in completion_ids]
