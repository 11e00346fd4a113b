"""Suspends what an organization runs when its spend cap is reached, and starts it again when that is over.

Level-triggered: each look compares how things stand with what they should be, so that any process may look, at any time.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import structlog
from sqlalchemy import and_, func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from services.deployment_svc.deployments import repository, state
from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.quotas.models import PERIOD, Quota
from services.deployment_svc.quotas.rules import EACH, exact
from services.deployment_svc.usage.models import UsageCounter
from services.deployment_svc.usage.rules import PERIODS, period_end, period_of
from services.kit.columns import now
from services.kit.db import ALL, Database

log = structlog.get_logger()
BY_QUOTA = "quota"
"""What ``suspended_for`` says of those that wait for the next period."""


@dataclass(frozen=True)
class Reached:
    """A spend cap that is used up."""

    org_id: str
    period: str
    amount: Decimal
    ends_at: datetime


async def reached(session: AsyncSession, at: datetime, org_id: str = "") -> list[Reached]:
    """The caps that are used up, of one organization or of all, the one that lasts longest first."""
    c = UsageCounter
    # Counted by the hour, day or month, as the cap is.
    current = or_(*(and_(Quota.period == PERIOD.numbers[period], c.starts_at == period_of(period, at)) for period in PERIODS))
    same = and_(c.org_id == Quota.org_id, c.scope == "organization", c.subject == "", c.period == Quota.period, current)
    statement = (
        select(Quota.org_id, Quota.period, Quota.amount_cost).outerjoin(c, same)
        .where(Quota.suspends.is_(True), func.coalesce(c.cost, 0) >= Quota.amount_cost)
    )  # fmt: skip
    if org_id:
        statement = statement.where(Quota.org_id == org_id)
    found = []
    for row in await session.execute(statement):
        period = PERIOD.words[row[1]]
        found.append(Reached(row[0], period, row[2] or Decimal(0), period_end(period, period_of(period, at))))
    return sorted(found, key=lambda one: one.ends_at, reverse=True)


async def leave_alone(session: AsyncSession, d: Deployment) -> None:
    """An operator sets it going again: what a cap has suspended, none suspends before the period ends of which the cap is reached now."""
    if d.suspended_for == BY_QUOTA:
        caps = await reached(session, now(), d.org_id)
        d.resumed_until = caps[0].ends_at if caps else None


class SpendCap:
    """Ticks of the loop that looks."""

    def __init__(self, db: Database, currency: str, wake: Callable[[], None]) -> None:
        """``wake``: what is done with a deployment that was suspended or is to start again begins at once."""
        self.db, self.currency, self.wake = db, currency, wake

    async def tick(self) -> bool:
        """Looks at every organization that has a cap, or something that was suspended for one."""
        at = now()
        async with self.db.read(ALL) as session:
            capped = {cap.org_id for cap in await reached(session, at)}
            running = (Deployment.state == state.ACTIVE, Deployment.org_id.in_(capped), _not_left_alone(at))
            over = (Deployment.suspended_for == BY_QUOTA, Deployment.org_id.not_in(capped))
            doomed = (await session.scalars(select(Deployment.id).where(*running))).all() if capped else []
            waiting = (await session.scalars(select(Deployment.id).where(*over))).all()
        for deployment_id in doomed:
            await self._change(deployment_id, self._suspend)
        for deployment_id in waiting:
            await self._change(deployment_id, self._resume)
        return False

    async def _change(self, deployment_id: str, change: Callable[[AsyncSession, Deployment], Awaitable[bool]]) -> None:
        """Changes a deployment if that is still right; another process may have been faster, or the limit raised."""

        async def work(session: AsyncSession) -> bool:
            d = await repository.locked(session, deployment_id)
            return d is not None and await change(session, d)

        if await self.db.run(work, ALL):
            self.wake()

    async def _suspend(self, session: AsyncSession, d: Deployment) -> bool:
        at = now()
        caps = await reached(session, at, d.org_id)
        if d.state != state.ACTIVE or not caps or (d.resumed_until is not None and d.resumed_until > at):
            return False
        cap = caps[0]
        repository.suspend(
            session, d,
            f"the spend cap of {exact(cap.amount)} {self.currency.upper()} {EACH[cap.period]} is reached: it is started again at "
            f"{cap.ends_at:%Y-%m-%d %H:%M} UTC, when the cap is raised, or by an operator",
        )  # fmt: skip
        d.suspended_for = BY_QUOTA
        log.warning("spend_cap.suspended", deployment_id=d.id, org=d.org_id, period=cap.period)
        return True

    async def _resume(self, session: AsyncSession, d: Deployment) -> bool:
        if d.state != state.SUSPENDED or d.suspended_for != BY_QUOTA or await reached(session, now(), d.org_id):
            return False
        repository.resume(session, d, "started again: the spend cap is not reached any more")
        return True


def _not_left_alone(at: datetime) -> Any:
    return or_(Deployment.resumed_until.is_(None), Deployment.resumed_until <= at)
