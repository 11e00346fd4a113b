"""Stripe's webhooks: signatures, meaning, answers."""

import time
from typing import Any

import grpc
import httpx
import orjson
import pytest
from gateway_fakes import DEPLOYMENT_ID, SANDBOX_SECRET, SERVICE_TOKEN, STRIPE_SECRET, STRIPE_SECRET_2, Platform, Stack, running
from hypothesis import given, settings
from hypothesis import strategies as st

from clawplane.deployment.v1 import payment_pb2
from gateway.webhooks import stripe

pytestmark = pytest.mark.asyncio


def session_event(kind: str = "checkout.session.completed", **changes: Any) -> dict[str, Any]:
    """An event about a checkout session, as Stripe makes it."""
    session = {
        "id": "cs_test_1",
        "object": "checkout.session",
        "mode": "payment",
        "payment_status": "paid",
        "payment_intent": "pi_1",
        "amount_total": 2900,
        "currency": "USD",
        "livemode": False,
        "metadata": {"deployment_id": DEPLOYMENT_ID},
        "client_reference_id": None,
        **changes,
    }
    return {"id": "evt_1", "object": "event", "type": kind, "created": 1767225600, "livemode": False, "data": {"object": session}}


def charge_event(kind: str = "charge.refunded", **changes: Any) -> dict[str, Any]:
    """An event about a charge or a dispute."""
    charge = {
        "id": "ch_1",
        "payment_intent": "pi_1",
        "amount": 2900,
        "amount_refunded": 1000,
        "currency": "usd",
        "metadata": {},
        **changes,
    }
    return {"id": "evt_2", "object": "event", "type": kind, "created": 1767225600, "livemode": True, "data": {"object": charge}}


async def post(stack: Stack, event: Any, secret: str = STRIPE_SECRET, age_s: int = 0, **headers: str) -> httpx.Response:
    """Posts a signed event."""
    payload = event if isinstance(event, bytes) else orjson.dumps(event)
    signature = stripe.sign(payload, secret.encode(), int(time.time()) - age_s)
    return await stack.client.post("/webhooks/stripe", content=payload, headers={"stripe-signature": signature, **headers})


async def test_applied(stack: Stack) -> None:
    answer = await post(stack, session_event(), **{"x-request-id": "hook-1", "authorization": "Bearer of a stranger"})
    assert answer.status_code == 200, answer.text
    event = stack.platform.events[0]
    assert (event.provider, event.external_id, event.type) == ("stripe", "evt_1", "checkout.session.completed")
    assert (event.session_id, event.payment_id, event.deployment_id) == ("cs_test_1", "pi_1", DEPLOYMENT_ID)
    assert (event.amount_minor, event.currency, event.livemode, event.paid) == (2900, "usd", False, True)
    assert event.occurred_at.seconds == 1767225600
    seen = stack.platform.metadata[-1]
    assert (seen["authorization"], seen["x-request-id"]) == (SERVICE_TOKEN, "hook-1")


async def test_signatures(stack: Stack) -> None:
    assert (await post(stack, session_event(), STRIPE_SECRET_2)).status_code == 200
    assert (await post(stack, session_event(), age_s=290)).status_code == 200
    payload, now = orjson.dumps(session_event()), int(time.time())
    good = stripe.sign(payload, STRIPE_SECRET.encode(), now)
    rolling = good.replace("v1=", "v1=" + "0" * 64 + ",v0=x,v1=")
    assert (await stack.client.post("/webhooks/stripe", content=payload, headers={"stripe-signature": rolling})).status_code == 200
    arrived = len(stack.platform.events)
    bad = {
        "empty": "",
        "other body": stripe.sign(payload + b" ", STRIPE_SECRET.encode(), now),
        "other secret": stripe.sign(payload, b"", now),
        "stale": stripe.sign(payload, STRIPE_SECRET.encode(), now - 320),
        "future": stripe.sign(payload, STRIPE_SECRET.encode(), now + 320),
        "two times": f"t={now},{good}",
        "no time": good.split(",")[1],
        "no signature": good.split(",")[0],
        "only v0": good.replace("v1=", "v0="),
        "negative": good.replace("t=", "t=-"),
        "long": good + "," + "v1=0," * 2000,
        "words": "hello",
    }
    for name, header in bad.items():
        answer = await stack.client.post("/webhooks/stripe", content=payload, headers={"stripe-signature": header})
        assert (answer.status_code, "stripe-signature" in answer.text) == (400, True), name
    assert (await stack.client.post("/webhooks/stripe", content=payload)).status_code == 400
    assert len(stack.platform.events) == arrived


async def test_sandbox_speaks_for_itself_only(stack: Stack) -> None:
    own = {"id": "cs_sandbox_1", "payment_intent": "pi_sandbox_1"}
    assert (await post(stack, session_event(**own), SANDBOX_SECRET)).status_code == 200
    assert stack.platform.events[-1].provider == "sandbox"
    arrived = len(stack.platform.events)
    for event, secret in (
        (session_event(), SANDBOX_SECRET),
        (session_event(id="cs_sandbox_1"), SANDBOX_SECRET),
        (session_event(payment_intent="pi_sandbox_1"), SANDBOX_SECRET),
        (session_event(**own, livemode=True), SANDBOX_SECRET),
        (charge_event(livemode=False), SANDBOX_SECRET),
        (session_event(**own), STRIPE_SECRET),
        (session_event(id="cs_sandbox_1"), STRIPE_SECRET),
        (charge_event(payment_intent="pi_sandbox_1"), STRIPE_SECRET),
    ):
        assert (await post(stack, event, secret)).status_code == 400, event
    assert len(stack.platform.events) == arrived
    async with running(Platform(), sandbox_enabled=False) as without:
        assert (await post(without, session_event(**own), SANDBOX_SECRET)).status_code == 400
        assert (await without.client.get("/sandbox/checkout/cs_sandbox_0123456789abcdef")).status_code == 404
    async with running(Platform(), sandbox_enabled=False, stripe_webhook_secrets=[]) as without:
        assert (await post(without, session_event(), "")).status_code == 404


async def test_ignored_events_are_stored(stack: Stack) -> None:
    for event in (
        session_event(mode="subscription"),
        {"id": "evt_3", "type": "customer.created", "created": 1767225600, "data": {"object": {}}},
        charge_event(payment_intent=None),
    ):
        assert (await post(stack, event)).status_code == 200
    assert [one.external_id for one in stack.platform.ignored] == ["evt_1", "evt_3", "evt_2"]
    assert "subscription" in stack.platform.ignored[0].reason and stack.platform.ignored[0].source == "stripe"
    assert stack.platform.events == []


async def test_malformed_events(stack: Stack) -> None:
    for event in (
        b"",
        b"{",
        b"\xff",
        b"[1]",
        b'{"id": "evt_1", "id": "evt_2"}',
        {},
        session_event() | {"id": ""},
        session_event() | {"id": "evt\n1"},
        session_event() | {"created": -1},
        session_event() | {"created": 10**15},
        session_event() | {"created": True},
        session_event() | {"data": None},
        session_event() | {"data": {"object": "x"}},
        session_event(amount_total=-1),
        session_event(amount_total=29.5),
        session_event(amount_total=2**63),
        session_event(currency="dollars"),
        session_event(livemode="no"),
        session_event(id=None),
        session_event(payment_intent=7),
        charge_event(amount_refunded=None),
    ):
        answer = await post(stack, event)
        assert answer.status_code == 400, event
        assert "Traceback" not in answer.text


async def test_only_ok_is_2xx(stack: Stack) -> None:
    retry = {
        "UNAVAILABLE",
        "ABORTED",
        "DEADLINE_EXCEEDED",
        "RESOURCE_EXHAUSTED",
        "UNAUTHENTICATED",
        "PERMISSION_DENIED",
        "CANCELLED",
    }
    for code in grpc.StatusCode:
        if code is grpc.StatusCode.OK:
            continue
        stack.platform.fail.append(code)
        event = session_event() if code.value[0] % 2 else {"id": "evt_3", "type": "x.y", "created": 1767225600}
        answer = await post(stack, event)
        assert answer.status_code >= 400, code
        if code.name in retry:
            assert (answer.status_code, "retry-after" in answer.headers) == (503, True), code
        if code is grpc.StatusCode.NOT_FOUND:
            assert answer.status_code == 404
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            assert answer.status_code == 400


async def test_translation() -> None:
    def translated(event: dict[str, Any]) -> payment_pb2.PaymentEvent:
        result = stripe.translate(event)
        assert isinstance(result, payment_pb2.PaymentEvent)
        return result

    kinds = {
        "checkout.session.async_payment_succeeded": payment_pb2.PAYMENT_EVENT_KIND_ASYNC_SUCCEEDED,
        "checkout.session.async_payment_failed": payment_pb2.PAYMENT_EVENT_KIND_ASYNC_FAILED,
        "checkout.session.expired": payment_pb2.PAYMENT_EVENT_KIND_EXPIRED,
    }
    for kind, meaning in kinds.items():
        assert translated(session_event(kind)).kind == meaning
    assert not translated(session_event(payment_status="unpaid")).paid
    free = translated(session_event(payment_status="no_payment_required", payment_intent=None, amount_total=0))
    assert (free.paid, free.payment_id) == (True, "")
    expanded = {"id": "pi_9", "metadata": {"deployment_id": DEPLOYMENT_ID}}
    assert translated(session_event(payment_intent=expanded)).payment_id == "pi_9"
    refund = translated(charge_event(payment_intent=expanded))
    assert (refund.kind, refund.amount_minor, refund.refunded_minor) == (payment_pb2.PAYMENT_EVENT_KIND_REFUNDED, 2900, 1000)
    assert (refund.livemode, refund.deployment_id, refund.session_id) == (True, DEPLOYMENT_ID, "")
    assert translated(charge_event("charge.dispute.created")).kind == payment_pb2.PAYMENT_EVENT_KIND_DISPUTED
    assert translated(session_event(metadata={}, client_reference_id=DEPLOYMENT_ID)).deployment_id == DEPLOYMENT_ID
    for reference in ("order-7", "dep_x", DEPLOYMENT_ID + "\n", 5, None):
        assert translated(session_event(metadata={"deployment_id": reference}, client_reference_id=reference)).deployment_id == ""
    assert translated(session_event(metadata=None)).deployment_id == ""


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from(list(session_event()["data"]["object"])), st.none() | st.integers() | st.text() | st.booleans())
)
async def test_any_session_is_translated_or_refused(changes: dict[str, Any]) -> None:
    try:
        stripe.translate(session_event(**changes))
    except stripe.BadEvent:
        pass
