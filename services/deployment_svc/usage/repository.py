"""Writes and sums of the usage ledger."""

from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any

from sqlalchemy import func, inspect, select
from sqlalchemy.ext.asyncio import AsyncSession

from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.usage import postgres
from services.deployment_svc.usage.models import UsageEvent, UsageRollup
from services.deployment_svc.usage.rules import rolled_up
from services.kit.db import insert_for, is_postgres

_SUMS = ("events", "tokens_in", "tokens_out", "tokens_total", "cost", "unpriced_events")


async def store(session: AsyncSession, rows: Sequence[dict[str, Any]]) -> set[tuple[str, str, date]]:
    """Stores those events that are new, with their roll-ups, and returns their (org_id, id, month)."""
    if is_postgres(session):
        return await postgres.store(session, rows)
    insert = insert_for(session)
    ordered = sorted(rows, key=lambda row: (row["org_id"], row["id"], row["month"]))
    # Given as parameters, SQLAlchemy splits the rows into statements that both drivers can take (32,767 parameters at most).
    statement = insert(UsageEvent).on_conflict_do_nothing().returning(UsageEvent.org_id, UsageEvent.id, UsageEvent.month)
    stored = {(row.org_id, row.id, row.month) for row in await session.execute(statement, ordered)}
    for rollup in rolled_up(_first(ordered, stored)):
        upsert = insert(UsageRollup).values(rollup)
        added = {name: getattr(UsageRollup, name) + getattr(upsert.excluded, name) for name in _SUMS}
        await session.execute(
            upsert.on_conflict_do_update(index_elements=list(inspect(UsageRollup).primary_key), set_=added)
        )
    return stored


def _first(rows: Sequence[dict[str, Any]], stored: set[tuple[str, str, date]]) -> Iterator[dict[str, Any]]:
    """The rows that were stored, each event once, however often it is among them."""
    left = set(stored)
    for row in rows:
        key = (row["org_id"], row["id"], row["month"])
        if key in left:
            left.discard(key)
            yield row


async def find(session: AsyncSession, event_id: str, month: date) -> UsageEvent | None:
    """One event of the session's organization."""
    return await session.scalar(select(UsageEvent).where(UsageEvent.id == event_id, UsageEvent.month == month))


async def own_deployments(session: AsyncSession, wanted: set[str]) -> set[str]:
    """Those of the deployments that belong to the session's organization."""
    return set((await session.scalars(select(Deployment.id).where(Deployment.id.in_(wanted)))).all())


async def summarize(
    session: AsyncSession, first: date, last: date, group_by: Sequence[str], deployment_id: str
) -> list[dict[str, Any]]:
    """Sums of the roll-ups between two days, both included, one for each group."""
    groups = [getattr(UsageRollup, name) for name in group_by]
    statement = (
        select(*groups, UsageRollup.currency, *(func.sum(getattr(UsageRollup, name)).label(name) for name in _SUMS))
        .where(UsageRollup.day >= first, UsageRollup.day <= last)
        .group_by(*groups, UsageRollup.currency)
        .order_by(*groups, UsageRollup.currency)
    )
    if deployment_id:
        statement = statement.where(UsageRollup.deployment_id == deployment_id)
    return [dict(row._mapping) for row in await session.execute(statement)]
