"""What this service asks of the user service."""

from collections.abc import AsyncIterable, Callable, Sequence
from datetime import UTC

import grpc

from clawplane.user.v1 import (
    access_service_pb2,
    access_service_pb2_grpc,
    change_service_pb2,
    change_service_pb2_grpc,
    entitlement_service_pb2,
    entitlement_service_pb2_grpc,
    session_service_pb2,
    session_service_pb2_grpc,
)
from clawplane.user.v1.change_service_pb2 import Change
from services.kit.auth import Access, Session
from services.kit.errors import NotFound, Unavailable

PERMISSIONS = ("access.resolve", "changes.watch", "entitlements.get", "sessions.validate")
"""What this service's own token may do there."""
_TIMEOUT_S = 3.0


class Users:
    """Typed calls with this service's own credential."""

    def __init__(self, channel: grpc.aio.Channel, credential: Callable[[], Sequence[tuple[str, str]]]) -> None:
        self._access = access_service_pb2_grpc.AccessServiceStub(channel)
        self._entitlements = entitlement_service_pb2_grpc.EntitlementServiceStub(channel)
        self._sessions = session_service_pb2_grpc.SessionServiceStub(channel)
        self._changes = change_service_pb2_grpc.ChangeServiceStub(channel)
        self._credential = credential

    def watch(self, after_seq: int) -> AsyncIterable[change_service_pb2.WatchChangesResponse]:
        """The feed of changes after a number; -1 means from now on."""
        request = change_service_pb2.WatchChangesRequest(after_seq=after_seq)
        return self._changes.WatchChanges(request, metadata=self._credential())

    async def access(self, user_id: str, org_id: str) -> Access | None:
        """What a user may do in an organization; None when it is not the user's."""
        request = access_service_pb2.ResolveAccessRequest(user_id=user_id, org_id=org_id)
        try:
            found = await self._access.ResolveAccess(request, metadata=self._credential(), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT):
                return None
            raise Unavailable("the user service does not answer") from error
        return Access(found.user_id, found.org_id, frozenset(found.permissions), found.email, found.is_operator)

    async def session(self, token: str) -> Session | None:
        """The session of a token; None when it does not hold."""
        request = session_service_pb2.ValidateSessionRequest(token=token)
        try:
            found = await self._sessions.ValidateSession(request, metadata=self._credential(), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT):
                return None
            raise Unavailable("the user service does not answer") from error
        return Session(found.id, found.user_id, found.expires_at.ToDatetime(UTC).timestamp())

    async def entitlements(self, org_id: str) -> entitlement_service_pb2.Entitlements:
        """The limits of an organization."""
        request = entitlement_service_pb2.GetEntitlementsRequest(org_id=org_id)
        try:
            return await self._entitlements.GetEntitlements(request, metadata=self._credential(), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.NOT_FOUND:
                raise NotFound("organization") from None
            raise Unavailable("the user service does not answer") from error


def entitlements_changed(change: Change) -> list[str]:
    """Whose entitlements a change concerns."""
    return [change.org_id]
