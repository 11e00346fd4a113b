"""Sealing the audit log, a moment after its rows were written: writers wait for nobody, and the order is that of sealing."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import structlog
from sqlalchemy import Row, bindparam, exists, select, type_coerce, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.types import NullType

from services.kit.audit import Log
from services.kit.audit_chain import START, bare_id, raw, same, stored
from services.kit.call import Kit
from services.kit.columns import now
from services.kit.db import ALL, Database, alone_now, insert_for
from services.kit.loops import Loop
from services.kit.rows import look

log = structlog.get_logger()
_BATCH = 500
_LOCK = "audit seals"


def of(kit: Kit, heads: Any) -> "Sealer":
    """The sealer of a service. ``heads``: the service's own AuditHead, a subclass of AuditHeadRow."""
    assert kit.audit is not None
    return Sealer(kit.db, kit.audit, heads)


class Sealer:
    """Seals the new rows of one service. Several processes may try; one at a time does it."""

    def __init__(self, db: Database, audit: Log, heads: Any) -> None:
        self._db, self._chain = db, audit.chain
        self._rows, self._heads, self._head_model = audit.model.__table__, heads.__table__, heads
        self._sealed = [column.key for column in self._rows.c if column.key != "seal"]
        self._broken: set[str] = set()

    def loop(self) -> Loop:
        """Seals as long as the process runs."""
        return Loop("audit-seals", self.tick, self._db.settings.audit_seal_s)

    async def finish(self) -> None:
        """Seals what is left, when the process stops in order."""
        while await self.tick():
            pass

    async def tick(self) -> bool:
        """Seals a batch; True when there may be more."""
        # Looked at before anything is locked: mostly there is nothing.
        if not await look(self._db, select(exists().where(*self._waiting()))):
            return False
        async with self._db.transaction(ALL) as session:
            if not await alone_now(session, _LOCK):
                return False
            rows, sealed = await self._batch(session)
        for head in sealed:
            log.info("audit.sealed", service=self._chain.service, org=head["org_id"], count=head["count"], head=head["head"].hex())
        return len(rows) == _BATCH

    async def adopt(self) -> None:
        """Before anything was ever sealed: takes over the rows that were written before there were seals."""
        async with self._db.transaction(ALL) as session:
            if await session.scalar(select(exists().where(self._heads.c.count > 0))) or not await alone_now(session, _LOCK):
                return
            c = self._rows.c
            old = (await session.execute(select(*map(raw, c)).where(c.written.is_(None), c.seal_number.is_(None)))).all()
            await self._set(session, old, "written", [{"new_written": self._chain.written(row._asdict())} for row in old])

    def _waiting(self) -> list[Any]:
        c = self._rows.c
        # The index of what is not sealed serves this; the few organizations in question are left out.
        broken = [f"org_{one}" for one in sorted(self._broken)]
        return [c.seal_number.is_(None), *([c.org_id.not_in(broken)] if broken else [])]

    async def _batch(self, session: AsyncSession) -> tuple[list[Row[Any]], list[dict[str, Any]]]:
        """Seals some rows: these, and the heads that they lead to."""
        c = self._rows.c
        wanted = select(*(raw(c[name]) for name in self._sealed)).where(*self._waiting()).order_by(c.org_id, c.id).limit(_BATCH)
        rows = list((await session.execute(wanted)).all())
        by_org: dict[str, list[Row[Any]]] = defaultdict(list)
        for row in rows:
            by_org[bare_id(row.org_id)].append(row)
        known = await self._known(session, by_org)
        heads, sealed, seals = [], [], []
        for org, its in by_org.items():
            head = known.get(org, {"count": 0, "head": START})
            if org in known and not same(self._chain.head(head), head["mac"]):
                # To go on from here would make good what somebody has changed.
                self._broken.add(org)
                log.error("audit.head_broken", service=self._chain.service, org=f"org_{org}")
                continue
            previous, count = head["head"], head["count"]
            for row in its:
                count += 1
                previous = self._chain.seal(previous, count, row._asdict())
                sealed.append(row)
                seals.append({"new_number": count, "new_seal": previous})
            heads.append(self._head(org, count, previous))
        await self._set(session, sealed, "seal", seals)
        for values in heads:
            await self._keep(session, values)
        return rows, heads

    async def _known(self, session: AsyncSession, orgs: Iterable[str]) -> dict[str, dict[str, Any]]:
        c = self._heads.c
        named = select(*map(raw, c)).where(c.org_id.in_([f"org_{one}" for one in orgs]))
        return {bare_id(row.org_id): dict(row._mapping) for row in (await session.execute(named)).all()}

    def _head(self, org: str, count: int, head: bytes) -> dict[str, Any]:
        values = {"org_id": f"org_{org}", "count": count, "head": head, "sealed_at": now()}
        return values | {"mac": self._chain.head(stored(self._heads, values))}

    async def _keep(self, session: AsyncSession, values: Mapping[str, Any]) -> None:
        insert = insert_for(session)(self._head_model).values(**values)
        changed = {name: value for name, value in values.items() if name != "org_id"} | {"updated_at": now()}
        await session.execute(insert.on_conflict_do_update(index_elements=["org_id"], set_=changed))

    async def _set(self, session: AsyncSession, rows: Sequence[Row[Any]], what: str, values: list[dict[str, Any]]) -> None:
        """Writes the ``written`` or the ``seal`` (with its number) of rows."""
        if not rows:
            return
        c = self._rows.c
        named: dict[str, dict[str, Any]] = {
            "seal": {"seal_number": bindparam("new_number"), "seal": bindparam("new_seal")},
            "written": {"written": bindparam("new_written")},
        }
        keys = ("org_id", "id", "created_at")
        this = [type_coerce(c[name], NullType()) == bindparam(f"the_{name}", type_=NullType()) for name in keys]
        found = [{f"the_{name}": row._mapping[name] for name in keys} for row in rows]
        await (await session.connection()).execute(
            update(self._rows).where(*this).values(named[what]), [one | other for one, other in zip(found, values, strict=True)]
        )
