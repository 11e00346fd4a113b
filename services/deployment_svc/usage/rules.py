"""What events add to roll-ups and counters: pure functions, the portable form of what postgres.py says in SQL."""

from bisect import bisect_right
from collections.abc import Iterable
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from clawplane.deployment.v1 import usage_event_pb2 as pb
from services.deployment_svc.usage.models import KINDS, LATENCIES, LATENCY_MS, SUMS, USAGE_TYPE

PERIODS = ("hour", "day", "month")
ALWAYS = (("organization", "hour"), ("organization", "month"))
"""Counters that each organization has; others exist where a quota asks for them."""
SUBJECTS = {"organization": "", "user": "user_id", "api_key": "api_key_id", "deployment": "deployment_id"}
"""Scope of a counter -> the column of an event that is its subject."""
COUNTED_BY: dict[str, tuple[str, int | None]] = {
    "organization": ("model", None), "user": ("caller", 0), "api_key": ("caller", 1), "deployment": ("workload", 0),
}  # fmt: skip
"""Scope of a counter -> the kind of roll-ups that it adds up, and which of their dimensions is its subject."""
Wanted = tuple[str, str, str]
"""(organization, scope, period) of counters that a quota asks for."""


def quarter_of(when: datetime) -> datetime:
    """When the quarter of an hour began."""
    return when.replace(minute=when.minute // 15 * 15, second=0, microsecond=0)


def period_of(period: str, when: datetime) -> datetime:
    """When the hour, day or month began, UTC."""
    hour = when.replace(minute=0, second=0, microsecond=0)
    if period == "hour":
        return hour
    return hour.replace(hour=0) if period == "day" else hour.replace(hour=0, day=1)


def period_end(period: str, start: datetime) -> datetime:
    """When the hour, day or month ends that began then."""
    if period == "month":
        return (start + timedelta(days=32)).replace(day=1)
    return start + (timedelta(hours=1) if period == "hour" else timedelta(days=1))


def added(row: Any, sign: int = 1) -> dict[str, Any]:
    """What one event adds to each of its roll-ups, or takes away. A correction is no event of its own."""
    own = sign * (not row.adjusts)
    sums: dict[str, Any] = dict.fromkeys(SUMS, 0) | {"events": own, "cost": sign * (row.cost or Decimal(0))}
    sums["errors"] = own * (row.status == pb.USAGE_STATUS_ERROR)
    sums["unpriced_events"] = own * (row.cost is None)
    for name in ("tokens_in", "tokens_out", "tokens_cached", "tokens_reasoning", "tokens_total"):
        sums[name] = sign * getattr(row, name)
    if row.latency_ms > 0:
        sums[LATENCIES[bisect_right(LATENCY_MS, row.latency_ms)]] = own
    return sums


def dims(row: Any, kind: str) -> tuple[str, str, str]:
    """What an event is in a kind of roll-up."""
    one, two, three = (_text(row, name) for name in KINDS[kind])
    return one, two, three


def _text(row: Any, column: str) -> str:
    if not column:
        return ""
    value = getattr(row, column)
    return USAGE_TYPE.words[value] if column == "type" else value or ""


_ROLLUP_KEY = ("org_id", "kind", "starts_at", "dim_1", "dim_2", "dim_3", "currency")
_COUNTER_KEY = ("org_id", "scope", "subject", "period", "starts_at")


def rolled_up(rows: Iterable[Any], sign: int = 1) -> list[dict[str, Any]]:
    """The roll-up rows of events, in key order, so that two transactions cannot wait for each other in a circle."""
    sums: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        more = added(row, sign)
        for kind in KINDS:
            key = (row.org_id, kind, quarter_of(row.occurred_at), *dims(row, kind), row.currency)
            total = sums.setdefault(key, dict.fromkeys(SUMS, 0) | {"cost": Decimal(0)})
            for name, value in more.items():
                total[name] += value
    return [dict(zip(_ROLLUP_KEY, key, strict=True)) | sums[key] for key in sorted(sums)]


def counted(rows: Iterable[Any], wanted: Iterable[Wanted], sign: int = 1) -> list[dict[str, Any]]:
    """The counter rows of events, in key order."""
    asked: dict[str, set[tuple[str, str]]] = {}
    for org_id, scope, period in wanted:
        asked.setdefault(org_id, set()).add((scope, period))
    sums: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        for scope, period in {*ALWAYS, *asked.get(row.org_id, ())}:
            subject = _text(row, SUBJECTS[scope])
            if scope != "organization" and not subject:
                continue
            total = sums.setdefault((row.org_id, scope, subject, period, period_of(period, row.occurred_at)), [0, Decimal(0)])
            total[0] += sign * row.tokens_total
            total[1] += sign * (row.cost or 0)
    return [dict(zip(_COUNTER_KEY, key, strict=True)) | {"tokens": sums[key][0], "cost": sums[key][1]} for key in sorted(sums)]
