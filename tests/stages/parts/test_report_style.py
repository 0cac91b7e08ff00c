"""The style sheet: both schemes define every colour that the page uses, readable on its ground, and nothing is fetched."""

import ast
import re
from pathlib import Path

import pytest

from warpline.stages.parts.report_figures import color
from warpline.stages.parts.report_run import STAGES
from warpline.stages.parts.report_style import STYLE

ROOT = Path(__file__).parents[3]
PAGE = "".join((ROOT / "stages" / name).read_text() for name in ("report.py", "parts/report_figures.py", "parts/report_run.py"))
SCHEMES = [dict(re.findall(r"--([\w-]+):([^;]+);", block)) for block in re.findall(r":root \{([^}]*)\}", STYLE)]


def used(source: str) -> set[str]:
    return set(re.findall(r"var\(--([\w-]+)", source))


def luminance(paint: str) -> float:
    """WCAG's relative luminance of #rgb or #rrggbb."""
    digits = paint.removeprefix("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_light_and_dark_define_the_same_colours_once_each():
    light, dark = SCHEMES
    assert light.keys() == dark.keys()
    assert all(re.fullmatch(r"#([0-9a-f]{3}){1,2}", paint) for scheme in SCHEMES for paint in scheme.values())
    assert len(re.findall(r"--[\w-]+:", STYLE)) == 2 * len(light)


def test_every_colour_that_is_used_is_defined_and_every_stage_has_one():
    stops = ("data", *STAGES, "evaluate", "release")
    assert used(STYLE) | used(PAGE) | used("".join(map(color, stops))) <= SCHEMES[0].keys()
    assert len({SCHEMES[0][stop.replace("_", "-")] for stop in STAGES}) == len(STAGES)


def test_no_colour_is_defined_for_nothing():
    stops = ("data", *STAGES, "evaluate", "release")
    assert SCHEMES[0].keys() == used(STYLE) | used(PAGE) | used("".join(map(color, stops)))


@pytest.mark.parametrize("scheme", SCHEMES, ids=("light", "dark"))
def test_text_is_readable_on_its_ground(scheme):
    """4.5 is WCAG's level AA for text, 3 for graphics."""
    for paint in ("ink", "muted", "good", "bad", "open"):
        assert min(contrast(scheme[paint], scheme[ground]) for ground in ("card", "page")) >= 4.5, paint


def test_dark_is_dark():
    assert luminance(SCHEMES[0]["page"]) > 0.8 and luminance(SCHEMES[1]["page"]) < 0.05


def test_every_class_with_a_style_is_one_that_the_page_writes():
    selectors = " ".join(re.findall(r"([^{}]+)\{", STYLE))
    constants = [node.value for node in ast.walk(ast.parse(PAGE)) if isinstance(node, ast.Constant)]
    written = {word for constant in constants if isinstance(constant, str) for word in re.findall(r"[a-z]+", constant)}
    assert set(re.findall(r"\.([a-z]+)", selectors)) - written == set()


def test_the_sheet_is_whole_and_fetches_nothing():
    depth = 0
    for brace in re.findall(r"[{}]", STYLE):
        depth += 1 if brace == "{" else -1
        assert 0 <= depth <= 2
    assert depth == 0
    assert not re.search(r"url\(|@import|http|</", STYLE)
