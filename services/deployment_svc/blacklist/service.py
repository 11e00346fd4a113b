"""BlacklistService: providers that get no deployments."""

from typing import Any

from sqlalchemy import select

from clawplane.deployment.v1 import blacklist_entry_pb2, blacklist_service_pb2, blacklist_service_pb2_grpc
from services.deployment_svc.blacklist.models import BlacklistEntry
from services.deployment_svc.blacklist.repository import in_force
from services.kit.audit import diff
from services.kit.call import Call
from services.kit.columns import now
from services.kit.db import insert_for
from services.kit.proto import to_datetime, to_proto
from services.kit.standard import get, list_page


class BlacklistService(blacklist_service_pb2_grpc.BlacklistServiceServicer):
    """See proto/clawplane/deployment/v1/blacklist_service.proto."""

    async def AddBlacklistEntry(
        self, request: blacklist_service_pb2.AddBlacklistEntryRequest, call: Call
    ) -> blacklist_entry_pb2.BlacklistEntry:
        values: dict[str, Any] = {
            "reason": request.reason or "Provider blacklisted",
            "expires_at": to_datetime(request.expires_at, "expires_at") if request.HasField("expires_at") else None,
            # An operator's word replaces what the rule has found.
            "by_rule": False, "on_probation": False, "strikes": 0, "evidence": [],
        }  # fmt: skip
        async with call.transaction() as session:
            known = await session.get(BlacklistEntry, request.provider_address)
            before = _to_message(known) if known is not None else None
            insert = insert_for(session)
            await session.execute(
                insert(BlacklistEntry)
                .values(provider_address=request.provider_address, **values)
                .on_conflict_do_update(index_elements=["provider_address"], set_={**values, "updated_at": now()})
            )
            row = await session.get_one(BlacklistEntry, request.provider_address, populate_existing=True)
            call.audit(row.provider_address, **diff(before, _to_message(row)))
        return _to_message(row)

    async def RemoveBlacklistEntry(
        self, request: blacklist_service_pb2.RemoveBlacklistEntryRequest, call: Call
    ) -> blacklist_service_pb2.RemoveBlacklistEntryResponse:
        async with call.transaction() as session:
            row = await session.get(BlacklistEntry, request.provider_address)
            if row is not None:
                call.audit(row.provider_address, **diff(_to_message(row), None))
                await session.delete(row)
        return blacklist_service_pb2.RemoveBlacklistEntryResponse()

    async def ListBlacklistEntries(
        self, request: blacklist_service_pb2.ListBlacklistEntriesRequest, call: Call
    ) -> blacklist_service_pb2.ListBlacklistEntriesResponse:
        statement = select(BlacklistEntry) if request.show_expired else in_force()
        answer = blacklist_service_pb2.ListBlacklistEntriesResponse
        return await list_page(call, request, answer, statement, BlacklistEntry.provider_address, _to_message, descending=False)

    async def GetBlacklistEntry(
        self, request: blacklist_service_pb2.GetBlacklistEntryRequest, call: Call
    ) -> blacklist_entry_pb2.BlacklistEntry:
        return _to_message(await get(call, BlacklistEntry, request.provider_address, "blacklist entry"))

    async def CheckProviders(
        self, request: blacklist_service_pb2.CheckProvidersRequest, call: Call
    ) -> blacklist_service_pb2.CheckProvidersResponse:
        named = in_force().where(BlacklistEntry.provider_address.in_(set(request.provider_addresses)))
        async with call.read() as session:
            rows = (await session.scalars(named.order_by(BlacklistEntry.provider_address))).all()
        return blacklist_service_pb2.CheckProvidersResponse(entries=[_to_message(row) for row in rows])

    async def CheckProvider(
        self, request: blacklist_service_pb2.CheckProviderRequest, call: Call
    ) -> blacklist_service_pb2.CheckProviderResponse:
        async with call.read() as session:
            row = await session.scalar(in_force().where(BlacklistEntry.provider_address == request.provider_address))
        if row is None:
            return blacklist_service_pb2.CheckProviderResponse(blacklisted=False)
        return blacklist_service_pb2.CheckProviderResponse(
            blacklisted=True, entry=_to_message(row)
        )


def _to_message(row: BlacklistEntry) -> blacklist_entry_pb2.BlacklistEntry:
    return to_proto(row, blacklist_entry_pb2.BlacklistEntry)
