"""Polar's webhooks: what they mean, and what is never taken for a payment."""

import time
from typing import Any

import httpx
import orjson
import pytest
from gateway_fakes import DEPLOYMENT_ID, POLAR_SECRET, Stack
from hypothesis import given, settings
from hypothesis import strategies as st

from clawplane.deployment.v1 import payment_pb2
from gateway.webhooks import polar, standard
from gateway.webhooks.event import BadEvent, Ignore

pytestmark = pytest.mark.asyncio
_K = payment_pb2.PaymentEventKind
CHECKOUT = "9a2bd6d5-1b1f-4f0e-8b5c-6d1f1f1a0c11"


def order(kind: str = "order.paid", **changes: Any) -> dict[str, Any]:
    """An event of an order."""
    data = {
        "id": "0f3c", "checkout_id": CHECKOUT, "net_amount": 2900, "tax_amount": 551, "total_amount": 3451, "refunded_amount": 0,
        "currency": "usd", "billing_reason": "purchase", "metadata": {"deployment_id": DEPLOYMENT_ID}, **changes,
    }  # fmt: skip
    return {"type": kind, "timestamp": "2026-01-01T00:00:00.500Z", "data": data}


def checkout(status: str, kind: str = "checkout.updated", **changes: Any) -> dict[str, Any]:
    """An event of a checkout."""
    data = {"id": CHECKOUT, "status": status, "net_amount": 2900, "currency": "usd", "metadata": {"deployment_id": DEPLOYMENT_ID}, **changes}
    return {"type": kind, "timestamp": "2026-01-01T00:00:00Z", "data": data}


async def post(stack: Stack, event: Any, secret: str = POLAR_SECRET, age_s: int = 0, **headers: str) -> httpx.Response:
    """Posts a signed event."""
    payload, at = event if isinstance(event, bytes) else orjson.dumps(event), int(time.time()) - age_s
    signed = {"webhook-id": "msg_1", "webhook-timestamp": str(at), "webhook-signature": standard.sign(payload, secret.encode(), "msg_1", at)}
    return await stack.client.post("/webhooks/polar", content=payload, headers=signed | headers)


async def test_an_order_is_a_payment_of_its_checkout(stack: Stack) -> None:
    assert (await post(stack, order())).status_code == 200
    (event,) = stack.platform.events
    assert (event.provider, event.external_id, event.type, event.kind, event.paid) == ("polar", "msg_1", "order.paid", _K.PAYMENT_EVENT_KIND_COMPLETED, True)
    assert (event.session_id, event.payment_id, event.deployment_id) == (CHECKOUT, CHECKOUT, DEPLOYMENT_ID)
    # What was agreed is the price; tax comes on top.
    assert (event.amount_minor, event.currency, event.livemode) == (2900, "usd", False)
    assert event.occurred_at.ToMilliseconds() == 1767225600500


async def test_only_what_is_signed_now_is_taken(stack: Stack) -> None:
    for answer in (
        await post(stack, order(), secret="another secret of theirs"), await post(stack, order(), age_s=301), await post(stack, order(), age_s=-301),
        await post(stack, order(), **{"webhook-id": "msg_2"}), await post(stack, order(), **{"webhook-signature": "v1,"}),
    ):  # fmt: skip
        assert answer.status_code == 400 and "webhook-signature" in answer.text
    assert not stack.platform.events
    # Polar lists several while a secret rolls.
    assert (await post(stack, order(), **{"webhook-signature": "v1,AAAA " + _signature(order())})).status_code == 200


def _signature(event: Any) -> str:
    return standard.sign(orjson.dumps(event), POLAR_SECRET.encode(), "msg_1", int(time.time()))


@pytest.mark.parametrize(
    ("event", "kind", "paid"),
    [
        (checkout("succeeded"), _K.PAYMENT_EVENT_KIND_COMPLETED, True),
        (checkout("failed"), _K.PAYMENT_EVENT_KIND_ASYNC_FAILED, False),
        (checkout("expired"), _K.PAYMENT_EVENT_KIND_EXPIRED, False),
        (checkout("expired", "checkout.expired"), _K.PAYMENT_EVENT_KIND_EXPIRED, False),
        (order("order.refunded", refunded_amount=900), _K.PAYMENT_EVENT_KIND_REFUNDED, False),
    ],
)
async def test_what_events_mean(event: dict[str, Any], kind: int, paid: bool) -> None:
    found = polar.translate(event, "msg_1", 0, livemode=True)
    assert isinstance(found, payment_pb2.PaymentEvent)
    assert (found.kind, found.paid, found.session_id, found.livemode) == (kind, paid, CHECKOUT, True)
    assert found.refunded_minor == (900 if kind == _K.PAYMENT_EVENT_KIND_REFUNDED else 0)


@pytest.mark.parametrize(
    "event",
    [checkout("confirmed"), checkout("open"), order(checkout_id=None), order("order.created"), order("customer.state_changed"), order("benefit.created")],
)
async def test_what_starts_nothing_says_why(event: dict[str, Any]) -> None:
    found = polar.translate(event, "msg_1", 0, livemode=False)
    assert isinstance(found, Ignore) and found.reason and found.type == event["type"]


@given(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["order.paid", "order.refunded", "checkout.updated", "checkout.expired", "subscription.updated", "customer.created", "x"]) | st.none()},
        optional={
            "timestamp": st.none() | st.text(max_size=12) | st.sampled_from(["2026-01-01T00:00:00Z", "2026-01-01", "0001-01-01T00:00:00Z"]),
            "data": st.none()
            | st.dictionaries(
                st.sampled_from(["id", "checkout_id", "status", "net_amount", "refunded_amount", "currency", "metadata", "customer_id", "product_id", "modified_at"]),
                st.none() | st.integers() | st.text(max_size=5) | st.booleans() | st.just({"deployment_id": 1}) | st.sampled_from(["succeeded", CHECKOUT]),
            ),
        },
    )
)
@settings(max_examples=200, deadline=None)
async def test_whatever_comes_is_an_event_or_is_told(event: dict[str, Any]) -> None:
    try:
        found = polar.translate(event, "msg_1", time.time(), livemode=False)
    except BadEvent as error:
        assert str(error)
    else:
        assert found.external_id == "msg_1"
