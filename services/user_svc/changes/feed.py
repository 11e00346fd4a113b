"""Following the changes: read from the table, so that any process serves all of them, and hears its own the same way."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.errors.v1.errors_pb2 import ErrorReason
from clawplane.user.v1.change_service_pb2 import Change, WatchChangesResponse
from services.kit.db import ALL, Database
from services.kit.errors import OutOfRange
from services.kit.feed import Follower
from services.kit.proto import to_proto
from services.user_svc.changes import repository

POLL_S = 0.2
_PAGE = 500
_BEAT_S = 0.4


async def watch(
    read: Callable[[], AbstractAsyncContextManager[AsyncSession]], ticks: AsyncIterator[None], after_seq: int
) -> AsyncIterator[WatchChangesResponse]:
    """The changes after a number, as they come, and a beat when there are none; -1 means from now on. OutOfRange for what is not kept."""
    async with read() as session:
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
        more = True
        while more:
            # A transaction a tick: an open one would hold back PostgreSQL's clean-up for as long as somebody watches.
            async with read() as session:
                rows = await repository.after(session, seq, _PAGE)
            for row in rows:
                seq = row.seq
                yield WatchChangesResponse(seq=seq, change=to_proto(row, Change))
            more = len(rows) == _PAGE
            if rows:
                beat = time.monotonic()
        if time.monotonic() - beat >= _BEAT_S:
            beat = time.monotonic()
            yield WatchChangesResponse(seq=seq)


def follower(db: Database) -> Follower:
    """Follows for this process itself."""

    async def ticks() -> AsyncIterator[None]:
        while True:
            yield
            await asyncio.sleep(POLL_S)

    return Follower(lambda after_seq: watch(lambda: db.read(ALL), ticks(), after_seq))
