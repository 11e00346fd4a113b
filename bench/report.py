"""Keeps a run for the reader: a table as Markdown and a picture, in bench/results/."""

import platform
import re
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pygal
from pygal.style import Style

from bench.rig import Figures

FOLDER = Path(__file__).parent / "results"
Rows = dict[str, list[Figures]]
_HOW = """PostgreSQL 18 with durable commits, each service one process, the load generator a process of its own, all on one machine.
Rounds are interleaved. In each, what a promise compares is measured in turn, CPU by default a quarter of a second each, so that both
sides of its ratio meet the machine in the same mood (where the bound is 1.05, three times as long as elsewhere); a scenario that
several promises name is measured for each, and its line is of all of that. Shown are medians of the rounds, with the least and the most
in brackets. "native" is the same service on the native transport, a process of its own on the same database. Absolute numbers belong to
the machine; the ratios are what the project promises."""


Gates = Sequence[tuple[str, str, list[float], str]]
"""What, bound, ratios of the rounds, verdict."""
Transports = Sequence[tuple[str, str, str, str]]
"""Scenario, server CPU on grpcio, on native, their ratio."""


def write(rounds: Rows, transports: Transports, gates: Gates, callers: int, floor: str, folder: Path = FOLDER) -> None:
    """``floor``: the scenario that others are shown beside."""
    folder.mkdir(exist_ok=True)
    (folder / "latest.md").write_text(_markdown(rounds, transports, gates, callers))
    (folder / "latest.svg").write_text(_picture(rounds, floor))


def _markdown(rounds: Rows, transports: Transports, gates: Gates, callers: int) -> str:
    count = len(next(iter(rounds.values())))
    lines = [
        "# What a call costs", "",
        f"{datetime.now(UTC):%Y-%m-%d}, {psutil.cpu_count()} cores, Python {platform.python_version()}, {count} rounds, "
        f"{callers} callers where nothing else is said.", "", _HOW, "", "![rates beside the floor](latest.svg)", "",
        "| | calls/s | server CPU, us/call | first piece, ms | p50 ms | p99 ms |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, figures in rounds.items():
        first = f"{statistics.median(one.first_ms for one in figures):.2f}" if figures[0].first_ms else ""
        p50, p99 = (statistics.median(getattr(one, field) for one in figures) for field in ("p50_ms", "p99_ms"))
        lines.append(
            f"| {name} | {_spread([one.per_s for one in figures])} | {_spread([one.server_us for one in figures])} | {first} "
            f"| {p50:.2f} | {p99:.1f} |"
        )
    lines += ["", "| server CPU, us/call | grpcio | native | native / grpcio |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in transports]
    lines += ["", "| promise | bound | measured | |", "|---|---|---|---|"]
    for what, bound, ratios, verdict in gates:
        lines.append(f"| {what} | {bound} | {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | {verdict} |")
    return "\n".join([*lines, ""])


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})"


def _picture(rounds: Rows, floor: str) -> str:
    """Rates beside that of the floor, in percent."""
    style = Style(background="white", plot_background="white", colors=("#2f6f4f",), font_family="system-ui, sans-serif", value_font_size=12)
    shares = {
        name: round(100 * statistics.median(one.per_s / base.per_s for one, base in zip(figures, rounds[floor], strict=True)), 1)
        for name, figures in rounds.items()
    }
    chart = pygal.HorizontalBar(
        style=style, show_legend=False, print_values=True, print_values_position="top", js=(), width=900, height=32 * len(rounds) + 100,
        truncate_label=-1, title=f"calls a second, in percent of the RPC \"{floor}\" (more is better)", show_x_guides=False,
        show_y_guides=False, spacing=16, range=(0, 1.15 * max(shares.values())), disable_xml_declaration=True, no_prefix=True,
        value_formatter=lambda value: f"{value:.0f} %" if value >= 10 else f"{value:.1f} %",
    )  # fmt: skip
    chart.x_labels = list(shares)[::-1]
    chart.add("share", list(shares.values())[::-1])
    drawn: str = chart.render(is_unicode=True)
    # A picture needs no script, and no page that shows it should have to allow one.
    return re.sub(r"<script.*?</script>", "", drawn, flags=re.DOTALL) + "\n"
