"""MemberService: who belongs to an organization, as what, and who owns it."""

from typing import Any, cast

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.user.v1 import member_pb2, member_service_pb2, member_service_pb2_grpc
from clawplane.user.v1.change_service_pb2 import ChangeKind
from clawplane.user.v1.organization_pb2 import Role
from services.kit.call import Call
from services.kit.errors import InvalidState, NotFound
from services.kit.paging import page
from services.kit.proto import to_proto
from services.user_svc.changes.repository import record
from services.user_svc.members.rules import check_grant, check_touch
from services.user_svc.organizations import repository
from services.user_svc.organizations.models import ROLE, Membership
from services.user_svc.sessions.service import person_of
from services.user_svc.settings import UserSettings
from services.user_svc.users import repository as users
from services.user_svc.users.models import User

MemberRow = tuple[Membership, User]


class MemberService(member_service_pb2_grpc.MemberServiceServicer):
    """See proto/clawplane/user/v1/member_service.proto."""

    def __init__(self, settings: UserSettings) -> None:
        self.settings = settings

    async def ListMembers(
        self, request: member_service_pb2.ListMembersRequest, call: Call
    ) -> member_service_pb2.ListMembersResponse:
        statement = select(Membership).where(Membership.org_id == call.org_id)
        async with call.read() as session:
            rows, token = await page(session, statement, Membership.id, request, descending=False)
            found = (await session.scalars(select(User).where(User.id.in_([row.user_id for row in rows])))).all()
        people = {user.id: user for user in found}
        messages = [to_message((row, people[row.user_id])) for row in rows]
        return member_service_pb2.ListMembersResponse(members=messages, next_page_token=token)

    async def UpdateMember(self, request: member_service_pb2.UpdateMemberRequest, call: Call) -> member_pb2.Member:
        async def work(session: AsyncSession) -> MemberRow:
            organization, own = await repository.standing(session, call)
            row = await _member(session, organization.id, request.user_id)
            before = row.role
            check_touch(own.role, before, is_self=row.id == own.id)
            check_grant(own.role, request.role)
            row.role = request.role
            call.audit(row.user_id, before={"role": ROLE.words[before]}, after={"role": ROLE.words[request.role]})
            user = await session.get_one(User, row.user_id)
            await session.flush()
            if before != row.role:
                await record(session, ChangeKind.CHANGE_KIND_MEMBERSHIP, organization.id, row.user_id)
            return row, user

        return to_message(await call.run(work))

    async def RemoveMember(
        self, request: member_service_pb2.RemoveMemberRequest, call: Call
    ) -> member_service_pb2.RemoveMemberResponse:
        await self._take_out(call, request.user_id)
        return member_service_pb2.RemoveMemberResponse()

    async def LeaveOrganization(
        self, request: member_service_pb2.LeaveOrganizationRequest, call: Call
    ) -> member_service_pb2.LeaveOrganizationResponse:
        await self._take_out(call, person_of(call))
        return member_service_pb2.LeaveOrganizationResponse()

    async def _take_out(self, call: Call, user_id: str) -> None:
        async def work(session: AsyncSession) -> None:
            organization, own = await repository.standing(session, call)
            row = await _member(session, organization.id, user_id)
            check_touch(own.role, row.role, is_self=row.id == own.id)
            call.audit(user_id, before={"role": ROLE.words[row.role]})
            await session.delete(row)
            await session.flush()
            await record(session, ChangeKind.CHANGE_KIND_MEMBERSHIP, organization.id, user_id)

        await call.run(work)

    async def TransferOwnership(self, request: member_service_pb2.TransferOwnershipRequest, call: Call) -> member_pb2.Member:
        async def work(session: AsyncSession) -> MemberRow:
            await _member(session, call.org_id, request.user_id)
            found = await users.lock(session, request.user_id)
            organization, own = await repository.standing(session, call)
            row = await _member(session, organization.id, request.user_id)
            if organization.is_personal:
                raise InvalidState("a personal organization stays its user's", state="personal")
            if row.id == own.id:
                raise InvalidState("you own the organization already", state="owner")
            if found is None or not found[0].is_active:
                raise InvalidState("the member is switched off", state="inactive")
            await repository.check_room(session, row.user_id, self.settings.organizations_per_user)
            # First the one, then the other: at no moment two owners, which the index would refuse.
            own.role = Role.ROLE_ADMIN
            await session.flush()
            row.role = Role.ROLE_OWNER
            call.audit(organization.id, before={"owner": own.user_id}, after={"owner": row.user_id})
            await session.flush()
            for user_id in (own.user_id, row.user_id):
                await record(session, ChangeKind.CHANGE_KIND_MEMBERSHIP, organization.id, user_id)
            return row, found[0]

        return to_message(await call.run(work))


async def _member(session: AsyncSession, org_id: str, user_id: str) -> Membership:
    row = await repository.member(session, org_id, user_id)
    if row is None:
        raise NotFound("member")
    return row


def to_message(row: MemberRow) -> member_pb2.Member:
    """The member as others see him."""
    membership, user = row
    message = to_proto(membership, member_pb2.Member)
    message.email, message.full_name, message.role = user.email, user.full_name, cast("Any", membership.role)
    message.joined_at.FromDatetime(membership.created_at)
    return message
