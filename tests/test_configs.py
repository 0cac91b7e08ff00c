"""Every committed config loads; every field is read somewhere; unknown keys are refused."""

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from warpline.stages.command import VERBS
from warpline.stages.parts.config import BadConfig, load_config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))
FIELD_TABLES: set[type[BaseModel]] = set()


def tables(kind: type[BaseModel]) -> set[type[BaseModel]]:
    """The config model and every model nested in its fields."""
    found = {kind}
    for field in kind.model_fields.values():
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel) and candidate not in found:
                found |= tables(candidate)
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=[str(path.relative_to(ROOT)) for path in CONFIGS])
def test_every_committed_config_loads(path):
    kind, _, _ = VERBS[path.parent.name]
    loaded = load_config(kind, path, [])
    assert loaded.model_dump(mode="json").keys() >= tomllib.loads(path.read_text()).keys()


@pytest.mark.parametrize("path", CONFIGS, ids=[str(path.relative_to(ROOT)) for path in CONFIGS])
def test_an_unknown_key_is_refused_with_the_nearest_known_one(path):
    kind, _, _ = VERBS[path.parent.name]
    with pytest.raises(BadConfig, match=r"unknown key 'sede'; the nearest known key is 'seed'"):
        load_config(kind, path, ["sede=1"])


@pytest.mark.parametrize("verb", VERBS)
def test_every_field_is_read_somewhere(verb):
    sources = "\n".join(path.read_text() for room in ("models", "stages") for path in (ROOT / room).rglob("*.py"))
    for table in tables(VERBS[verb][0]):
        for name in table.model_fields:
            assert re.search(rf"\.{name}\b|getattr\(config, name\)", sources), f"{table.__name__}.{name} is never read"


def test_a_nested_unknown_key_names_its_table():
    with pytest.raises(BadConfig, match=r"'rl.optimizer.learning_rat'; the nearest known key is 'rl.optimizer.learning_rate'"):
        load_config(VERBS["line"][0], ROOT / "configs/line/smoke.toml", ["rl.optimizer.learning_rat=1"])


def test_a_wrong_type_names_key_and_value():
    with pytest.raises(BadConfig, match=r"sft.steps = 'many'"):
        load_config(VERBS["line"][0], ROOT / "configs/line/smoke.toml", ["sft.steps=many"])


def test_an_override_without_equals_sign_is_refused():
    with pytest.raises(BadConfig, match=r"write dotted.key=value"):
        load_config(VERBS["line"][0], ROOT / "configs/line/smoke.toml", ["seed"])


def test_a_missing_key_is_named(tmp_path):
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(BadConfig, match="key 'data' is missing"):
        load_config(VERBS["line"][0], tmp_path / "empty.toml", [])


def test_broken_toml_is_one_line_with_its_place(tmp_path):
    (tmp_path / "broken.toml").write_text("seed = \n")
    with pytest.raises(BadConfig, match=r"broken.toml: not valid TOML: .*line 1"):
        load_config(VERBS["line"][0], tmp_path / "broken.toml", [])
