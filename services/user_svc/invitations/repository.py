"""Making and finding invitations."""

from datetime import timedelta

from sqlalchemy import exists, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.user.v1.invitation_pb2 import InvitationState
from services.kit import keys
from services.kit.columns import now
from services.user_svc.invitations import rules
from services.user_svc.invitations.models import Invitation
from services.user_svc.organizations import repository as organizations
from services.user_svc.organizations.models import Membership, Organization
from services.user_svc.users.models import User

PREFIX, ID_PREFIX = "invt", "inv"
LIFETIME = timedelta(days=7)
_OPEN = InvitationState.INVITATION_STATE_OPEN


def issue(row: Invitation, lifetime: timedelta, environment: str) -> str:
    """Gives an invitation a token, which exists nowhere else, and so much time from now; the token before is dead."""
    key = keys.mint(PREFIX, environment, ID_PREFIX)
    row.digest, row.sent_at = key.sha256(), now()
    row.expires_at = row.sent_at + lifetime
    return key.text


async def has_member(session: AsyncSession, org_id: str, email: str) -> bool:
    """Whether a member has the address."""
    mine = exists().where(Membership.org_id == org_id, Membership.user_id == User.id, User.email == email, User.deleted_at.is_(None))
    return bool(await session.scalar(select(mine)))


async def open_to(session: AsyncSession, email: str) -> Invitation | None:
    """The tenant's invitation to an address that nobody has answered, also an expired one."""
    return await session.scalar(select(Invitation).where(Invitation.email == email, Invitation.state == _OPEN))


async def count_open(session: AsyncSession) -> int:
    """How many of the tenant's invitations wait for an answer."""
    statement = select(func.count()).select_from(Invitation).where(Invitation.state == _OPEN, Invitation.expires_at > now())
    return await session.scalar(statement) or 0


async def lock(session: AsyncSession, invitation_id: str) -> Invitation | None:
    """The tenant's invitation as it is now, locked until the transaction ends. Its organization is locked before."""
    statement = select(Invitation).where(Invitation.id == invitation_id).with_for_update().execution_options(populate_existing=True)
    return await session.scalar(statement)


async def answerable(
    session: AsyncSession, token: str, email: str, *, for_update: bool
) -> tuple[Invitation, Organization, User] | None:
    """The open invitation of a token that was sent to an address, its organization and who invites, all of them such that it may be
    accepted now; with ``for_update`` both are locked. Needs a session that sees every organization."""
    key = keys.parse(token, PREFIX, ID_PREFIX)
    if key is None:
        return None
    found = await session.scalar(select(Invitation).where(Invitation.digest == key.sha256()))
    if found is None or found.email != email:
        return None
    if for_update:
        organization = await organizations.lock(session, found.org_id)
        # While we waited, it may have been answered, or sent again with another token.
        found = await lock(session, found.id)
    else:
        organization = await organizations.find(session, found.org_id)
    if organization is None or found is None or not key.is_hashed_as(found.digest) or rules.state_of(found, now()) != _OPEN:
        return None
    inviter = await session.get_one(User, found.invited_by)
    own = await organizations.member(session, organization.id, inviter.id)
    acts = own is not None and inviter.is_active and inviter.deleted_at is None
    if own is None or not acts or not rules.still_stands(own.role, found.role):
        return None
    return found, organization, inviter
