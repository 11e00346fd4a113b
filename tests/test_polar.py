"""Payment at Polar: nothing starts before the money is there, and what was paid starts exactly once, whatever is lost or repeated."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from clawplane.deployment.v1 import deployment_pb2, payment_pb2, payment_service_pb2
from clawplane.deployment.v1 import deployment_service_pb2 as rpc
from tests.conftest import Databases
from tests.harness import Stack, eventually, running
from tests.simulators.market import MarketSimulator
from tests.simulators.polar import PRODUCT, SECRET, TOKEN, PolarSimulator

PENDING, ACTIVE, CLOSED = deployment_pb2.STATE_PENDING, deployment_pb2.STATE_ACTIVE, deployment_pb2.STATE_CLOSED
SETTINGS: dict[str, Any] = {
    "payment_provider": "polar", "polar_access_token": TOKEN, "polar_product_id": PRODUCT, "checkout_timeout_s": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def polar() -> Iterator[PolarSimulator]:
    """Polar, in a process of its own."""
    with PolarSimulator() as simulator:
        yield simulator


@pytest_asyncio.fixture(scope="module")
async def shop(
    databases: Databases, market: MarketSimulator, polar: PolarSimulator, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stack]:
    """A stack that is paid through Polar."""
    driver = {"driver": "tests.simulators.market:MarketDriver", "driver_options": {"url": market.url}}
    options = SETTINGS | driver | {"polar_api_base": polar.url}
    async with running(
        tmp_path_factory.mktemp("polar"), databases.make(), deployment=options, gateway={"polar_webhook_secrets": [SECRET]}
    ) as stack:
        await polar.do("webhooks", url=f"{stack.url}/webhooks/polar")
        yield stack


async def payments(stack: Stack, d: deployment_pb2.Deployment) -> list[payment_pb2.Payment]:
    """The payments of a deployment."""
    request = payment_service_pb2.ListPaymentsRequest(deployment_id=d.id)
    return list((await stack.payments.ListPayments(request, metadata=stack.operator)).payments)


async def test_paid_once_and_started_once(shop: Stack, polar: PolarSimulator, market: MarketSimulator) -> None:
    person = await shop.person()
    made = await asyncio.gather(*(shop.order(person) for _ in range(10)))
    assert len({(d.id, d.payment_url) for d in made}) == 1
    d = made[0]
    (page,) = [one for one in await polar.do("checkouts") if one["metadata"]["deployment_id"] == d.id]
    assert (d.polar_id, d.payment_url, page["net_amount"], page["external_customer_id"]) == (page["id"], page["url"], 2900, person.user.id)
    # GoClaw started the bot here, and the card was refused afterwards.
    assert await polar.do("confirm", id=page["id"]) == 200
    assert (await shop.get(d.id)).state == PENDING and not await payments(shop, d)
    assert set(await polar.do("succeed", id=page["id"], times=3)) == {200}
    live = await shop.until(d.id, ACTIVE)
    (payment,) = await payments(shop, d)
    assert (payment.amount_minor, payment.status, payment.external_id) == (2900, payment_pb2.PAYMENT_STATUS_SUCCEEDED, page["id"])
    starts = await market.get("/_sim/starts")
    assert starts[f"clawplane-{d.id}"] == 1
    found = await shop.deployments.LookupDeployment(rpc.LookupDeploymentRequest(polar_id=page["id"]), metadata=shop.operator)
    assert found.id == live.id
    assert await polar.do("refund", id=page["id"], amount=900) == 200
    assert (await shop.get(d.id)).state == ACTIVE
    assert await polar.do("refund", id=page["id"], amount=2000) == 200
    await shop.until(d.id, CLOSED)


async def test_a_page_whose_answer_was_lost_is_paid_all_the_same(shop: Stack, polar: PolarSimulator) -> None:
    person = await shop.person()
    await polar.do("faults", call="create.lost")
    with pytest.raises(grpc.aio.AioRpcError) as lost:
        await shop.order(person)
    assert lost.value.code() is grpc.StatusCode.UNAVAILABLE
    (orphan,) = [one for one in await polar.do("checkouts") if one["external_customer_id"] == person.user.id]
    d = await shop.order(person)
    assert d.polar_id != orphan["id"]
    await polar.do("succeed", id=orphan["id"])
    await shop.until(d.id, ACTIVE)
    # Polar cannot close a page: who pays on the other one as well gets the money back.
    await polar.do("succeed", id=d.polar_id)
    assert sorted(payment.refund_due for payment in await payments(shop, d)) == [False, True]


@pytest.mark.parametrize("fault", [{"kind": "html"}, {"kind": "status", "status": 500}, {"kind": "status", "status": 429}, {"kind": "hang"}])
async def test_faults_are_told_and_pass(shop: Stack, polar: PolarSimulator, fault: dict[str, Any]) -> None:
    person = await shop.person()
    await polar.do("faults", call="create", **fault)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await shop.order(person)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE and "polar" not in (refused.value.details() or "").lower()
    assert (await shop.order(person)).payment_url


async def test_a_lost_webhook_costs_nothing(
    databases: Databases, market: MarketSimulator, polar: PolarSimulator, tmp_path_factory: pytest.TempPathFactory
) -> None:
    driver = {"driver": "tests.simulators.market:MarketDriver", "driver_options": {"url": market.url}}
    options = SETTINGS | driver | {"polar_api_base": polar.url, "payment_check_s": 0.3, "refund_check_s": 0.3}
    async with running(tmp_path_factory.mktemp("lost"), databases.make(), deployment=options) as stack:
        d = await stack.order(await stack.person())
        await polar.do("succeed", id=d.polar_id, silent=True)
        await stack.until(d.id, ACTIVE)

        async def no_webhook_of_polar() -> bool:
            return (await stack.http.post("/webhooks/polar", content=b"{}")).status_code == 404

        await eventually(no_webhook_of_polar)
