"""Sums of usage."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from decimal import Decimal
from typing import Any

from clawplane.deployment.v1 import usage_service_pb2 as rpc
from services.deployment_svc.usage import sources
from services.deployment_svc.usage.latency import percentiles
from services.deployment_svc.usage.models import LATENCIES, SUMS, USAGE_TYPE
from services.deployment_svc.usage.periods import Span, span_of
from services.deployment_svc.usage.rules import PERIODS
from services.deployment_svc.usage.sources import MOST_ROWS, Figures, Group, Source
from services.kit.call import Call
from services.kit.columns import now
from services.kit.errors import InvalidArgument

_EVENTS_REACH = timedelta(days=31, hours=1)
"""An hour more, for a clock that is put back."""
_GROUPS = {
    rpc.USAGE_GROUP_HOUR: "hour", rpc.USAGE_GROUP_DAY: "day", rpc.USAGE_GROUP_MONTH: "month", rpc.USAGE_GROUP_PROVIDER: "provider",
    rpc.USAGE_GROUP_MODEL: "model", rpc.USAGE_GROUP_TYPE: "type", rpc.USAGE_GROUP_USER: "user_id", rpc.USAGE_GROUP_API_KEY: "api_key_id",
    rpc.USAGE_GROUP_DEPLOYMENT: "deployment_id", rpc.USAGE_GROUP_AGENT: "agent_id", rpc.USAGE_GROUP_PROJECT: "project_id",
}  # fmt: skip
_FILTERS = ("deployment_id", "model", "provider", "type", "user_id", "api_key_id", "agent_id", "project_id")
_SHOWN = [name for name in SUMS if name not in LATENCIES and name != "cost"]
_NOTHING: Figures = dict.fromkeys(SUMS, 0) | {"cost": Decimal(0)}


async def summarize(request: rpc.SummarizeUsageRequest, call: Call, currency: str) -> rpc.SummarizeUsageResponse:
    """The sums, grouped as asked; ``currency`` is the ledger's."""
    _ = call.org_id
    groups = [_GROUPS[group] for group in request.group_by] or ["day"]
    periods = [name for name in groups if name in PERIODS]
    if len(periods) > 1:
        raise InvalidArgument("group_by", "may hold one of hour, day and month")
    span = span_of(request, periods[0] if periods else "", now())
    dims = [name for name in groups if name not in PERIODS]
    filters = {name: getattr(request, name) for name in _FILTERS if getattr(request, name)}
    kind = sources.kind_for({*dims, *filters})
    if not kind and span.end - span.start > _EVENTS_REACH:
        raise InvalidArgument(*_too_far(dims, filters))

    spans = [span, span.before()] if request.compare else [span]
    found = []
    async with call.read() as session:
        for one in spans:
            source, wanted = _source(kind, one, filters)
            found.append(await sources.added_up(session, source, one, dims, wanted))
    keys = {key for each in found for key in each}
    if len(keys) > MOST_ROWS:
        raise InvalidArgument("group_by", f"makes more than {MOST_ROWS} rows: ask for less time or fewer groups, or filter")

    response = rpc.SummarizeUsageResponse(total=_message(_total(found[0], currency), currency=currency))
    if request.compare:
        response.total.previous.CopyFrom(_message(_total(found[1], currency), currency=currency))
    for key in sorted(keys, key=_in_order(groups)):
        row = _row(key, found[0].get(key, _NOTHING), dims, span)
        if request.compare:
            # A group that was used only then stands here with nothing, so that what was before adds up as well.
            row.previous.CopyFrom(_row(key, found[1].get(key, _NOTHING), dims, spans[1]))
        response.sums.append(row)
    return response


def _source(kind: str, span: Span, filters: Mapping[str, Any]) -> tuple[Source, Mapping[str, Any]]:
    """What to read for a time, and the filters in its words."""
    if not kind:
        return sources.events(span), filters
    return sources.rollups(kind), {name: USAGE_TYPE.words[value] if name == "type" else value for name, value in filters.items()}


def _too_far(dims: Sequence[str], filters: Mapping[str, Any]) -> tuple[str, str]:
    """(field, what is wrong) of a combination that only the events know, over too long a time."""
    names, field = set(dims), "group_by"
    for name in filters:
        if not sources.kind_for(names):
            break
        names.add(name)
        field = name
    return field, (
        f"this combination reaches back {_EVENTS_REACH.days} days; further do those within one of: provider, model, type; user, API key; "
        "deployment, agent, project"
    )


def _in_order(groups: Sequence[str]) -> Any:
    """Sorts groups by what they are grouped by, in the order in which it was asked for."""
    dims = [name for name in groups if name not in PERIODS]
    places = [0 if name in PERIODS else 1 + dims.index(name) for name in groups]
    return lambda key: (*(key[place] for place in places), key[-1])


def _total(found: Mapping[Group, Figures], currency: str) -> Figures:
    """All groups together; money of another currency than the ledger's is no part of it."""
    total = dict(_NOTHING)
    for key, figures in found.items():
        for name in SUMS:
            if name != "cost" or key[-1] == currency:
                total[name] += figures[name]
    return total


def _row(key: Group, figures: Figures, dims: Iterable[str], span: Span) -> rpc.UsageSum:
    number, *values, currency = key
    one = _message(figures, **dict(zip(dims, values, strict=True)), currency=currency)
    if span.period:
        one.period_start.FromDatetime(span.starts[number])
    if span.period == "day":
        one.day = span.day(number)
    return one


def _message(figures: Figures, **group: Any) -> rpc.UsageSum:
    p50, p95, p99 = percentiles([figures[name] for name in LATENCIES], 50, 95, 99)
    return rpc.UsageSum(
        **group, **{name: figures[name] for name in _SHOWN}, cost=format(figures["cost"], "f"),
        latency_p50_ms=p50, latency_p95_ms=p95, latency_p99_ms=p99,
    )  # fmt: skip
