"""Which processes live and which keys each of them holds: nothing is wrapped with a key that one of them has not reported."""

import asyncio
import os
import secrets
import socket
import time
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import JSON, Integer, String, delete, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from services.kit import vault
from services.kit.columns import Timestamps, UtcDateTime, now
from services.kit.db import ALL, Database, alone, insert_for, is_postgres
from services.kit.loops import Loop
from services.kit.secrets import SecretBox, SecretError

log = structlog.get_logger()

STALE_S = 10.0
"""A process that has not reported for so long does not live."""
_BEAT_S, _READ_S, _FORGET_S = 3.0, 0.9, 24 * 3600.0


class KeyHolderRow(Timestamps):
    """Mixin of each service's ``key_holders``: one row a live process."""

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    host: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int] = mapped_column(Integer)
    key_ids: Mapped[list[str]] = mapped_column(JSON)
    """What it can open."""
    current: Mapped[str] = mapped_column(String(64))
    """What it seals with."""
    reported_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


async def clock(session: AsyncSession) -> datetime:
    """The database's time, on which processes of several machines agree."""
    at = await session.scalar(select(func.clock_timestamp())) if is_postgres(session) else None
    return at or now()


async def turn(session: AsyncSession) -> None:
    """Until the transaction ends, no other process joins, and no key is put into use."""
    await alone(session, "keys")


async def live(session: AsyncSession, model: Any) -> list[Any]:
    """The rows of the processes that live."""
    since = await clock(session) - timedelta(seconds=STALE_S)
    return list((await session.scalars(select(model).where(model.reported_at > since).order_by(model.host, model.pid))).all())


def named(holders: list[Any]) -> str:
    """Processes, as an error names them."""
    return ", ".join(f"process {one.pid} on {one.host}" for one in holders)


class Holder:
    """This process among the holders of a service's database."""

    def __init__(self, db: Database, box: SecretBox, model: Any, canary: Any) -> None:
        self.db, self.box, self.model, self.canary = db, box, model, canary
        self.id = secrets.token_hex(16)
        self._told: tuple[list[str], str] | None = None
        self._told_at = 0.0

    @property
    def loop(self) -> Loop:
        """Reads the ring again and reports."""
        return Loop("keys", self.tick, _READ_S)

    async def join(self) -> None:
        """Before anything is served: SecretError when the keys are not those of the database, or another process lacks our current one."""
        deadline = time.monotonic() + STALE_S + 1
        while True:
            async with self.db.transaction(ALL) as session:
                await turn(session)
                lacking = await self._lacking(session)
                if not lacking:
                    await vault.plant(session, self.box, self.canary, self.box.current)
                    await vault.check(session, self.box, self.canary)
                    await self._report(session)
                    return
            if time.monotonic() > deadline:
                raise SecretError(
                    f"this process would seal with the key {self.box.current!r}, which {named(lacking)} cannot open: "
                    "add a new key to CLAWPLANE_ENCRYPTION_KEYS of every process first, then set CLAWPLANE_ENCRYPTION_KEY_ID"
                )
            # One that was killed has not been missed yet.
            await asyncio.sleep(0.5)

    async def _lacking(self, session: AsyncSession) -> list[Any]:
        """Who could not open what we would seal; a key that is in use already is everybody's own matter."""
        if await session.get(self.canary, self.box.current) is not None:
            return []
        return [one for one in await live(session, self.model) if self.box.current not in one.key_ids]

    async def tick(self) -> bool:
        """Follows the ring; reports what changed at once, else that we live."""
        self.box.refresh()
        if self._told == self._state() and time.monotonic() - self._told_at < _BEAT_S:
            return False
        try:
            async with self.db.transaction(ALL) as session:
                rows = (await session.scalars(select(self.canary))).all()
                await self._report(session)
        except (SQLAlchemyError, OSError) as error:
            # The loop's own growing pause would make this process look dead.
            log.warning("keys.not_reported", database=self.db.name, error=type(error).__name__)
            return False
        behind = next((why for row in rows if (why := vault.missing(self.box, row))), "")
        if behind != self.box.behind:
            log.error("keys.behind", database=self.db.name, why=behind)
            self.box.behind = behind
        return False

    async def leave(self) -> None:
        """Nobody need wait for this process any more."""
        try:
            async with self.db.transaction(ALL) as session:
                await session.execute(delete(self.model).where(self.model.id == self.id))
        except (SQLAlchemyError, OSError) as error:
            log.warning("keys.not_left", database=self.db.name, error=type(error).__name__)

    def _state(self) -> tuple[list[str], str]:
        return self.box.ring.ids, self.box.current

    async def _report(self, session: AsyncSession) -> None:
        at, (key_ids, current) = await clock(session), self._state()
        values = {"host": socket.gethostname()[:255], "pid": os.getpid(), "key_ids": key_ids, "current": current, "reported_at": at}
        row = insert_for(session)(self.model).values(id=self.id, **values)
        await session.execute(row.on_conflict_do_update(index_elements=["id"], set_=values | {"updated_at": at}))
        await session.execute(delete(self.model).where(self.model.reported_at < at - timedelta(seconds=_FORGET_S)))
        self._told, self._told_at = (key_ids, current), time.monotonic()
