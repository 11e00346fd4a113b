"""Queries on deployments, and the one way to move one from state to state."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

import structlog
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.deployment.v1 import deployment_pb2
from clawplane.deployment.v1.deployment_pb2 import State
from services.deployment_svc.deployments.models import Deployment, DeploymentEvent
from services.deployment_svc.deployments.state import COUNTED, DEPLOYING, PENDING, SUSPENDED, TRANSITIONS, begin_anew
from services.kit.call import Call
from services.kit.coalesce import Loader
from services.kit.columns import now
from services.kit.db import Database, alone
from services.kit.errors import InvalidState, NotFound
from services.kit.proto import columns_for
from services.kit.rows import by_key

log = structlog.get_logger()


async def locked(session: AsyncSession, deployment_id: str) -> Deployment | None:
    """The row, locked until the transaction ends, as it is now."""
    return await session.get(Deployment, deployment_id, with_for_update=True, populate_existing=True)


def visible(d: Deployment | None, call: Call) -> Deployment:
    """The deployment, if the caller may know of it: a deleted one is there for services and operators only. NotFound otherwise."""
    if d is None or not call.sees(d.org_id) or (d.deleted_at is not None and not call.caller.is_platform):
        raise NotFound("deployment")
    return d


def loader(db: Database) -> Loader[Any]:
    """Deployments by id, of all organizations."""
    return Loader(by_key(db, select(*columns_for(Deployment, deployment_pb2.Deployment)), Deployment.id))


async def lock_organization(session: AsyncSession, org_id: str) -> None:
    """Lets one transaction at a time count and add an organization's deployments."""
    await alone(session, f"deployments of {org_id}")


async def deploying(session: AsyncSession, org_id: str) -> tuple[int, int]:
    """How many orders are being brought up for an organization, and in all. Until the transaction ends, no other one counts."""
    await alone(session, "deploying")
    mine = func.count().filter(Deployment.org_id == org_id)
    statement = select(mine, func.count()).where(Deployment.state == DEPLOYING, Deployment.order_intended.is_(True))
    in_org, in_all = (await session.execute(statement)).one()
    return in_org, in_all


async def pending_wish(session: AsyncSession, fingerprints: Iterable[bytes]) -> Deployment | None:
    """The organization's open wish with this fingerprint, whatever key it is under."""
    return await session.scalar(select(Deployment).where(Deployment.fingerprint.in_(list(fingerprints)), Deployment.state == PENDING))


async def count_live(session: AsyncSession) -> int:
    """How many of the organization's deployments count against its limit."""
    return await session.scalar(select(func.count()).select_from(Deployment).where(Deployment.state.in_(COUNTED))) or 0


async def count_by_state(session: AsyncSession) -> dict[int, int]:
    """How many deployments are in each state, the deleted ones left out."""
    statement = select(Deployment.state, func.count()).where(Deployment.deleted_at.is_(None)).group_by(Deployment.state)
    return {row[0]: row[1] for row in await session.execute(statement)}


def state_name(state: int) -> str:
    """The short name of a state: "PENDING"."""
    return State.Name(state).removeprefix("STATE_")  # type: ignore[arg-type]


def note(session: AsyncSession, d: Deployment, kind: str, message: str) -> None:
    """Writes down that something happened. The message is shown to the owner and must hold no secret."""
    log.info("deployment", deployment_id=d.id, org=d.org_id, kind=kind, state=state_name(d.state), message=message)
    session.add(DeploymentEvent(org_id=d.org_id, deployment_id=d.id, kind=kind, state=d.state, message=message[:2000]))


def restart(session: AsyncSession, d: Deployment, why: str) -> None:
    """Another wish for what runs, or is being brought up: the old start is undone, and the next one follows the row as it is then."""
    d.generation += 1
    d.undoing = d.undoing or d.order_intended
    begin_anew(d)
    if d.state == DEPLOYING:
        d.due_at = now()
        note(session, d, "restart", why)
    else:
        move(session, d, DEPLOYING, why)


def suspend(session: AsyncSession, d: Deployment, why: str) -> None:
    """Takes down what runs, and keeps the wish."""
    move(session, d, SUSPENDED, why)
    d.error_message, d.undoing = why, d.order_intended


def resume(session: AsyncSession, d: Deployment, why: str) -> None:
    """Brings it up anew, once what is being taken down is gone."""
    begin_anew(d)
    d.generation += 1
    move(session, d, DEPLOYING, why)
    d.error_message = ""


def move(session: AsyncSession, d: Deployment, to: int, message: str, *, due_at: datetime | None = None) -> None:
    """Moves a deployment along the table of transitions and writes the event; InvalidState for any other way.

    The reconcile loop looks at it at once, unless ``due_at`` says later.
    """
    if to not in TRANSITIONS[d.state]:
        raise InvalidState(f"a deployment that is {state_name(d.state)} cannot become {state_name(to)}", state=state_name(d.state))
    d.state = to
    d.due_at = due_at or now()
    d.payment_url, d.payment_expires_at, d.suspended_for = "", None, ""
    note(session, d, f"state.{state_name(to).lower()}", message)
