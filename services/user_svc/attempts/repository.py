"""Counting attempts in the database, so that all processes count together and nobody is let through twice."""

from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import case, delete, literal, or_, update
from sqlalchemy.ext.asyncio import AsyncSession

from services.kit.columns import UtcDateTime, now
from services.kit.db import insert_for
from services.user_svc.attempts.models import Attempt


@dataclass(frozen=True)
class Limit:
    """How often one subject may try one kind of thing."""

    kind: str
    most: int
    within: timedelta
    extends: bool = True
    """Whether each attempt begins the time anew: then no span of that length ever holds more than ``most``. Else windows follow each other,
    as befits a network, where somebody tries again and again as long as there are people."""


async def hit(session: AsyncSession, limit: Limit, subject: bytes) -> bool:
    """Counts an attempt; False, and nothing counted, when there were too many. One statement: it holds under any concurrency."""
    at = now()
    until, is_over = literal(at + limit.within, UtcDateTime), Attempt.expires_at <= at
    first = insert_for(session)(Attempt).values(kind=limit.kind, subject=subject, count=1, expires_at=at + limit.within)
    counted = first.on_conflict_do_update(
        index_elements=["kind", "subject"],
        set_={
            "count": case((is_over, 1), else_=Attempt.count + 1),
            "expires_at": until if limit.extends else case((is_over, until), else_=Attempt.expires_at),
            "updated_at": at,
        },
        where=or_(is_over, Attempt.count < limit.most),
    ).returning(Attempt.count)
    return await session.scalar(counted) is not None


async def clear(session: AsyncSession, limit: Limit, subject: bytes) -> None:
    """Forgets what was counted."""
    await session.execute(delete(Attempt).where(Attempt.kind == limit.kind, Attempt.subject == subject))


async def give_back(session: AsyncSession, limit: Limit, subject: bytes) -> None:
    """Takes one attempt out of the count: it was right."""
    mine = (Attempt.kind == limit.kind, Attempt.subject == subject, Attempt.count > 0)
    await session.execute(update(Attempt).where(*mine).values(count=Attempt.count - 1).execution_options(synchronize_session=False))
