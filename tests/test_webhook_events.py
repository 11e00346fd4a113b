"""Stored webhook events: listed, and applied again."""

import uuid
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from clawplane.deployment.v1 import deployment_pb2, payment_pb2, payment_service_pb2, webhook_service_pb2, webhook_service_pb2_grpc
from clawplane.user.v1 import user_service_pb2
from clawplane.user.v1 import webhook_service_pb2 as user_webhooks
from clawplane.user.v1 import webhook_service_pb2_grpc as user_webhooks_grpc
from tests.harness import Person, Stack

rpc = webhook_service_pb2


async def test_a_payment_that_came_too_early_is_replayed(stack: Stack, person: Person) -> None:
    """An event about a deployment of another environment is kept as ignored; what it says is applied once it can be."""
    desk = webhook_service_pb2_grpc.WebhookServiceStub(stack.channel)
    d = await stack.order(person)
    event = payment_pb2.PaymentEvent(
        provider="sandbox", external_id=f"evt_{uuid.uuid4().hex}", type="checkout.session.completed", paid=True,
        kind=payment_pb2.PAYMENT_EVENT_KIND_COMPLETED, session_id=d.stripe_session_id, payment_id=f"pi_{uuid.uuid4().hex}",
        deployment_id=d.id, amount_minor=d.price_minor, currency=d.currency,
    )  # fmt: skip
    event.occurred_at.GetCurrentTime()
    apply = payment_service_pb2.ApplyPaymentEventRequest(event=event)
    await stack.payments.ApplyPaymentEvent(apply, metadata=stack.operator)
    await stack.until(d.id, deployment_pb2.STATE_ACTIVE)
    listed = await desk.ListWebhookEvents(rpc.ListWebhookEventsRequest(source="sandbox", status="applied"), metadata=stack.operator)
    (stored,) = [one for one in listed.events if one.external_id == event.external_id]
    assert stored.payload["sessionId"] == d.stripe_session_id and stored.reason == "paid"
    again = await desk.ReplayWebhookEvent(rpc.ReplayWebhookEventRequest(id=stored.id), metadata=stack.operator)
    assert (again.status, again.reason) == ("applied", "already started on this payment")
    assert again.updated_at.ToDatetime() > stored.updated_at.ToDatetime()
    assert (await stack.get(d.id)).attempts == 0
    ignore = payment_service_pb2.IgnoreWebhookEventRequest(source="stripe", external_id=uuid.uuid4().hex, type="x.y", reason="nobody handles it")
    await stack.payments.IgnoreWebhookEvent(ignore, metadata=stack.operator)
    listed = await desk.ListWebhookEvents(rpc.ListWebhookEventsRequest(source="stripe", status="ignored"), metadata=stack.operator)
    (unknown,) = [one for one in listed.events if one.external_id == ignore.external_id]
    assert unknown.reason == "nobody handles it" and not unknown.HasField("payload")
    for replay, code in (
        (desk.ReplayWebhookEvent(rpc.ReplayWebhookEventRequest(id=unknown.id), metadata=stack.operator), grpc.StatusCode.FAILED_PRECONDITION),
        (desk.ReplayWebhookEvent(rpc.ReplayWebhookEventRequest(id="whe_" + "0" * 32), metadata=stack.operator), grpc.StatusCode.NOT_FOUND),
        (desk.ReplayWebhookEvent(rpc.ReplayWebhookEventRequest(id=stored.id), metadata=person.metadata), grpc.StatusCode.PERMISSION_DENIED),
        (desk.ListWebhookEvents(rpc.ListWebhookEventsRequest(), metadata=person.metadata), grpc.StatusCode.PERMISSION_DENIED),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await replay
        assert refused.value.code() is code


async def test_an_old_update_of_a_user_stays_old(stack: Stack) -> None:
    desk = user_webhooks_grpc.WebhookServiceStub(stack.channel)
    clerk_id, now = f"user_{uuid.uuid4().hex}", datetime.now(UTC)

    async def sync(name: str, at: datetime) -> user_service_pb2.SyncClerkUserResponse:
        request = user_service_pb2.SyncClerkUserRequest(
            external_id=uuid.uuid4().hex, clerk_user_id=clerk_id, email=f"{clerk_id[5:20]}@example.com", email_verified=True, full_name=name,
        )  # fmt: skip
        request.occurred_at.FromDatetime(at)
        return await stack.users.SyncClerkUser(request, metadata=stack.operator)

    made = await sync("First", now)
    await sync("Second", now + timedelta(seconds=5))
    listed = await desk.ListWebhookEvents(user_webhooks.ListWebhookEventsRequest(source="clerk", status="applied", page_size=250), metadata=stack.operator)
    first = [one for one in listed.events if one.payload["clerkUserId"] == clerk_id][-1]
    again = await desk.ReplayWebhookEvent(user_webhooks.ReplayWebhookEventRequest(id=first.id), metadata=stack.operator)
    assert again.reason == "older than what was applied before"
    user = await stack.users.GetUser(user_service_pb2.GetUserRequest(id=made.user_id), metadata=stack.operator)
    assert user.full_name == "Second"
