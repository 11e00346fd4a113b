"""Writes of the usage ledger: events, their roll-ups and their counters in one transaction."""

from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any

from sqlalchemy import inspect, select
from sqlalchemy.ext.asyncio import AsyncSession

from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.prices.book import PriceBook
from services.deployment_svc.prices.models import PriceBookVersion
from services.deployment_svc.prices.repository import RULES
from services.deployment_svc.quotas.models import PERIOD, SCOPE, Quota
from services.deployment_svc.usage import postgres
from services.deployment_svc.usage.models import SUMS, UsageCounter, UsageEvent, UsageRollup
from services.deployment_svc.usage.rows import Row, key_of
from services.deployment_svc.usage.rules import Wanted, counted, rolled_up
from services.kit.columns import now
from services.kit.db import ALL, Database, insert_for, is_postgres, together

Key = tuple[str, str, date]


class StaleBook(Exception):
    """The rows were priced by a book that no longer counts; nothing was written. Ledger.run prices them again."""


async def store(session: AsyncSession, rows: Sequence[Row], book: PriceBook) -> set[Key]:
    """Stores those events that are new, with what they add up to, and returns their keys; StaleBook when they have to be priced anew.

    The first write of its transaction, or after locks that are never taken before a store's own."""
    await together(session, RULES)
    if is_postgres(session):
        fresh, stored = await postgres.store(session, rows, book)
        if not fresh:
            raise StaleBook
        return stored
    version = await session.scalar(select(PriceBookVersion.version).where(PriceBookVersion.currency == book.currency)) or 0
    if version != book.version:
        raise StaleBook
    ordered = sorted(rows, key=key_of)
    # Given as parameters, SQLAlchemy splits the rows into statements that the driver can take.
    statement = insert_for(session)(UsageEvent).on_conflict_do_nothing().returning(UsageEvent.org_id, UsageEvent.id, UsageEvent.month)
    given = [row._asdict() for row in ordered]
    stored = {(row.org_id, row.id, row.month) for row in await session.execute(statement, given)}
    await add(session, list(_first(ordered, stored)))
    return stored


async def commit(db: Database, rows: Sequence[Row], book: PriceBook) -> set[Key]:
    """As ``store``, in a transaction of its own."""
    if db.is_sqlite:
        return await db.run(lambda session: store(session, rows, book), ALL)
    fresh, stored = await postgres.commit(db, rows, book)
    if not fresh:
        raise StaleBook
    return stored


def _first(rows: Sequence[Row], stored: set[Key]) -> Iterator[Row]:
    """The rows that were stored, each event once, however often it is among them."""
    left = set(stored)
    for row in rows:
        if row.key in left:
            left.discard(row.key)
            yield row


async def add(session: AsyncSession, rows: Sequence[Any], sign: int = 1) -> None:
    """Adds events to their roll-ups and counters, or takes them away."""
    wanted = await asked_for(session, {row.org_id for row in rows})
    await _upsert(session, UsageRollup, rolled_up(rows, sign), SUMS)
    await _upsert(session, UsageCounter, counted(rows, wanted, sign), ("tokens", "cost"))


async def _upsert(session: AsyncSession, model: Any, rows: Sequence[dict[str, Any]], sums: Sequence[str]) -> None:
    at = now()
    for row in rows:
        upsert = insert_for(session)(model).values(row | {"created_at": at, "updated_at": at})
        changes = {name: getattr(model, name) + getattr(upsert.excluded, name) for name in sums} | {"updated_at": at}
        await session.execute(upsert.on_conflict_do_update(index_elements=list(inspect(model).primary_key), set_=changes))


async def asked_for(session: AsyncSession, org_ids: set[str]) -> list[Wanted]:
    """The counters that quotas of these organizations ask for."""
    rows = await session.execute(select(Quota.org_id, Quota.scope, Quota.period).where(Quota.org_id.in_(org_ids)).distinct())
    return [(org_id, SCOPE.words[scope], PERIOD.words[period]) for org_id, scope, period in rows]


async def find(session: AsyncSession, event_id: str, month: date) -> UsageEvent | None:
    """One event of the session's organization."""
    return await session.scalar(select(UsageEvent).where(UsageEvent.id == event_id, UsageEvent.month == month))


async def own_deployments(session: AsyncSession, wanted: set[str]) -> set[str]:
    """Those of the deployments that belong to the session's organization."""
    return set((await session.scalars(select(Deployment.id).where(Deployment.id.in_(wanted)))).all())
