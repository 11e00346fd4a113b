"""Tells once, for each limit and period, that 50, 75 and 100 hundredths of it are used up."""

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

import structlog
from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.user.v1.entitlement_service_pb2 import Entitlements
from services.deployment_svc.quotas import repository
from services.deployment_svc.quotas.models import PERIOD, SCOPE, UNIT, QuotaNotice
from services.deployment_svc.quotas.rules import ORGANIZATION, THRESHOLDS, Limit, Standings, Who, entitled, exact, holding, percent
from services.deployment_svc.usage.ledger import Ledger
from services.deployment_svc.usage.models import UsageCounter
from services.deployment_svc.usage.rules import PERIODS, period_of
from services.kit import ids
from services.kit.columns import now
from services.kit.db import ALL, Database, insert_for
from services.kit.errors import NotFound

log = structlog.get_logger()
_PAGE = 200
_TOLD = 100_000
_SWEEP_S = 300.0
_KEPT = timedelta(days=70)
"""Counters of periods that began longer ago are no limit's any more."""
_ABOUT = ("org_id", "scope", "subject", "period", "unit", "period_start", "percent")
Reached = tuple[str, int, str, int, int, datetime, int]
"""What a notice is about."""


class Watcher:
    """Ticks of the loop that looks at the organizations whose counters have moved, and now and then at all: after a crash nobody knows
    which had."""

    def __init__(self, db: Database, ledger: Ledger, entitlements: Callable[[str], Awaitable[Entitlements]]) -> None:
        self.db, self.ledger, self.entitlements = db, ledger, entitlements
        self._sweep_at = 0.0
        self._told: set[Reached] = set()
        """What this process knows to be noticed; only spares the database the question."""

    async def tick(self) -> bool:
        """Looks at what has moved since the last look."""
        moved, self.ledger.touched = self.ledger.touched, set()
        try:
            if time.monotonic() >= self._sweep_at:
                async with self.db.read(ALL) as session:
                    moved |= await repository.users_of(session, now())
                await self.db.run(_forget, ALL)
                self._sweep_at = time.monotonic() + _SWEEP_S
            left = iter(sorted(moved))
            while page := list(islice(left, _PAGE)):
                await self._look(page)
        except BaseException:
            self.ledger.touched |= moved
            raise
        return False

    async def _look(self, org_ids: list[str]) -> None:
        at = now()
        async with self.db.read(ALL) as session:
            found = await repository.counters(session, org_ids, at)
        rows = []
        for org_id in org_ids:
            try:
                paid_for = entitled(await self.entitlements(org_id))
            except NotFound:
                continue  # It is gone, and its limits with it.
            rows += [row for limit in _limits(org_id, paid_for, found) for row in self._notices(org_id, limit, found)]
        if rows:
            await self.db.run(lambda session: _store(session, rows), ALL)
            if len(self._told) > _TOLD:
                self._told.clear()
            self._told.update(tuple(row[name] for name in _ABOUT) for row in rows)

    def _notices(self, org_id: str, limit: Limit, found: Standings) -> Iterator[dict[str, Any]]:
        used, _ = found.of(org_id, limit)
        share, start = percent(used, limit.amount), period_of(limit.period, found.at)
        about = (org_id, SCOPE.numbers[limit.scope], limit.subject, PERIOD.numbers[limit.period], UNIT.numbers[limit.unit], start)
        for threshold in THRESHOLDS:
            if share >= threshold and (*about, threshold) not in self._told:
                said = {"amount": exact(limit.amount), "used": exact(used), "created_at": found.at, "updated_at": found.at}
                yield dict(zip(_ABOUT, (*about, threshold), strict=True)) | said | {"id": ids.new("qnt")}


def _limits(org_id: str, paid_for: Iterable[Limit], found: Standings) -> Iterator[Limit]:
    """Every limit of an organization, and of each subject that has used something or has a limit of its own."""
    quotas = found.quotas.get(org_id, [])
    yield from holding(tuple(paid_for), [quota for quota in quotas if quota.scope == ORGANIZATION], Who(org_id))
    for scope in {quota.scope for quota in quotas} - {ORGANIZATION}:
        of_scope = [quota for quota in quotas if quota.scope == scope]
        subjects = {key[2] for key in found.standing if key[:2] == (org_id, scope)} | {quota.subject for quota in of_scope} - {""}
        for subject in sorted(subjects):
            yield from holding((), of_scope, Who(org_id, **{f"{scope}_id": subject}))


async def _store(session: AsyncSession, rows: list[dict[str, Any]]) -> None:
    # Given as parameters, SQLAlchemy splits the rows into statements that the driver can take.
    insert = insert_for(session)(QuotaNotice).on_conflict_do_nothing().returning(QuotaNotice)
    for row in await session.scalars(insert, rows):
        log.warning(
            "quota.reached", org=row.org_id, scope=SCOPE.words[row.scope], subject=row.subject, period=PERIOD.words[row.period],
            unit=UNIT.words[row.unit], percent=row.percent, amount=row.amount, used=row.used,
        )  # fmt: skip


async def _forget(session: AsyncSession) -> None:
    """Deletes counters of users, keys and deployments that no limit asks for any more; there may be very many."""
    c, before = UsageCounter, now() - _KEPT
    old = delete(c).where(c.period.in_(PERIODS), c.starts_at < before, c.scope != ORGANIZATION)
    await session.execute(old.execution_options(synchronize_session=False))
