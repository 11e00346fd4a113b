"""One loop that deletes every row whose time is over."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import structlog
from sqlalchemy import delete, inspect, select, tuple_

from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.loops import Loop

log = structlog.get_logger()
_BATCH = 500


async def purge(db: Database, kept: Mapping[Any, timedelta]) -> bool:
    """Deletes a batch of each table whose ``expires_at`` lies further back than the rows are kept; True when there may be more."""
    more = False
    for model, keep in kept.items():
        keys = inspect(model).primary_key
        expired = select(*keys).where(model.expires_at < now() - keep).limit(_BATCH)
        async with db.transaction(ALL) as session:
            doomed = (await session.execute(expired)).all()
            if doomed:
                await session.execute(delete(model).where(tuple_(*keys).in_(doomed)).execution_options(synchronize_session=False))
                log.info("purged", table=model.__tablename__, rows=len(doomed))
        more = more or len(doomed) == _BATCH
    return more


def purger(db: Database, kept: Mapping[Any, timedelta], every_s: float = 60) -> Loop:
    """The loop. ``kept``: model with ``expires_at`` -> how long rows stay after that."""

    async def tick() -> bool:
        return await purge(db, kept)

    return Loop("purge", tick, every_s)
