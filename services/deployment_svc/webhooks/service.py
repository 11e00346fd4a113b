"""WebhookService: the events of payment providers, and applying them again."""

from collections.abc import Callable

from google.protobuf.json_format import ParseDict
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.deployment.v1 import webhook_service_pb2 as rpc
from clawplane.deployment.v1 import webhook_service_pb2_grpc
from clawplane.deployment.v1.payment_pb2 import PaymentEvent
from services.deployment_svc.base import WebhookEvent
from services.deployment_svc.payments.apply import NotOurs, apply
from services.deployment_svc.settings import DeploymentSettings
from services.kit.call import Call
from services.kit.inbox import filtered, replay
from services.kit.proto import to_proto
from services.kit.standard import list_page


class WebhookService(webhook_service_pb2_grpc.WebhookServiceServicer):
    """See proto/clawplane/deployment/v1/webhook_service.proto."""

    def __init__(self, settings: DeploymentSettings, wake: Callable[[], None]) -> None:
        self.settings, self.wake = settings, wake

    async def ListWebhookEvents(self, request: rpc.ListWebhookEventsRequest, call: Call) -> rpc.ListWebhookEventsResponse:
        statement = filtered(select(WebhookEvent), WebhookEvent, request)
        return await list_page(call, request, rpc.ListWebhookEventsResponse, statement, WebhookEvent.id, _to_message)

    async def ReplayWebhookEvent(self, request: rpc.ReplayWebhookEventRequest, call: Call) -> rpc.WebhookEvent:
        async def work(session: AsyncSession) -> WebhookEvent:
            async def again(row: WebhookEvent) -> tuple[str, str]:
                try:
                    d, text = await apply(session, ParseDict(row.payload or {}, PaymentEvent()), self.settings.refund_check_s)
                except NotOurs as stranger:
                    return "ignored", str(stranger)
                call.audit(row.id, org_id=d.org_id, after={"deployment_id": d.id, "outcome": text})
                return "applied", text

            call.audit(request.id)
            return await replay(session, WebhookEvent, request.id, again)

        row = await call.run(work)
        self.wake()
        return _to_message(row)


def _to_message(row: WebhookEvent) -> rpc.WebhookEvent:
    return to_proto(row, rpc.WebhookEvent)
