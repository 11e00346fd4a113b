"""What events add up to, counted once more in Python, beside what roll-ups and counters say."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

from sqlalchemy import inspect, select

from services.deployment_svc.usage.models import SUMS, UsageCounter, UsageEvent, UsageRollup
from services.deployment_svc.usage.rules import ALWAYS, counted, rolled_up
from services.kit.db import ALL, Database
from services.kit.settings import KitSettings
from tests.harness import Stack

Sums = dict[tuple[Any, ...], dict[str, Any]]


@asynccontextmanager
async def ledger_of(stack: Stack) -> AsyncIterator[Database]:
    """The database of the deployment service."""
    db = Database(stack.urls["deployment_svc"], KitSettings(), "test")
    try:
        yield db
    finally:
        await db.close()


async def events_of(db: Database, org_id: str) -> list[UsageEvent]:
    """All events of an organization, corrections among them, in the order of their keys."""
    async with db.read(ALL) as session:
        key = (UsageEvent.month, UsageEvent.org_id, UsageEvent.id)
        return list((await session.scalars(select(UsageEvent).where(UsageEvent.org_id == org_id).order_by(*key))).all())


async def recount(stack: Stack, org_id: str) -> list[UsageEvent]:
    """Asserts that roll-ups and counters of an organization are what its events make, and returns these.

    Of the counters, those that each organization has: others are complete only from when a quota asked for them. Nothing may be written
    meanwhile."""
    async with ledger_of(stack) as db:
        events = await events_of(db, org_id)
        for model, rows, sums in (
            (UsageRollup, rolled_up(events), SUMS),
            (UsageCounter, counted(events, ()), ("tokens", "cost")),
        ):
            stored, made = await _stored(db, model, org_id, sums), _by_key(model, rows, sums)
            for key in {*stored, *made}:
                have, want = stored.get(key, {}), made.get(key, {})
                wrong = {name: (have.get(name, 0), want.get(name, 0)) for name in sums if have.get(name, 0) != want.get(name, 0)}
                assert not wrong, (model.__tablename__, key, wrong)
    return events


async def _stored(db: Database, model: Any, org_id: str, sums: tuple[str, ...]) -> Sums:
    async with db.read(ALL) as session:
        rows = (await session.scalars(select(model).where(model.org_id == org_id))).all()
    rows = [row for row in rows if model is UsageRollup or (row.scope, row.period) in ALWAYS]
    return _by_key(model, [{column.key: getattr(row, column.key) for column in inspect(model).columns} for row in rows], sums)


def _by_key(model: Any, rows: list[dict[str, Any]], sums: tuple[str, ...]) -> Sums:
    names = [column.key for column in inspect(model).primary_key]
    found = {tuple(row[name] for name in names): {name: row[name] for name in sums} for row in rows}
    # What has come to nothing may stay as a row of zeros.
    return {key: row for key, row in found.items() if any(row.values())}


def cost_of(events: list[UsageEvent]) -> Decimal:
    """What they cost together."""
    return sum((event.cost or Decimal(0) for event in events), Decimal(0))
