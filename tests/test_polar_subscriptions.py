"""Polar's customers and subscriptions: tier and status follow, whatever order, however often, and no customer changes hands."""

import asyncio
import itertools
import random
import secrets
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from clawplane.user.v1 import (
    entitlement_service_pb2,
    subscription_service_pb2,
    subscription_service_pb2_grpc,
    user_pb2,
    webhook_service_pb2,
    webhook_service_pb2_grpc,
)
from clawplane.user.v1 import user_service_pb2 as rpc
from services.user_svc.settings import TIERS, Tier
from services.user_svc.subscriptions.models import Subscription
from services.user_svc.subscriptions.rules import is_newer, projection
from tests.conftest import Databases
from tests.harness import Person, Stack, eventually, running
from tests.simulators.market import MarketSimulator
from tests.simulators.polar import PRODUCT, SECRET, TOKEN, PolarSimulator

_S = user_pb2.SubscriptionStatus
PRO, BUSINESS = "prod-pro", "prod-business"
START = datetime(2026, 5, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def polar() -> Iterator[PolarSimulator]:
    with PolarSimulator() as simulator:
        yield simulator


@pytest_asyncio.fixture(scope="module")
async def shop(
    databases: Databases, market: MarketSimulator, polar: PolarSimulator, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stack]:
    """A stack that takes Polar's webhooks."""
    deployment = {
        "driver": "tests.simulators.market:MarketDriver", "driver_options": {"url": market.url}, "payment_provider": "polar",
        "polar_access_token": TOKEN, "polar_product_id": PRODUCT, "polar_api_base": polar.url,
    }  # fmt: skip
    user = {"polar_tiers": {PRO: "pro", BUSINESS: "business"}, "tiers": TIERS}
    gateway = {"polar_webhook_secrets": [SECRET]}
    folder = tmp_path_factory.mktemp("subscriptions")
    async with running(folder, databases.make(), deployment=deployment, gateway=gateway, user=user) as stack:
        await polar.do("webhooks", url=f"{stack.url}/webhooks/polar")
        yield stack


@pytest_asyncio.fixture
async def buyer(shop: Stack) -> Person:
    return await shop.person()


def at(minutes: float) -> str:
    return (START + timedelta(minutes=minutes)).isoformat()


def customer(person: Person | None, customer_id: str, minutes: float = 0) -> dict[str, Any]:
    return {"id": customer_id, "external_id": person.user.id if person else None, "email": "x@example.com", "modified_at": at(minutes)}


def subscription(number: str, customer_id: str, status: str = "active", minutes: float = 0, product: str = PRO, **more: Any) -> dict[str, Any]:
    return {
        "id": number, "customer_id": customer_id, "status": status, "product_id": product, "modified_at": at(minutes),
        "current_period_end": at(60 * 24 * 30), "cancel_at_period_end": False, **more,
    }  # fmt: skip


async def tell(polar: PolarSimulator, kind: str, data: dict[str, Any], message_id: str = "") -> None:
    assert await polar.do("tell", type=kind, data=data, id=message_id) == 200


async def user_of(shop: Stack, person: Person) -> user_pb2.User:
    return await shop.users.GetUser(rpc.GetUserRequest(id=person.user.id), metadata=shop.operator)


def tag() -> str:
    return secrets.token_hex(6)


async def test_a_customer_is_linked_by_our_own_id_only(shop: Stack, polar: PolarSimulator, buyer: Person) -> None:
    cus = f"cus-{tag()}"
    # The same address, but nobody's id: GoClaw would have linked it.
    await tell(polar, "customer.created", customer(None, cus) | {"email": buyer.user.email})
    assert not (await user_of(shop, buyer)).polar_customer_id
    await tell(polar, "customer.updated", customer(buyer, cus, 1))
    found = await shop.users.LookupUser(rpc.LookupUserRequest(polar_customer_id=cus), metadata=shop.operator)
    assert found.id == buyer.user.id
    # A stranger's event does not take the customer over.
    stranger = await shop.person()
    await tell(polar, "customer.updated", customer(stranger, cus, 2))
    assert (await user_of(shop, buyer)).polar_customer_id == cus and not (await user_of(shop, stranger)).polar_customer_id
    # Gone there and made anew: linked anew, and the deletion that comes late changes nothing.
    await tell(polar, "customer.created", customer(buyer, f"{cus}-2", 5))
    late = customer(buyer, cus)
    assert await polar.do("tell", type="customer.deleted", data=late) == 200
    assert (await user_of(shop, buyer)).polar_customer_id == f"{cus}-2"


async def test_the_tier_follows(shop: Stack, polar: PolarSimulator, buyer: Person) -> None:
    cus, sub = f"cus-{tag()}", f"sub-{tag()}"
    await tell(polar, "customer.created", customer(buyer, cus))
    await tell(polar, "subscription.created", subscription(sub, cus, "incomplete"))
    assert ((await user_of(shop, buyer)).tier, (await user_of(shop, buyer)).subscription_status) == ("starter", _S.SUBSCRIPTION_STATUS_INCOMPLETE)
    await tell(polar, "subscription.active", subscription(sub, cus, "active", 1))
    user = await user_of(shop, buyer)
    assert (user.tier, user.subscription_status, user.is_premium) == ("pro", _S.SUBSCRIPTION_STATUS_ACTIVE, True)
    # The other service learns of it: the price of what is ordered now is the new tier's.
    get = entitlement_service_pb2.GetEntitlementsRequest(org_id=buyer.org_id)
    assert (await shop.entitlements.GetEntitlements(get, metadata=shop.operator)).live_deployments == 3

    async def dearer() -> bool:
        return (await shop.order(buyer, token=f"{random.randint(10**5, 10**8)}:{'A' * 35}")).price_minor == 4900

    await eventually(dearer, 5)
    await tell(polar, "subscription.past_due", subscription(sub, cus, "past_due", 2))
    assert ((await user_of(shop, buyer)).tier, (await user_of(shop, buyer)).subscription_status) == ("pro", _S.SUBSCRIPTION_STATUS_PAST_DUE)
    # "canceled" with the end of the period is still in force.
    await tell(polar, "subscription.canceled", subscription(sub, cus, "active", 3, cancel_at_period_end=True))
    assert (await user_of(shop, buyer)).tier == "pro"
    await tell(polar, "subscription.revoked", subscription(sub, cus, "canceled", 4))
    user = await user_of(shop, buyer)
    assert (user.tier, user.subscription_status) == ("starter", _S.SUBSCRIPTION_STATUS_CANCELED)
    # GoClaw let this one, late and out of order, bring it back.
    await tell(polar, "subscription.updated", subscription(sub, cus, "active", 2.5))
    assert (await user_of(shop, buyer)).tier == "starter"


async def test_the_dearest_in_force_counts(shop: Stack, polar: PolarSimulator, buyer: Person) -> None:
    cus = f"cus-{tag()}"
    await tell(polar, "customer.created", customer(buyer, cus))
    await tell(polar, "subscription.active", subscription(f"a-{cus}", cus, "active", 1))
    await tell(polar, "subscription.active", subscription(f"b-{cus}", cus, "active", 2, BUSINESS))
    assert (await user_of(shop, buyer)).tier == "business"
    await tell(polar, "subscription.revoked", subscription(f"b-{cus}", cus, "canceled", 3, BUSINESS))
    assert ((await user_of(shop, buyer)).tier, (await user_of(shop, buyer)).subscription_status) == ("pro", _S.SUBSCRIPTION_STATUS_ACTIVE)
    # A product that gives no tier takes none away.
    await tell(polar, "subscription.active", subscription(f"c-{cus}", cus, "active", 4, "prod-unknown"))
    assert (await user_of(shop, buyer)).tier == "pro"
    stub = subscription_service_pb2_grpc.SubscriptionServiceStub(shop.channel)
    listed = await stub.ListSubscriptions(subscription_service_pb2.ListSubscriptionsRequest(org_id=buyer.org_id), metadata=shop.operator)
    assert [(one.tier, one.status) for one in listed.subscriptions] == [
        ("", _S.SUBSCRIPTION_STATUS_ACTIVE), ("business", _S.SUBSCRIPTION_STATUS_CANCELED), ("pro", _S.SUBSCRIPTION_STATUS_ACTIVE)
    ]  # fmt: skip


async def test_a_subscription_before_its_customer_is_kept(shop: Stack, polar: PolarSimulator, buyer: Person) -> None:
    cus = f"cus-{tag()}"
    await tell(polar, "subscription.active", subscription(f"s-{cus}", cus))
    assert (await user_of(shop, buyer)).tier == "starter"
    await tell(polar, "customer.created", customer(buyer, cus))
    assert (await user_of(shop, buyer)).tier == "pro"


async def test_repeated_and_replayed(shop: Stack, polar: PolarSimulator, buyer: Person) -> None:
    cus, message = f"cus-{tag()}", f"msg_{tag()}"
    await tell(polar, "customer.created", customer(buyer, cus))
    for _ in range(3):
        await tell(polar, "subscription.active", subscription(f"s-{cus}", cus), message)
    await tell(polar, "subscription.revoked", subscription(f"s-{cus}", cus, "canceled", 1))
    stub = webhook_service_pb2_grpc.WebhookServiceStub(shop.channel)
    listed = await stub.ListWebhookEvents(webhook_service_pb2.ListWebhookEventsRequest(source="polar"), metadata=shop.operator)
    (stored,) = [one for one in listed.events if one.external_id == message]
    again = await stub.ReplayWebhookEvent(webhook_service_pb2.ReplayWebhookEventRequest(id=stored.id), metadata=shop.operator)
    assert again.reason == "older than what was applied before" and (await user_of(shop, buyer)).tier == "starter"


async def test_every_order_ends_the_same(shop: Stack, polar: PolarSimulator) -> None:
    """Four events of one subscription in all orders, each twice."""
    events = [("created", "incomplete", 0), ("active", "active", 1), ("past_due", "past_due", 2), ("revoked", "unpaid", 3)]
    orders = list(itertools.permutations(events))
    for order in random.Random(7).sample(orders, 8):
        buyer, cus = await shop.person(), f"cus-{tag()}"
        for kind, status, minutes in [*order, *order[:2]]:
            data = subscription(f"s-{cus}", cus, status, minutes, customer={"external_id": buyer.user.id})
            await tell(polar, f"subscription.{kind}", data)
        user = await user_of(shop, buyer)
        assert (user.tier, user.subscription_status) == ("starter", _S.SUBSCRIPTION_STATUS_UNPAID), order


async def test_only_the_gateway_applies(shop: Stack, buyer: Person) -> None:
    stub = subscription_service_pb2_grpc.SubscriptionServiceStub(shop.channel)
    event = subscription_service_pb2.ApplySubscriptionEventRequest(
        provider="polar", external_id="x", type="subscription.active", subscription_id="s", customer_id="c", user_id=buyer.user.id,
        product_id=BUSINESS, status=_S.SUBSCRIPTION_STATUS_ACTIVE,
    )  # fmt: skip
    event.occurred_at.GetCurrentTime()
    with pytest.raises(grpc.aio.AioRpcError) as denied:
        await stub.ApplySubscriptionEvent(event, metadata=buyer.metadata)
    assert denied.value.code() is grpc.StatusCode.PERMISSION_DENIED


STATUSES = st.sampled_from([value for value in _S.values() if value])


@given(st.lists(st.tuples(st.integers(0, 5), STATUSES), min_size=1, max_size=8), st.randoms())
def test_the_last_word_does_not_depend_on_the_order(events: list[tuple[int, int]], chance: random.Random) -> None:
    def last(sequence: list[tuple[int, int]]) -> tuple[datetime, int]:
        (minutes, status), *rest = sequence
        known = Subscription(status=status, changed_at=START + timedelta(minutes=minutes))
        for later, word in rest:
            when = START + timedelta(minutes=later)
            if is_newer(known, when, word):
                known.status, known.changed_at = word, when
        return known.changed_at, known.status

    shuffled = events[:]
    chance.shuffle(shuffled)
    assert last(events) == last(shuffled)


@given(st.lists(st.tuples(st.sampled_from(["", "pro", "business", "gone"]), STATUSES), max_size=6))
def test_a_tier_is_only_what_is_in_force(rows: list[tuple[str, int]]) -> None:
    tiers = TIERS | {"free": Tier(price_minor=0, monthly_tokens=0, monthly_credit_minor=1, live_deployments=1)}
    made = [
        Subscription(id=f"sub_{number}", tier=tier, status=status, changed_at=START + timedelta(minutes=number))
        for number, (tier, status) in enumerate(rows)
    ]
    tier, status = projection(made, tiers, "free")
    live = {one.tier for one in made if one.status in (_S.SUBSCRIPTION_STATUS_ACTIVE, _S.SUBSCRIPTION_STATUS_PAST_DUE)} & set(TIERS)
    assert tier == ("business" if "business" in live else "pro" if "pro" in live else "free")
    assert status in {one.status for one in made} or (not made and status == 0)


async def test_two_subscriptions_at_once_are_both_seen(shop: Stack) -> None:
    """Told of in the same moment after the customer was unlinked: nothing but the projection's own lock keeps them apart."""
    stub = subscription_service_pb2_grpc.SubscriptionServiceStub(shop.channel)

    def event(sub: str, cus: str, status: "_S.ValueType", user_id: str, minutes: int) -> subscription_service_pb2.ApplySubscriptionEventRequest:
        made = subscription_service_pb2.ApplySubscriptionEventRequest(
            provider="polar", external_id=tag(), type="subscription.updated", subscription_id=sub, customer_id=cus, user_id=user_id,
            product_id=PRO, status=status,
        )  # fmt: skip
        made.occurred_at.FromDatetime(START + timedelta(minutes=minutes))
        return made

    for _ in range(15):
        buyer, cus = await shop.person(), f"cus-{tag()}"
        for sub in ("a", "b"):
            active = event(f"{sub}-{cus}", cus, _S.SUBSCRIPTION_STATUS_ACTIVE, buyer.user.id, 0)
            await stub.ApplySubscriptionEvent(active, metadata=shop.operator)
        # Both end: each alone would leave the tier to the other.
        ended = [event(f"{sub}-{cus}", cus, _S.SUBSCRIPTION_STATUS_CANCELED, "", 1) for sub in ("a", "b")]
        await asyncio.gather(*(stub.ApplySubscriptionEvent(one, metadata=shop.operator) for one in ended))
        assert (await user_of(shop, buyer)).tier == "starter"
