"""Background loops: level-triggered, leased, woken early, stopped in order."""

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, TypeVar

import structlog
from sqlalchemy import ColumnElement, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from services.kit import telemetry
from services.kit.columns import Leased, now
from services.kit.db import ALL, Database
from services.kit.rows import look

log = structlog.get_logger()
L = TypeVar("L", bound=Leased)

_MAX_BACKOFF_S = 30.0


class Loop:
    """Calls ``tick`` again and again: at once while it returns True (there is more), else after ``interval_s`` or ``wake()``."""

    def __init__(self, name: str, tick: Callable[[], Awaitable[bool]], interval_s: float, *, endless: bool = False) -> None:
        """``endless``: a tick may wait for ever (it follows a stream) and is cancelled at the stop."""
        self.name, self.tick, self.interval_s, self._endless = name, tick, interval_s, endless
        self._wake = asyncio.Event()
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts the loop in the running event loop."""
        self._task = asyncio.create_task(self._run(), name=f"loop:{self.name}")

    def wake(self) -> None:
        """There is something to do now. Only spares the wait: a lost wake-up costs one interval."""
        self._wake.set()

    async def stop(self) -> None:
        """Lets the step in hand finish, for at most ten seconds."""
        self._stopping = True
        self._wake.set()
        if self._task is None:
            return
        if self._endless:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            return
        try:
            await asyncio.wait_for(self._task, 10)
        except (TimeoutError, asyncio.CancelledError):
            log.warning("loop.killed", loop=self.name)

    async def _run(self) -> None:
        failures = 0
        while not self._stopping:
            self._wake.clear()
            pause = self.interval_s
            try:
                if await self.tick():
                    pause = 0
                failures = 0
                telemetry.LOOP_RUNS.labels(self.name, "ok").inc()
            except Exception as error:
                failures += 1
                pause = min(_MAX_BACKOFF_S, self.interval_s * 2 ** min(failures, 20))
                telemetry.LOOP_RUNS.labels(self.name, "error").inc()
                log.error("loop.failed", loop=self.name, failures=failures, exc_info=error)
            if pause and not self._stopping:
                try:
                    await asyncio.wait_for(self._wake.wait(), pause * random.uniform(0.8, 1.2))
                except TimeoutError:
                    pass
            else:
                await asyncio.sleep(0)


async def claim(db: Database, model: type[L], *, limit: int, lease_s: float, where: Sequence[ColumnElement[bool]] = ()) -> list[L]:
    """Rows that are due and free, leased to this caller under a new token. Two workers never hold the same row."""
    token, at = secrets.token_hex(8), now()
    free = (model.due_at <= at, or_(model.lease_until.is_(None), model.lease_until < at), *where)
    # Looked for first: to claim is to write, and mostly there is nothing. In their order, else PostgreSQL may look through the whole table.
    if await look(db, select(model.id).where(*free).order_by(model.due_at).limit(1)) is None:  # type: ignore[attr-defined]
        return []
    # In a CTE, since PostgreSQL may run a subquery of IN several times, and each time lock other rows.
    due: Any = (
        select(model.id)  # type: ignore[attr-defined]
        .where(*free)
        .order_by(model.due_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    statement = (
        update(model)
        .where(model.id.in_(select(due.c.id)))  # type: ignore[attr-defined]
        # Being worked on is no change that an owner should see.
        .values(lease_until=at + timedelta(seconds=lease_s), lease_token=token, updated_at=model.updated_at)  # type: ignore[attr-defined]
        .returning(model)
        .execution_options(synchronize_session=False)
    )
    async with db.transaction(ALL) as session:
        return list((await session.scalars(statement)).all())


@asynccontextmanager
async def held(db: Database, row: Leased, lease_s: float) -> AsyncIterator[None]:
    """Keeps a claimed row leased while the block runs, however long it takes."""

    async def beat() -> None:
        while True:
            await asyncio.sleep(lease_s / 3)
            try:
                async with db.transaction(ALL) as session:
                    await _renew(session, row, lease_s)
            except Exception as error:
                # Two more beats come before the lease ends.
                log.warning("lease.not_renewed", table=type(row).__name__, exc_info=error)

    heart = asyncio.create_task(beat())
    try:
        yield
    finally:
        heart.cancel()
        await asyncio.gather(heart, return_exceptions=True)


async def _renew(session: AsyncSession, row: Leased, lease_s: float) -> None:
    model: Any = type(row)
    await session.execute(
        update(model)
        .where(model.id == row.id, model.lease_token == row.lease_token)  # type: ignore[attr-defined]
        .values(lease_until=now() + timedelta(seconds=lease_s), updated_at=model.updated_at)
        .execution_options(synchronize_session=False)
    )
