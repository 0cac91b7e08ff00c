"""config.json both ways: what transformers writes for each family, and the `DecoderConfig` that computes the same.

A family is a row of `FAMILIES`: the shape fields that it fixes, those that its settings choose, and where its windows and its
rotary settings stand. A decoder that no family computes (gpt-oss's sinks with a dense MLP, say) has a form of its own,
model_type `warpline`, which transformers does not load.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..parallel.checkpoint import BadCheckpoint
from .decoder import DecoderConfig
from .rope_scaling import AnyRopeScaling, LinearRopeScaling, RopeScaling, YarnRopeScaling

# Ours to theirs, in every family.
_SIZES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "mlp_width": "intermediate_size",
    "max_positions": "max_position_embeddings",
}
_DERIVED_SIZES = ("num_kv_heads", "head_width")
_SWITCHES = {"norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings", "init_std": "initializer_range"}
# What transformers assumes where config.json is silent.
_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02}
# Settings that change the mathematics, and the values under which this decoder computes the same; in every family.
_REQUIRED = {
    "pretraining_tp": (1, None), "use_sliding_window": (False, None), "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
}  # fmt: skip
# What a family does not say about its windows and rotations, `_windows` and `_rope` do.
_PLACED = {*_SIZES, *_SWITCHES, "windows", "rope_theta", "rope_scaling", "local_rope_theta"}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


# ---- Windows: one number per layer, 0 without ----


@dataclass(frozen=True)
class Windows:
    """Where the families' settings keep the windows of the layers."""

    read: Callable[[dict[str, Any], Path], tuple[int, ...]]
    write: Callable[[list[int], DecoderConfig], dict[str, Any]]
    allows: Callable[[set[int]], bool]
    rule: str  # what `allows` asks for, in words


def _read_no_windows(settings: dict[str, Any], path: Path) -> tuple[int, ...]:
    if any(layer != _GLOBAL for layer in settings.get("layer_types") or ()):
        raise BadCheckpoint(f"{path}: layer_types={settings['layer_types']} is not supported; only {_GLOBAL} is")
    return (0,)


def _read_one_window(settings: dict[str, Any], path: Path) -> tuple[int, ...]:
    if settings.get("layer_types") is not None:
        raise BadCheckpoint(f"{path}: layer_types is not supported for {settings['model_type']}; delete it")
    return (_window(settings, path) if settings["sliding_window"] is not None else 0,)


def _read_windows_by_layer(settings: dict[str, Any], path: Path) -> tuple[int, ...]:
    """`layer_types`, or in older files every `sliding_window_pattern`-th layer without a window; as short as it repeats."""
    num_layers, every = settings["num_hidden_layers"], settings["sliding_window_pattern"]
    kinds = settings.get("layer_types")
    if kinds is None:
        if not isinstance(every, int) or every < 1:
            raise BadCheckpoint(f"{path}: sliding_window_pattern is {every!r}; it must be a number of layers, at least 1")
        kinds = [_LOCAL if (layer + 1) % every else _GLOBAL for layer in range(num_layers)]
    unknown = sorted({str(kind) for kind in kinds} - {_LOCAL, _GLOBAL})
    if unknown or len(kinds) != num_layers:
        received = unknown[0] if unknown else f"{len(kinds)} entries"
        raise BadCheckpoint(
            f"{path}: layer_types with {received} is not supported; only {_LOCAL} and {_GLOBAL} are, one for each of the "
            f"{num_layers} layers"
        )
    windows = [_window(settings, path) if kind == _LOCAL else 0 for kind in kinds]
    return next(
        tuple(windows[:period])
        for period in range(1, num_layers + 1)
        if all(window == windows[layer % period] for layer, window in enumerate(windows))
    )


def _window(settings: dict[str, Any], path: Path) -> int:
    window = settings["sliding_window"]
    if not isinstance(window, int) or window < 1:
        raise BadCheckpoint(f"{path}: sliding_window is {window!r}; it must be a number of tokens, at least 1")
    return window


def _write_windows_by_layer(windows: list[int], config: DecoderConfig) -> dict[str, Any]:
    # Where no layer has a window, transformers still wants a number.
    return {
        "sliding_window": max(windows) or config.max_positions,
        "layer_types": [_LOCAL if window else _GLOBAL for window in windows],
    }


_NO_WINDOWS = Windows(_read_no_windows, lambda windows, config: {}, lambda windows: windows == {0}, "no windows")
_ONE_WINDOW = Windows(
    _read_one_window,
    lambda windows, config: {"sliding_window": windows[0] or None},
    lambda windows: len(windows) == 1,
    "the same window in all layers",
)
_WINDOWS_BY_LAYER = Windows(
    _read_windows_by_layer, _write_windows_by_layer, lambda windows: len(windows - {0}) <= 1, "windows of one size"
)


# ---- Families ----


@dataclass(frozen=True)
class Family:
    """How one model_type of transformers relates to `DecoderShape`."""

    architecture: str
    fixed: dict[str, Any] = field(default_factory=dict)  # shape fields that are not at their defaults
    chosen: dict[str, str] = field(default_factory=dict)  # shape fields that a setting chooses
    defaults: dict[str, Any] = field(default_factory=dict)  # what transformers assumes where config.json is silent
    required: dict[str, tuple] = field(default_factory=dict)
    activation: str = "hidden_act"
    windows: Windows = _NO_WINDOWS
    has_local_rope: bool = False
    heads_divide_width: bool = False  # transformers refuses other widths


_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
_GEMMA: dict[str, Any] = {"zero_centred_norms": True, "post_norms": True, "scale_embeddings": True, "activation": "gelu_tanh"}
_GEMMA_CHOSEN = {
    "attention_bias": "attention_bias",
    "query_scalar": "query_pre_attn_scalar",
    "logit_softcap": "final_logit_softcapping",
}
_GEMMA_DEFAULTS = {
    "head_dim": 256, "num_key_value_heads": 4, "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096,
}  # fmt: skip
_NOT_BIDIRECTIONAL = {"use_bidirectional_attention": (False, None)}

FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        chosen={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        defaults={"max_position_embeddings": 2048, "head_dim": None},
        heads_divide_width=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        fixed={"query_key_norm": True},
        chosen={"attention_bias": "attention_bias"},
        defaults={"max_position_embeddings": 32768, "head_dim": 128, "num_key_value_heads": 32},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={"max_position_embeddings": 131072, "head_dim": None, "num_key_value_heads": 8, "sliding_window": 4096},
        windows=_ONE_WINDOW,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        fixed=_GEMMA,
        chosen=_GEMMA_CHOSEN | {"attention_softcap": "attn_logit_softcapping"},
        defaults=_GEMMA_DEFAULTS
        | {
            "max_position_embeddings": 8192, "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        },
        required=_NOT_BIDIRECTIONAL | {"sliding_window_pattern": (2,)},
        activation="hidden_activation",
        windows=_WINDOWS_BY_LAYER,
        heads_divide_width=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        fixed=_GEMMA | {"query_key_norm": True},
        chosen=_GEMMA_CHOSEN,
        defaults=_GEMMA_DEFAULTS | {"max_position_embeddings": 131072, "sliding_window_pattern": 6},
        required=_NOT_BIDIRECTIONAL | {"attn_logit_softcapping": (None,)},  # transformers ignores it
        activation="hidden_activation",
        windows=_WINDOWS_BY_LAYER,
        has_local_rope=True,
        heads_divide_width=True,
    ),
}  # fmt: skip
_OWN, _OWN_ARCHITECTURE = "warpline", "WarplineDecoder"
_UNSUPPORTED = {
    "gpt_oss": "its MLP is a mixture of experts, and this decoder's is dense",
    "gemma3": "it sees images; export its text model as gemma3_text",
}


# ---- Reading ----


def read_settings(settings: dict[str, Any], path: Path) -> DecoderConfig:
    """The decoder that these contents of config.json (at `path`) describe; BadCheckpoint names the first setting that it does
    not compute.
    """
    kind = settings.get("model_type")
    try:
        if kind == _OWN:
            return DecoderConfig.model_validate(settings.get("decoder"))
        return DecoderConfig(**_fields(settings, path))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "the sizes"
        raise BadCheckpoint(f"{path}: {name}: {first['msg']}; correct that setting") from None


def _fields(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    kind = settings.get("model_type")
    if kind not in FAMILIES:
        reason = f" ({_UNSUPPORTED[kind]})" if kind in _UNSUPPORTED else ""
        raise BadCheckpoint(f"{path}: model_type is {kind!r}{reason}; supported are {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    architectures = settings.get("architectures") or [family.architecture]
    if family.architecture not in architectures:
        raise BadCheckpoint(f"{path}: architectures is {architectures}; for {kind} only {family.architecture} is supported")
    settings = _DEFAULTS | family.defaults | settings
    activation = _ACTIVATIONS[family.fixed.get("activation", "silu")]
    for name, values in ({family.activation: (activation,)} | _REQUIRED | family.required).items():
        if settings.get(name, values[0]) not in values:
            raise BadCheckpoint(f"{path}: {name}={settings[name]!r} is not supported; only {values[0]!r} is")
    fields = {ours: settings[theirs] for ours, theirs in family.chosen.items() if theirs in settings}
    fields |= {ours: settings[theirs] for ours, theirs in _SWITCHES.items()}
    fields |= family.fixed | _read_sizes(settings, path) | _read_rope(settings, path, family)
    fields["windows"] = family.windows.read(settings, path)
    if fields.get("query_scalar") == fields["head_width"]:
        fields["query_scalar"] = None
    return fields


def _read_sizes(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    sizes: dict[str, Any] = {ours: settings.get(theirs) for ours, theirs in _SIZES.items()}
    for ours, size in sizes.items():
        if not isinstance(size, int) and (size is not None or ours not in _DERIVED_SIZES):
            raise BadCheckpoint(f"{path}: {_SIZES[ours]} is {size!r}; it must be a number, as transformers writes it")
    derived = {"num_kv_heads": sizes["num_heads"], "head_width": sizes["width"] // max(1, sizes["num_heads"])}
    return sizes | {ours: sizes[ours] or derived[ours] for ours in _DERIVED_SIZES}


# ---- Rotary settings ----

_ORIGINAL = ("original_max_positions", "original_max_position_embeddings")
_SCALINGS: dict[str, type[AnyRopeScaling]] = {"llama3": RopeScaling, "linear": LinearRopeScaling, "yarn": YarnRopeScaling}
_ROPE_NAMES = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def _read_rope(settings: dict[str, Any], path: Path, family: Family) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`; before, `rope_theta` and `rope_scaling`, with `type` for `rope_type`."""
    new, old = settings.get("rope_parameters") or {}, settings.get("rope_scaling") or {}
    if new and old and new != old:
        raise BadCheckpoint(f"{path}: rope_parameters and rope_scaling differ; keep rope_parameters and delete the other")
    rope = new or old
    _check_is_object(rope, path)
    if not family.has_local_rope:
        return _read_rotation(rope, settings.get("rope_theta") or 10000.0, settings, path)
    if new and not {_LOCAL, _GLOBAL} >= new.keys():
        raise BadCheckpoint(f"{path}: rope_parameters must hold {_GLOBAL} and {_LOCAL}, as transformers writes them")
    everywhere = (new.get(_GLOBAL) or {}) if new else old
    local = _read_rotation(new.get(_LOCAL) or {}, settings.get("rope_local_base_freq") or 10000.0, settings, path)
    rotation = _read_rotation(everywhere, settings.get("rope_theta") or 1000000.0, settings, path)
    if local == rotation:
        return rotation
    for name, scaling in ((_LOCAL, local["rope_scaling"]), (_GLOBAL, rotation["rope_scaling"])):
        if scaling is not None and (name == _LOCAL or not isinstance(scaling, LinearRopeScaling)):
            supported = "default is" if name == _LOCAL else "default and linear are"
            raise BadCheckpoint(f"{path}: this rope_type of {name} is not supported; only {supported}")
    return rotation | {"local_rope_theta": local["rope_theta"]}


def _read_rotation(rope: dict[str, Any], theta: float, settings: dict[str, Any], path: Path) -> dict[str, Any]:
    _check_is_object(rope, path)
    if any(isinstance(value, dict) for value in rope.values()):
        raise BadCheckpoint(f"{path}: rope_parameters by layer type are not supported for {settings['model_type']}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    fraction = rope.get("partial_rotary_factor", 1.0)
    if fraction != 1.0:
        raise BadCheckpoint(f"{path}: partial_rotary_factor={fraction!r} is not supported; only 1.0 is")
    theta = rope.get("rope_theta") or theta
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind not in _SCALINGS:
        raise BadCheckpoint(f"{path}: rope_type={kind!r} is not supported; supported are default, {', '.join(_SCALINGS)}")
    scaling, (ours, theirs) = _SCALINGS[kind], _ORIGINAL
    given = {name: value for name, value in rope.items() if name not in _ROPE_NAMES and value is not None}
    if ours in scaling.model_fields:
        given[ours] = given.pop(theirs, settings["max_position_embeddings"])
    absent = [name for name, info in scaling.model_fields.items() if info.is_required() and name not in given]
    if absent:
        raise BadCheckpoint(f"{path}: rope_type {kind} lacks {absent[0]}; add it, as transformers writes it")
    extra = [name for name in given if name not in scaling.model_fields]
    if extra:
        raise BadCheckpoint(f"{path}: {extra[0]}={given[extra[0]]!r} with rope_type {kind} is not supported; delete it")
    return {"rope_theta": theta, "rope_scaling": scaling(**given)}


def _check_is_object(rope: Any, path: Path) -> None:
    if not isinstance(rope, dict):
        raise BadCheckpoint(f"{path}: rope_parameters is {rope!r}; it must be an object, as transformers writes it")


def _write_rotation(theta: float, scaling: AnyRopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    (kind,) = (name for name, candidate in _SCALINGS.items() if isinstance(scaling, candidate))
    values, (ours, theirs) = scaling.model_dump(exclude_none=True), _ORIGINAL
    return {"rope_type": kind, "rope_theta": theta} | {theirs if name == ours else name: values[name] for name in values}


# ---- Writing ----


def write_settings(config: DecoderConfig, *, own_form: bool = False) -> dict[str, Any]:
    """Contents of config.json for the first family that computes `config`. A decoder that none computes is refused or, with
    `own_form`, written in a form that only `read_settings` reads.
    """
    differences = {kind: _differences(config, family) for kind, family in FAMILIES.items()}
    kind = min(differences, key=lambda kind: len(differences[kind]))  # the first of equals
    if differences[kind]:
        if own_form:
            return {"architectures": [_OWN_ARCHITECTURE], "model_type": _OWN, "decoder": config.model_dump(mode="json")}
        raise BadCheckpoint(
            f"no architecture of transformers computes this decoder; the nearest, {kind}, asks for "
            f"{', '.join(differences[kind])}: to export, change the shape"
        )
    family = FAMILIES[kind]
    rope = _write_rotation(config.rope_theta, config.rope_scaling)
    if family.has_local_rope:
        local = rope if config.local_rope_theta is None else _write_rotation(config.local_rope_theta, None)
        rope = {_GLOBAL: rope, _LOCAL: local}
    chosen = {theirs: getattr(config, ours) for ours, theirs in family.chosen.items()}
    if "query_pre_attn_scalar" in chosen:
        chosen["query_pre_attn_scalar"] = config.query_scalar or config.head_width
    return {
        "architectures": [family.architecture],
        "model_type": kind,
        family.activation: _ACTIVATIONS[config.activation],
        **{theirs: getattr(config, ours) for ours, theirs in (_SIZES | _SWITCHES).items()},
        "rope_parameters": rope,
        **chosen,
        **family.windows.write(_layer_windows(config), config),
    }


def _layer_windows(config: DecoderConfig) -> list[int]:
    return [config.window(layer) or 0 for layer in range(config.num_layers)]


def _differences(config: DecoderConfig, family: Family) -> list[str]:
    """What a decoder would have to change to be of this family, in words."""
    if config.query_scalar == config.head_width:
        config = config.model_copy(update={"query_scalar": None})
    wanted = {
        name: family.fixed.get(name, info.default)
        for name, info in DecoderConfig.model_fields.items()
        if name not in _PLACED and name not in family.chosen
    }
    found = [f"{name}={value}" for name, value in wanted.items() if getattr(config, name) != value]
    windows = set(_layer_windows(config))
    if not family.windows.allows(windows):
        found.append(family.windows.rule)
    if family.has_local_rope:
        if not isinstance(config.rope_scaling, LinearRopeScaling | None):
            found.append("linear rope_scaling or none")
    elif config.local_rope_theta is not None and windows != {0}:
        found.append("local_rope_theta=None")
    if family.heads_divide_width and config.width % config.num_heads:
        found.append(f"a width that is a multiple of num_heads={config.num_heads} (it is {config.width})")
    return found
