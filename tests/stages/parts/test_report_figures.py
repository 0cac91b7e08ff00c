"""The pictures: everything stands where a calculation by hand puts it, and no text becomes markup."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from warpline.stages.parts.report_figures import (
    Axes,
    Bar,
    Curve,
    Station,
    averaged,
    bars,
    chart,
    color,
    ends,
    running_mean,
    stacked_bar,
    station,
    text,
)

AXES = Axes("x", "y")
# A chart's field: 336 pixels across from x = 52, and 164 up from y = 190, of which 6 % of the values' range pads each end.


def elements(drawn: str, tag: str, **attributes: str) -> list[ElementTree.Element]:
    """The elements of a picture with these attributes; the picture has to be well-formed."""
    found = ElementTree.fromstring(drawn).iter(tag)
    return [one for one in found if all(one.get(name) == value for name, value in attributes.items())]


def dots(drawn: str) -> list[tuple[float, float]]:
    return [(float(one.get("cx")), float(one.get("cy"))) for one in elements(drawn, "circle")]


def words(drawn: str) -> list[str]:
    return [one.text for one in elements(drawn, "text")]


def test_points_stand_where_the_axes_put_them():
    drawn = chart("label", Curve([(0, 0), (2.5, 50), (10, 100)], "red"), AXES)
    assert dots(drawn) == [(52.0, 181.2), (136.0, 108.0), (388.0, 34.8)]  # 190 − (6, 56, 106) / 112 · 164
    assert elements(drawn, "polyline")[0].get("points") == "52.0,181.2 136.0,108.0 388.0,34.8"


def test_ticks_are_round_numbers_at_their_heights():
    drawn = chart("label", Curve([(0, 0), (10, 100)], "red"), AXES)
    rules = [one.get("d") for one in elements(drawn, "path", **{"class": "rule"})]
    assert rules == [f"M52 {y}H388" for y in (181.2, 144.6, 108.0, 71.4, 34.8)]
    assert words(drawn) == ["0", "25", "50", "75", "100", "0", "2", "4", "6", "8", "10", "x", "y"]


def test_a_single_point_stands_in_the_middle():
    assert dots(chart("label", Curve([(3, 5)], "red"), AXES)) == [(220.0, 108.0)]
    assert dots(chart("label", Curve([(0, 0)], "red"), AXES)) == [(220.0, 108.0)]


def test_a_log_axis_spaces_powers_of_ten_evenly_and_a_zero_makes_it_linear():
    axes = Axes("x", "y", log=True)
    drawn = chart("label", Curve([(0, 1), (1, 10), (2, 100)], "red"), axes)
    assert [y for _, y in dots(drawn)] == [181.2, 108.0, 34.8]
    assert words(drawn)[:3] == ["1", "10", "100"]
    linear = chart("label", Curve([(0, 0), (1, 10), (2, 100)], "red"), axes)
    assert [y for _, y in dots(linear)] == [181.2, 166.6, 34.8]


@pytest.mark.parametrize(("level", "line", "name"), [(50.0, 108.0, 102.0), (100.0, 34.8, 49.8)])
def test_a_level_is_named_above_its_line_or_below_it_at_the_top(level, line, name):
    drawn = chart("label", Curve([(0, 0), (10, 100)], "red"), Axes("x", "y", (level, "zlib")))
    assert elements(drawn, "path", **{"class": "level"})[0].get("d") == f"M52 {line}H388"
    [named] = elements(drawn, "text", **{"class": "level"})
    assert (named.text, float(named.get("y"))) == ("zlib", name)


def test_a_level_outside_the_curve_widens_the_axis():
    drawn = chart("label", Curve([(0, 0), (10, 50)], "red"), Axes("x", "y", (100.0, "far")))
    assert dots(drawn)[1] == (388.0, 108.0)


def test_many_points_are_drawn_thin_with_their_running_mean_thick():
    curve = [(i, 1.0 if i == 20 else 0.0) for i in range(41)]
    thin, thick = (
        [
            float(point.split(",")[1])
            for point in elements(chart("label", Curve(curve, "red"), AXES), "polyline", **kind)[0].get("points").split()
        ]
        for kind in ({"class": "thin"}, {"class": "thick"})
    )
    assert thin[20] == 34.8 and set(thin) == {34.8, 181.2}
    assert thick[19:22] == [132.4] * 3 and set(thick) == {132.4, 181.2}  # a third of the spike: 190 − (1/3 + 0.06) / 1.12 · 164
    assert not dots(chart("label", Curve(curve, "red"), AXES))


def test_large_ticks_are_in_thousands_and_minus_is_a_minus_sign():
    drawn = chart("label", Curve([(0, -1), (20_000, 1)], "red"), AXES)
    assert {"20k", "−1"} <= set(words(drawn))


def test_bars_are_as_long_as_their_values():
    rows = [
        Bar("half", 0.5, "50 %", "red", mark=0.75),
        Bar("none", 0, "0 %", "red"),
        Bar("over", 3.0, "300 %", "red", mark=9.0),
    ]
    drawn = bars("label", rows, 1.0)
    assert [float(one.get("width")) for one in elements(drawn, "rect", fill="red")] == [114.0, 1.0, 228.0]
    assert [one.get("d") for one in elements(drawn, "path")] == ["M279.0 2v22", "M336.0 54v22"]
    assert words(drawn) == ["half", "50 %", "none", "0 %", "over", "300 %"]
    assert 'viewBox="0 0 400 78"' in drawn


def test_a_stacked_bar_divides_its_width_by_the_values():
    drawn = stacked_bar("label", [("one", 1.0, "red"), ("three", 3.0, "blue")])
    placed = [(one.get("x"), one.get("width"), one.get("fill")) for one in elements(drawn, "rect")]
    assert placed == [("0.00", "248.50", "red"), ("250.00", "748.50", "blue")]  # 1.5 of each is the gap
    thin = stacked_bar("label", [("nothing", 1e-9, "red"), ("all", 1.0, "blue")])
    assert elements(thin, "rect")[0].get("width") == "0.50"


@pytest.mark.parametrize(("share", "arc"), [(0.25, "25.00 100"), (1.7, "100.00 100"), (-0.1, "0.00 100")])
def test_a_ring_is_filled_by_its_share(share, arc):
    drawn = station(Station("rl", "25 %", ["2.3 bits"], "red", share), is_first=False, is_last=False)
    assert [one.get("stroke-dasharray") for one in elements(drawn, "circle", **{"class": "arc"})] == [arc]


def test_a_station_without_accuracy_has_an_open_ring_and_the_rail_ends_at_the_outer_stops():
    stop = Station("data", "text", ["1,660 documents"], "red")
    assert not elements(station(stop, True, False), "circle", **{"class": "arc"})
    rails = [elements(station(stop, *at), "path")[0].get("d") for at in ((True, False), (False, False), (False, True))]
    assert rails == ["M70 52H140", "M0 52H140", "M0 52H70"]
    assert 'aria-label="data: text, 1,660 documents"' in station(stop, True, False)


def test_a_station_ahead_looks_so():
    ahead = station(Station("rl", "–", ["not reached"], "red", is_reached=False), False, True)
    assert 'class="station ahead"' in ahead and elements(ahead, "path")[0].get("class") == "rail ahead"


def test_text_escapes_markup_and_shows_what_cannot_be_printed():
    assert text('<a href="x">&\'</a>') == "&lt;a href=&quot;x&quot;&gt;&amp;&#x27;&lt;/a&gt;"
    assert text("\x00\x1b\x7f\n\t") == "␀␛␡\n\t"
    assert text("\ud800") == "\\ud800"
    assert text(3) == "3"


def test_no_name_becomes_markup_in_any_picture():
    evil = '"><script>alert(1)</script>\x00'
    pictures = [
        chart(evil, Curve([(0, 1)], "red"), Axes(evil, evil, (1.0, evil))),
        bars(evil, [Bar(evil, 1.0, evil, "red")], 1.0),
        stacked_bar(evil, [(evil, 1.0, "red")]),
        station(Station(evil, evil, [evil], "red"), True, True),
    ]
    for picture in pictures:
        assert not elements(picture, "script")
        assert ElementTree.fromstring(picture).get("aria-label").startswith('"><script>alert(1)</script>␀')


def test_a_stage_has_its_own_colour_and_a_name_that_is_no_name_has_none():
    assert color("distill_control") == "var(--distill-control, var(--muted))"
    assert color("red);background:url(x") == color("") == "var(--muted)"


def test_averaging_takes_neighbours_together_in_both_coordinates():
    assert averaged([(i, i % 2) for i in range(300)]) == [(i, i % 2) for i in range(300)]
    assert averaged([(float(i), i % 2) for i in range(600)]) == [(2 * i + 0.5, 0.5) for i in range(300)]


def test_a_running_mean_spreads_a_spike_over_a_twentieth_and_is_cut_at_the_ends():
    spike = [(i, 5.0 if i == 40 else 3.0 if i == 0 else 0.0) for i in range(80)]
    means = [y for _, y in running_mean(spike)]
    assert means[38:43] == [1.0] * 5 and means[37] == means[43] == 0.0
    assert means[:4] == [1.0, 0.75, 0.6, 0.0]
    assert [x for x, _ in running_mean(spike)] == list(range(80))


def test_ends_are_means_over_a_twentieth():
    assert ends([(i, float(i)) for i in range(40)]) == (0.5, 38.5)
    assert ends([(0, 7.0), (1, 9.0)]) == (7.0, 9.0)


def test_equal_input_gives_equal_bytes_and_colours_stay_variables():
    make = [chart("label", Curve([(0, 1), (1, 2)], color("rl")), AXES) for _ in range(2)]
    assert make[0] == make[1]
    assert set(re.findall(r'(?:fill|stroke)="([^"]*)"', make[0])) == {"var(--rl, var(--muted))"}
