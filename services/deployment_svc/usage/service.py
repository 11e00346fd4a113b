"""UsageService: the ledger of model usage."""

import re
from collections.abc import Sequence
from datetime import timedelta
from decimal import Decimal
from typing import Any

import protovalidate
from sqlalchemy import select

from clawplane.deployment.v1 import usage_event_pb2, usage_service_pb2, usage_service_pb2_grpc
from clawplane.deployment.v1.usage_service_pb2 import UsageGroup
from services.deployment_svc.settings import DeploymentSettings
from services.deployment_svc.usage import repository
from services.deployment_svc.usage.models import NO_DEPLOYMENT, UsageEvent
from services.deployment_svc.usage.prices import PriceBook
from services.deployment_svc.usage.rules import occurred, to_row
from services.kit.call import Call
from services.kit.coalesce import Batcher
from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.errors import Error, InvalidArgument, InvalidFields
from services.kit.intake import violation
from services.kit.proto import to_datetime, to_proto
from services.kit.standard import list_page

_GROUPS = {
    UsageGroup.USAGE_GROUP_DAY: "day",
    UsageGroup.USAGE_GROUP_PROVIDER: "provider",
    UsageGroup.USAGE_GROUP_MODEL: "model",
    UsageGroup.USAGE_GROUP_DEPLOYMENT: "deployment_id",
}
_MAX_DAYS = 400
_DEPLOYMENT = re.compile("dep_[0-9a-f]{32}")
Row = dict[str, Any]


class UsageService(usage_service_pb2_grpc.UsageServiceServicer):
    """See proto/clawplane/deployment/v1/usage_service.proto."""

    def __init__(self, db: Database, settings: DeploymentSettings, prices: PriceBook) -> None:
        self.db, self.prices = db, prices
        self.write = Batcher(self._write)
        self.late = timedelta(days=settings.usage_late_days)
        self.ahead = timedelta(seconds=settings.usage_ahead_s)

    async def RecordUsage(self, request: usage_service_pb2.RecordUsageRequest, call: Call) -> usage_service_pb2.RecordUsageResponse:
        own = await _own([request.event], call)
        try:
            row = self._row(request.event, call, own)
        except InvalidFields as error:
            raise InvalidFields([(f"event.{field}", text) for field, text in error.violations]) from None

        stored = await self.write(row)
        event: UsageEvent | None = UsageEvent(**row)
        if not stored:
            async with call.read() as session:
                event = await repository.find(session, row["id"], row["month"])
            assert event is not None
        return usage_service_pb2.RecordUsageResponse(event=to_proto(event, usage_event_pb2.UsageEvent), duplicate=not stored)

    async def _write(self, rows: list[Row]) -> list[bool]:
        """Stores events of any organizations in one commit: which of them are new."""
        stored = await self.db.run(lambda session: repository.store(session, rows), ALL)
        new = []
        for row in rows:
            key = (row["org_id"], row["id"], row["month"])
            new.append(key in stored)
            # The same event twice in one commit: one of them was first.
            stored.discard(key)
        return new

    async def BatchRecordUsage(
        self, request: usage_service_pb2.BatchRecordUsageRequest, call: Call
    ) -> usage_service_pb2.BatchRecordUsageResponse:
        response = usage_service_pb2.BatchRecordUsageResponse()
        own = await _own(request.events, call)
        rows: dict[tuple[str, Any], Row] = {}
        for index, event in enumerate(request.events):
            try:
                found = protovalidate.collect_violations(event)
                if found:
                    raise InvalidFields([violation(item) for item in found])
                row = self._row(event, call, own)
            except Error as error:
                field, text = error.violations[0] if error.violations else ("", error.message)
                response.errors.add(index=index, id=event.id, field=field, message=text)
                continue
            if rows.setdefault((row["id"], row["month"]), row) is not row:
                response.duplicates += 1
        if rows:
            stored = await call.run(lambda session: repository.store(session, list(rows.values())))
            response.accepted = len(stored)
            response.duplicates += len(rows) - len(stored)
        response.rejected = len(response.errors)
        return response

    def _row(self, event: usage_event_pb2.UsageEvent, call: Call, own: set[str]) -> Row:
        at = now()
        try:
            when = occurred(event, at, self.late, self.ahead)
            row = to_row(event, call.caller, call.org_id, when, at, self.prices) | {"estimated": False}
            if not call.caller.deployment_id and event.deployment_id and event.deployment_id not in own:
                raise InvalidArgument("deployment_id", "is none of the organization's deployments")
        except InvalidArgument as error:
            raise InvalidFields(error.violations) from None
        return row

    async def ListUsage(self, request: usage_service_pb2.ListUsageRequest, call: Call) -> usage_service_pb2.ListUsageResponse:
        _ = call.org_id
        statement = select(UsageEvent)
        if request.HasField("start"):
            statement = statement.where(UsageEvent.occurred_at >= to_datetime(request.start))
        if request.HasField("end"):
            statement = statement.where(UsageEvent.occurred_at < to_datetime(request.end))
        if request.deployment_id:
            statement = statement.where(UsageEvent.deployment_id == request.deployment_id)
        if request.model:
            statement = statement.where(UsageEvent.model == request.model)
        key = (UsageEvent.occurred_at, UsageEvent.id)
        return await list_page(
            call, request, usage_service_pb2.ListUsageResponse, statement, key, lambda row: to_proto(row, usage_event_pb2.UsageEvent)
        )

    async def SummarizeUsage(
        self, request: usage_service_pb2.SummarizeUsageRequest, call: Call
    ) -> usage_service_pb2.SummarizeUsageResponse:
        _ = call.org_id
        last = (to_datetime(request.end) if request.HasField("end") else now()).date()
        first = to_datetime(request.start).date() if request.HasField("start") else last - timedelta(days=30)
        if not first <= last:
            raise InvalidArgument("start", "is after end")
        if (last - first).days > _MAX_DAYS:
            raise InvalidArgument("end", f"is more than {_MAX_DAYS} days after start")
        groups = [_GROUPS[group] for group in request.group_by] or ["day"]
        async with call.read() as session:
            rows = await repository.summarize(session, first, last, groups, request.deployment_id)
        response = usage_service_pb2.SummarizeUsageResponse(sums=[_sum(row) for row in rows])
        response.total.CopyFrom(_sum(_total(rows, self.prices.currency)))
        return response


async def _own(events: Sequence[usage_event_pb2.UsageEvent], call: Call) -> set[str]:
    """Those of the named deployments that are the organization's. A bot's own needs no look-up."""
    named = {event.deployment_id for event in events if _DEPLOYMENT.fullmatch(event.deployment_id)}
    if call.caller.deployment_id or not named:
        return set()
    async with call.read() as session:
        return await repository.own_deployments(session, named)


def _sum(row: Row) -> usage_service_pb2.UsageSum:
    deployment_id = row.get("deployment_id", "")
    return usage_service_pb2.UsageSum(
        day=row["day"].isoformat() if "day" in row else "",
        provider=row.get("provider", ""), model=row.get("model", ""),
        deployment_id="" if deployment_id == NO_DEPLOYMENT else deployment_id,
        events=int(row["events"]), tokens_in=int(row["tokens_in"]), tokens_out=int(row["tokens_out"]),
        tokens_total=int(row["tokens_total"]), cost=format(row["cost"], "f"), currency=row["currency"],
        unpriced_events=int(row["unpriced_events"]),
    )  # fmt: skip


def _total(rows: Sequence[Row], currency: str) -> Row:
    total: Row = {
        name: sum(int(row[name]) for row in rows)
        for name in ("events", "tokens_in", "tokens_out", "tokens_total", "unpriced_events")
    }
    return total | {"cost": sum((row["cost"] for row in rows), Decimal(0)), "currency": currency}
