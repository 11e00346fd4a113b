"""PaymentService: what providers report, and what needs a person."""

from collections.abc import Callable

from google.protobuf.json_format import MessageToDict
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.deployment.v1 import payment_pb2, payment_service_pb2, payment_service_pb2_grpc
from services.deployment_svc.base import WebhookEvent
from services.deployment_svc.payments.apply import NotOurs, apply
from services.deployment_svc.payments.models import Payment
from services.deployment_svc.settings import DeploymentSettings
from services.kit.call import Call
from services.kit.inbox import take_in
from services.kit.proto import to_datetime, to_proto
from services.kit.standard import list_page


class PaymentService(payment_service_pb2_grpc.PaymentServiceServicer):
    """See proto/clawplane/deployment/v1/payment_service.proto."""

    def __init__(self, settings: DeploymentSettings, wake: Callable[[], None]) -> None:
        self.settings, self.wake = settings, wake

    async def ApplyPaymentEvent(
        self, request: payment_service_pb2.ApplyPaymentEventRequest, call: Call
    ) -> payment_service_pb2.ApplyPaymentEventResponse:
        event = request.event
        response = payment_service_pb2.ApplyPaymentEventResponse()

        async def work(session: AsyncSession) -> None:
            response.Clear()
            taken = await take_in(
                session, WebhookEvent, source=event.provider, external_id=event.external_id, type=event.type, status="applied",
                payload=MessageToDict(event), occurred_at=to_datetime(event.occurred_at, "occurred_at"),
            )  # fmt: skip
            if taken is None:
                response.duplicate = True
                return
            row = await session.get_one(WebhookEvent, taken)
            try:
                d, text = await apply(session, event, self.settings.refund_check_s)
            except NotOurs as stranger:
                # Retrying would not help the provider: the event is kept, with the reason, for operators.
                row.status, row.reason = "ignored", str(stranger)
                response.outcome = f"ignored: {stranger}"
                return
            row.reason = text
            response.deployment_id, response.outcome = d.id, text
            call.audit(d.id, org_id=d.org_id, after={"event": event.type, "outcome": text})

        await call.run(work)
        self.wake()
        return response

    async def ListPayments(
        self, request: payment_service_pb2.ListPaymentsRequest, call: Call
    ) -> payment_service_pb2.ListPaymentsResponse:
        statement = select(Payment)
        if request.deployment_id:
            statement = statement.where(Payment.deployment_id == request.deployment_id)
        if request.refund_due:
            statement = statement.where(Payment.refund_due)
        if request.payment_mismatch:
            statement = statement.where(Payment.payment_mismatch)
        return await list_page(
            call, request, payment_service_pb2.ListPaymentsResponse, statement, Payment.id, lambda row: to_proto(row, payment_pb2.Payment)
        )

    async def IgnoreWebhookEvent(
        self, request: payment_service_pb2.IgnoreWebhookEventRequest, call: Call
    ) -> payment_service_pb2.IgnoreWebhookEventResponse:
        async with call.transaction() as session:
            await take_in(
                session, WebhookEvent, source=request.source, external_id=request.external_id, type=request.type,
                status="ignored", reason=request.reason,
            )  # fmt: skip
        return payment_service_pb2.IgnoreWebhookEventResponse()
