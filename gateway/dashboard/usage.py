"""Usage: what was used over time and by whom, beside what was before; the same numbers as tables, and all of it as files."""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple

from google.rpc import code_pb2
from starlette.responses import RedirectResponse, Response

from clawplane.deployment.v1 import deployment_service_pb2, quota_pb2, usage_event_pb2
from clawplane.deployment.v1 import usage_service_pb2 as rpc
from clawplane.user.v1 import api_key_service_pb2, member_service_pb2
from gateway import exports
from gateway.dashboard import charts, quotas
from gateway.dashboard.render import HEADERS, render, with_query
from gateway.dashboard.usage_query import DIMS, PRESETS, SHOWN, TYPES, Query, blamed
from gateway.dashboard.visit import Visit, violations
from gateway.errors import ApiError, invalid

COLOURS = 6
"""Groups with a colour of their own; the rest share the last."""
_OTHERS = "others"
_MOST_ROWS = 50
"""Of the breakdown; the file has them all."""
_MOST_NAMES = 100
"""Of users, keys and deployments each, the latest; others are shown by their ids."""
_NAMED = ("user", "key", "deployment")
"""Dimensions whose values have names of their own."""
_SUBJECTS = {
    quota_pb2.QUOTA_SCOPE_USER: ("the user", "user"), quota_pb2.QUOTA_SCOPE_API_KEY: ("the API key", "key"),
    quota_pb2.QUOTA_SCOPE_DEPLOYMENT: ("the deployment", "deployment"),
}  # fmt: skip
"""Scope of a limit -> whose it is, and the dimension that knows its name."""
_EXPORT_S = 3600
_COLUMNS = (
    "events", "errors", "tokens_in", "tokens_out", "tokens_cached", "tokens_reasoning", "cost", "currency", "unpriced_events",
    "latency_p50_ms", "latency_p95_ms", "latency_p99_ms",
)  # fmt: skip
"""Of the file of sums, after what it is grouped by."""
_ID = re.compile(r"[a-z]{3,4}_[0-9a-f]{32}")
Names = Mapping[str, Mapping[str, str]]
"""Dimension -> value -> how it is called."""


class Line(NamedTuple):
    """A row of the breakdown."""

    value: str
    name: str
    figures: rpc.UsageSum
    share: int
    """Of the whole, in hundredths."""
    amount: Decimal
    before: Decimal


async def page(visit: Visit) -> Response:
    """The page."""
    given = dict(visit.query)
    if given.get("from") or given.get("to"):
        given.pop("days", None)
    if any(given.get(name) for name in DIMS):
        given.pop("filters", None)
    if given != dict(visit.query) or "" in given.values():
        # A form sends its empty fields too; nobody wants them in a bookmark.
        return RedirectResponse("/dashboard/usage" + with_query(given).rstrip("?"), 303, HEADERS)
    query = Query.of(given)
    visit.problems = dict(query.problems)
    choosing = bool(query.filters or query.problems.keys() & DIMS.keys() or visit.query.get("filters"))
    named = choosing or query.by in _NAMED
    (bars, sums), limits, noticed, names = await visit.calls(
        _sums(visit, query), quotas.checked(visit), quotas.noticed(visit), _names(visit, wanted=named)
    )
    if not named and any(one.subject for one in noticed):
        names = await _names(visit, wanted=True)
    total, currency = (sums.total, sums.total.currency) if sums else (None, "")
    heads, series = _series(bars.sums, query, names) if bars else ([], [])
    return render(
        "usage.html", visit, 400 if visit.problems else 200, page="usage", query=query, total=total, presets=PRESETS, kinds=SHOWN,
        dims=DIMS, types=TYPES, names=names, choosing=choosing, heads=heads, chart=_chart(query, heads, series, currency) if heads else "",
        rows=_rows(bars, query, series) if heads else [], lines=_breakdown(sums, query, names) if sums else [],
        more=max(0, len(sums.sums) - _MOST_ROWS) if sums else 0, meters=[quotas.meter(one, currency) for one in limits],
        notices=[(one, quotas.notice(one, currency, _whose(one, visit, names))) for one in noticed], told=told, change=change,
        latency=latency, rate=rate,
    )  # fmt: skip


async def csv_file(visit: Visit) -> Response:
    """The sums as a file: a line for each bar and group."""
    query = _sound(visit)
    answer = await visit.call(visit.services.usage.SummarizeUsage, query.summary(by_period=True))
    dim = DIMS[query.by].field
    lines = [exports.line([query.period, dim, *_COLUMNS])]
    for one in answer.sums:
        value = usage_event_pb2.UsageType.Name(one.type) if dim == "type" else getattr(one, dim)
        cells = [query.label(one.period_start.ToDatetime(UTC)), value, *(str(getattr(one, name)) for name in _COLUMNS)]
        lines.append(exports.line(map(exports.guarded, cells)))
    name = f"usage-{query.first}-{query.last}.csv"
    return Response("".join(lines), 200, {**HEADERS, "Content-Disposition": f'attachment; filename="{name}"'}, "text/csv")


async def events(visit: Visit) -> Response:
    """Every event as a file, as they come from the service."""
    query = _sound(visit)
    call = visit.services.usage.ExportUsage(query.export(), metadata=visit.metadata, timeout=_EXPORT_S)
    field = rpc.ExportUsageResponse.DESCRIPTOR.fields_by_name["events"]
    kind = "ndjson" if visit.query.get("format") == "ndjson" else "csv"
    return await exports.answer(visit.http, call, field, kind, "usage-events", HEADERS)


def _sound(visit: Visit) -> Query:
    """What is asked for; ApiError when a part of it cannot be, which a file has no place to say."""
    query = Query.of(visit.query)
    if query.problems:
        raise invalid(query.problems.items())
    return query


async def _sums(visit: Visit, query: Query) -> tuple[Any, Any]:
    """(by bar and group, by group beside what was before); nothing when the service cannot sum so, which the page then says."""
    summarize = visit.services.usage.SummarizeUsage
    try:
        bars, sums = await visit.calls(*(visit.call(summarize, query.summary(by_period=split)) for split in (True, False)))
        return bars, sums
    except ApiError as error:
        if error.status.code != code_pb2.INVALID_ARGUMENT:
            raise
        visit.problems |= blamed(violations(error))
        return None, None


async def _names(visit: Visit, *, wanted: bool) -> Names:
    """How users, keys and deployments are called, as far as the visitor may know; only types where nobody wants to know."""
    types = {"type": {word: word.capitalize() for word in TYPES}}
    if not wanted:
        return types
    users, keys, deployments = await visit.calls(
        _listed(visit, "members.list", visit.services.members.ListMembers, member_service_pb2.ListMembersRequest),
        _listed(visit, "api_keys.list", visit.services.api_keys.ListApiKeys, api_key_service_pb2.ListApiKeysRequest),
        _listed(visit, "deployments.list", visit.services.deployments.ListDeployments, deployment_service_pb2.ListDeploymentsRequest),
    )
    return types | {
        "user": {one.user_id: one.full_name or one.email for one in users.members} if users else {},
        "key": {one.id: one.name for one in keys.api_keys} if keys else {},
        "deployment": {one.id: one.display_name or one.model for one in deployments.deployments} if deployments else {},
    }


async def _listed(visit: Visit, permission: str, listing: Any, request: Any) -> Any:
    return await visit.call(listing, request(page_size=_MOST_NAMES)) if visit.may(permission) else None


def _whose(one: quota_pb2.QuotaNotice, visit: Visit, names: Names) -> str:
    if one.scope not in _SUBJECTS:
        return "the organization"
    if one.subject == visit.who.user_id:
        return "you"
    word, by = _SUBJECTS[one.scope]
    return f"{word} {told(names, by, one.subject)}"


def _value(one: rpc.UsageSum, by: str) -> str:
    """What a sum is of, as an address says it."""
    if by == "type":
        return next((word for word, number in TYPES.items() if number == one.type), "")
    return str(getattr(one, DIMS[by].field))


def told(names: Names, by: str, value: str) -> str:
    """How people know a value."""
    if not value:
        return f"no {'API key' if by == 'key' else by}"
    return names.get(by, {}).get(value) or (f"{value[:12]}…" if _ID.fullmatch(value) else value)


def _amount(one: rpc.UsageSum, show: str) -> Decimal:
    return Decimal((one.cost or 0) if show == "cost" else one.tokens_total if show == "tokens" else one.events)


def _series(sums: Sequence[rpc.UsageSum], query: Query, names: Names) -> tuple[list[str], list[list[Decimal]]]:
    """(groups, their values by bar), the greatest first."""
    axis = query.axis()
    by_value: dict[str, list[Decimal]] = {}
    for number, one in _places(axis, sums):
        bars = by_value.setdefault(_value(one, query.by), [Decimal(0)] * len(axis))
        bars[number] += _amount(one, query.show)
    ranked = sorted(by_value, key=lambda value: (-sum(by_value[value]), value))
    own = ranked if len(ranked) <= COLOURS else ranked[: COLOURS - 1]
    heads, series = [told(names, query.by, value) for value in own], [by_value[value] for value in own]
    if rest := ranked[len(own) :]:
        heads.append(f"{len(rest)} {_OTHERS}")
        series.append([sum(values, Decimal(0)) for values in zip(*(by_value[value] for value in rest), strict=True)])
    return heads, series


def _places(axis: Sequence[datetime], sums: Iterable[rpc.UsageSum]) -> Iterator[tuple[int, rpc.UsageSum]]:
    """Each sum with the number of the bar that it belongs to."""
    starts = [int(when.timestamp()) for when in axis]
    return ((max(0, bisect_right(starts, one.period_start.seconds) - 1), one) for one in sums)


def _chart(query: Query, heads: Sequence[str], series: Sequence[Sequence[Decimal]], currency: str) -> Any:
    label = (
        f"{SHOWN[query.show]} by {query.period} and {DIMS[query.by].title}, {query.first} to {query.last}; a table below has the numbers."
    )
    bars = [(query.short(when), query.label(when)) for when in query.axis()]
    unit = currency.upper() if query.show == "cost" else query.show
    return charts.stacked_bars(bars, list(zip(heads, series, strict=True)), label, unit)


def _rows(bars: rpc.SummarizeUsageResponse, query: Query, series: Sequence[Sequence[Decimal]]) -> list[dict[str, object]]:
    """The table of the bars: a row for each that there is, the latest first."""
    axis, calls = query.axis(), Counter[int]()
    for number, one in _places(axis, bars.sums):
        calls[number] += one.events
    rows: list[dict[str, object]] = []
    for number in sorted(calls, reverse=True):
        amounts = [values[number] for values in series]
        together = sum(amounts, Decimal(0))
        rows.append({"label": query.label(axis[number]), "amounts": amounts, "calls": calls[number], "together": together})
    return rows


def _breakdown(sums: rpc.SummarizeUsageResponse, query: Query, names: Names) -> list[Line]:
    """A row for each group, the greatest first; those that were only before come last."""
    whole = _amount(sums.total, query.show)
    lines = []
    for one in sums.sums:
        value, amount = _value(one, query.by), _amount(one, query.show)
        share = int(100 * amount / whole + Decimal("0.5")) if whole > 0 else 0
        lines.append(Line(value, told(names, query.by, value), one, max(0, share), amount, _amount(one.previous, query.show)))
    return sorted(lines, key=lambda line: (-line.amount, -line.before, line.name))[:_MOST_ROWS]


def change(now: Decimal | int | str, before: Decimal | int | str) -> tuple[str, str]:
    """(arrow, words) for what became of a number."""
    one, other = Decimal(now or 0), Decimal(before or 0)
    if one == other:
        return "", "the same" if one else "none"
    if other <= 0:
        return "", "none before"
    percent = round(100 * (one - other) / other)
    if one <= 0:
        return "↓", "none now"
    return ("↑", f"{percent:,} % more") if one > other else ("↓", f"{-percent:,} % less")


def latency(milliseconds: int) -> str:
    """How long, for people; a dash when nobody told it."""
    if not milliseconds:
        return "–"
    return f"{milliseconds} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.1f} s"


def rate(errors: int, calls: int) -> str:
    """Failed calls in hundredths."""
    if not calls:
        return "–"
    percent = 100 * errors / calls
    return "0 %" if not errors else "<0.1 %" if percent < 0.1 else f"{percent:.1f} %"
