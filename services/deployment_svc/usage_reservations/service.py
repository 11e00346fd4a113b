"""UsageReservationService: usage that is held before it happens."""

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.deployment.v1 import usage_event_pb2, usage_reservation_pb2, usage_reservation_service_pb2_grpc
from clawplane.deployment.v1 import usage_reservation_service_pb2 as rpc
from services.deployment_svc.quotas.rules import exact
from services.deployment_svc.quotas.service import who_of
from services.deployment_svc.usage import repository as usage
from services.deployment_svc.usage_reservations import repository
from services.deployment_svc.usage_reservations.engine import Reservations
from services.deployment_svc.usage_reservations.models import UsageReservation
from services.deployment_svc.usage_reservations.rules import Settled, Used
from services.kit.call import Call
from services.kit.columns import now
from services.kit.errors import InvalidArgument, InvalidState, NotFound
from services.kit.proto import to_proto
from services.kit.standard import list_page

_HOLDS_S = 15 * 60
_HELD = usage_reservation_pb2.USAGE_RESERVATION_STATE_HELD
_EXPIRED = usage_reservation_pb2.USAGE_RESERVATION_STATE_EXPIRED
_SETTLED = usage_reservation_pb2.USAGE_RESERVATION_STATE_SETTLED


class UsageReservationService(usage_reservation_service_pb2_grpc.UsageReservationServiceServicer):
    """See proto/clawplane/deployment/v1/usage_reservation_service.proto."""

    def __init__(self, reservations: Reservations) -> None:
        self.reservations = reservations

    async def ReserveUsage(self, request: rpc.ReserveUsageRequest, call: Call) -> usage_reservation_pb2.UsageReservation:
        who = who_of(call, request.deployment_id)
        if request.deployment_id and not call.caller.deployment_id:
            async with call.read() as session:
                if not await usage.own_deployments(session, {request.deployment_id}):
                    raise InvalidArgument("deployment_id", "is none of the organization's deployments")
        wish = await self.reservations.wish(
            who, request.provider, request.model, request.tokens_in, request.tokens_out, request.ttl_s or _HOLDS_S
        )
        return _message(UsageReservation(**await self.reservations.grant(wish, call)), now())

    async def RenewUsageReservation(self, request: rpc.RenewUsageReservationRequest, call: Call) -> usage_reservation_pb2.UsageReservation:
        async def renew(row: UsageReservation, at: datetime) -> None:
            if row.settled:
                raise NotFound(repository.WHAT)
            if row.expires_at <= at:
                raise InvalidState("it has expired, and what it held may be held by another: reserve anew", state="EXPIRED")
            row.expires_at = at + timedelta(seconds=request.ttl_s or _HOLDS_S)

        return _message(await self._own(request.id, call, renew), now())

    async def ReleaseUsage(self, request: rpc.ReleaseUsageRequest, call: Call) -> rpc.ReleaseUsageResponse:
        async def release(row: UsageReservation, at: datetime) -> None:
            if row.settled and not row.released:
                raise NotFound(repository.WHAT)
            row.settled = row.released = True

        await self._own(request.id, call, release)
        return rpc.ReleaseUsageResponse()

    async def _own(
        self, reservation_id: str, call: Call, change: Callable[[UsageReservation, datetime], Awaitable[None]]
    ) -> UsageReservation:
        """Changes a reservation of the caller's."""
        org_id, bot = call.org_id, call.caller.deployment_id

        async def work(session: AsyncSession) -> UsageReservation:
            row, at = await repository.own(session, org_id, reservation_id, bot)
            if row is None:
                raise NotFound(repository.WHAT)
            if row.settles_itself and not row.settled:
                raise repository.of_the_endpoint()
            await change(row, at)
            return row

        row: UsageReservation = await call.run(work)
        return row

    async def SettleUsage(self, request: rpc.SettleUsageRequest, call: Call) -> rpc.SettleUsageResponse:
        if request.tokens_cached > request.tokens_in:
            raise InvalidArgument("tokens_cached", "is more than tokens_in, of which it is a part")
        if request.tokens_reasoning > request.tokens_out:
            raise InvalidArgument("tokens_reasoning", "is more than tokens_out, of which it is a part")
        done = await self.reservations.settle(
            Used(
                request.id, request.tokens_in, request.tokens_out, request.tokens_cached, request.tokens_reasoning,
                request.status or usage_event_pb2.USAGE_STATUS_OK, request.latency_ms, org_id=call.org_id,
                deployment_id=call.caller.deployment_id,
            )
        )  # fmt: skip
        return _settled(done)

    async def ListUsageReservations(
        self, request: rpc.ListUsageReservationsRequest, call: Call
    ) -> rpc.ListUsageReservationsResponse:
        _, at, r = call.org_id, now(), UsageReservation
        holds = or_(r.settles_itself.is_(True), r.expires_at > at)
        states: dict[int, Any] = {
            _HELD: [r.settled.is_(False), holds], _EXPIRED: [r.settled.is_(False), ~holds], _SETTLED: [r.settled.is_(True)]
        }  # fmt: skip
        statement = select(r).where(r.released.is_(False), *states.get(request.state, ()))
        return await list_page(call, request, rpc.ListUsageReservationsResponse, statement, r.id, lambda row: _message(row, at))


def _message(row: UsageReservation, at: datetime) -> usage_reservation_pb2.UsageReservation:
    message = to_proto(row, usage_reservation_pb2.UsageReservation)
    message.tokens_held = row.tokens_in + row.tokens_out
    holds = row.settles_itself or row.expires_at > at
    message.state = _SETTLED if row.settled else _HELD if holds else _EXPIRED
    return message


def _settled(done: Settled) -> rpc.SettleUsageResponse:
    return rpc.SettleUsageResponse(
        event=to_proto(done.event, usage_event_pb2.UsageEvent), duplicate=done.duplicate, tokens_overrun=done.tokens_overrun,
        cost_overrun=exact(done.cost_overrun), late=done.late,
    )  # fmt: skip
