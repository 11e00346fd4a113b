"""What summaries are made from: a kind of roll-up, or the events themselves. The database adds up; both give the same sums."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, DateTime, Integer, Select, and_, case, cast, func, literal, select, type_coerce
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.deployment.v1.usage_event_pb2 import USAGE_STATUS_ERROR
from services.deployment_svc.usage.models import KINDS, LATENCIES, LATENCY_MS, SUMS, USAGE_TYPE, UsageEvent, UsageRollup
from services.deployment_svc.usage.periods import Span
from services.deployment_svc.usage.rows import month_of
from services.kit.columns import ExactDecimal, UtcDateTime
from services.kit.db import is_postgres

Column = ColumnElement[Any]
MOST_ROWS = 10_000
"""Of a summary; more are no summary, and fit no message."""
Group = tuple[Any, ...]
"""(number of the period or 0, value of each dimension, currency)."""
Figures = dict[str, Any]
_NO_COST = literal(Decimal(0), ExactDecimal())
_FOREVER = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Source:
    """A table as it is summed."""

    when: Column
    currency: Column
    dims: Mapping[str, Column]
    sums: Sequence[Column]
    """In the order of SUMS."""
    where: tuple[Column, ...]

    def select(self, span: Span, groups: Sequence[Column], filters: Mapping[str, Any]) -> Select[Any]:
        """Groups and sums of a time, not grouped yet."""
        wanted = [self.dims[name] == value for name, value in filters.items()]
        return select(*groups, *self.sums).where(*self.where, *wanted, self.when >= span.start, self.when < span.end)


def kind_for(names: set[str]) -> str:
    """The kind of roll-up that has all these dimensions; empty when only the events have."""
    return next((kind for kind, dims in KINDS.items() if names <= set(dims)), "")


def _summed(columns: Mapping[str, Any]) -> list[Column]:
    """PostgreSQL's sums of whole numbers are decimals, which take longer to read."""
    return [func.sum(columns[name]) if name == "cost" else cast(func.sum(columns[name]), BigInteger) for name in SUMS]


@cache
def rollups(kind: str) -> Source:
    """The roll-ups of a kind."""
    dims: dict[str, Any] = dict(zip(KINDS[kind], (UsageRollup.dim_1, UsageRollup.dim_2, UsageRollup.dim_3), strict=True))
    sums = _summed({name: getattr(UsageRollup, name) for name in SUMS})
    return Source(UsageRollup.starts_at.expression, UsageRollup.currency.expression, dims, sums, (UsageRollup.kind == kind,))


def events(span: Span) -> Source:
    """The events of a time."""
    # The month is what the table is partitioned by: it spares a look at all others.
    months = (UsageEvent.month >= month_of(span.start), UsageEvent.month <= month_of(span.end))
    return replace(_all_events(), where=months)


@cache
def _all_events() -> Source:
    dims = {name: getattr(UsageEvent, name) for columns in KINDS.values() for name in columns if name}
    own = UsageEvent.adjusts == ""
    sums: dict[str, Any] = {name: getattr(UsageEvent, name) for name in SUMS if hasattr(UsageEvent, name)}
    sums |= {"events": _one(own), "errors": _one(own, UsageEvent.status == USAGE_STATUS_ERROR)}
    sums |= {"unpriced_events": _one(own, UsageEvent.cost.is_(None)), "cost": func.coalesce(UsageEvent.cost, _NO_COST)}
    took, edges = UsageEvent.latency_ms, (1, *LATENCY_MS)
    for number, name in enumerate(LATENCIES):
        below = (took < edges[number + 1],) if number + 1 < len(edges) else ()
        sums[name] = _one(own, took >= edges[number], *below)
    return Source(UsageEvent.occurred_at.expression, UsageEvent.currency.expression, dims, _summed(sums), ())


def _one(*conditions: ColumnElement[bool]) -> Column:
    return case((and_(*conditions), 1), else_=0)


async def added_up(
    session: AsyncSession, source: Source, span: Span, dims: Sequence[str], filters: Mapping[str, Any]
) -> dict[Group, Figures]:
    """The sums of a time by group; more than MOST_ROWS of them are cut off."""
    groups = [*(source.dims[name] for name in dims), source.currency]
    statement = source.select(span, groups, filters)
    if span.period:
        statement, period = _by_period(session, statement, source.when, span.starts)
        groups.append(period)
    found: dict[Group, Figures] = {}
    for row in await session.execute(statement.group_by(*groups).limit(MOST_ROWS + 1)):
        key = [_told(name, value) for name, value in zip(dims, row, strict=False)]
        number = row[-1] if span.period else 0
        found[(number, *key, row[len(dims)])] = dict(zip(SUMS, row[len(dims) + 1 :], strict=False))
    return found


def _by_period(session: AsyncSession, statement: Select[Any], when: Column, starts: Sequence[datetime]) -> tuple[Select[Any], Any]:
    """The statement with the number of the period as its last column, and that column."""
    if is_postgres(session):
        thresholds = cast(literal(list(starts), ARRAY(UtcDateTime())), ARRAY(DateTime(timezone=True)))
        period = (func.width_bucket(when, thresholds, type_=Integer) - 1).label("period")
        return statement.add_columns(period), period
    # As one text: a statement with a parameter for each period would have to be made anew for every number of them.
    dialect = session.get_bind().dialect
    write = UtcDateTime().dialect_impl(dialect).bind_processor(dialect)
    assert write is not None
    given = json.dumps([(write(start), write(end)) for start, end in zip(starts, (*starts[1:], _FOREVER), strict=True)])
    each = func.json_each(given).table_valued("key", "value", name="periods")
    starts_at, ends_at = (func.json_extract(each.c.value, place) for place in ("$[0]", "$[1]"))
    number = type_coerce(each.c.key, Integer)
    return statement.where(when >= starts_at, when < ends_at).add_columns(number), number


def _told(name: str, value: Any) -> Any:
    """A dimension as messages have it, whatever it is read from."""
    if name == "type":
        return USAGE_TYPE.numbers[value] if isinstance(value, str) else value
    return value or ""
