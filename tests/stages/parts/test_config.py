import pytest

from warpline.stages.parts.config import (
    BadConfig,
    Config,
    OptimizerConfig,
    TrainingConfig,
    apply_override,
    load_config,
    validate,
)


class Inner(Config):
    width: int = 1
    name: str = "x"


class Outer(Config):
    inner: Inner = Inner()
    other: Inner | None = None
    rate: float = 0.5


def test_overrides_are_toml_values_and_bare_words_strings():
    table = {}
    for override in ("rate=1e-3", "inner.width=7", "inner.name=word", 'other.name="a = b"', "other.width=2"):
        apply_override(table, override)
    config = validate(Outer, table, "test")
    assert config == Outer(rate=1e-3, inner=Inner(width=7, name="word"), other=Inner(width=2, name="a = b"))


def test_overrides_win_over_the_file(tmp_path):
    (tmp_path / "c.toml").write_text("rate = 2.0\n[inner]\nwidth = 3\n")
    assert load_config(Outer, tmp_path / "c.toml", ["inner.width=4"]) == Outer(rate=2.0, inner=Inner(width=4))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"rat": 1.0}, "unknown key 'rat'; the nearest known key is 'rate'"),
        ({"inner": {"widht": 1}}, "unknown key 'inner.widht'; the nearest known key is 'inner.width'"),
        ({"other": {"nmae": "x"}}, "unknown key 'other.nmae'; the nearest known key is 'other.name'"),
        ({"inner": {"width": "3"}}, "inner.width = '3'"),
        ({"inner": {"width": True}}, "inner.width = True"),
        ({"rate": "fast"}, "rate = 'fast'"),
    ],
)
def test_wrong_tables_are_one_line_with_key_and_remedy(table, message):
    with pytest.raises(BadConfig) as caught:
        validate(Outer, table, "file.toml")
    assert message in str(caught.value) and str(caught.value).startswith("file.toml: ")
    assert "\n" not in str(caught.value)


def test_an_override_below_a_value_is_refused():
    with pytest.raises(BadConfig, match="rate is a value, not a table"):
        apply_override({"rate": 1.0}, "rate.deep=2")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadConfig, match=r"nothing.toml: cannot be read"):
        load_config(Outer, tmp_path / "nothing.toml", [])


def test_values_are_frozen_and_checked():
    config = TrainingConfig(steps=1, optimizer=OptimizerConfig(learning_rate=1e-3))
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 2
    with pytest.raises(ValueError, match="greater than 0"):
        TrainingConfig(steps=0, optimizer=OptimizerConfig(learning_rate=1e-3))
