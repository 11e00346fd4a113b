"""Finds orders that came to be late: a market may carry out what it was asked long after we stopped waiting for its answer."""

import asyncio
from datetime import timedelta

import structlog
from sqlalchemy import select

from services.deployment_svc.deployments import repository, state
from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.markets.driver import Driver
from services.deployment_svc.settings import DeploymentSettings
from services.kit.columns import now
from services.kit.db import ALL, Database

log = structlog.get_logger()
_PAGE = 500
_SETTLED = (state.ACTIVE, state.SUSPENDED, state.FAILED, state.CLOSED)
"""Nothing is being ordered in these, so what carries the name and is not the current order is nobody's."""
_LOOKED_AT = timedelta(days=1)
"""Ended deployments are looked at for so long."""


def name_of(deployment_id: str) -> str:
    """What carries a deployment's name at a market."""
    return f"clawplane-{deployment_id}"


class Orphans:
    """Ticks of the loop that closes them. The market is asked for its list once for all deployments."""

    def __init__(self, db: Database, settings: DeploymentSettings, driver: Driver) -> None:
        self.db, self.settings, self.driver = db, settings, driver

    async def tick(self) -> bool:
        """Looks at every deployment once."""
        last = ""
        while True:
            recent = (Deployment.state == state.ACTIVE) | (Deployment.updated_at > now() - _LOOKED_AT)
            settled = (Deployment.state.in_(_SETTLED), Deployment.payment_id.is_not(None), recent)
            statement = select(Deployment.id, Deployment.akash_deployment_id).where(*settled)
            if last:
                statement = statement.where(Deployment.id > last)
            async with self.db.read(ALL) as session:
                page = (await session.execute(statement.order_by(Deployment.id).limit(_PAGE))).all()
            await asyncio.gather(*(self._look(deployment_id, order_id) for deployment_id, order_id in page))
            if len(page) < _PAGE:
                return False
            last = page[-1][0]

    async def _look(self, deployment_id: str, known: str | None) -> None:
        found = await asyncio.wait_for(self.driver.find(name_of(deployment_id)), self.settings.step_timeout_s)
        if not set(found) - {known}:
            return
        # It may have been ordered anew since the page was read.
        async with self.db.read(ALL) as session:
            d = await session.get(Deployment, deployment_id)
        if d is None or d.state not in _SETTLED or d.undoing:
            return
        for order_id in found:
            if order_id == d.akash_deployment_id:
                continue
            await asyncio.wait_for(self.driver.close(order_id), self.settings.step_timeout_s)
            log.warning("order.late", deployment_id=d.id, order=order_id)
            async with self.db.transaction(ALL) as session:
                repository.note(session, d, "order.closed", f"order {order_id} came to be too late and was closed")
