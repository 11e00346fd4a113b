"""What this service asks of the user service."""

import math
from collections.abc import AsyncIterable, Callable, Sequence
from datetime import UTC
from uuid import UUID

import grpc

from clawplane.user.v1 import (
    access_service_pb2,
    access_service_pb2_grpc,
    api_key_service_pb2,
    api_key_service_pb2_grpc,
    change_service_pb2,
    change_service_pb2_grpc,
    claw_key_service_pb2,
    claw_key_service_pb2_grpc,
    entitlement_service_pb2,
    entitlement_service_pb2_grpc,
    session_service_pb2,
    session_service_pb2_grpc,
)
from clawplane.user.v1.change_service_pb2 import Change, ChangeKind
from services.kit import known_keys
from services.kit.auth import Access, Caller, Session
from services.kit.errors import NotFound, Unavailable
from services.kit.known_keys import KnownKey

PERMISSIONS = (
    "access.resolve", "api_keys.verify", "changes.watch", "claw_keys.mint", "claw_keys.revoke", "entitlements.get", "sessions.validate",
)  # fmt: skip
"""What this service's own token may do there."""
_TIMEOUT_S = 3.0


class Users:
    """Typed calls with this service's own credential."""

    def __init__(self, channel: grpc.aio.Channel, credential: Callable[[], Sequence[tuple[str, str]]]) -> None:
        self._access = access_service_pb2_grpc.AccessServiceStub(channel)
        self._entitlements = entitlement_service_pb2_grpc.EntitlementServiceStub(channel)
        self._sessions = session_service_pb2_grpc.SessionServiceStub(channel)
        self._keys = api_key_service_pb2_grpc.ApiKeyServiceStub(channel)
        self._claw_keys = claw_key_service_pb2_grpc.ClawKeyServiceStub(channel)
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
        request = session_service_pb2.ValidateSessionRequest(token=token, uncached=True)
        try:
            found = await self._sessions.ValidateSession(request, metadata=self._credential(), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT):
                return None
            raise Unavailable("the user service does not answer") from error
        ends_at = min(found.expires_at.ToDatetime(UTC), found.idle_at.ToDatetime(UTC))
        return Session(found.id, found.user_id, ends_at.timestamp(), found.fresh_until.ToDatetime(UTC).timestamp())

    async def key(self, text: str) -> KnownKey | None:
        """What an API key or a bot's stands for; None when there is no such key. Garbage is not asked about."""
        if known_keys.parse(text) is None:
            return None
        request = api_key_service_pb2.VerifyApiKeyRequest(key=text, uncounted=True)
        try:
            found = await self._keys.VerifyApiKey(request, metadata=self._credential(), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise Unavailable("the user service does not answer") from error
        if found.outcome == api_key_service_pb2.API_KEY_OUTCOME_NOT_FOUND:
            return None
        caller = Caller(
            "claw" if found.deployment_id else "key", found.key_id, frozenset(found.permissions), found.org_id, found.user_id, found.email,
            found.deployment_id, found.key_id, rate=found.rate,
        )  # fmt: skip
        ends_at = found.expires_at.ToDatetime(UTC).timestamp() if found.HasField("expires_at") else math.inf
        return KnownKey(caller, found.outcome == api_key_service_pb2.API_KEY_OUTCOME_VALID, ends_at)

    async def keys_used(self, key_ids: Sequence[str]) -> None:
        """Tells that keys were used here."""
        request = api_key_service_pb2.RecordApiKeyUsesRequest(key_ids=key_ids)
        try:
            await self._keys.RecordApiKeyUses(request, metadata=self._credential(), timeout=1, wait_for_ready=False)
        except grpc.aio.AioRpcError as error:
            raise Unavailable("the user service does not answer") from error

    async def mint_claw_key(self, key_id: str, deployment_id: str, org_id: str, user_id: str) -> str:
        """The text of a new key for a bot's next start; every other key of the deployment has ended then."""
        request = claw_key_service_pb2.MintClawKeyRequest(
            key_id=key_id, deployment_id=deployment_id, org_id=org_id, user_id=user_id, request_id=str(UUID(hex=key_id[-32:]))
        )
        try:
            return (await self._claw_keys.MintClawKey(request, metadata=self._credential(), timeout=_TIMEOUT_S)).key
        except grpc.aio.AioRpcError as error:
            raise Unavailable("the user service makes no key for the bot now") from error

    async def revoke_claw_keys(self, key_id: str, deployment_id: str, org_id: str, user_id: str) -> None:
        """Ends the keys of a deployment's bot up to a start, also one that is not made yet."""
        request = claw_key_service_pb2.RevokeClawKeysRequest(key_id=key_id, deployment_id=deployment_id, org_id=org_id, user_id=user_id)
        try:
            await self._claw_keys.RevokeClawKeys(request, metadata=self._credential(), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            # Whose user or organization is gone altogether has no keys.
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise Unavailable("the user service does not answer") from error

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


def keys_changed(change: Change) -> list[str]:
    """Which keys a change concerns: the one that was changed, or all of a user and organization whose access changed."""
    if change.kind == ChangeKind.CHANGE_KIND_ENTITLEMENTS:
        return []
    return [change.subject] if change.kind == ChangeKind.CHANGE_KIND_REVOKED else [change.subject, change.org_id]
