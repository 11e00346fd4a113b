"""Queries on organizations and their members. Who changes members locks their organization first, so that such changes queue."""

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.errors.v1.errors_pb2 import ErrorReason
from clawplane.user.v1.organization_pb2 import Role
from services.kit.call import Call
from services.kit.errors import Exhausted, NotFound, PermissionDenied
from services.user_svc.organizations.models import Membership, Organization
from services.user_svc.organizations.roles import PERMISSIONS


async def find(session: AsyncSession, org_id: str) -> Organization | None:
    """The organization, unless it is deleted."""
    return await session.scalar(select(Organization).where(Organization.id == org_id, Organization.deleted_at.is_(None)))


async def lock(session: AsyncSession, org_id: str, *, with_deleted: bool = False) -> Organization | None:
    """The organization as it is now, locked until the transaction ends. A user is locked before, never after."""
    row = await session.get(Organization, org_id, with_for_update=True, populate_existing=True)
    return row if row is not None and (with_deleted or row.deleted_at is None) else None


async def member(session: AsyncSession, org_id: str, user_id: str) -> Membership | None:
    """The membership of a user as it is now."""
    statement = select(Membership).where(Membership.org_id == org_id, Membership.user_id == user_id)
    return await session.scalar(statement.execution_options(populate_existing=True))


async def standing(session: AsyncSession, call: Call) -> tuple[Organization, Membership]:
    """The call's organization, locked, and the caller's membership as it is now.

    What the caller might do a moment ago is not asked: PermissionDenied when his role has shrunk since, or he has none of his own.
    """
    organization = await lock(session, call.org_id)
    if organization is None:
        raise NotFound("organization")
    own = await member(session, organization.id, call.caller.user_id) if call.caller.user_id else None
    if own is None or call.plan.permission not in PERMISSIONS[own.role]:
        raise PermissionDenied(call.plan.permission)
    return organization, own


async def check_room(session: AsyncSession, user_id: str, limit: int) -> None:
    """Exhausted when a user owns as many organizations as one may, beside the personal one. The user must be locked."""
    statement = (
        select(func.count())
        .select_from(Membership)
        .join(Organization, Organization.id == Membership.org_id)
        .where(Membership.user_id == user_id, Membership.role == Role.ROLE_OWNER)
        .where(Organization.deleted_at.is_(None), ~Organization.is_personal)
    )
    if (await session.scalar(statement) or 0) >= limit:
        raise Exhausted(
            f"a user owns at most {limit} organizations: hand one over or delete one first",
            reason=ErrorReason.ERROR_REASON_LIMIT_REACHED, limit=limit,
        )  # fmt: skip
