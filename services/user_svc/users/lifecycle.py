"""Deleting, bringing back and switching off users, with what other services must learn of it."""

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.user.v1.change_service_pb2 import ChangeKind
from services.kit.call import Call
from services.kit.columns import now
from services.kit.errors import AlreadyExists, InvalidState
from services.user_svc.changes.repository import record
from services.user_svc.organizations import heirs
from services.user_svc.organizations.models import Membership
from services.user_svc.sessions import repository as sessions
from services.user_svc.users import repository


async def delete(session: AsyncSession, row: repository.UserRow, call: Call) -> bool:
    """Marks a user as deleted; False when that was so before. The deployments of the personal organization will be closed; shared
    organizations pass to their heirs (organizations/heirs.py)."""
    user, organization = row
    if user.deleted_at is not None:
        return False
    news = await heirs.leave_all(session, call, user)
    user.deleted_at = organization.deleted_at = now()
    await session.flush()
    await record(session, ChangeKind.CHANGE_KIND_USER_DELETED, organization.id, user.id)
    await record(session, ChangeKind.CHANGE_KIND_ORGANIZATION_DELETED, organization.id, organization.id)
    for kind, org_id, subject in news:
        await record(session, kind, org_id, subject)
    # Who is brought back signs in anew.
    await sessions.revoke_all(session, user.id, organization.id)
    return True


async def undelete(session: AsyncSession, row: repository.UserRow) -> None:
    """Brings a user back; AlreadyExists when someone else has the e-mail address by now."""
    user, organization = row
    if user.deleted_at is None:
        raise InvalidState("the user is not deleted", state="not deleted")
    if await repository.find(session, email=user.email):
        raise AlreadyExists("email")
    user.deleted_at = organization.deleted_at = None
    await session.flush()
    await record(session, ChangeKind.CHANGE_KIND_USER_ACCESS, organization.id, user.id)


async def announce_access(session: AsyncSession, user_id: str) -> None:
    """Tells that a user's credentials hold or no longer hold, for each organization in which they act."""
    await session.flush()
    organizations = (await session.scalars(select(Membership.org_id).where(Membership.user_id == user_id))).all()
    for org_id in sorted(organizations):
        await record(session, ChangeKind.CHANGE_KIND_USER_ACCESS, org_id, user_id)
