"""The order of events: within an organization, an event with a greater id was committed later, whichever process wrote it."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from sqlalchemy import event, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from services.deployment_svc.deployments import repository
from services.deployment_svc.deployments.models import Deployment, DeploymentEvent
from services.kit import ids
from services.kit.call import Call
from services.kit.db import ScopedSession, alone_sync
from services.kit.errors import NotFound

_PAGE = 200
Happened = tuple[DeploymentEvent | None, Deployment]
"""An event, and the deployment as it is now; no event says only how things stand."""


@event.listens_for(ScopedSession, "before_flush")
def _number(session: Session, context: Any, instances: Any) -> None:
    """Gives new events their ids under a lock that lasts until the commit: a watcher that has seen one has seen all before it."""
    last: dict[str, str] = {}
    for row in session.new:
        if not isinstance(row, DeploymentEvent):
            continue
        if row.org_id not in last:
            with session.no_autoflush:
                alone_sync(session, f"events of {row.org_id}")
                last[row.org_id] = session.scalar(_newest(row.org_id)) or ""
        row.id = last[row.org_id] = ids.new_after("devt", last[row.org_id])


def _newest(org_id: str) -> Any:
    return select(DeploymentEvent.id).where(DeploymentEvent.org_id == org_id).order_by(DeploymentEvent.id.desc()).limit(1)


async def watch(call: Call, poll_s: float, *, deployment_id: str = "", after: str = "") -> AsyncIterator[Happened]:
    """What happens to a deployment, or to all of the organization, after an event; NotFound when it is none of the caller's."""
    async with call.read() as session:
        d = await session.get(Deployment, deployment_id) if deployment_id else None
        org_id = repository.visible(d, call).org_id if deployment_id else call.org_id
        if after:
            known = await session.get(DeploymentEvent, after)
            if known is None or known.org_id != org_id:
                raise NotFound("deployment event")
        else:
            after = await session.scalar(_newest(org_id)) or ids.lowest("devt")
            if d is not None:
                await session.refresh(d)
    if d is not None:
        yield None, d
    async for _ in call.ticks(poll_s):
        more = True
        while more:
            async with call.read() as session:
                rows, deployments = await _after(session, org_id, deployment_id, after)
            for row in rows:
                after = row.id
                yield row, deployments[row.deployment_id]
            more = len(rows) == _PAGE


async def _after(
    session: AsyncSession, org_id: str, deployment_id: str, after: str
) -> tuple[Sequence[DeploymentEvent], dict[str, Deployment]]:
    statement = select(DeploymentEvent).where(DeploymentEvent.org_id == org_id, DeploymentEvent.id > after)
    if deployment_id:
        statement = statement.where(DeploymentEvent.deployment_id == deployment_id)
    rows = (await session.scalars(statement.order_by(DeploymentEvent.id).limit(_PAGE))).all()
    if not rows:
        return rows, {}
    found = await session.scalars(select(Deployment).where(Deployment.id.in_({row.deployment_id for row in rows})))
    return rows, {d.id: d for d in found}
