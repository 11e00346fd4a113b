"""Recounts what events add up to, and holds roll-ups and counters against it; mends them when asked to."""

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import delete, func, inspect, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from services.deployment_svc.prices.repository import RULES
from services.deployment_svc.usage import postgres, repository
from services.deployment_svc.usage.models import SUMS, UsageCounter, UsageEvent, UsageRollup
from services.deployment_svc.usage.retention import kept_from
from services.deployment_svc.usage.rows import month_of
from services.deployment_svc.usage.rules import ALWAYS, COUNTED_BY, Wanted, period_of, rolled_up
from services.kit.columns import now
from services.kit.db import ALL, Database, alone, insert_for, is_postgres

_BATCH = 2000
_COUNTED = ("tokens", "cost")
Sums = dict[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True)
class Difference:
    """A row that is not what the events make."""

    table: str
    key: tuple[Any, ...]
    stored: Mapping[str, Any] | None
    """None: it is missing."""
    counted: Mapping[str, Any] | None
    """None: no event has made it."""

    def __str__(self) -> str:
        where = " ".join(part.isoformat() if isinstance(part, datetime) else str(part) or "-" for part in self.key)
        if self.stored is None or self.counted is None:
            return f"{self.table}: {where}: {'is missing' if self.stored is None else 'was made by no event'}"
        pairs = [(name, self.stored[name], value) for name, value in self.counted.items()]
        wrong = [f"{name} is {_say(have)}, counted {_say(want)}" for name, have, want in pairs if have != want]
        return f"{self.table}: {where}: {'; '.join(wrong)}"


def _say(value: Any) -> str:
    return f"{value.normalize():f}" if isinstance(value, Decimal) else str(value)


async def months(db: Database, days: int) -> list[tuple[str, date]]:
    """(organization, month) of everything that there is to check: as far back as events are kept for so many days, and are there. Of what
    is over the sums stay, and no event says any more that they are right."""
    async with db.read(ALL) as session:
        oldest = await session.scalar(select(func.min(UsageEvent.month)))
        since = max(kept_from(days), oldest or date.min)
        events = select(UsageEvent.org_id, UsageEvent.month).where(UsageEvent.month >= since)
        found = {(org_id, month) for org_id, month in await session.execute(events.distinct())}
        rolled = await session.execute(select(UsageRollup.org_id, UsageRollup.starts_at).distinct())
        found |= {(org_id, month_of(at)) for org_id, at in rolled if month_of(at) >= since}
    return sorted(found)


async def check(db: Database, org_id: str, month: date, *, repair: bool = False) -> AsyncIterator[Difference]:
    """What is wrong with an organization's month, as of one moment; with ``repair`` it is right afterwards."""
    async with db.transaction(ALL) as session:
        if repair:
            await alone(session, RULES)
        elif is_postgres(session):
            await postgres.as_of_one_moment(session)
        found = await _differences(session, org_id, month)
        if repair and found:
            await _mend(session, found)
    for one in found:
        yield one


async def _differences(session: AsyncSession, org_id: str, month: date) -> list[Difference]:
    counted: Sums = {_key(UsageRollup, row): _sums(row, SUMS) for row in await _recount(session, org_id, month)}
    rollups = await _stored(session, UsageRollup, org_id, month)
    found = list(_compare(UsageRollup, rollups, counted))
    wanted = await repository.asked_for(session, {org_id})
    counters = await _stored(session, UsageCounter, org_id, month)
    return found + list(_compare(UsageCounter, *_comparable(counters, _counters(counted, wanted), now())))


async def _recount(session: AsyncSession, org_id: str, month: date) -> list[dict[str, Any]]:
    if is_postgres(session):
        return await postgres.recount(session, org_id, month)
    sums: dict[tuple[Any, ...], dict[str, Any]] = {}
    statement = select(UsageEvent).where(UsageEvent.org_id == org_id, UsageEvent.month == month)
    async for part in (await session.stream_scalars(statement.execution_options(yield_per=_BATCH))).partitions():
        for row in rolled_up(part):
            known = sums.setdefault(_key(UsageRollup, row), row)
            if known is not row:
                known.update({name: known[name] + row[name] for name in SUMS})
        session.expunge_all()
    return list(sums.values())


def _counters(rollups: Sums, wanted: Iterable[Wanted]) -> Sums:
    """The counters that roll-ups make."""
    asked = {*ALWAYS, *((scope, period) for _, scope, period in wanted)}
    sums: dict[tuple[Any, ...], dict[str, Any]] = {}
    for (org_id, kind, starts_at, *dims, _), row in rollups.items():
        for scope, period in asked:
            counted_kind, place = COUNTED_BY[scope]
            subject = "" if place is None else dims[place]
            if kind != counted_kind or (place is not None and not subject):
                continue
            total = sums.setdefault((org_id, scope, subject, period, period_of(period, starts_at)), {"tokens": 0, "cost": Decimal(0)})
            total["tokens"] += row["tokens_total"]
            total["cost"] += row["cost"]
    return dict(sums)


def _comparable(stored: Sums, counted: Sums, at: datetime) -> tuple[Sums, Sums]:
    """Without those that no limit is checked against: what a quota asks for counts in full from the period on in which it was set."""

    def counts(key: tuple[Any, ...]) -> bool:
        _, scope, _, period, starts_at = key
        return (scope, period) in ALWAYS or starts_at >= period_of(period, at)

    counted = {key: row for key, row in counted.items() if counts(key)}
    asked = {(scope, period) for _, scope, _, period, _ in counted} | set(ALWAYS)
    return {key: row for key, row in stored.items() if counts(key) and (key[1], key[3]) in asked}, counted


async def _stored(session: AsyncSession, model: Any, org_id: str, month: date) -> Sums:
    first = datetime(month.year, month.month, 1, tzinfo=now().tzinfo)
    end = (first + timedelta(days=32)).replace(day=1)
    statement = select(*inspect(model).columns).where(model.org_id == org_id, model.starts_at >= first, model.starts_at < end)
    names = SUMS if model is UsageRollup else _COUNTED
    return {_key(model, row._mapping): _sums(row._mapping, names) for row in await session.execute(statement)}


def _key(model: Any, row: Any) -> tuple[Any, ...]:
    return tuple(row[column.key] for column in inspect(model).primary_key)


def _sums(row: Any, names: Sequence[str]) -> dict[str, Any]:
    return {name: row[name] if isinstance(row[name], Decimal) else int(row[name]) for name in names}


def _compare(model: Any, stored: Sums, counted: Sums) -> Iterable[Difference]:
    empty = dict.fromkeys(SUMS if model is UsageRollup else _COUNTED, 0)
    for key in sorted({*stored, *counted}):
        have, want = stored.get(key), counted.get(key)
        # What has come to nothing may stay as a row of zeros.
        if have != want and (have or empty) != (want or empty):
            yield Difference(model.__tablename__, key, have, want)


async def _mend(session: AsyncSession, found: Sequence[Difference]) -> None:
    at = now()
    for one in found:
        model: Any = UsageRollup if one.table == UsageRollup.__tablename__ else UsageCounter
        keys = list(inspect(model).primary_key)
        if one.counted is None:
            await session.execute(delete(model).where(tuple_(*keys) == one.key).execution_options(synchronize_session=False))
            continue
        named = dict(zip([column.key for column in keys], one.key, strict=True))
        upsert = insert_for(session)(model).values(named | dict(one.counted) | {"created_at": at, "updated_at": at})
        await session.execute(upsert.on_conflict_do_update(index_elements=keys, set_=dict(one.counted) | {"updated_at": at}))
