"""When an event counts, and as what: pure functions."""

import uuid
from collections.abc import Iterable
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any

from clawplane.deployment.v1 import usage_event_pb2 as pb
from services.deployment_svc.usage.models import NO_DEPLOYMENT
from services.deployment_svc.usage.prices import PriceBook
from services.kit.auth import Caller
from services.kit.errors import InvalidArgument
from services.kit.ids import uuid7_time
from services.kit.proto import to_datetime

MODEL_CALL = "call_"
"""Ids of events that the model endpoint writes start so, and no others."""
_SAME_MOMENT = timedelta(hours=1)
"""An id made just before the end of a month, for a call just after it, is no contradiction: the id's time counts."""


def occurred(event: pb.UsageEvent, at: datetime, late: timedelta, ahead: timedelta) -> datetime:
    """When an event of a caller's own making happened; its month is part of its identity, so a UUIDv7's own time decides the month."""
    if event.id.startswith(MODEL_CALL):
        raise InvalidArgument("id", f"must not start with {MODEL_CALL}: such events are written by the model endpoint alone")
    inside = _time_in_id(event.id)
    given = to_datetime(event.occurred_at) if event.HasField("occurred_at") else None
    if given is None and inside is None:
        raise InvalidArgument("occurred_at", "is needed, since the id is no UUID of version 7 and carries no time")
    if given is not None and inside is not None and month_of(inside) != month_of(given):
        if abs(given - inside) <= _SAME_MOMENT:
            given = None
        elif "-" in event.id:  # Without dashes it may be no UUID: one of 64 random texts looks like one of version 7.
            raise InvalidArgument("occurred_at", "lies in another month than the time in the id")
    when = given or inside
    assert when is not None
    if when < at - late:
        raise InvalidArgument("occurred_at", f"is more than {late.days} days ago")
    if when > at + ahead:
        raise InvalidArgument("occurred_at", f"is more than {int(ahead.total_seconds())} seconds ahead of time")
    return when


def _time_in_id(text: str) -> datetime | None:
    if len(text) not in (32, 36):
        return None
    try:
        return uuid7_time(uuid.UUID(text))
    except ValueError:
        return None


def month_of(when: datetime) -> date:
    """The first day of the month, UTC."""
    return when.date().replace(day=1)


def to_row(event: pb.UsageEvent, caller: Caller, org_id: str, when: datetime, at: datetime, prices: PriceBook) -> dict[str, Any]:
    """The columns of an event. Organization, user, key, a bot's deployment and the cost never come from the caller's words."""
    if event.tokens_cached > event.tokens_in:
        raise InvalidArgument("tokens_cached", "is more than tokens_in, of which it is a part")
    if event.tokens_reasoning > event.tokens_out:
        raise InvalidArgument("tokens_reasoning", "is more than tokens_out, of which it is a part")
    return {
        "org_id": org_id,
        # One spelling for one UUID, so that another spelling is no second event.
        "id": str(uuid.UUID(event.id)) if _time_in_id(event.id) else event.id,
        "month": month_of(when),
        "occurred_at": when,
        "user_id": caller.user_id or None,
        "api_key_id": caller.key_id or None,
        "deployment_id": caller.deployment_id or event.deployment_id or None,
        "agent_id": event.agent_id or None,
        "thread_id": event.thread_id or None,
        "project_id": event.project_id or None,
        "provider": event.provider,
        "model": event.model,
        "type": event.type or pb.USAGE_TYPE_CHAT,
        "tokens_in": event.tokens_in,
        "tokens_out": event.tokens_out,
        "tokens_cached": event.tokens_cached,
        "tokens_reasoning": event.tokens_reasoning,
        "tokens_total": event.tokens_in + event.tokens_out,
        "cost": prices.cost(event.provider, event.model, event.tokens_in, event.tokens_cached, event.tokens_out),
        "currency": prices.currency,
        "latency_ms": event.latency_ms,
        "status": event.status or pb.USAGE_STATUS_OK,
        "operation_id": event.operation_id,
        "attempt": event.attempt,
        "estimated": event.estimated,
        "metadata_": dict(event.metadata),
        "created_at": at,
    }


_SUMS = ("events", "tokens_in", "tokens_out", "tokens_total", "cost", "unpriced_events")


def rolled_up(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The roll-up rows of events, in key order, so that two transactions cannot wait for each other in a circle."""
    sums: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = (
            row["org_id"],
            row["occurred_at"].date(),
            row["provider"],
            row["model"],
            row["deployment_id"] or NO_DEPLOYMENT,
            row["currency"],
        )
        total = sums.setdefault(key, dict.fromkeys(_SUMS, 0) | {"cost": Decimal(0)})
        total["events"] += 1
        for name in ("tokens_in", "tokens_out", "tokens_total"):
            total[name] += row[name]
        total["cost"] += row["cost"] or 0
        total["unpriced_events"] += row["cost"] is None
    names = ("org_id", "day", "provider", "model", "deployment_id", "currency")
    return [dict(zip(names, key, strict=True)) | sums[key] for key in sorted(sums)]
