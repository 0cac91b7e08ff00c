"""Configs: TOML with dotted overrides into strict, frozen pydantic models; what is wrong is one line that names key and
remedy.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from ...parallel.mesh import Sizes


class BadConfig(ValueError):
    """A config or a run folder that cannot be used: one line that names the file or key and the remedy."""


class Config(BaseModel):
    """Every table of a config: unknown keys refused, types strict, values frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


C = TypeVar("C", bound=BaseModel)
Precision = Literal["auto", "bf16", "fp32", "fp64"]


class OptimizerConfig(Config):
    """AdamW and its schedule. `learning_rate` is the peak; `decay_fraction` the share of all steps spent going down to
    `final_fraction` of it (`wsd`: linear at the end; `cosine`: from the end of the warm-up, whatever `decay_fraction`)."""

    learning_rate: PositiveFloat
    schedule: Literal["wsd", "cosine", "constant"] = "constant"
    warmup_steps: NonNegativeInt = 0
    decay_fraction: float = Field(0.2, ge=0, le=1)
    final_fraction: float = Field(0.0, ge=0, le=1)
    weight_decay: NonNegativeFloat = 0.0
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    max_grad_norm: PositiveFloat = 1.0


class TrainingConfig(Config):
    """What every training stage shares. Steps are optimiser updates; a step's gradient is accumulated over microbatches."""

    steps: PositiveInt
    optimizer: OptimizerConfig
    tokens_per_microbatch: PositiveInt = 16384
    checkpoint_every_steps: PositiveInt = 50
    keep_checkpoints: PositiveInt = 2
    max_skipped_steps_in_a_row: PositiveInt = 10
    precision: Precision = "auto"


class ParallelConfig(Config):
    """The layout: ranks along each axis, whose product is the number of processes. How the axes work: `attention` over
    `context`, the `schedule` over `pipeline` (`stages_per_rank`: of interleaved and zero_bubble), what of each layer's
    activations the backward makes again (`recompute`), and whether sharded parameters rest in host memory (`offload`). A rank
    that waits `timeout_seconds` for another ends the job.
    """

    pipeline: PositiveInt = 1
    replicate: PositiveInt = 1
    shard: PositiveInt = 1
    context: PositiveInt = 1
    tensor: PositiveInt = 1
    attention: Literal["ring", "ulysses"] = "ring"
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"] = "1f1b"
    stages_per_rank: PositiveInt = 1
    recompute: Literal["none", "attention", "mlp", "full"] = "none"
    offload: bool = False
    timeout_seconds: Annotated[PositiveFloat, Field(le=86_400)] = 100.0

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.pipeline, self.replicate, self.shard, self.context, self.tensor)


def load_config(kind: type[C], path: Path, overrides: list[str]) -> C:
    """Read `path` (TOML), apply `dotted.key=value` overrides (values in TOML syntax, bare words are strings), validate."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadConfig(f"{path}: cannot be read ({error.strerror}); give the path of a TOML config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        apply_override(table, override)
    return validate(kind, table, str(path))


def apply_override(table: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise BadConfig(f"override {override!r} has no '='; write dotted.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise BadConfig(
                f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a table; drop what follows it"
            )
    table[last] = value


def validate(kind: type[C], table: dict[str, Any], where: str) -> C:
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        raise BadConfig(f"{where}: {_first_problem(kind, error)}") from error


def _first_problem(kind: type[BaseModel], error: ValidationError) -> str:
    details = error.errors()[0]
    location = [str(part) for part in details["loc"]]
    key = ".".join(location)
    if details["type"] == "extra_forbidden":
        known = _known_keys(kind, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.0)
        return f"unknown key {key!r}; the nearest known key is {'.'.join([*location[:-1], *near])!r}"
    if details["type"] == "missing":
        return f"key {key!r} is missing; add it"
    return f"{key or 'config'} = {details['input']!r}: {details['msg']}" if location else details["msg"]


def _known_keys(kind: Any, location: list[str]) -> list[str]:
    for part in location:
        models = [kind, *getattr(kind, "__args__", ())]
        owner = next((model for model in models if part in getattr(model, "model_fields", {})), None)
        kind = owner.model_fields[part].annotation if owner else kind
    models = [kind, *getattr(kind, "__args__", ())]
    return [key for model in models for key in getattr(model, "model_fields", {})]
