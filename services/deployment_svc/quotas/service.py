"""QuotaService: limits of usage."""

from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from operator import itemgetter

from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.deployment.v1 import quota_pb2, quota_service_pb2_grpc
from clawplane.deployment.v1 import quota_service_pb2 as rpc
from clawplane.user.v1.entitlement_service_pb2 import Entitlements
from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.quotas import repository
from services.deployment_svc.quotas.models import PERIOD, SCOPE, UNIT, Quota, QuotaNotice
from services.deployment_svc.quotas.rules import TOKENS, Amount, Limit, Standings, Who, entitled, exact, holding, percent, tightness
from services.deployment_svc.usage.ledger import Ledger
from services.deployment_svc.usage.service import api_key_of
from services.kit.audit import diff
from services.kit.call import Call
from services.kit.coalesce import Coalescer
from services.kit.db import Database
from services.kit.errors import InvalidArgument, NotFound
from services.kit.proto import to_proto
from services.kit.standard import list_page

_PREFIXES = {quota_pb2.QUOTA_SCOPE_USER: "usr", quota_pb2.QUOTA_SCOPE_API_KEY: "key", quota_pb2.QUOTA_SCOPE_DEPLOYMENT: "dep"}
_MOST_MONEY = Decimal(9_000_000)
"""More is no limit, and SQLite's integers could not hold it."""


def who_of(call: Call, deployment_id: str = "") -> Who:
    """On whose account a call uses something; a bot's is always its own deployment."""
    caller = call.caller
    return Who(call.org_id, caller.user_id, api_key_of(call) or "", caller.deployment_id or deployment_id)


class QuotaService(quota_service_pb2_grpc.QuotaServiceServicer):
    """See proto/clawplane/deployment/v1/quota_service.proto."""

    def __init__(self, db: Database, ledger: Ledger, entitlements: Callable[[str], Awaitable[Entitlements]]) -> None:
        self.db, self.ledger, self.entitlements = db, ledger, entitlements
        self._standings: Coalescer[Who, Standings] = Coalescer(self._read)

    async def SetQuota(self, request: rpc.SetQuotaRequest, call: Call) -> quota_pb2.Quota:
        wish, amount = request.quota, amount_of(request.quota)
        # NotFound for an organization that is none.
        await self.entitlements(wish.org_id)

        async def work(session: AsyncSession) -> Quota:
            if wish.scope == quota_pb2.QUOTA_SCOPE_DEPLOYMENT and wish.subject:
                d = await session.get(Deployment, wish.subject)
                if d is None or d.org_id != wish.org_id:
                    raise InvalidArgument("quota.subject", "is none of the organization's deployments")
            row, before = await repository.set_quota(session, wish, amount)
            call.audit(row.id, org_id=row.org_id, **diff(to_message(before) if before is not None else None, to_message(row)))
            return row

        row: Quota = await call.run(work)
        self.ledger.touched.add(row.org_id)
        return to_message(row)

    async def ListQuotas(self, request: rpc.ListQuotasRequest, call: Call) -> rpc.ListQuotasResponse:
        if request.org_id and not call.sees(request.org_id):
            raise NotFound("organization")
        statement = select(Quota)
        if request.org_id:
            statement = statement.where(Quota.org_id == request.org_id)
        return await list_page(call, request, rpc.ListQuotasResponse, statement, Quota.id, to_message)

    async def DeleteQuota(self, request: rpc.DeleteQuotaRequest, call: Call) -> rpc.DeleteQuotaResponse:
        async def work(session: AsyncSession) -> None:
            row = await session.get(Quota, request.id, with_for_update=True)
            if row is None:
                raise NotFound("quota")
            call.audit(row.id, org_id=row.org_id, **diff(to_message(row), None))
            await session.delete(row)

        await call.run(work)
        return rpc.DeleteQuotaResponse()

    async def CheckQuota(self, request: rpc.CheckQuotaRequest, call: Call) -> rpc.CheckQuotaResponse:
        who = who_of(call, request.deployment_id)
        paid_for = entitled(await self.entitlements(who.org_id))
        found = await self._standings(who)
        tokens, cost = request.tokens, Decimal(request.cost or 0)
        return _standing(holding(paid_for, found.quotas.get(who.org_id, ()), who), found, who.org_id, tokens, cost)

    async def _read(self, whos: list[Who]) -> list[Standings]:
        """How things stand for many callers: one answer for all of them."""
        return [await repository.look(self.db, whos)] * len(whos)

    async def ListQuotaNotices(self, request: rpc.ListQuotaNoticesRequest, call: Call) -> rpc.ListQuotaNoticesResponse:
        _ = call.org_id
        answer = rpc.ListQuotaNoticesResponse
        return await list_page(call, request, answer, select(QuotaNotice), QuotaNotice.id, lambda row: to_proto(row, quota_pb2.QuotaNotice))


def amount_of(wish: quota_pb2.Quota) -> Amount:
    """How much a limit grants; InvalidArgument for one that contradicts itself."""
    amount, is_tokens = Decimal(wish.amount), wish.unit == quota_pb2.QUOTA_UNIT_TOKENS
    if is_tokens and amount != int(amount):
        raise InvalidArgument("quota.amount", "must be a whole number of tokens")
    if not is_tokens and amount > _MOST_MONEY:
        raise InvalidArgument("quota.amount", f"must be at most {_MOST_MONEY}")
    if wish.scope == quota_pb2.QUOTA_SCOPE_ORGANIZATION and wish.subject:
        raise InvalidArgument("quota.subject", "must be empty: the limit is the organization's")
    prefix = _PREFIXES.get(wish.scope)
    if prefix and wish.subject and not wish.subject.startswith(f"{prefix}_"):
        raise InvalidArgument("quota.subject", f"must be empty or {prefix}_ and 32 hexadecimal digits")
    if wish.suspends and (wish.scope != quota_pb2.QUOTA_SCOPE_ORGANIZATION or is_tokens):
        raise InvalidArgument("quota.suspends", "is only for money of the whole organization")
    return int(amount) if is_tokens else amount


def to_message(row: Quota) -> quota_pb2.Quota:
    """The limit as operators see it."""
    message = to_proto(row, quota_pb2.Quota)
    message.amount = exact(repository.limit_of(row).amount)
    return message


def _standing(limits: Iterable[Limit], found: Standings, org_id: str, tokens: int, cost: Decimal) -> rpc.CheckQuotaResponse:
    answer = rpc.CheckQuotaResponse(allowed=True)
    standings = []
    for limit in limits:
        used, held = found.of(org_id, limit)
        if not limit.soft and used + held + (tokens if limit.unit == TOKENS else cost) > limit.amount:
            answer.allowed = False
        standings.append((tightness(used, held, limit.amount), limit, used, held))
    standings.sort(key=_by_tightness, reverse=True)
    for _, limit, used, held in standings:
        status = answer.quotas.add()
        status.MergeFrom(_unused(limit, found.ends[limit.period]))
        status.used, status.held, status.percent = exact(used), exact(held), percent(used, limit.amount)
    return answer


_by_tightness = itemgetter(0)


@lru_cache(4096)
def _unused(limit: Limit, ends_at: datetime) -> quota_pb2.QuotaStatus:
    """What is the same of a limit whatever is used of it."""
    return quota_pb2.QuotaStatus(
        quota_id=limit.quota_id, scope=SCOPE.numbers[limit.scope], subject=limit.subject, period=PERIOD.numbers[limit.period],
        unit=UNIT.numbers[limit.unit], amount=exact(limit.amount), soft=limit.soft,
        resets_at=Timestamp(seconds=int(ends_at.timestamp())),
    )  # fmt: skip
