"""What this service asks of the user service."""

from collections.abc import Callable, Sequence

import grpc

from clawplane.user.v1 import access_service_pb2, access_service_pb2_grpc, entitlement_service_pb2, entitlement_service_pb2_grpc
from services.kit.auth import Access
from services.kit.errors import NotFound, Unavailable

PERMISSIONS = ("access.resolve", "entitlements.get")
"""What this service's own token may do there."""
_TIMEOUT_S = 5.0


class Users:
    """Typed calls with this service's own credential."""

    def __init__(self, channel: grpc.aio.Channel, credential: Callable[[], Sequence[tuple[str, str]]]) -> None:
        self._access = access_service_pb2_grpc.AccessServiceStub(channel)
        self._entitlements = entitlement_service_pb2_grpc.EntitlementServiceStub(channel)
        self._credential = credential

    async def access(self, user_id: str, org_id: str) -> Access | None:
        """What a user may do in an organization; None when it is not the user's."""
        request = access_service_pb2.ResolveAccessRequest(user_id=user_id, org_id=org_id)
        try:
            found = await self._access.ResolveAccess(request, metadata=self._credential(), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT):
                return None
            raise
        return Access(found.user_id, found.org_id, frozenset(found.permissions), found.email)

    async def entitlements(self, org_id: str) -> entitlement_service_pb2.Entitlements:
        """The limits of an organization."""
        request = entitlement_service_pb2.GetEntitlementsRequest(org_id=org_id)
        try:
            return await self._entitlements.GetEntitlements(request, metadata=self._credential(), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.NOT_FOUND:
                raise NotFound("organization") from None
            raise Unavailable("the user service does not answer") from error
