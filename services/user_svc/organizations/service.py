"""OrganizationService: making, renaming, deleting and bringing back organizations."""

from datetime import timedelta
from typing import Any, cast

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.user.v1 import organization_pb2, organization_service_pb2, organization_service_pb2_grpc
from clawplane.user.v1.change_service_pb2 import ChangeKind
from clawplane.user.v1.organization_pb2 import Role
from services.kit import ids
from services.kit.call import Call
from services.kit.columns import now
from services.kit.db import ALL
from services.kit.errors import Conflict, InvalidArgument, InvalidState, NotFound
from services.kit.paging import page
from services.kit.proto import assign, to_proto
from services.user_svc.changes.repository import record
from services.user_svc.organizations import repository
from services.user_svc.organizations.models import Membership, Organization
from services.user_svc.sessions.service import person_of
from services.user_svc.settings import UserSettings
from services.user_svc.users import repository as users

UNDELETE_WITHIN = timedelta(days=30)


class OrganizationService(organization_service_pb2_grpc.OrganizationServiceServicer):
    """See proto/clawplane/user/v1/organization_service.proto."""

    def __init__(self, settings: UserSettings) -> None:
        self.settings = settings

    async def CreateOrganization(
        self, request: organization_service_pb2.CreateOrganizationRequest, call: Call
    ) -> organization_pb2.Organization:
        user_id = person_of(call)

        async def work(session: AsyncSession) -> Organization:
            await self._check_room(session, user_id)
            row = Organization(id=ids.new("org"), tier=self.settings.default_tier, is_personal=False)
            row.name = _name(request.organization.name)
            session.add(row)
            await session.flush()
            session.add(Membership(org_id=row.id, user_id=user_id, role=Role.ROLE_OWNER))
            await session.flush()
            call.audit(row.id, org_id=row.id, after={"name": row.name})
            return row

        return to_message(await call.run(work, ALL), Role.ROLE_OWNER)

    async def GetOrganization(
        self, request: organization_service_pb2.GetOrganizationRequest, call: Call
    ) -> organization_pb2.Organization:
        if not call.sees(request.id):
            raise NotFound("organization")
        async with call.read() as session:
            row = await repository.find(session, request.id)
            own = await repository.member(session, request.id, call.caller.user_id) if call.caller.user_id else None
        if row is None:
            raise NotFound("organization")
        return to_message(row, own.role if own else 0)

    async def ListOrganizations(
        self, request: organization_service_pb2.ListOrganizationsRequest, call: Call
    ) -> organization_service_pb2.ListOrganizationsResponse:
        mine = select(Membership.org_id).where(Membership.user_id == person_of(call))
        statement = select(Organization).where(Organization.id.in_(mine), Organization.deleted_at.is_(None))
        if request.show_deleted:
            owned = mine.where(Membership.role == Role.ROLE_OWNER)
            statement = select(Organization).where(
                (Organization.id.in_(mine) & Organization.deleted_at.is_(None)) | Organization.id.in_(owned)
            )
        async with call.read() as session:
            rows, token = await page(session, statement, Organization.id, request)
            memberships = select(Membership).where(
                Membership.user_id == call.caller.user_id, Membership.org_id.in_([row.id for row in rows])
            )
            roles = {row.org_id: row.role for row in (await session.scalars(memberships)).all()}
        messages = [to_message(row, roles.get(row.id, 0)) for row in rows]
        return organization_service_pb2.ListOrganizationsResponse(organizations=messages, next_page_token=token)

    async def UpdateOrganization(
        self, request: organization_service_pb2.UpdateOrganizationRequest, call: Call
    ) -> organization_pb2.Organization:
        wish = request.organization

        async def work(session: AsyncSession) -> tuple[Organization, int]:
            row, own = await self._own(session, call, wish.id)
            if wish.etag and wish.etag != str(row.version):
                raise Conflict("the organization was changed by someone else; read it again and repeat")
            before = row.name
            written = assign(row, wish, request.update_mask)
            row.name = _name(row.name)
            call.audit(row.id, before={"name": before}, after={"name": row.name} if written else None)
            await session.flush()
            return row, own.role

        return to_message(*await call.run(work))

    async def DeleteOrganization(
        self, request: organization_service_pb2.DeleteOrganizationRequest, call: Call
    ) -> organization_pb2.Organization:
        async def work(session: AsyncSession) -> tuple[Organization, int]:
            row, own = await self._own(session, call, request.id)
            if row.is_personal:
                raise InvalidState("a personal organization is deleted together with its user", state="personal")
            row.deleted_at = now()
            call.audit(row.id, before={"name": row.name})
            await session.flush()
            await record(session, ChangeKind.CHANGE_KIND_ORGANIZATION_DELETED, row.id, row.id)
            return row, own.role

        return to_message(*await call.run(work))

    async def UndeleteOrganization(
        self, request: organization_service_pb2.UndeleteOrganizationRequest, call: Call
    ) -> organization_pb2.Organization:
        user_id = person_of(call)

        async def work(session: AsyncSession) -> Organization:
            if await users.lock(session, user_id) is None:
                raise NotFound("organization")
            row = await repository.lock(session, request.id, with_deleted=True)
            own = await repository.member(session, request.id, user_id)
            if row is None or own is None or own.role != Role.ROLE_OWNER:
                raise NotFound("organization")
            if row.is_personal:
                raise InvalidState("a personal organization comes back together with its user", state="personal")
            if row.deleted_at is None:
                raise InvalidState("the organization is not deleted", state="not deleted")
            if row.deleted_at < now() - UNDELETE_WITHIN:
                raise InvalidState(f"the organization was deleted more than {UNDELETE_WITHIN.days} days ago", state="deleted")
            await repository.check_room(session, user_id, self.settings.organizations_per_user)
            row.deleted_at = None
            call.audit(row.id, org_id=row.id, after={"name": row.name})
            await session.flush()
            await record(session, ChangeKind.CHANGE_KIND_MEMBERSHIP, row.id, user_id)
            return row

        return to_message(await call.run(work, ALL), Role.ROLE_OWNER)

    async def _check_room(self, session: AsyncSession, user_id: str) -> None:
        if await users.lock(session, user_id) is None:
            raise NotFound("user")
        await repository.check_room(session, user_id, self.settings.organizations_per_user)

    @staticmethod
    async def _own(session: AsyncSession, call: Call, org_id: str) -> tuple[Organization, Membership]:
        """The call's organization, when it is the one that the request names."""
        if org_id != call.org_id:
            raise NotFound("organization")
        return await repository.standing(session, call)


def _name(name: str) -> str:
    shown = name.strip()
    if not shown:
        raise InvalidArgument("organization.name", "must not be blank")
    return shown


def to_message(row: Organization, role: int) -> organization_pb2.Organization:
    """The organization as a caller with this role sees it; 0 for one without."""
    message = to_proto(row, organization_pb2.Organization)
    message.my_role = cast("Any", role)
    return message
