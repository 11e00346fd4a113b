"""AccessService: what a person may do in an organization."""

from typing import cast

from clawplane.user.v1 import access_service_pb2, access_service_pb2_grpc
from clawplane.user.v1.organization_pb2 import Role
from services.kit.auth import Access, AccessResolver
from services.kit.call import Call
from services.kit.db import ALL, Database
from services.kit.errors import NotFound
from services.user_svc.organizations.roles import OF_EVERY_KEY, OF_PEOPLE_ALONE, PERMISSIONS
from services.user_svc.users import repository


class AccessService(access_service_pb2_grpc.AccessServiceServicer):
    """See proto/clawplane/user/v1/access_service.proto."""

    async def ResolveAccess(self, request: access_service_pb2.ResolveAccessRequest, call: Call) -> access_service_pb2.Access:
        async with call.read() as session:
            found = await repository.membership(session, request.user_id, request.org_id)
        if found is None:
            raise NotFound("membership")
        user, org_id, role = found
        return access_service_pb2.Access(
            user_id=user.id, org_id=org_id, role=cast("Role.ValueType", role), permissions=sorted(PERMISSIONS[role]), email=user.email,
            is_operator=user.is_operator,
        )  # fmt: skip

    async def WhoAmI(self, request: access_service_pb2.WhoAmIRequest, call: Call) -> access_service_pb2.Access:
        caller = call.caller
        if not caller.user_id:
            raise NotFound("user")
        async with call.read() as session:
            found = await repository.membership(session, caller.user_id, call.org_id)
        if found is None:
            raise NotFound("membership")
        return access_service_pb2.Access(
            user_id=caller.user_id, org_id=caller.org_id, role=cast("Role.ValueType", found[2]), permissions=sorted(caller.permissions),
            email=caller.email, is_operator=caller.is_operator, kind=caller.kind, deployment_id=caller.deployment_id,
            key_id=caller.key_id if caller.kind != "user" else "",
            grantable_permissions=sorted(caller.permissions - OF_PEOPLE_ALONE - OF_EVERY_KEY) if caller.kind == "user" else (),
        )  # fmt: skip


def resolver(db: Database) -> AccessResolver:
    """The same answer for this service's own calls, straight from the tables."""

    async def resolve(user_id: str, org_id: str) -> Access | None:
        async with db.read(ALL) as session:
            try:
                found = await repository.membership(session, user_id, org_id)
            except ValueError:
                return None
        if found is None:
            return None
        user, org, role = found
        return Access(user.id, org, PERMISSIONS[role], user.email, user.is_operator)

    return resolve
