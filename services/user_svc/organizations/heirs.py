"""What becomes of organizations when a user goes: an organization is never without an owner."""

from sqlalchemy import exists, select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.errors.v1.errors_pb2 import ErrorReason
from clawplane.user.v1.change_service_pb2 import ChangeKind
from clawplane.user.v1.organization_pb2 import Role
from services.kit.call import Call
from services.kit.columns import now
from services.kit.errors import InvalidState
from services.user_svc.organizations import repository
from services.user_svc.organizations.models import ROLE, Membership, Organization
from services.user_svc.users.models import User

News = list[tuple[int, str, str]]
"""Changes to record last: (kind, organization, subject)."""


async def check_handed_over(session: AsyncSession, user: User) -> None:
    """InvalidState (OWNER_REQUIRED) while a user owns an organization that has other members; its id and name are in the metadata.

    For whoever deletes himself, in the transaction that does. The user must be locked; the organizations are from here on, so that
    nobody joins one meanwhile.
    """
    for organization in await _locked(session, user, owned=True):
        own = await repository.member(session, organization.id, user.id)
        if own is None or own.role != Role.ROLE_OWNER:
            continue  # Handed over while we waited for the lock.
        others = exists().where(Membership.org_id == organization.id, Membership.user_id != user.id)
        if await session.scalar(select(others)):
            first = "remove its members" if organization.is_personal else "hand it over"
            raise InvalidState(
                f"the organization {organization.name} has other members: {first} first",
                reason=ErrorReason.ERROR_REASON_OWNER_REQUIRED, org_id=organization.id, organization=organization.name,
            )  # fmt: skip


async def leave_all(session: AsyncSession, call: Call, user: User) -> News:
    """Takes a user, who must be locked, out of every organization but the personal one, which goes with him.

    What he owns passes to the longest-standing admin who can act; without one it is deleted, and keeps him as its owner, in case both
    come back. Each organization's own log says so. Returns what is left to record.
    """
    news: News = []
    for organization in await _locked(session, user):
        own = await repository.member(session, organization.id, user.id)
        if own is None or organization.id == user.personal_org_id:
            continue
        heir = await _heir(session, organization.id, user.id) if own.role == Role.ROLE_OWNER else None
        if own.role == Role.ROLE_OWNER and heir is None:
            organization.deleted_at = now()
            news.append((ChangeKind.CHANGE_KIND_ORGANIZATION_DELETED, organization.id, organization.id))
            why = {"deleted": "its owner was deleted, and no admin could follow"}
            call.audit_elsewhere(organization.id, organization.id, after=why)
            continue
        after: dict[str, object] = {"left": user.id}
        await session.delete(own)
        await session.flush()
        if heir is not None:
            heir.role = Role.ROLE_OWNER
            news.append((ChangeKind.CHANGE_KIND_MEMBERSHIP, organization.id, heir.user_id))
            after["owner"] = heir.user_id
        news.append((ChangeKind.CHANGE_KIND_MEMBERSHIP, organization.id, user.id))
        call.audit_elsewhere(organization.id, organization.id, before={"role": ROLE.words[own.role]}, after=after)
    await session.flush()
    return news


async def _locked(session: AsyncSession, user: User, *, owned: bool = False) -> list[Organization]:
    """The organizations of a user that are not deleted, in an order that everybody locks them in."""
    statement = select(Membership.org_id).where(Membership.user_id == user.id).order_by(Membership.org_id)
    if owned:
        statement = statement.where(Membership.role == Role.ROLE_OWNER)
    found = [await repository.lock(session, org_id) for org_id in (await session.scalars(statement)).all()]
    return [organization for organization in found if organization is not None]


async def _heir(session: AsyncSession, org_id: str, but: str) -> Membership | None:
    statement = (
        select(Membership)
        .join(User, User.id == Membership.user_id)
        .where(Membership.org_id == org_id, Membership.role == Role.ROLE_ADMIN, Membership.user_id != but)
        .where(User.is_active, User.deleted_at.is_(None))
        .order_by(Membership.created_at, Membership.id)
        .limit(1)
        .execution_options(populate_existing=True)
    )
    return await session.scalar(statement)
