"""Charts: their frames are remembered, their bars and names never are."""

from decimal import Decimal
from xml.etree import ElementTree

from gateway.dashboard import charts

AXIS = [("11-01", "2026-11-01"), ("11-02", "2026-11-02")]


def drawn(*series: tuple[str, list[int]]) -> ElementTree.Element:
    """The chart, as a browser reads it."""
    whole = [(name, [Decimal(value) for value in values]) for name, values in series]
    return ElementTree.fromstring(charts.stacked_bars(AXIS, whole, 'so "much"', "tokens"))  # noqa: S314 - our own


def told(chart: ElementTree.Element) -> list[str]:
    """What a pointer over each bar says."""
    return [str(one.text) for one in chart.iter() if one.tag.endswith("}title")]


def test_a_frame_is_shared_by_charts_of_one_scale_and_nothing_else() -> None:
    one, other = drawn(("a", [10, 4])), drawn(("b", [3, 10]))
    assert told(one) == ["a, 2026-11-01: 10 tokens", "a, 2026-11-02: 4 tokens"]
    assert told(other) == ["b, 2026-11-01: 3 tokens", "b, 2026-11-02: 10 tokens"]
    charts._frame.cache_clear()
    again = drawn(("b", [3, 10]))
    assert ElementTree.tostring(again) == ElementTree.tostring(other)
    # Of another scale, a bar that is as high as before stands for another amount.
    labels = {str(text.text) for text in drawn(("a", [10_000, 1])).iter() if text.tag.endswith("}text")}
    assert labels - {str(text.text) for text in one.iter() if text.tag.endswith("}text")}


def test_bars_stand_above_the_lines_and_on_each_other_also_below_nothing() -> None:
    chart = drawn(("a", [4, -2]), ("b", [6, 1]))
    plot = next(one for one in chart.iter() if one.get("class") == "plot")
    assert [one.get("class") for one in plot][-2:] == ["bars color-0", "bars color-1"]
    first, minus, second, small = [one for one in plot.iter() if one.tag.endswith("}rect")][-4:]
    top = {one: float(one.attrib["y"]) for one in (first, minus, second, small)}
    assert abs(top[second] + float(second.attrib["height"]) - top[first]) < 0.02
    # Below the line of nothing hangs what is less, and what is more stands on it.
    assert abs(top[small] + float(small.attrib["height"]) - top[minus]) < 0.02


def test_names_are_words_and_no_markup() -> None:
    chart = drawn(("<b>&\"'", [1, 0]))
    assert told(chart) == ["<b>&\"', 2026-11-01: 1 tokens"] and chart.get("aria-label") == 'so "much"'
