"""Writing changes in commit order, and reading them after a number."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from services.kit.db import alone
from services.user_svc.changes.models import Change

NEWEST = select(func.max(Change.seq))
"""The number of the newest change. Whether there is one after a number, PostgreSQL would look for in the whole table."""


async def record(session: AsyncSession, kind: int, org_id: str, subject: str) -> None:
    """Adds a change to the transaction. Call it last: from here to the commit, no other transaction gets a number.

    A number is drawn when a row is inserted, not when it is committed; without the lock a reader could see 8, remember it, and miss
    the 7 that commits later. On SQLite there is one writer anyway.
    """
    await alone(session, "changes")
    session.add(Change(kind=kind, org_id=org_id, subject=subject))
    await session.flush()


async def bounds(session: AsyncSession) -> tuple[int, int]:
    """Numbers of the oldest and the newest change that are kept; (0, 0) when there is none."""
    row = (await session.execute(select(func.min(Change.seq), func.max(Change.seq)))).one()
    return row[0] or 0, row[1] or 0


async def after(session: AsyncSession, seq: int, limit: int) -> Sequence[Change]:
    """The next changes, in order."""
    return (await session.scalars(select(Change).where(Change.seq > seq).order_by(Change.seq).limit(limit))).all()


async def purge(session: AsyncSession, before: datetime) -> None:
    """Deletes old changes, but never the newest: its number tells a follower whether it has seen everything."""
    newest = select(func.max(Change.seq)).scalar_subquery()
    await session.execute(delete(Change).where(Change.created_at < before, Change.seq < newest))
