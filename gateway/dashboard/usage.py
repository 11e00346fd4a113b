"""Usage: bars by day and model, the same numbers in a table, and as CSV."""

import csv
import io
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from starlette.responses import Response

from clawplane.deployment.v1 import usage_service_pb2
from gateway.dashboard import charts
from gateway.dashboard.render import HEADERS, render
from gateway.dashboard.visit import Visit

RANGES = (7, 30, 90)
COLOURS = 6
"""Models with a colour of their own; the rest share the last."""
_OTHERS = "other models"


async def page(visit: Visit) -> Response:
    """The page."""
    days, shown = _range(visit), "tokens" if visit.query.get("show") == "tokens" else "cost"
    answer = await _summary(visit, days)
    names, series = _series(answer.sums, days, shown)
    unit = answer.total.currency.upper() if shown == "cost" else "tokens"
    label = f"{'Cost' if shown == 'cost' else 'Tokens'} by day and model, {days[0]} to {days[-1]}; the table below has the numbers."
    return render(
        "usage.html", visit, page="usage", answer=answer, days=days, shown=shown, names=names, ranges=RANGES,
        chart=charts.stacked_bars(days, list(zip(names, series, strict=True)), label, unit) if answer.sums else "",
        rows=_rows(answer.sums, days, series), chosen=len(days),
    )  # fmt: skip


async def csv_file(visit: Visit) -> Response:
    """The table as a file."""
    days = _range(visit)
    answer = await _summary(visit, days)
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["day", "model", "calls", "tokens_in", "tokens_out", "cost", "currency"])
    for one in answer.sums:
        writer.writerow([one.day, one.model, one.events, one.tokens_in, one.tokens_out, one.cost, one.currency])
    name = f"usage-{days[0]}-{days[-1]}.csv"
    return Response(out.getvalue(), 200, {**HEADERS, "Content-Disposition": f'attachment; filename="{name}"'}, "text/csv")


def _range(visit: Visit) -> list[str]:
    """The days that are asked for, as YYYY-MM-DD."""
    asked = visit.query.get("days", "")
    count = int(asked) if asked in {str(one) for one in RANGES} else 30
    today = datetime.now(UTC).date()
    return [(today - timedelta(days=back)).isoformat() for back in range(count - 1, -1, -1)]


async def _summary(visit: Visit, days: Sequence[str]) -> usage_service_pb2.SummarizeUsageResponse:
    request = usage_service_pb2.SummarizeUsageRequest(
        group_by=[usage_service_pb2.USAGE_GROUP_DAY, usage_service_pb2.USAGE_GROUP_MODEL]
    )
    request.start.FromDatetime(datetime.fromisoformat(days[0]).replace(tzinfo=UTC))
    found: usage_service_pb2.SummarizeUsageResponse = await visit.call(visit.services.usage.SummarizeUsage, request)
    return found


def _rows(sums: Sequence[usage_service_pb2.UsageSum], days: Sequence[str], series: Sequence[Sequence[Decimal]]) -> list[dict[str, object]]:
    """The table: a row for each day that has usage, the latest first."""
    calls: dict[str, int] = {}
    for one in sums:
        calls[one.day] = calls.get(one.day, 0) + one.events
    rows: list[dict[str, object]] = []
    for index, day in enumerate(days):
        if day in calls:
            amounts = [values[index] for values in series]
            rows.append({"day": day, "amounts": amounts, "calls": calls[day], "together": sum(amounts, Decimal(0))})
    return rows[::-1]


def _series(sums: Sequence[usage_service_pb2.UsageSum], days: Sequence[str], shown: str) -> tuple[list[str], list[list[Decimal]]]:
    """(models, values by day), the dearest first."""
    by_model: dict[str, dict[str, Decimal]] = {}
    for one in sums:
        value = Decimal(one.cost or "0") if shown == "cost" else Decimal(one.tokens_total)
        by_day = by_model.setdefault(one.model, {})
        by_day[one.day] = by_day.get(one.day, Decimal(0)) + value
    ranked = sorted(by_model, key=lambda model: (-sum(by_model[model].values()), model))
    names = ranked if len(ranked) <= COLOURS else [*ranked[: COLOURS - 1], _OTHERS]
    series = []
    for name in names:
        models = [name] if name != _OTHERS else ranked[COLOURS - 1 :]
        series.append([sum((by_model[model].get(day, Decimal(0)) for model in models), Decimal(0)) for day in days])
    return names, series
