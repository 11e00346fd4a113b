"""BlacklistService: providers that get no deployments."""

from clawplane.deployment.v1 import blacklist_entry_pb2, blacklist_service_pb2, blacklist_service_pb2_grpc
from services.deployment_svc.blacklist.models import BlacklistEntry
from services.deployment_svc.blacklist.repository import in_force
from services.kit.call import Call
from services.kit.columns import now
from services.kit.db import insert_for
from services.kit.paging import page
from services.kit.proto import to_datetime, to_proto


class BlacklistService(blacklist_service_pb2_grpc.BlacklistServiceServicer):
    """See proto/clawplane/deployment/v1/blacklist_service.proto."""

    async def AddBlacklistEntry(
        self, request: blacklist_service_pb2.AddBlacklistEntryRequest, call: Call
    ) -> blacklist_entry_pb2.BlacklistEntry:
        values = {
            "reason": request.reason or "Provider blacklisted",
            "expires_at": to_datetime(request.expires_at) if request.HasField("expires_at") else None,
        }
        async with call.transaction() as session:
            insert = insert_for(session)
            await session.execute(
                insert(BlacklistEntry)
                .values(provider_address=request.provider_address, **values)
                .on_conflict_do_update(index_elements=["provider_address"], set_={**values, "updated_at": now()})
            )
            row = await session.get_one(BlacklistEntry, request.provider_address)
            call.audit(row.provider_address, after={"reason": row.reason, "expires_at": str(row.expires_at or "never")})
        return to_proto(row, blacklist_entry_pb2.BlacklistEntry)

    async def RemoveBlacklistEntry(
        self, request: blacklist_service_pb2.RemoveBlacklistEntryRequest, call: Call
    ) -> blacklist_service_pb2.RemoveBlacklistEntryResponse:
        async with call.transaction() as session:
            row = await session.get(BlacklistEntry, request.provider_address)
            if row is not None:
                call.audit(row.provider_address, before={"reason": row.reason})
                await session.delete(row)
        return blacklist_service_pb2.RemoveBlacklistEntryResponse()

    async def ListBlacklistEntries(
        self, request: blacklist_service_pb2.ListBlacklistEntriesRequest, call: Call
    ) -> blacklist_service_pb2.ListBlacklistEntriesResponse:
        async with call.read() as session:
            rows, token = await page(session, in_force(), BlacklistEntry.provider_address, request, descending=False)
        entries = [to_proto(row, blacklist_entry_pb2.BlacklistEntry) for row in rows]
        return blacklist_service_pb2.ListBlacklistEntriesResponse(entries=entries, next_page_token=token)

    async def CheckProvider(
        self, request: blacklist_service_pb2.CheckProviderRequest, call: Call
    ) -> blacklist_service_pb2.CheckProviderResponse:
        async with call.read() as session:
            row = await session.scalar(in_force().where(BlacklistEntry.provider_address == request.provider_address))
        if row is None:
            return blacklist_service_pb2.CheckProviderResponse(blacklisted=False)
        return blacklist_service_pb2.CheckProviderResponse(
            blacklisted=True, entry=to_proto(row, blacklist_entry_pb2.BlacklistEntry)
        )
