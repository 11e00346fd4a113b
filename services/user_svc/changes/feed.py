"""Following the changes: read from the table, so that any process serves all of them, and hears its own the same way."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from clawplane.errors.v1.errors_pb2 import ErrorReason
from clawplane.user.v1.change_service_pb2 import Change, WatchChangesResponse
from services.kit.db import ALL, Database
from services.kit.errors import OutOfRange
from services.kit.feed import Follower
from services.kit.proto import to_proto
from services.kit.rows import look
from services.user_svc.changes import repository
from services.user_svc.changes.models import Change as Row

_POLL_S = 0.2
_PAGE = 500
_BEAT_S = 0.4


class Tail:
    """Looks at the end of the table for all who watch it in this process: one look at a time, shared by those who wait for it."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self._seq = 0
        """What the next look, or the one under way, starts after."""
        self._looked = 0.0
        self._look: asyncio.Task[Sequence[Row]] | None = None

    async def after(self, seq: int) -> Sequence[Row]:
        """The next changes after a number, at once if they are known to be there; else what the next look finds, which may be nothing."""
        if seq < self._seq and (rows := await self._read(seq)):
            return rows
        if self._look is None or self._look.done():
            self._seq = seq
            self._look = asyncio.create_task(self._next(), name="changes")
        # Whoever stops watching does not end it for the others.
        return [row for row in await asyncio.shield(self._look) if row.seq > seq]

    async def _next(self) -> Sequence[Row]:
        await asyncio.sleep(self._looked + _POLL_S - time.monotonic())
        try:
            # Mostly there is nothing new, and to be told so costs half of reading.
            newest = await look(self.db, repository.NEWEST) or 0
            rows = await self._read(self._seq) if newest > self._seq else ()
        finally:
            self._looked = time.monotonic()
        if rows:
            self._seq = rows[-1].seq
        return rows

    async def _read(self, seq: int) -> Sequence[Row]:
        # A transaction each time: an open one would hold back PostgreSQL's clean-up for as long as somebody watches.
        async with self.db.read(ALL) as session:
            return await repository.after(session, seq, _PAGE)

    async def close(self) -> None:
        """Stops looking."""
        if self._look is not None:
            self._look.cancel()
            await asyncio.gather(self._look, return_exceptions=True)


async def watch(tail: Tail, ticks: AsyncIterator[None], after_seq: int) -> AsyncIterator[WatchChangesResponse]:
    """The changes after a number, as they come, and a beat when there are none; -1 means from now on. OutOfRange for what is not kept.
    ``ticks`` need not wait."""
    async with tail.db.read(ALL) as session:
        oldest, newest = await repository.bounds(session)
    seq = after_seq if after_seq >= 0 else newest
    if seq > newest or (seq < oldest - 1 and seq > 0) or (seq == 0 and oldest > 1):
        raise OutOfRange(
            "changes after this number are not kept; read everything anew and follow from latest_seq",
            reason=ErrorReason.ERROR_REASON_OUT_OF_RANGE, latest_seq=newest,
        )  # fmt: skip
    yield WatchChangesResponse(seq=seq)
    beat = time.monotonic()
    async for _ in ticks:
        rows = await tail.after(seq)
        for row in rows:
            seq = row.seq
            yield WatchChangesResponse(seq=seq, change=to_proto(row, Change))
        if rows or time.monotonic() - beat >= _BEAT_S:
            beat = time.monotonic()
            if not rows:
                yield WatchChangesResponse(seq=seq)


def follower(tail: Tail) -> Follower:
    """Follows for this process itself."""

    async def ticks() -> AsyncIterator[None]:
        while True:
            yield

    return Follower(lambda after_seq: watch(tail, ticks(), after_seq))
