"""ClawKeyService: the keys of bots."""

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.user.v1 import claw_key_service_pb2 as rpc
from clawplane.user.v1 import claw_key_service_pb2_grpc
from services.kit import keys, known_keys
from services.kit.call import Call
from services.kit.columns import now
from services.kit.db import alone
from services.kit.errors import InvalidState, NotFound
from services.kit.secrets import SecretBox
from services.user_svc.api_keys import repository
from services.user_svc.api_keys.models import ENVIRONMENT, ApiKey
from services.user_svc.organizations.models import Organization
from services.user_svc.users.models import User

PERMISSIONS = ("models.call", "quotas.read", "usage.record", "usage.reserve")
"""All that a bot may do."""
_NAME = "bot"
_ENDED = "the start that it was made for has ended"
Request = rpc.MintClawKeyRequest | rpc.RevokeClawKeysRequest


class ClawKeyService(claw_key_service_pb2_grpc.ClawKeyServiceServicer):
    """See proto/clawplane/user/v1/claw_key_service.proto."""

    def __init__(self, box: SecretBox, environment: str) -> None:
        self.box, self.environment = box, environment

    async def MintClawKey(self, request: rpc.MintClawKeyRequest, call: Call) -> rpc.MintClawKeyResponse:
        key = keys.mint(known_keys.BOTS, self.environment, known_keys.ID_PREFIX, request.key_id)

        async def work(session: AsyncSession) -> None:
            newest = await self._newest(session, request)
            if newest is not None and newest >= request.key_id:
                raise InvalidState("a newer start of this deployment has a key, or this one was ended", newest=newest)
            ended = await self._live(session, request)
            row = self._row(request)
            session.add(row)
            await repository.add_text(session, row, key, self.box)
            call.audit(row.id, org_id=row.org_id, after={"deployment_id": row.deployment_id})
            await self._end(session, ended)

        await call.run(work)
        return rpc.MintClawKeyResponse(key=key.text)

    async def RevokeClawKeys(self, request: rpc.RevokeClawKeysRequest, call: Call) -> rpc.RevokeClawKeysResponse:
        async def work(session: AsyncSession) -> int:
            newest = await self._newest(session, request)
            call.audit(request.key_id, org_id=request.org_id, after={"deployment_id": request.deployment_id})
            if newest is None or newest < request.key_id:
                # The start's key may be on its way yet: it must find that it is too late.
                session.add(self._row(request, revoked_at=now(), revoke_reason=_ENDED))
            ended = [row for row in await self._live(session, request) if row.id <= request.key_id]
            await self._end(session, ended)
            return len(ended)

        return rpc.RevokeClawKeysResponse(revoked=await call.run(work))

    async def _newest(self, session: AsyncSession, request: Request) -> str | None:
        """The newest key of the deployment; nobody else makes or ends one until the transaction ends."""
        await alone(session, f"keys of {request.deployment_id}")
        known = await session.scalar(select(Organization.id).where(Organization.id == request.org_id))
        if known is None or await session.scalar(select(User.id).where(User.id == request.user_id)) is None:
            raise NotFound("organization" if known is None else "user")
        statement = select(ApiKey.id).where(ApiKey.deployment_id == request.deployment_id)
        return await session.scalar(statement.order_by(ApiKey.id.desc()).limit(1))

    async def _live(self, session: AsyncSession, request: Request) -> list[ApiKey]:
        statement = select(ApiKey).where(ApiKey.deployment_id == request.deployment_id, ApiKey.revoked_at.is_(None))
        return list((await session.scalars(statement.order_by(ApiKey.id).with_for_update())).all())

    async def _end(self, session: AsyncSession, rows: list[ApiKey]) -> None:
        for row in rows:
            row.revoked_at, row.revoke_reason = now(), _ENDED
        for row in rows:
            await repository.changed(session, row)

    def _row(self, request: Request, **more: object) -> ApiKey:
        return ApiKey(
            id=request.key_id, org_id=request.org_id, user_id=request.user_id, deployment_id=request.deployment_id, name=_NAME,
            environment=ENVIRONMENT.numbers[self.environment], permissions=list(PERMISSIONS), metadata_={}, **more,
        )  # fmt: skip
