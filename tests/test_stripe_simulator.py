"""The Stripe simulator, asked by Stripe's own library."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
import stripe

from tests.simulators.stripe import StripeSimulator, sign, start_stripe

pytestmark = pytest.mark.asyncio
CREATE = "POST /v1/checkout/sessions"
SECRET = "whsec_test"


@pytest.fixture(scope="module")
def process() -> Iterator[StripeSimulator]:
    with start_stripe() as started:
        yield started


@pytest_asyncio.fixture
async def sim(process: StripeSimulator) -> StripeSimulator:
    await process.post("/_sim/reset")
    return process


def connect(sim: StripeSimulator, retries: int = 0, timeout_s: float = 5, key: str = "sk_test_1") -> stripe.StripeClient:
    transport = stripe.HTTPXClient(timeout=timeout_s)
    return stripe.StripeClient(key, http_client=transport, base_addresses={"api": sim.url}, max_network_retries=retries)


@pytest_asyncio.fixture
async def client(sim: StripeSimulator) -> AsyncIterator[stripe.StripeClient]:
    yield connect(sim)


def wish(**changes: Any) -> Any:
    price = {"currency": "usd", "unit_amount": 2900, "product_data": {"name": "A bot"}}
    return {
        "mode": "payment",
        "line_items": [{"quantity": 1, "price_data": price}],
        "metadata": {"deployment_id": "d1"},
        "payment_intent_data": {"metadata": {"deployment_id": "d1"}},
        "client_reference_id": "d1",
        "customer_email": "a@b.test",
        "success_url": "https://app.test/ok",
        "cancel_url": "https://app.test/no",
        **changes,
    }


async def create(client: stripe.StripeClient, key: str | None = None, **changes: Any) -> stripe.checkout.Session:
    options: Any = {"idempotency_key": key} if key else {}
    return await client.v1.checkout.sessions.create_async(wish(**changes), options)


async def count(sim: StripeSimulator, key: str) -> int:
    return sum(one["count"] for one in await sim.get("/_sim/requests") if one["idempotency_key"] == key)


async def test_create(sim: StripeSimulator, client: stripe.StripeClient) -> None:
    closes = int(time.time()) + 3600
    session = await create(client, expires_at=closes)
    assert session.id.startswith("cs_test_") and session.status == "open" and session.payment_status == "unpaid"
    assert (session.amount_total, session.currency, session.livemode, session.expires_at) == (2900, "usd", False, closes)
    assert session.metadata and session.metadata["deployment_id"] == "d1" and session.payment_intent is None
    assert session.url and (await client.v1.checkout.sessions.retrieve_async(session.id)).to_dict() == session.to_dict()
    async with httpx.AsyncClient(trust_env=False) as http:
        assert (await http.get(session.url)).status_code == 200


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"expires_at": int(time.time()) + 60}, "expires_at"),
        ({"expires_at": int(time.time()) + 90_000}, "expires_at"),
        ({"succes_url": "x"}, "succes_url"),
        ({"customer_email": ""}, "customer_email"),
        ({"line_items": []}, "line_items"),
    ],
)
async def test_validation_is_refused_and_not_kept(
    sim: StripeSimulator, client: stripe.StripeClient, changes: Any, param: str
) -> None:
    with pytest.raises(stripe.InvalidRequestError) as refused:
        await create(client, "k", **changes)
    assert refused.value.param == param and refused.value.request_id
    assert (await create(client, "k")).status == "open"


async def test_idempotency(sim: StripeSimulator, client: stripe.StripeClient) -> None:
    first, again = await create(client, "k"), await create(client, "k")
    assert first.id == again.id and len(await sim.get("/_sim/sessions")) == 1 and await count(sim, "k") == 2
    assert again.last_response and again.last_response.headers["idempotent-replayed"] == "true"
    with pytest.raises(stripe.IdempotencyError):
        await create(client, "k", client_reference_id="d2")


async def test_a_kept_500_is_replayed(sim: StripeSimulator, client: stripe.StripeClient) -> None:
    await sim.post("/_sim/faults", {"match": CREATE, "kind": "error500"})
    for _ in range(2):
        with pytest.raises(stripe.APIError) as broken:
            await create(client, "k")
        assert broken.value.http_status == 500
    assert (await create(client, "k2")).status == "open"


async def test_key_in_use(sim: StripeSimulator, client: stripe.StripeClient) -> None:
    await sim.post("/_sim/faults", {"match": CREATE, "kind": "slow", "seconds": 0.5})
    slow = asyncio.create_task(create(client, "k"))
    while not await count(sim, "k"):
        await asyncio.sleep(0.01)
    with pytest.raises(stripe.APIError) as conflict:
        await create(client, "k")
    assert conflict.value.http_status == 409 and conflict.value.error and conflict.value.error.code == "idempotency_key_in_use"
    # With retries the library waits for the first answer by itself.
    assert (await create(connect(sim, retries=2), "k")).id == (await slow).id


async def test_a_lost_answer_is_found_again(sim: StripeSimulator, client: stripe.StripeClient) -> None:
    await sim.post("/_sim/faults", {"match": CREATE, "kind": "drop_after"})
    with pytest.raises(stripe.APIConnectionError):
        await create(client, "k")
    (made,) = await sim.get("/_sim/sessions")
    assert (await create(client, "k")).id == made["id"]
    await sim.post("/_sim/faults", {"match": CREATE, "kind": "drop_after"})
    await create(connect(sim, retries=1))
    assert len(await sim.get("/_sim/sessions")) == 2


@pytest.mark.parametrize(
    ("kind", "error", "status"),
    [
        ("hang", stripe.APIConnectionError, None),
        ("hang_after", stripe.APIConnectionError, None),
        ("rate_limit", stripe.RateLimitError, 429),
        ("html", stripe.APIError, 502),
    ],
)
async def test_faults(sim: StripeSimulator, kind: str, error: type[stripe.StripeError], status: int | None) -> None:
    impatient = connect(sim, timeout_s=0.3)
    await sim.post("/_sim/faults", {"match": CREATE, "kind": kind})
    with pytest.raises(error) as raised:
        await create(impatient, "k")
    assert raised.value.http_status == status
    await create(impatient, "k")
    assert len(await sim.get("/_sim/sessions")) == 1


async def test_expire(sim: StripeSimulator, client: stripe.StripeClient) -> None:
    session = await create(client)
    expired = await client.v1.checkout.sessions.expire_async(session.id)
    assert expired.status == "expired" and expired.url is None
    with pytest.raises(stripe.InvalidRequestError, match="status of `expired`"):
        await client.v1.checkout.sessions.expire_async(session.id)
    assert [event.type for event in (await client.v1.events.list_async()).data] == ["checkout.session.expired"]


async def test_a_complete_session_cannot_expire(sim: StripeSimulator, client: stripe.StripeClient) -> None:
    session = await create(client)
    (event,) = await sim.post(f"/_sim/sessions/{session.id}/pay", created=1000)
    assert (event["type"], event["created"], event["livemode"]) == ("checkout.session.completed", 1000, False)
    assert event["data"]["object"]["payment_status"] == "paid" and event["data"]["object"]["url"] is None
    with pytest.raises(stripe.InvalidRequestError, match="status of `complete`"):
        await client.v1.checkout.sessions.expire_async(session.id)
    with pytest.raises(httpx.HTTPStatusError):
        await sim.post(f"/_sim/sessions/{session.id}/pay")


async def test_refund_and_dispute(sim: StripeSimulator, client: stripe.StripeClient) -> None:
    session = await create(client)
    (paid,) = await sim.post(f"/_sim/sessions/{session.id}/pay")
    identity = paid["data"]["object"]["payment_intent"]
    (refund,) = await sim.post(f"/_sim/payment_intents/{identity}/refund", amount=900)
    (dispute,) = await sim.post(f"/_sim/payment_intents/{identity}/dispute")
    assert (refund["type"], dispute["type"]) == ("charge.refunded", "charge.dispute.created")
    assert refund["data"]["object"]["metadata"] == {"deployment_id": "d1"} and dispute["data"]["object"]["metadata"] == {}
    assert refund["data"]["object"]["payment_intent"] == dispute["data"]["object"]["payment_intent"] == identity
    bare = await client.v1.payment_intents.retrieve_async(identity)
    full: Any = await client.v1.payment_intents.retrieve_async(identity, {"expand": ["latest_charge"]})
    assert bare.latest_charge == full.latest_charge.id and bare.metadata["deployment_id"] == "d1"
    assert (full.latest_charge.amount_refunded, full.latest_charge.refunded, full.latest_charge.disputed) == (900, False, True)
    await sim.post(f"/_sim/payment_intents/{identity}/refund")
    deep: Any = await client.v1.checkout.sessions.retrieve_async(session.id, {"expand": ["payment_intent.latest_charge"]})
    assert deep.payment_intent.latest_charge.refunded


@pytest.mark.parametrize(("end", "status"), [("settle", "paid"), ("fail", "unpaid")])
async def test_delayed_payment(sim: StripeSimulator, client: stripe.StripeClient, end: str, status: str) -> None:
    session = await create(client)
    mismatch: dict[str, Any] = {"async": 1, "amount": 1, "currency": "eur", "livemode": 1}
    (first,) = await sim.post(f"/_sim/sessions/{session.id}/pay", **mismatch)
    assert first["livemode"] and first["data"]["object"]["payment_status"] == "unpaid"
    (second,) = await sim.post(f"/_sim/sessions/{session.id}/{end}")
    assert second["type"] == f"checkout.session.async_payment_{'succeeded' if end == 'settle' else 'failed'}"
    now = await client.v1.checkout.sessions.retrieve_async(session.id)
    assert (now.payment_status, now.amount_total, now.currency) == (status, 1, "eur")


async def test_the_signature_verifies(sim: StripeSimulator, client: stripe.StripeClient) -> None:
    session = await create(client)
    (event,) = await sim.post(f"/_sim/sessions/{session.id}/pay")
    body = json.dumps(event).encode()
    assert stripe.Webhook.construct_event(body, sign(body, SECRET), SECRET).id == event["id"]
    for wrong in (sign(body, "whsec_other"), sign(body, SECRET, int(time.time()) - 301), sign(body + b" ", SECRET)):
        with pytest.raises(stripe.SignatureVerificationError):
            stripe.Webhook.construct_event(body, wrong, SECRET)


async def test_events_page(sim: StripeSimulator, client: stripe.StripeClient) -> None:
    made = [(await sim.post(f"/_sim/sessions/{(await create(client)).id}/pay", created=at))[0]["id"] for at in (30, 10, 20)]
    page = await client.v1.events.list_async({"limit": 2, "types": ["checkout.session.completed"]})
    assert [event.id async for event in page.auto_paging_iter()] == [made[0], made[2], made[1]]
    assert [event.created for event in (await client.v1.events.list_async({"created": {"gte": 20}})).data] == [30, 20]


async def test_keys_and_unknown_objects(sim: StripeSimulator, client: stripe.StripeClient) -> None:
    with pytest.raises(stripe.AuthenticationError):
        await create(connect(sim, key="nonsense"))
    with pytest.raises(stripe.InvalidRequestError) as missing:
        await client.v1.payment_intents.retrieve_async("pi_none")
    assert (missing.value.http_status, missing.value.code) == (404, "resource_missing")
