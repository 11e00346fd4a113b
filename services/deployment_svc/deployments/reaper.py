"""Finds deployments that nothing moves any more: a lost due time, a wish whose page was never made, a bring-up without an end."""

from collections.abc import Callable
from datetime import timedelta

import structlog
from sqlalchemy import ColumnElement, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from services.deployment_svc.deployments import repository, state
from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.settings import DeploymentSettings
from services.kit.columns import now
from services.kit.db import ALL, Database

log = structlog.get_logger()
_PAGE = 100
Where = tuple[ColumnElement[bool], ...]


class Reaper:
    """Ticks of the loop that looks for them. None happens in silence: an end is an event of the deployment, a waking stands in the log."""

    def __init__(self, db: Database, settings: DeploymentSettings) -> None:
        self.db, self.settings = db, settings

    async def tick(self) -> bool:
        """True when there may be more."""
        woken = await self.db.run(self._wake_forgotten, ALL)
        if woken:
            log.warning("reaper.woken", deployments=woken)
        never_paged = (
            Deployment.state == state.PENDING, Deployment.link_number == 0,
            Deployment.created_at < now() - timedelta(seconds=self.settings.checkout_ttl_s),
        )  # fmt: skip
        endless = (
            Deployment.state == state.DEPLOYING, Deployment.undoing.is_(False),
            Deployment.attempting_since < now() - timedelta(seconds=self.settings.stuck_after_s),
        )  # fmt: skip
        found = [await self._end_all(never_paged, self._expire), await self._end_all(endless, self._give_up)]
        return max(found) == _PAGE

    async def _end_all(self, where: Where, end: Callable[[AsyncSession, Deployment], None]) -> int:
        async with self.db.read(ALL) as session:
            found = (await session.scalars(select(Deployment.id).where(*where).limit(_PAGE))).all()
        for deployment_id in found:

            async def work(session: AsyncSession, deployment_id: str = deployment_id) -> None:
                d = await repository.locked(session, deployment_id)
                # Somebody may have moved it since we looked.
                if d is not None and await session.scalar(select(Deployment.id).where(Deployment.id == d.id, *where)):
                    end(session, d)

            await self.db.run(work, ALL)
        return len(found)

    async def _wake_forgotten(self, session: AsyncSession) -> list[str]:
        at_work = or_(Deployment.state.in_([state.DEPLOYING, state.ACTIVE, state.CLOSING]), Deployment.undoing.is_(True))
        statement = (
            update(Deployment)
            .where(Deployment.due_at.is_(None), Deployment.lease_until.is_(None), at_work)
            .values(due_at=now(), updated_at=Deployment.updated_at)
            .returning(Deployment.id)
            .execution_options(synchronize_session=False)
        )
        return list((await session.scalars(statement)).all())

    def _expire(self, session: AsyncSession, d: Deployment) -> None:
        repository.move(session, d, state.EXPIRED, "no payment page could be made for it")

    def _give_up(self, session: AsyncSession, d: Deployment) -> None:
        hours = self.settings.stuck_after_s / 3600
        d.error_message = f"not brought up within {hours:g} hours" + (f": {d.error_message}" if d.error_message else "")
        d.undoing = d.order_intended
        repository.move(session, d, state.FAILED, d.error_message)
