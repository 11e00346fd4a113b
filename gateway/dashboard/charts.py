"""Charts as inline SVG: drawn by pygal, coloured by our own style sheet, without script, style or anything from outside."""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

_UNWANTED = {"script", "style", "defs", "desc", "title"}
_SVG = "http://www.w3.org/2000/svg"
_GAP = 0.06
"""Beside a bar, as a part of its place."""


Bar = tuple[str, str]
"""(what stands under a bar, how it is called)."""
Series = Sequence[tuple[str, Sequence[Decimal]]]


def stacked_bars(axis: Sequence[Bar], series: Series, label: str, unit: str) -> Markup:
    """Bars, one colour a series. ``label`` says it to those who do not see it; the numbers stand in a table beside it."""
    # It takes an eighth of a second to load, which only this page needs.
    import pygal

    kept: list[Any] = []

    class Bars(pygal.StackedBar):  # type: ignore[misc]
        def _plot(self) -> None:
            """No bars: what pygal draws beside them is for a script that we do not have, and takes five times as long as they do."""
            kept.append(self.view)

    chart = Bars(
        width=880, height=260, js=(), css=(), show_legend=False, explicit_size=False, print_values=False, margin=8, spacing=8,
        show_minor_x_labels=False, x_labels_major_every=max(1, len(axis) // 7), disable_xml_declaration=True, no_data_text="",
        truncate_label=-1,
        max_scale=5, value_formatter=lambda value: f"{value:,.10g}",
    )  # fmt: skip
    chart.x_labels = [short for short, _ in axis]
    # The sums are what it needs to know for a scale and its lines.
    stacks = list(zip(*(values for _, values in series), strict=True))
    chart.add("", [float(sum(value for value in stack if value > 0)) for stack in stacks])
    if any(value < 0 for stack in stacks for value in stack):
        chart.add("", [float(sum(value for value in stack if value < 0)) for stack in stacks])
    root = chart.render_tree()
    _clean(root)
    plot = next(one for one in root.iter() if one.get("class") == "plot")
    _draw(plot, kept[0], axis, series, unit)
    root.attrib.pop("id", None)
    root.attrib |= {"class": "chart", "role": "img", "aria-label": label}
    ElementTree.register_namespace("", _SVG)
    # Drawn from our own numbers and from names that were escaped as they were put in.
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704


def _draw(plot: ElementTree.Element, view: Any, axis: Sequence[Bar], series: Series, unit: str) -> None:
    """The bars, each with what a pointer over it says."""
    slot = (view.x(1) - view.x(0)) / len(axis)
    above, below = [0.0] * len(axis), [0.0] * len(axis)
    for order, (name, values) in enumerate(series):
        group = ElementTree.SubElement(plot, "g", {"class": f"bars color-{order}"})
        for number, value in enumerate(values):
            if not value:
                continue
            stack = below if value < 0 else above
            one, other = view.y(stack[number]), view.y(stack[number] + float(value))
            stack[number] += float(value)
            sizes = {
                "x": view.x(0) + slot * (number + _GAP),
                "y": min(one, other),
                "width": slot * (1 - 2 * _GAP),
                "height": abs(one - other),
            }
            rect = ElementTree.SubElement(group, "rect", {key: f"{size:.2f}" for key, size in sizes.items()})
            ElementTree.SubElement(rect, "title").text = f"{name}, {axis[number][1]}: {value:,f} {unit}"


def _clean(parent: ElementTree.Element) -> None:
    for child in list(parent):
        kind = child.tag.rpartition("}")[2] if isinstance(child.tag, str) else ""
        if kind in _UNWANTED or not kind or "overlay" in child.get("class", ""):
            parent.remove(child)
            continue
        child.attrib.pop("style", None)
        _clean(child)
