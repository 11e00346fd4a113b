"""InvitationService: the way into an organization."""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, cast

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.errors.v1.errors_pb2 import ErrorReason
from clawplane.user.v1 import invitation_pb2, invitation_service_pb2, invitation_service_pb2_grpc, organization_pb2
from clawplane.user.v1.change_service_pb2 import ChangeKind
from clawplane.user.v1.invitation_pb2 import InvitationState
from services.kit.call import Call
from services.kit.columns import now
from services.kit.db import ALL
from services.kit.errors import AlreadyExists, Exhausted, InvalidState, NotFound
from services.kit.paging import page
from services.kit.proto import to_proto
from services.kit.secrets import SecretBox
from services.user_svc.changes.repository import record
from services.user_svc.invitations import repository, rules
from services.user_svc.invitations.models import STATE, Invitation
from services.user_svc.mail import repository as outbox
from services.user_svc.members.rules import check_grant
from services.user_svc.organizations import repository as organizations
from services.user_svc.organizations.models import ROLE, Membership, Organization
from services.user_svc.organizations.service import to_message as organization_message
from services.user_svc.sessions.service import person_of
from services.user_svc.settings import UserSettings
from services.user_svc.users import repository as users
from services.user_svc.users.models import User
from services.user_svc.users.rules import normal_email

Found = tuple[Invitation, Organization, User]
"""An invitation, its organization, and who invites."""
MAIL_TRIED = timedelta(days=1)
OPEN, EXPIRED = InvitationState.INVITATION_STATE_OPEN, InvitationState.INVITATION_STATE_EXPIRED
REVOKED, DECLINED = InvitationState.INVITATION_STATE_REVOKED, InvitationState.INVITATION_STATE_DECLINED


class InvitationService(invitation_service_pb2_grpc.InvitationServiceServicer):
    """See proto/clawplane/user/v1/invitation_service.proto."""

    def __init__(self, settings: UserSettings, box: SecretBox) -> None:
        self.settings, self.box = settings, box

    async def CreateInvitation(
        self, request: invitation_service_pb2.CreateInvitationRequest, call: Call
    ) -> invitation_pb2.Invitation:
        lifetime = request.expires_in.ToTimedelta() if request.HasField("expires_in") else repository.LIFETIME
        email = normal_email(request.email)

        async def work(session: AsyncSession) -> Found:
            organization, own = await organizations.standing(session, call)
            check_grant(own.role, request.role)
            await self._check_free(session, organization, email)
            if await repository.count_open(session) >= self.settings.open_invitations:
                raise Exhausted(
                    f"an organization has at most {self.settings.open_invitations} open invitations: revoke some first",
                    reason=ErrorReason.ERROR_REASON_LIMIT_REACHED, limit=self.settings.open_invitations,
                )  # fmt: skip
            row = Invitation(email=email, role=request.role)
            token = repository.issue(row, lifetime, self.settings.key_environment)
            found = await self._send(session, organization, own, row, token)
            session.add(row)
            await session.flush()
            call.audit(row.id, after={"email": email, "role": ROLE.words[row.role], "expires_at": row.expires_at.isoformat()})
            return found

        return to_message(await call.run(work))

    async def ListInvitations(
        self, request: invitation_service_pb2.ListInvitationsRequest, call: Call
    ) -> invitation_service_pb2.ListInvitationsResponse:
        statement = select(Invitation).where(Invitation.org_id == call.org_id)
        if not request.show_ended:
            statement = statement.where(Invitation.state == OPEN, Invitation.expires_at > now())
        async with call.read() as session:
            rows, token = await page(session, statement, Invitation.id, request)
            organization = await session.get_one(Organization, call.org_id)
            found = (await session.scalars(select(User).where(User.id.in_({row.invited_by for row in rows})))).all()
        people = {user.id: user for user in found}
        messages = [to_message((row, organization, people[row.invited_by])) for row in rows]
        return invitation_service_pb2.ListInvitationsResponse(invitations=messages, next_page_token=token)

    async def ResendInvitation(
        self, request: invitation_service_pb2.ResendInvitationRequest, call: Call
    ) -> invitation_pb2.Invitation:
        async def work(session: AsyncSession) -> Found:
            organization, own = await organizations.standing(session, call)
            row = await self._locked(session, request.id)
            if row.state not in (OPEN, EXPIRED):
                raise _ended(row)
            check_grant(own.role, row.role)
            await self._check_free(session, organization, row.email, but=row)
            row.state, row.ended_at = OPEN, None
            token = repository.issue(row, row.expires_at - row.sent_at, self.settings.key_environment)
            found = await self._send(session, organization, own, row, token)
            call.audit(row.id, after={"email": row.email, "expires_at": row.expires_at.isoformat()})
            await session.flush()
            return found

        return to_message(await call.run(work))

    async def RevokeInvitation(
        self, request: invitation_service_pb2.RevokeInvitationRequest, call: Call
    ) -> invitation_pb2.Invitation:
        async def work(session: AsyncSession) -> Found:
            organization, _ = await organizations.standing(session, call)
            row = await self._locked(session, request.id)
            if row.state not in (OPEN, EXPIRED, REVOKED):
                raise _ended(row)
            call.audit(row.id, before={"state": STATE.words[row.state]})
            if row.state != REVOKED:
                row.state, row.ended_at = REVOKED, now()
            await session.flush()
            return row, organization, await session.get_one(User, row.invited_by)

        return to_message(await call.run(work))

    async def LookupInvitation(
        self, request: invitation_service_pb2.LookupInvitationRequest, call: Call
    ) -> invitation_pb2.Invitation:
        async with call.kit.db.read(ALL) as session:
            user = await users.find(session, id=person_of(call))
            found = await repository.answerable(session, request.token, user[0].email, for_update=False) if user else None
        if found is None:
            raise NotFound("invitation")
        return to_message(found)

    async def AcceptInvitation(
        self, request: invitation_service_pb2.AcceptInvitationRequest, call: Call
    ) -> organization_pb2.Organization:
        async def accept(session: AsyncSession, user: User, found: Found) -> None:
            row, organization, _ = found
            if await organizations.member(session, organization.id, user.id):
                raise AlreadyExists("user", "is a member already", org_id=organization.id)
            row.state = InvitationState.INVITATION_STATE_ACCEPTED
            # The token came by mail to this address and nowhere else.
            user.email_verified_at = user.email_verified_at or now()
            session.add(Membership(org_id=organization.id, user_id=user.id, role=row.role))
            await session.flush()
            await record(session, ChangeKind.CHANGE_KIND_MEMBERSHIP, organization.id, user.id)

        row, organization, _ = await self._answer(call, request.token, accept)
        return organization_message(organization, row.role)

    async def DeclineInvitation(
        self, request: invitation_service_pb2.DeclineInvitationRequest, call: Call
    ) -> invitation_pb2.Invitation:
        async def decline(session: AsyncSession, user: User, found: Found) -> None:
            found[0].state = DECLINED

        return to_message(await self._answer(call, request.token, decline))

    async def _answer(self, call: Call, token: str, how: Callable[[AsyncSession, User, Found], Awaitable[None]]) -> Found:
        """Answers an invitation as the caller; NotFound unless it is open and his."""
        user_id = person_of(call)

        async def work(session: AsyncSession) -> Found:
            user = await users.lock(session, user_id)
            found = await repository.answerable(session, token, user[0].email, for_update=True) if user else None
            if user is None or found is None:
                raise NotFound("invitation")
            row = found[0]
            row.ended_at = now()
            call.audit(row.id, org_id=row.org_id, after={"email": row.email, "role": ROLE.words[row.role]})
            await how(session, user[0], found)
            await session.flush()
            return found

        return cast("Found", await call.run(work, ALL))

    async def _check_free(self, session: AsyncSession, organization: Organization, email: str, but: Invitation | None = None) -> None:
        """AlreadyExists when an address is a member's, or another invitation to it is open; an expired one makes room."""
        if await repository.has_member(session, organization.id, email):
            raise AlreadyExists("email", "is a member's")
        known = await repository.open_to(session, email)
        if known is None or known is but:
            return
        if rules.state_of(known, now()) == OPEN:
            raise AlreadyExists("email", "has an open invitation: ResendInvitation sends it again", invitation_id=known.id)
        known.state, known.ended_at = EXPIRED, known.expires_at
        await session.flush()

    async def _send(
        self, session: AsyncSession, organization: Organization, own: Membership, row: Invitation, token: str
    ) -> Found:
        """Puts the mail into the transaction; from now on, the caller is the one who invites."""
        outbox.check_sent(self.settings)
        inviter = await session.get_one(User, own.user_id)
        row.org_id, row.invited_by = organization.id, inviter.id
        subject, text = rules.mail(row, organization.name, _name(inviter), self.settings.public_url, token)
        await outbox.send(session, self.box, to=row.email, subject=subject, text=text, kept=min(row.expires_at - row.sent_at, MAIL_TRIED))
        return row, organization, inviter

    @staticmethod
    async def _locked(session: AsyncSession, invitation_id: str) -> Invitation:
        row = await repository.lock(session, invitation_id)
        if row is None:
            raise NotFound("invitation")
        return row


def _ended(row: Invitation) -> InvalidState:
    word = STATE.words[row.state]
    return InvalidState(f"the invitation was {word}: make a new one", state=word)


def _name(user: User) -> str:
    return user.full_name or user.username


def to_message(found: Found) -> invitation_pb2.Invitation:
    """The invitation as both sides see it: no token, and nothing of it."""
    row, organization, inviter = found
    message = to_proto(row, invitation_pb2.Invitation)
    message.organization_name, message.inviter_name = organization.name, _name(inviter)
    message.state = cast("Any", rules.state_of(row, now()))
    if message.state == EXPIRED:
        message.ended_at.FromDatetime(row.expires_at)
    return message
