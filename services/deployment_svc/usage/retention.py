"""Forgetting events when their time is over. Their sums stay."""

from datetime import date, timedelta

import structlog
from sqlalchemy import delete, select, tuple_

from services.deployment_svc.usage.models import UsageEvent
from services.deployment_svc.usage.rows import month_of
from services.kit import partitions
from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.loops import Loop

log = structlog.get_logger()
_BATCH = 1000


def kept_from(days: int) -> date:
    """The first month that is kept, whole: of which any day lies within so many days."""
    return month_of(now() - timedelta(days=days))


async def forget(db: Database, days: int) -> bool:
    """Drops the months that are over; True when there may be more."""
    before = kept_from(days)
    if not db.is_sqlite:
        for name in await partitions.drop(db, "usage_events", "month", before):
            log.info("usage.month_dropped", partition=name)
        return False
    key = (UsageEvent.org_id, UsageEvent.id, UsageEvent.month)
    async with db.transaction(ALL) as session:
        doomed = (await session.execute(select(*key).where(UsageEvent.month < before).limit(_BATCH))).all()
        if doomed:
            await session.execute(delete(UsageEvent).where(tuple_(*key).in_(doomed)).execution_options(synchronize_session=False))
    return len(doomed) == _BATCH


def keeper(db: Database, days: int) -> Loop:
    """The loop."""
    return Loop("usage-retention", lambda: forget(db, days), 6 * 3600)
