"""A log to try things on: rows as a service writes them, sealed by hand, verified in this process."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import sqlalchemy as sa

from clawplane.audit.v1.audit_event_pb2 import AuditOutcome
from services.kit import audit_sealer, ids
from services.kit.audit import Log, Note
from services.kit.audit_chain import Chain
from services.kit.audit_sealer import Sealer
from services.kit.audit_verify import Logged, Problem, Verifier
from services.kit.auth import Caller
from services.kit.db import ALL, Database
from services.kit.migrate import migrate
from services.kit.settings import KitSettings
from services.user_svc.base import AuditEvent, AuditHead

KEY = bytes(range(32))
CALLER = Caller("user", "usr_" + "1" * 32, org_id="org_" + "2" * 32, key_id="ses_" + "3" * 32)


@dataclass
class Trial:
    """The log of one service. ``org_id`` is this test's own organization."""

    db: Database
    log: Log
    sealer: Sealer
    org_id: str

    async def write(self, count: int = 1, org_id: str = "", **more: Any) -> None:
        """Rows, each in a transaction of its own."""
        for _ in range(count):
            async with self.db.transaction(ALL) as session:
                await self.write_in(session, org_id, **more)

    async def write_in(self, session: Any, org_id: str = "", **more: Any) -> None:
        """A row in a transaction that is open."""
        note = Note(ids.new("dep"), org_id or self.org_id, {"name": "one"}, {"name": "two", "n": 1.5, "none": None, "text": "é\u0000\n"}, **more)
        common = {"method": "/x.Y/Z", "request_id": "r", "ip": "::1", "outcome": AuditOutcome.AUDIT_OUTCOME_DONE}
        await self.log.write(session, [note], CALLER, **common)

    async def seal(self) -> list[dict[str, Any]]:
        """Everything that waits; the heads that the log was told of."""
        told: list[dict[str, Any]] = []

        def hear(event: str, **line: Any) -> None:
            told.append({"event": event} | line)

        with mock.patch.object(audit_sealer, "log", mock.Mock(info=hear, error=hear)):
            await self.sealer.finish()
        return [line for line in told if line["org"] == self.org_id]

    async def problems(self, logged: Logged | None = None, chain: Chain | None = None) -> list[Problem]:
        """What is wrong with this organization."""
        verifier = Verifier(self.db, AuditEvent, AuditHead, chain or self.log.chain, logged or {}, self.org_id)
        return [problem async for problem in verifier.problems()]

    async def rows(self) -> list[Any]:
        """The rows in the order of their seals."""
        statement = sa.select(AuditEvent).where(AuditEvent.org_id == self.org_id).order_by(AuditEvent.seal_number, AuditEvent.id)
        async with self.db.read(ALL) as session:
            return list(await session.scalars(statement))

    async def sql(self, statement: str, **values: Any) -> None:
        """What somebody with access to the database does. ``:org`` is the organization."""
        org = ids.to_uuid(self.org_id, "org").hex
        async with self.db.writing.begin() as connection:
            done = await connection.execute(sa.text(statement.replace(":org", f"'{org}'")), values)
        assert done.rowcount != 0, statement

    async def number(self, number: int) -> Any:
        """The row of a number."""
        return next(row for row in await self.rows() if row.seal_number == number)


@asynccontextmanager
async def trial_on(url: str, **settings: Any) -> AsyncIterator[Trial]:
    """A log on a database of its own."""
    db = Database(url, KitSettings(**settings), "user_svc")
    await migrate(db, "user_svc")
    log = Log(AuditEvent, Chain(KEY, "user_svc"))
    try:
        yield Trial(db, log, Sealer(db, log, AuditHead), ids.new("org"))
    finally:
        await db.close()
