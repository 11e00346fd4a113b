"""The counting market, through its driver."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
import pytest_asyncio

from services.deployment_svc.markets.driver import Driver, Lease, Order, ProviderError, Secrets, Spec
from tests.simulators.market import MarketDriver, MarketSimulator

pytestmark = pytest.mark.asyncio
SECRETS = Secrets(claw_key="claw_1", channel_token="123:abc")


@pytest.fixture(scope="module")
def process() -> Iterator[MarketSimulator]:
    with MarketSimulator() as started:
        yield started


@pytest_asyncio.fixture
async def sim(process: MarketSimulator) -> MarketSimulator:
    await process.get("/_sim/reset")
    return process


@pytest_asyncio.fixture
async def driver(sim: MarketSimulator) -> AsyncIterator[Driver]:
    made = MarketDriver(sim.url, timeout_s=0.5)
    yield made
    await made.shutdown()


def spec(name: str = "bot-1") -> Spec:
    return Spec(name, "d1", "o1", "model", "telegram")


async def start(driver: Driver, order: Order, choice: int = 0) -> Lease:
    offer = (await driver.offers(order))[choice]
    return await driver.lease(order, offer)


async def test_life_of_an_order(sim: MarketSimulator, driver: Driver) -> None:
    await sim.post("/_sim/settings", {"ready_delay": 0.3})
    order = await driver.create(spec(), SECRETS, "s1")
    assert await driver.find("bot-1") == [order.id] and await driver.find("bot") == []
    assert (await driver.observe(order.id)).phase == "ordered"
    assert [offer.provider for offer in await driver.offers(order)] == ["p1", "p2", "p3", "p4", "p5"]
    lease = await start(driver, order)
    assert (await driver.observe(order.id)).phase == "starting"
    await asyncio.sleep(0.35)
    seen = await driver.observe(order.id)
    assert (seen.phase, seen.start_id, seen.lease_id, seen.provider) == ("ready", "s1", lease.id, "p1") and seen.url
    await driver.close(order.id)
    await driver.close(order.id)
    assert (await driver.observe(order.id)).phase == "absent" and await driver.find("bot-1") == []
    steps = [(one["step"], one["status"]) for one in await sim.get("/_sim/log")]
    assert steps[0] == ("create", 201) and steps[-3:] == [("close", 200), ("observe", 200), ("find", 200)]


async def test_a_second_lease_starts_nothing(sim: MarketSimulator, driver: Driver) -> None:
    order = await driver.create(spec(), SECRETS, "s1")
    offers = await driver.offers(order)
    first = await driver.lease(order, offers[0])
    assert await driver.lease(order, offers[1]) == first
    assert (await driver.observe(order.id)).start_id == "s1" and await sim.get("/_sim/starts") == {"bot-1": 1}


async def test_create_is_not_idempotent(sim: MarketSimulator, driver: Driver) -> None:
    for _ in range(2):
        await start(driver, await driver.create(spec(), SECRETS, "s1"))
    assert len(await driver.find("bot-1")) == 2
    assert await sim.get("/_sim/starts") == await sim.get("/_sim/running") == await sim.get("/_sim/peaks") == {"bot-1": 2}


async def test_a_killed_lease_is_lost(sim: MarketSimulator, driver: Driver) -> None:
    order = await driver.create(spec(), SECRETS, "s1")
    await start(driver, order)
    assert await sim.post("/_sim/kill", name="bot-1") == {"killed": [order.id]}
    assert (await driver.observe(order.id)).phase == "lost" and await sim.get("/_sim/running") == {"bot-1": 0}
    assert await driver.find("bot-1") == [order.id]


async def test_providers(sim: MarketSimulator, driver: Driver) -> None:
    await sim.post("/_sim/providers", {"bad": {"lease_fails": True}, "dumb": {"offers": False}, "slow": {"never_ready": True}})
    order = await driver.create(spec(), SECRETS, "s1")
    assert [offer.provider for offer in await driver.offers(order)] == ["bad", "slow"]
    with pytest.raises(ProviderError) as refused:
        await start(driver, order)
    assert refused.value.blame == "provider" and await sim.get("/_sim/starts") == {}
    await start(driver, order, choice=1)
    assert (await driver.observe(order.id)).phase == "starting"


@pytest.mark.parametrize("kind", ["error", "drop_after", "hang"])
@pytest.mark.parametrize("step", ["create", "find", "offers", "lease", "observe", "close"])
async def test_the_market_is_blamed(sim: MarketSimulator, driver: Driver, step: str, kind: str) -> None:
    order = await driver.create(spec(), SECRETS, "s1")
    (offer, *_) = await driver.offers(order)
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "create": lambda: driver.create(spec("other"), SECRETS, "s1"),
        "find": lambda: driver.find("bot-1"),
        "offers": lambda: driver.offers(order),
        "lease": lambda: driver.lease(order, offer),
        "observe": lambda: driver.observe(order.id),
        "close": lambda: driver.close(order.id),
    }
    await sim.post("/_sim/faults", {"step": step, "kind": kind, "times": 1})
    with pytest.raises(ProviderError) as failed:
        await calls[step]()
    assert failed.value.blame == "market"
    done = kind == "drop_after"
    assert len(await driver.find("other")) == (step == "create" and done)
    assert await sim.get("/_sim/starts") == ({"bot-1": 1} if step == "lease" and done else {})
    assert len(await driver.find("bot-1")) == (not (step == "close" and done))
    await calls[step]()


async def test_other_faults(sim: MarketSimulator, driver: Driver) -> None:
    order = await driver.create(spec(), SECRETS, "s1")
    await sim.post("/_sim/faults", {"step": "offers", "kind": "no_bids", "times": 2})
    assert [len(await driver.offers(order)) for _ in range(3)] == [0, 0, 5]
    await sim.post("/_sim/faults", {"step": "*", "kind": "refuse", "times": 2})
    for step, blame in ((start(driver, order), "request"), (driver.create(spec(), SECRETS, "s1"), "request")):
        with pytest.raises(ProviderError) as refused:
            await step
        assert refused.value.blame == blame
    await sim.post("/_sim/faults", {"step": "lease", "kind": "refuse"})
    with pytest.raises(ProviderError) as refused:
        await start(driver, order)
    assert refused.value.blame == "provider"
    await driver.close(order.id)
    with pytest.raises(ProviderError) as gone:
        await driver.offers(order)
    assert gone.value.blame == "request"


async def test_a_dead_market(process: MarketSimulator) -> None:
    with MarketSimulator() as other:
        driver = MarketDriver(other.url)
        await driver.create(spec(), SECRETS, "s1")
    with pytest.raises(ProviderError) as dead:
        await driver.create(spec(), SECRETS, "s1")
    assert dead.value.blame == "market"
    await driver.shutdown()


async def test_secrets_stay_out_of_the_log(sim: MarketSimulator, driver: Driver) -> None:
    order = await driver.create(spec(), SECRETS, "s1")
    await start(driver, order)
    assert "claw_1" not in str(await sim.get("/_sim/log")) and "secrets" not in str(await driver.find("bot-1"))
    (kept,) = await sim.get("/_sim/orders")
    assert kept["secrets"]["claw_key"] == "claw_1" and "claw_1" not in str(kept["spec"])


async def test_two_hundred_orders(sim: MarketSimulator) -> None:
    driver = MarketDriver(sim.url, timeout_s=20)
    began = time.monotonic()
    orders = await asyncio.gather(*(driver.create(spec(f"bot-{n}"), SECRETS, "s1") for n in range(200)))
    await asyncio.gather(*(start(driver, order) for order in orders))
    seen = await asyncio.gather(*(driver.observe(order.id) for order in orders))
    assert {one.phase for one in seen} == {"ready"} and set((await sim.get("/_sim/starts")).values()) == {1}
    assert time.monotonic() - began < 20
    await driver.shutdown()
