"""Charts as inline SVG: pygal's frame, our own bars, coloured by our style sheet, without script, style or anything from outside."""

from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple
from xml.etree import ElementTree

from markupsafe import Markup, escape

_UNWANTED = {"script", "style", "defs", "desc", "title"}
_SVG = "http://www.w3.org/2000/svg"
_GAP = 0.06
"""Beside a bar, as a part of its place."""
_HERE = "bars"
"""A comment where they go: above the lines."""
_FRAMES = 256
"""Of charts that were drawn last: whoever looks again, or at another grouping of the same, gets the same frame."""


Bar = tuple[str, str]
"""(what stands under a bar, how it is called)."""
Series = Sequence[tuple[str, Sequence[Decimal]]]


class _Frame(NamedTuple):
    """Scale, lines and labels."""

    before: str
    """The elements ahead of the bars, without the outermost."""
    after: str
    view: Any
    box: str


def stacked_bars(axis: Sequence[Bar], series: Series, label: str, unit: str) -> Markup:
    """Bars, one colour a series. ``label`` says it to those who do not see it; the numbers stand in a table beside it."""
    stacks = list(zip(*(values for _, values in series), strict=True))
    highest = max(float(sum(value for value in stack if value > 0)) for stack in stacks)
    lowest = min(float(sum(value for value in stack if value < 0)) for stack in stacks)
    frame = _frame(tuple(short for short, _ in axis), highest, lowest)
    head = Markup('<svg xmlns="{}" class="chart" role="img" aria-label="{}" viewBox="{}">').format(_SVG, label, frame.box)
    # Drawn from our own numbers; names were escaped as they were put in.
    return Markup("".join([head, frame.before, *_bars(frame.view, axis, series, unit), frame.after]))  # noqa: S704


@lru_cache(_FRAMES)
def _frame(labels: tuple[str, ...], highest: float, lowest: float) -> _Frame:
    # It takes an eighth of a second to load, which only this page needs.
    import pygal

    kept: list[Any] = []

    class Frame(pygal.StackedBar):  # type: ignore[misc]
        def _plot(self) -> None:
            """No bars: what pygal draws beside them is for a script that we do not have, and takes five times as long as they do."""
            kept.append(self.view)

    chart = Frame(
        width=880, height=260, js=(), css=(), show_legend=False, explicit_size=False, print_values=False, margin=8, spacing=8,
        show_minor_x_labels=False, x_labels_major_every=max(1, len(labels) // 7), disable_xml_declaration=True, no_data_text="",
        truncate_label=-1,
        max_scale=5, value_formatter=lambda value: f"{value:,.10g}",
    )  # fmt: skip
    chart.x_labels = labels
    # The ends are what it needs to know for a scale and its lines.
    chart.add("", [highest] * len(labels))
    if lowest < 0:
        chart.add("", [lowest] * len(labels))
    root = chart.render_tree()
    _clean(root)
    plot = next(one for one in root.iter() if one.get("class") == "plot")
    plot.append(ElementTree.Comment(_HERE))
    ElementTree.register_namespace("", _SVG)
    drawn = ElementTree.tostring(root, encoding="unicode")
    before, after = drawn[drawn.index(">") + 1 :].split(f"<!--{_HERE}-->")
    return _Frame(before, after, kept[0], root.attrib["viewBox"])


def _bars(view: Any, axis: Sequence[Bar], series: Series, unit: str) -> Iterator[str]:
    """The bars, each with what a pointer over it says."""
    slot = (view.x(1) - view.x(0)) / len(axis)
    left, width = view.x(0) + slot * _GAP, f"{slot * (1 - 2 * _GAP):.2f}"
    above, below = [0.0] * len(axis), [0.0] * len(axis)
    for order, (name, values) in enumerate(series):
        called, of = escape(name), escape(unit)
        yield f'<g class="bars color-{order}">'
        for number, value in enumerate(values):
            if not value:
                continue
            stack = below if value < 0 else above
            one, other = view.y(stack[number]), view.y(stack[number] + float(value))
            stack[number] += float(value)
            yield (
                f'<rect x="{left + slot * number:.2f}" y="{min(one, other):.2f}" width="{width}" height="{abs(one - other):.2f}">'
                f"<title>{called}, {escape(axis[number][1])}: {value:,f} {of}</title></rect>"
            )
        yield "</g>"


def _clean(parent: ElementTree.Element) -> None:
    for child in list(parent):
        kind = child.tag.rpartition("}")[2] if isinstance(child.tag, str) else ""
        if kind in _UNWANTED or not kind or "overlay" in child.get("class", ""):
            parent.remove(child)
            continue
        child.attrib.pop("style", None)
        _clean(child)
