"""Payment at Stripe: one open page for a wish, and each payment counted for what it is, whatever arrives."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio

from clawplane.deployment.v1 import deployment_pb2, deployment_service_pb2, payment_pb2, payment_service_pb2
from gateway.webhooks.stripe import sign
from tests.conftest import Databases
from tests.harness import Person, Stack, eventually, running
from tests.simulators.market import MarketSimulator
from tests.simulators.stripe import StripeSimulator

SECRET = "whsec_" + "s" * 32
API_KEY = "sk_test_PLANTEDKEY"
PENDING, DEPLOYING, ACTIVE = deployment_pb2.STATE_PENDING, deployment_pb2.STATE_DEPLOYING, deployment_pb2.STATE_ACTIVE
EXPIRED, CANCELED = deployment_pb2.STATE_EXPIRED, deployment_pb2.STATE_CANCELED
CLOSED = deployment_pb2.STATE_CLOSED


class Shop(Stack):
    """A stack that takes money at the Stripe simulator."""

    stripe_sim: StripeSimulator

    async def post(self, event: dict[str, Any], secret: str = SECRET, at: int | None = None) -> httpx.Response:
        """Delivers a webhook."""
        payload = json.dumps(event).encode()
        header = sign(payload, secret.encode(), at or int(time.time()))
        return await self.http.post("/webhooks/stripe", content=payload, headers={"stripe-signature": header})

    async def tell(self, path: str, **query: Any) -> list[dict[str, Any]]:
        """Lets something happen at Stripe, and delivers what it says of it."""
        events: list[dict[str, Any]] = await self.stripe_sim.post(path, **query)
        for event in events:
            answer = await self.post(event)
            assert answer.status_code == 200, answer.text
        return events

    async def happen(self, path: str, **query: Any) -> list[dict[str, Any]]:
        """Lets something happen at Stripe whose webhooks are lost, or come later."""
        events: list[dict[str, Any]] = await self.stripe_sim.post(path, **query)
        return events

    async def payments_of(self, d: deployment_pb2.Deployment) -> list[payment_pb2.Payment]:
        """The payments of a deployment."""
        request = payment_service_pb2.ListPaymentsRequest(deployment_id=d.id)
        return list((await self.payments.ListPayments(request, metadata=self.operator)).payments)

    async def close(self, d: deployment_pb2.Deployment, person: Person) -> deployment_pb2.Deployment:
        """Closes a deployment as its owner."""
        request = deployment_service_pb2.CloseDeploymentRequest(id=d.id)
        return await self.deployments.CloseDeployment(request, metadata=person.metadata, timeout=30)


def options(market: MarketSimulator, stripe: StripeSimulator, **more: Any) -> dict[str, Any]:
    """Settings of a deployment service that takes money at the simulator."""
    return {
        "driver": "tests.simulators.market:MarketDriver", "driver_options": {"url": market.url},
        "payment_provider": "stripe", "stripe_api_key": API_KEY, "stripe_api_base": stripe.url, "checkout_timeout_s": 2, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def stripe() -> Any:
    """Stripe, in a process of its own."""
    with StripeSimulator() as simulator:
        yield simulator


@pytest_asyncio.fixture(scope="module")
async def shop(
    databases: Databases, market: MarketSimulator, stripe: StripeSimulator, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Shop]:
    """A running shop; lost webhooks are asked about quickly, but not as quickly as they arrive."""
    made = options(market, stripe)
    folder = tmp_path_factory.mktemp("shop")
    async with running(folder, databases.make(), deployment=made, gateway={"stripe_webhook_secrets": [SECRET]}) as started:
        started.__class__ = Shop
        started.stripe_sim = stripe  # type: ignore[attr-defined]
        yield started  # type: ignore[misc]


@pytest_asyncio.fixture
async def buyer(shop: Shop) -> Person:
    """A new user."""
    return await shop.person()


async def test_paid_once_whatever_arrives_twice(shop: Shop, buyer: Person) -> None:
    d = await shop.order(buyer)
    assert d.stripe_session_id.startswith("cs_test_") and d.payment_url
    events = await shop.tell(f"/_sim/sessions/{d.stripe_session_id}/pay")
    for event in events * 3:
        assert (await shop.post(event)).status_code == 200
    live = await shop.until(d.id, ACTIVE)
    assert live.stripe_payment_intent_id.startswith("pi_")
    [payment] = await shop.payments_of(d)
    assert (payment.status, payment.amount_minor, payment.refund_due) == (payment_pb2.PAYMENT_STATUS_SUCCEEDED, 2900, False)


async def test_the_page_is_reused_while_open_and_replaced_on_the_same_row(shop: Shop, buyer: Person) -> None:
    first = await shop.order(buyer)
    assert (await shop.order(buyer)).payment_url == first.payment_url
    await shop.happen(f"/_sim/sessions/{first.stripe_session_id}/expire")
    second = await shop.order(buyer)
    assert second.id == first.id and second.payment_url != first.payment_url
    # Told late of the old page, the wish lives on; paid on the new one, it starts.
    for event in [e for e in await shop.stripe_sim.get("/_sim/events") if e["data"]["object"]["id"] == first.stripe_session_id]:
        assert (await shop.post(event)).status_code == 200
    assert (await shop.get(first.id)).state == PENDING
    await shop.tell(f"/_sim/sessions/{second.stripe_session_id}/pay")
    await shop.until(first.id, ACTIVE)
    keys = [r["idempotency_key"] for r in await shop.stripe_sim.get("/_sim/requests") if r["method"] == "POST" and first.id in str(r["idempotency_key"])]
    assert len(set(keys)) == 2


async def test_fifty_clicks_make_one_session_at_stripe(shop: Shop, buyer: Person) -> None:
    made = await asyncio.gather(*(shop.order(buyer) for _ in range(50)))
    assert len({(d.id, d.payment_url) for d in made}) == 1
    sessions = [s for s in await shop.stripe_sim.get("/_sim/sessions") if s["metadata"].get("deployment_id") == made[0].id]
    assert len(sessions) == 1


async def test_a_slow_payment(shop: Shop, buyer: Person) -> None:
    d = await shop.order(buyer)
    await shop.tell(f"/_sim/sessions/{d.stripe_session_id}/pay", **{"async": 1})
    assert (await shop.get(d.id)).state == PENDING
    # A second page now would ask for the money twice.
    again = await shop.order(buyer)
    assert again.id == d.id and len([s for s in await shop.stripe_sim.get("/_sim/sessions") if s["metadata"].get("deployment_id") == d.id]) == 1
    await shop.tell(f"/_sim/sessions/{d.stripe_session_id}/settle")
    await shop.until(d.id, ACTIVE)


async def test_a_slow_payment_that_fails_in_either_order(shop: Shop, buyer: Person) -> None:
    for turned in (False, True):
        d = await shop.order(buyer, f"20000000{int(turned)}:" + "F" * 35)
        first = await shop.happen(f"/_sim/sessions/{d.stripe_session_id}/pay", **{"async": 1})
        second = await shop.happen(f"/_sim/sessions/{d.stripe_session_id}/fail")
        for event in (second + first) if turned else (first + second):
            assert (await shop.post(event)).status_code == 200
        assert (await shop.get(d.id)).state == EXPIRED, turned


async def test_paid_after_it_expired_deploys_above_the_limit(shop: Shop, buyer: Person) -> None:
    d = await shop.order(buyer)
    paid = await shop.happen(f"/_sim/sessions/{d.stripe_session_id}/pay")
    expired = dict(paid[0], id=f"evt_{os.urandom(6).hex()}", type="checkout.session.expired")
    expired["data"] = {"object": paid[0]["data"]["object"] | {"status": "expired", "payment_status": "unpaid", "payment_intent": None}}
    assert (await shop.post(expired)).status_code == 200
    assert (await shop.get(d.id)).state == EXPIRED
    for n in range(3):
        await shop.order(buyer, f"30000000{n}:" + "L" * 35)
    assert (await shop.post(paid[0])).status_code == 200
    await shop.until(d.id, ACTIVE)


@pytest.mark.parametrize("wrong", [{"amount": 100}, {"currency": "eur"}, {"livemode": 1}])
async def test_a_payment_of_another_kind_starts_nothing(shop: Shop, buyer: Person, wrong: dict[str, Any]) -> None:
    d = await shop.order(buyer)
    await shop.tell(f"/_sim/sessions/{d.stripe_session_id}/pay", **wrong)
    await asyncio.sleep(0.3)
    assert (await shop.get(d.id)).state == PENDING
    [payment] = await shop.payments_of(d)
    assert payment.payment_mismatch and payment.attention
    listed = await shop.payments.ListPayments(payment_service_pb2.ListPaymentsRequest(payment_mismatch=True), metadata=buyer.metadata)
    assert [p.id for p in listed.payments] == [payment.id]


async def test_a_second_payment_is_due_for_refund_and_its_refund_changes_nothing(shop: Shop, buyer: Person) -> None:
    first = await shop.order(buyer)
    await shop.happen(f"/_sim/sessions/{first.stripe_session_id}/pay")
    # The first page's payment is told late: the customer has paid a second one meanwhile.
    sessions = await shop.stripe_sim.get("/_sim/sessions")
    assert any(s["id"] == first.stripe_session_id for s in sessions)
    [paid] = [e for e in await shop.stripe_sim.get("/_sim/events") if e["data"]["object"]["id"] == first.stripe_session_id]
    assert (await shop.post(paid)).status_code == 200
    await shop.until(first.id, ACTIVE)
    other = json.loads(json.dumps(paid).replace(paid["data"]["object"]["payment_intent"], "pi_second").replace(paid["id"], "evt_second" + first.id))
    assert (await shop.post(other)).status_code == 200
    due = [p for p in await shop.payments_of(first) if p.refund_due]
    assert [p.external_id for p in due] == ["pi_second"]
    refund = {
        "id": f"evt_{os.urandom(6).hex()}", "object": "event", "type": "charge.refunded", "created": int(time.time()), "livemode": False,
        "data": {"object": {
            "id": "ch_2", "object": "charge", "payment_intent": "pi_second", "amount": 2900, "amount_refunded": 2900, "currency": "usd",
            "livemode": False, "metadata": {"deployment_id": first.id},
        }},
    }  # fmt: skip
    assert (await shop.post(refund)).status_code == 200
    assert (await shop.get(first.id)).state == ACTIVE
    assert not [p for p in await shop.payments_of(first) if p.refund_due]


async def test_refunds(shop: Shop, buyer: Person) -> None:
    d = await shop.order(buyer)
    await shop.tell(f"/_sim/sessions/{d.stripe_session_id}/pay")
    live = await shop.until(d.id, ACTIVE)
    await shop.tell(f"/_sim/payment_intents/{live.stripe_payment_intent_id}/refund", amount=900)
    assert (await shop.get(d.id)).state == ACTIVE
    [payment] = await shop.payments_of(d)
    assert payment.refunded_minor == 900
    await shop.tell(f"/_sim/payment_intents/{live.stripe_payment_intent_id}/dispute")
    assert (await shop.payments_of(d))[0].disputed and (await shop.get(d.id)).state == ACTIVE
    await shop.tell(f"/_sim/payment_intents/{live.stripe_payment_intent_id}/refund")
    await shop.until(d.id, CLOSED)


async def test_a_refund_that_comes_first_spends_the_payment(shop: Shop, buyer: Person) -> None:
    d = await shop.order(buyer)
    paid = await shop.happen(f"/_sim/sessions/{d.stripe_session_id}/pay")
    await shop.tell(f"/_sim/payment_intents/{paid[0]['data']['object']['payment_intent']}/refund")
    assert (await shop.get(d.id)).state == CANCELED
    assert (await shop.post(paid[0])).status_code == 200
    await asyncio.sleep(0.3)
    assert (await shop.get(d.id)).state == CANCELED
    assert not [p for p in await shop.payments_of(d) if p.refund_due]


async def test_closing(shop: Shop, buyer: Person, market: MarketSimulator) -> None:
    unpaid = await shop.order(buyer)
    assert (await shop.close(unpaid, buyer)).state == CANCELED
    [session] = [s for s in await shop.stripe_sim.get("/_sim/sessions") if s["id"] == unpaid.stripe_session_id]
    assert session["status"] == "expired"
    # Paid in the very moment of the click: the payment counts.
    paid = await shop.order(buyer, "400000001:" + "P" * 35)
    await shop.happen(f"/_sim/sessions/{paid.stripe_session_id}/pay")
    assert (await shop.close(paid, buyer)).state in (DEPLOYING, ACTIVE)
    await shop.until(paid.id, ACTIVE)
    # Closed before it ever ran: the money goes back.
    early = await shop.order(buyer, "400000002:" + "E" * 35)
    await market.post("/_sim/faults", {"step": "offers", "kind": "no_bids", "times": 50, "name": f"clawplane-{early.id}"})
    await shop.tell(f"/_sim/sessions/{early.stripe_session_id}/pay")
    await shop.close(early, buyer)
    await shop.until(early.id, CLOSED)
    await market.post("/_sim/calm")
    [payment] = await shop.payments_of(early)
    assert payment.refund_due and "before" in payment.attention


async def test_a_success_for_what_was_given_up_is_due_for_refund(shop: Shop, buyer: Person) -> None:
    d = await shop.order(buyer)
    await shop.close(d, buyer)
    event = {
        "id": f"evt_{os.urandom(6).hex()}", "object": "event", "type": "checkout.session.completed", "created": int(time.time()),
        "data": {"object": {
            "id": d.stripe_session_id, "object": "checkout.session", "mode": "payment", "payment_status": "paid", "livemode": False,
            "payment_intent": f"pi_{d.id}", "amount_total": 2900, "currency": "usd", "metadata": {"deployment_id": d.id},
        }},
    }  # fmt: skip
    assert (await shop.post(event)).status_code == 200
    assert (await shop.get(d.id)).state == CANCELED
    assert [p.refund_due for p in await shop.payments_of(d)] == [True]


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
@pytest.mark.parametrize("kind", ["drop_after", "hang_after", "error500", "html", "rate_limit", "hang"])
async def test_stripe_breaks_and_the_next_call_works(shop: Shop, buyer: Person, kind: str) -> None:
    times = 1 if kind in ("error500", "html", "rate_limit") else 2
    await shop.stripe_sim.post("/_sim/faults", {"match": "POST /v1/checkout/sessions", "kind": kind, "times": times})
    try:
        await shop.order(buyer)
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert API_KEY not in (error.details() or "") and "Traceback" not in (error.details() or "")
    made = await shop.order(buyer)
    assert made.payment_url
    listed = await shop.deployments.ListDeployments(deployment_service_pb2.ListDeploymentsRequest(), metadata=buyer.metadata)
    assert [d.id for d in listed.deployments] == [made.id]
    sessions = [s for s in await shop.stripe_sim.get("/_sim/sessions") if s["metadata"].get("deployment_id") == made.id]
    assert len(sessions) == 1
    await shop.tell(f"/_sim/sessions/{made.stripe_session_id}/pay")
    await shop.until(made.id, ACTIVE)


async def test_every_page_of_a_row_stays_findable(shop: Shop, buyer: Person) -> None:
    first = await shop.order(buyer)
    paid = await shop.happen(f"/_sim/sessions/{first.stripe_session_id}/expire")
    second = await shop.order(buyer)
    assert second.stripe_session_id != first.stripe_session_id
    late = dict(paid[0], id=f"evt_{os.urandom(6).hex()}", type="checkout.session.completed")
    late["data"] = {"object": paid[0]["data"]["object"] | {"status": "complete", "payment_status": "paid", "payment_intent": f"pi_{first.id}", "metadata": {}, "client_reference_id": None}}
    assert (await shop.post(late)).status_code == 200
    await shop.until(first.id, ACTIVE)


async def test_lost_webhooks_change_nothing(
    databases: Databases, market: MarketSimulator, stripe: StripeSimulator, tmp_path: Any
) -> None:
    made = options(market, stripe, payment_check_s=0.3, refund_check_s=0.5)
    async with running(tmp_path, databases.make(), deployment=made, gateway={"stripe_webhook_secrets": [SECRET]}) as stack:
        person = await stack.person()
        paid, expired = await stack.order(person), await stack.order(person, "500000001:" + "X" * 35)
        await stripe.post(f"/_sim/sessions/{paid.stripe_session_id}/pay")
        await stripe.post(f"/_sim/sessions/{expired.stripe_session_id}/expire")
        live = await stack.until(paid.id, ACTIVE)
        await stack.until(expired.id, EXPIRED)
        await stripe.post(f"/_sim/payment_intents/{live.stripe_payment_intent_id}/refund")
        await stack.until(paid.id, CLOSED)


async def test_what_is_not_ours_is_kept_and_not_retried(shop: Shop, buyer: Person) -> None:
    d = await shop.order(buyer)
    other = {"id": f"evt_{os.urandom(6).hex()}", "object": "event", "type": "customer.created", "created": int(time.time()), "data": {"object": {}}}
    assert (await shop.post(other)).status_code == 200
    stranger = {
        "id": f"evt_{os.urandom(6).hex()}", "object": "event", "type": "charge.refunded", "created": int(time.time()),
        "data": {"object": {"id": "ch_x", "payment_intent": "pi_x", "amount": 1, "amount_refunded": 1, "currency": "usd", "livemode": False}},
    }  # fmt: skip
    assert (await shop.post(stranger)).status_code == 200
    # The sandbox's secret speaks for the sandbox alone.
    forged = {
        "id": f"evt_{os.urandom(6).hex()}", "object": "event", "type": "checkout.session.completed", "created": int(time.time()),
        "data": {"object": {
            "id": "cs_sandbox_" + "0" * 48, "mode": "payment", "payment_status": "paid", "payment_intent": "pi_sandbox_1", "livemode": False,
            "amount_total": 2900, "currency": "usd", "metadata": {"deployment_id": d.id},
        }},
    }  # fmt: skip
    assert (await shop.post(forged, secret=shop.keys["sandbox_webhook_secret"])).status_code == 200
    assert (await shop.post(forged, secret="whsec_wrong")).status_code == 400
    assert (await shop.post(forged, at=int(time.time()) - 400)).status_code == 400
    assert (await shop.post(forged, at=int(time.time()) + 400)).status_code == 400
    await asyncio.sleep(0.3)
    assert (await shop.get(d.id)).state == PENDING and not await shop.payments_of(d)

    async def stays() -> bool:
        return (await shop.get(d.id)).state == PENDING

    assert await eventually(stays)
