"""PriceService: the price book."""

import asyncio
from datetime import timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.deployment.v1 import price_pb2, price_service_pb2_grpc
from clawplane.deployment.v1 import price_service_pb2 as rpc
from services.deployment_svc.prices import price_file, repository, rules
from services.deployment_svc.prices.models import Price
from services.deployment_svc.prices.price_file import PriceFileError
from services.deployment_svc.prices.repository import Prices, changed, counting_at
from services.deployment_svc.settings import DeploymentSettings
from services.kit.audit import diff
from services.kit.call import Call
from services.kit.columns import now
from services.kit.errors import AlreadyExists, InvalidArgument, NotFound
from services.kit.paging import DEFAULT_SIZE, MAX_SIZE, Cursor
from services.kit.proto import to_datetime, to_proto
from services.kit.standard import get, list_page

_TOLD = 100
"""Prices of an import that its audit row names."""


class PriceService(price_service_pb2_grpc.PriceServiceServicer):
    """See proto/clawplane/deployment/v1/price_service.proto."""

    def __init__(self, prices: Prices) -> None:
        self.prices = prices

    async def CreatePrice(self, request: rpc.CreatePriceRequest, call: Call) -> price_pb2.Price:
        currency = self.prices.book.currency
        if request.price.currency not in ("", currency):
            raise InvalidArgument("price.currency", f"must be that of the ledger, {currency}")

        async def work(session: AsyncSession) -> price_pb2.Price:
            await changed(session, currency)
            row = rules.row_of(request.price, currency, now())
            if row.effective_to is not None and row.effective_to <= row.effective_from:
                raise InvalidArgument("price.effective_to", "must be after effective_from")
            line = await repository.of_key(session, rules.key_of(row))
            if (same := rules.begins_with(row, line)) is not None:
                raise AlreadyExists(
                    "price.effective_from", "is that of another price of the same provider, model and above_tokens_in", price_id=same.id
                )
            ended, resumed = rules.place(row, line)
            session.add_all([row] if resumed is None else [row, resumed])
            await session.flush()
            note = diff(None, _to_message(row))
            if ended is not None:
                note["after"]["ends"] = ended.id
            if resumed is not None:
                note["after"]["resumes"] = resumed.id
            call.audit(row.id, **note)
            return _to_message(row)

        made: price_pb2.Price = await call.run(work)
        await self.prices.reload()
        return made

    async def GetPrice(self, request: rpc.GetPriceRequest, call: Call) -> price_pb2.Price:
        return _to_message(await get(call, Price, request.id, "price"))

    async def ListPrices(self, request: rpc.ListPricesRequest, call: Call) -> rpc.ListPricesResponse:
        statement = select(Price)
        if request.provider:
            statement = statement.where(Price.provider == request.provider)
        if request.HasField("effective_at"):
            statement = statement.where(counting_at(to_datetime(request.effective_at, "effective_at")))
        return await list_page(call, request, rpc.ListPricesResponse, statement, Price.id, _to_message)

    async def EndPrice(self, request: rpc.EndPriceRequest, call: Call) -> price_pb2.Price:
        given = to_datetime(request.effective_to, "effective_to") if request.HasField("effective_to") else None

        async def work(session: AsyncSession) -> price_pb2.Price:
            await changed(session, self.prices.book.currency)
            row = await session.get(Price, request.id)
            if row is None:
                raise NotFound("price")
            before, at = _to_message(row), now()
            end = given or (row.effective_to if row.effective_to is not None and row.effective_to <= at else at)
            if end <= row.effective_from:
                raise InvalidArgument("effective_to", f"must be after {row.effective_from.isoformat()}, when the price begins")
            later = rules.next_after(await repository.of_key(session, rules.key_of(row)), row.effective_from)
            if later is not None and end > later.effective_from:
                raise InvalidArgument("effective_to", f"lies after {later.effective_from.isoformat()}, when {later.id} takes over")
            row.effective_to = end
            await session.flush()
            call.audit(row.id, **diff(before, _to_message(row)))
            return _to_message(row)

        ended: price_pb2.Price = await call.run(work)
        await self.prices.reload()
        return ended

    async def ImportPrices(self, request: rpc.ImportPricesRequest, call: Call) -> rpc.ImportPricesResponse:
        try:
            return await self._take(request, call)
        except PriceFileError as error:
            raise InvalidArgument("yaml", str(error)) from None

    async def _take(self, request: rpc.ImportPricesRequest, call: Call) -> rpc.ImportPricesResponse:
        currency = self.prices.book.currency
        # A large file takes seconds to read.
        entries = await asyncio.to_thread(price_file.read, request.yaml)
        async with call.read() as session:
            known = (await session.scalars(select(Price))).all()
        # What nothing is written for holds up nobody who writes usage.
        plan = rules.plan(entries, known, currency, now())
        if request.validate_only or not plan.new:
            call.audit("", after=_told(plan) | ({"validate_only": True} if request.validate_only else {}))
            return rpc.ImportPricesResponse(created=len(plan.new), unchanged=plan.unchanged)

        async def work(session: AsyncSession) -> rules.Plan:
            await changed(session, currency)
            made = rules.plan(entries, (await session.scalars(select(Price))).all(), currency, now())
            session.add_all(made.new)
            await session.flush()
            call.audit("", after=_told(made))
            return made

        plan = await call.run(work)
        await self.prices.reload()
        return rpc.ImportPricesResponse(created=len(plan.new), unchanged=plan.unchanged)

    async def ExportPrices(self, request: rpc.ExportPricesRequest, call: Call) -> rpc.ExportPricesResponse:
        statement = select(Price)
        if request.HasField("effective_at"):
            statement = statement.where(counting_at(to_datetime(request.effective_at, "effective_at")))
        async with call.read() as session:
            rows = (await session.scalars(statement)).all()
        return rpc.ExportPricesResponse(yaml=await asyncio.to_thread(price_file.write, rows))

    async def ListUnpricedModels(self, request: rpc.ListUnpricedModelsRequest, call: Call) -> rpc.ListUnpricedModelsResponse:
        assert isinstance(call.kit.settings, DeploymentSettings)
        # Events go by whole months, their sums stay: what is gone can get no price any more.
        kept = now() - timedelta(days=call.kit.settings.usage_retention_days)
        found = repository.unpriced(kept.replace(day=1, hour=0, minute=0, second=0, microsecond=0))
        cursor = Cursor(request, call.caller.tenant, (found.c.events, found.c.provider, found.c.model), "page_token")
        size = min(request.page_size or DEFAULT_SIZE, MAX_SIZE)
        async with call.read() as session:
            rows = (await session.execute(cursor.after(select(found), request.page_token).limit(size + 1))).all()
        models = [rpc.UnpricedModel(**row._mapping) for row in rows[:size]]
        return rpc.ListUnpricedModelsResponse(models=models, next_page_token=cursor.token(rows[size - 1]) if len(rows) > size else "")


def _to_message(row: Price) -> price_pb2.Price:
    return to_proto(row, price_pb2.Price)


def _told(plan: rules.Plan) -> dict[str, Any]:
    """What the audit log says of an import."""
    return {"created": len(plan.new), "unchanged": plan.unchanged, "prices": [row.id for row in plan.new[:_TOLD]]}
