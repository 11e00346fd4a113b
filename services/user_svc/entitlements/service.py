"""EntitlementService: the limits of an organization's tier."""

from clawplane.user.v1 import entitlement_service_pb2, entitlement_service_pb2_grpc
from services.kit.call import Call
from services.kit.errors import InvalidArgument, NotFound
from services.user_svc.organizations.models import Organization
from services.user_svc.settings import UserSettings


class EntitlementService(entitlement_service_pb2_grpc.EntitlementServiceServicer):
    """See proto/clawplane/user/v1/entitlement_service.proto."""

    def __init__(self, settings: UserSettings) -> None:
        self.settings = settings

    async def GetEntitlements(
        self, request: entitlement_service_pb2.GetEntitlementsRequest, call: Call
    ) -> entitlement_service_pb2.Entitlements:
        org_id = request.org_id or call.caller.org_id
        if not org_id:
            raise InvalidArgument("org_id", "is needed from a caller that acts in no organization")
        if not call.caller.is_platform and org_id != call.caller.org_id:
            raise NotFound("organization")
        async with call.read() as session:
            organization = await session.get(Organization, org_id)
        if organization is None or organization.deleted_at is not None:
            raise NotFound("organization")
        tier = self.settings.tiers[organization.tier]
        return entitlement_service_pb2.Entitlements(org_id=org_id, tier=organization.tier, **tier.model_dump())
