"""WebhookService: the events of identity and payment providers, and applying them again."""

from google.protobuf.json_format import ParseDict
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.user.v1 import webhook_service_pb2 as rpc
from clawplane.user.v1 import webhook_service_pb2_grpc
from clawplane.user.v1.subscription_service_pb2 import ApplyCustomerEventRequest, ApplySubscriptionEventRequest
from clawplane.user.v1.user_service_pb2 import SyncClerkUserRequest
from services.kit.call import Call
from services.kit.inbox import filtered, replay, take_in
from services.kit.proto import to_proto
from services.kit.standard import list_page
from services.user_svc.base import WebhookEvent
from services.user_svc.subscriptions.service import SubscriptionService
from services.user_svc.users.service import UserService


class WebhookService(webhook_service_pb2_grpc.WebhookServiceServicer):
    """See proto/clawplane/user/v1/webhook_service.proto."""

    def __init__(self, users: UserService, subscriptions: SubscriptionService) -> None:
        self.users, self.subscriptions = users, subscriptions

    async def ListWebhookEvents(self, request: rpc.ListWebhookEventsRequest, call: Call) -> rpc.ListWebhookEventsResponse:
        statement = filtered(select(WebhookEvent), WebhookEvent, request)
        return await list_page(call, request, rpc.ListWebhookEventsResponse, statement, WebhookEvent.id, _to_message)

    async def ReplayWebhookEvent(self, request: rpc.ReplayWebhookEventRequest, call: Call) -> rpc.WebhookEvent:
        async def work(session: AsyncSession) -> WebhookEvent:
            async def again(row: WebhookEvent) -> tuple[str, str]:
                payload = row.payload or {}
                if row.source == "clerk":
                    _, text = await self.users.sync(session, call, ParseDict(payload, SyncClerkUserRequest()))
                else:
                    kind = ApplyCustomerEventRequest if row.type.startswith("customer.") else ApplySubscriptionEventRequest
                    _, text = await self.subscriptions.apply(session, ParseDict(payload, kind()))
                return "applied", text

            call.audit(request.id)
            return await replay(session, WebhookEvent, request.id, again)

        return _to_message(await call.run(work))

    async def IgnoreWebhookEvent(self, request: rpc.IgnoreWebhookEventRequest, call: Call) -> rpc.IgnoreWebhookEventResponse:
        async with call.transaction() as session:
            await take_in(
                session, WebhookEvent, source=request.source, external_id=request.external_id, type=request.type,
                status="ignored", reason=request.reason,
            )  # fmt: skip
        return rpc.IgnoreWebhookEventResponse()


def _to_message(row: WebhookEvent) -> rpc.WebhookEvent:
    return to_proto(row, rpc.WebhookEvent)
