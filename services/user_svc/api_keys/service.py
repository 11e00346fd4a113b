"""ApiKeyService: making, changing, rotating and ending keys."""

from datetime import timedelta

from sqlalchemy import and_, not_, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.user.v1 import api_key_pb2, api_key_service_pb2_grpc
from clawplane.user.v1 import api_key_service_pb2 as rpc
from services.kit import keys, known_keys
from services.kit.audit import diff
from services.kit.call import Call
from services.kit.columns import now
from services.kit.errors import Conflict, InvalidArgument, NotFound
from services.kit.proto import assign, to_proto
from services.kit.secrets import SecretBox
from services.kit.standard import list_page
from services.user_svc.api_keys import repository, rules
from services.user_svc.api_keys.models import ENVIRONMENT, ApiKey
from services.user_svc.api_keys.verify import Verifier


class ApiKeyService(api_key_service_pb2_grpc.ApiKeyServiceServicer):
    """See proto/clawplane/user/v1/api_key_service.proto."""

    def __init__(self, box: SecretBox, verifier: Verifier) -> None:
        self.box, self.verifier = box, verifier

    async def CreateApiKey(self, request: rpc.CreateApiKeyRequest, call: Call) -> rpc.CreateApiKeyResponse:
        wish = request.api_key
        rules.check(wish, ("name", "permissions", "expires_at", "metadata"), call.caller, now())
        if not wish.environment:
            raise InvalidArgument("api_key.environment", "value is required")
        key = keys.mint(known_keys.PEOPLE, ENVIRONMENT.words[wish.environment], known_keys.ID_PREFIX)

        async def work(session: AsyncSession) -> api_key_pb2.ApiKey:
            row = ApiKey(id=key.id, org_id=call.org_id, user_id=call.caller.user_id, metadata_={})
            assign(row, wish)
            session.add(row)
            await repository.add_text(session, row, key, self.box)
            call.audit(row.id, after={"name": row.name, "permissions": row.permissions, "rate": row.rate})
            return await repository.message(session, row)

        return rpc.CreateApiKeyResponse(api_key=await call.run(work), key=key.text)

    async def GetApiKey(self, request: rpc.GetApiKeyRequest, call: Call) -> api_key_pb2.ApiKey:
        async with call.read() as session:
            row = await session.scalar(repository.seen_by(call).where(ApiKey.id == request.id))
            if row is None:
                raise NotFound("API key")
            return await repository.message(session, row)

    async def ListApiKeys(self, request: rpc.ListApiKeysRequest, call: Call) -> rpc.ListApiKeysResponse:
        statement = repository.seen_by(call)
        of_bot = ApiKey.deployment_id == request.deployment_id if request.deployment_id else ApiKey.deployment_id.is_(None)
        if request.HasField("is_active"):
            live = and_(ApiKey.is_active, ApiKey.revoked_at.is_(None), or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > now()))
            statement = statement.where(live if request.is_active else not_(live))
        answer = rpc.ListApiKeysResponse
        return await list_page(call, request, answer, statement.where(of_bot), ApiKey.id, lambda row: to_proto(row, api_key_pb2.ApiKey))

    async def UpdateApiKey(self, request: rpc.UpdateApiKeyRequest, call: Call) -> api_key_pb2.ApiKey:
        wish = request.api_key

        async def work(session: AsyncSession) -> api_key_pb2.ApiKey:
            row = await repository.changeable(session, call, wish.id)
            if wish.etag and wish.etag != str(row.version):
                raise Conflict("the key was changed by someone else; read it again and repeat")
            before = to_proto(row, api_key_pb2.ApiKey)
            written = assign(row, wish, request.update_mask)
            rules.check(wish, written, call.caller, now())
            call.audit(row.id, org_id=row.org_id, **diff(before, to_proto(row, api_key_pb2.ApiKey)))
            await repository.changed(session, row)
            return await repository.message(session, row)

        return await call.run(work)  # type: ignore[no-any-return]

    async def ActivateApiKey(self, request: rpc.ActivateApiKeyRequest, call: Call) -> api_key_pb2.ApiKey:
        return await self._switch(call, request.id, True)

    async def DeactivateApiKey(self, request: rpc.DeactivateApiKeyRequest, call: Call) -> api_key_pb2.ApiKey:
        return await self._switch(call, request.id, False)

    async def _switch(self, call: Call, key_id: str, active: bool) -> api_key_pb2.ApiKey:
        async def work(session: AsyncSession) -> api_key_pb2.ApiKey:
            row = await repository.changeable(session, call, key_id)
            if row.is_active != active:
                call.audit(row.id, org_id=row.org_id, before={"is_active": row.is_active}, after={"is_active": active})
                row.is_active = active
                await repository.changed(session, row)
            return await repository.message(session, row)

        return await call.run(work)  # type: ignore[no-any-return]

    async def RevokeApiKey(self, request: rpc.RevokeApiKeyRequest, call: Call) -> api_key_pb2.ApiKey:
        async def work(session: AsyncSession) -> api_key_pb2.ApiKey:
            row = await repository.locked(session, call, request.id)
            repository.refuse_bots(row)
            call.audit(row.id, org_id=row.org_id, after={"revoke_reason": request.reason})
            await repository.revoke(session, row, request.reason)
            return await repository.message(session, row)

        return await call.run(work)  # type: ignore[no-any-return]

    async def RevokeCurrentApiKey(self, request: rpc.RevokeCurrentApiKeyRequest, call: Call) -> api_key_pb2.ApiKey:
        async def work(session: AsyncSession) -> api_key_pb2.ApiKey:
            # A session has an id there too, which is no key's.
            is_key = call.caller.kind in ("key", "claw")
            row = await session.scalar(select(ApiKey).where(ApiKey.id == call.caller.key_id).with_for_update()) if is_key else None
            if row is None:
                raise NotFound("API key")
            call.audit(row.id, after={"revoke_reason": request.reason})
            await repository.revoke(session, row, request.reason)
            return await repository.message(session, row)

        return await call.run(work)  # type: ignore[no-any-return]

    async def RotateApiKey(self, request: rpc.RotateApiKeyRequest, call: Call) -> rpc.RotateApiKeyResponse:
        grace = request.grace.ToTimedelta() if request.HasField("grace") else timedelta(0)

        async def work(session: AsyncSession) -> rpc.RotateApiKeyResponse:
            row = await repository.changeable(session, call, request.id)
            key = keys.mint(known_keys.PEOPLE, ENVIRONMENT.words[row.environment], known_keys.ID_PREFIX, row.id)
            number = await repository.end_texts(session, row.id, now() + grace)
            await repository.add_text(session, row, key, self.box, number)
            row.updated_at = now()
            call.audit(row.id, org_id=row.org_id, after={"text": number, "grace_s": grace.total_seconds()})
            await repository.changed(session, row)
            return rpc.RotateApiKeyResponse(api_key=await repository.message(session, row), key=key.text)

        return await call.run(work)  # type: ignore[no-any-return]

    async def VerifyApiKey(self, request: rpc.VerifyApiKeyRequest, call: Call) -> rpc.VerifyApiKeyResponse:
        return await self.verifier(request, call)

    async def RecordApiKeyUses(self, request: rpc.RecordApiKeyUsesRequest, call: Call) -> rpc.RecordApiKeyUsesResponse:
        for key_id in request.key_ids:
            self.verifier.uses.note(key_id)
        return rpc.RecordApiKeyUsesResponse()
