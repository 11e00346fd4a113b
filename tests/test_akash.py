"""Bots on Akash: the SDL, every documented failure of the Console, and nothing of anybody else's ever touched."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from typing import Any

import pytest
import pytest_asyncio
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from clawplane.deployment.v1 import deployment_pb2, deployment_service_pb2
from services.deployment_svc.markets.akash import AkashDriver
from services.deployment_svc.markets.console import Console
from services.deployment_svc.markets.driver import Order, ProviderError, Secrets, Spec
from services.deployment_svc.markets.sdl import BotTemplate, document
from tests.conftest import Databases
from tests.harness import Person, Stack, eventually, running
from tests.simulators.akash import KEY, AkashSimulator

TEMPLATE = BotTemplate(image="registry.example/bot:1.2.3")
SPEC = Spec("clawplane-dep_1", "dep_1", "org_1", "claude-opus-4.5", "telegram")
SECRETS = Secrets("claw_test_PLANTED", "123:PLANTED", "")


@pytest.fixture(scope="module")
def console() -> Iterator[AkashSimulator]:
    with AkashSimulator() as started:
        yield started


@pytest_asyncio.fixture(scope="module")
async def akash(databases: Databases, console: AkashSimulator, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """A stack whose bots are on the simulated Akash."""
    async with running(tmp_path_factory.mktemp("akash"), databases.make(), deployment=console.settings() | {"sweep_s": 1}) as made:
        yield made


@pytest_asyncio.fixture
async def calm(console: AkashSimulator) -> AsyncIterator[AkashSimulator]:
    """The simulator, and nothing of this test is left for the next."""
    yield console
    await console.post("/_sim/calm")
    await console.post("/_sim/settings", {"null_names": False})
    await console.post("/_sim/providers", {f"akash1p{n}": {"price": f"{n}.5"} for n in range(1, 6)})


@pytest_asyncio.fixture
async def driver(console: AkashSimulator) -> AsyncIterator[AkashDriver]:
    client = Console(console.url, KEY, 1.0)
    made = AkashDriver(client, TEMPLATE, "http://gw.example/v1", block_s=Decimal("6"), deposit_usd=Decimal("0.5"), health_path="/")
    yield made
    await made.shutdown()


def name_of(d: deployment_pb2.Deployment) -> str:
    return f"clawplane-{d.id}"


async def orders(console: AkashSimulator, d: deployment_pb2.Deployment, state: str = "active") -> list[dict[str, Any]]:
    return [one for one in await console.get("/_sim/orders") if one["name"] == name_of(d) and one["state"] == state]


async def met(console: AkashSimulator, d: deployment_pb2.Deployment, fault: str) -> int:
    return len([one for one in await console.get("/_sim/log") if one["fault"] == fault and one["name"] == name_of(d)])


def test_the_sdl() -> None:
    made = yaml.safe_load(document(TEMPLATE, SPEC, SECRETS, "http://gw.example/v1"))
    service = made["services"]["bot"]
    assert service["image"] == "registry.example/bot:1.2.3"
    assert service["expose"] == [{"port": 18789, "as": 80, "to": [{"global": True}]}]
    resources = made["profiles"]["compute"]["bot"]["resources"]
    assert resources["cpu"] == {"units": 1.5} and resources["memory"] == {"size": "3Gi"}
    assert resources["storage"][1] == {"name": "data", "size": "10Gi", "attributes": {"persistent": True, "class": "beta3"}}
    assert made["deployment"] == {"bot": {"clawplane-dep_1": {"profile": "bot", "count": 1}}}
    assert made["profiles"]["placement"]["clawplane-dep_1"]["pricing"]["bot"]["amount"] == 1000
    env = dict(line.split("=", 1) for line in service["env"])
    assert (env["MODEL_ID"], env["BASE_URL"], env["API_KEY"]) == ("claude-opus-4.5", "http://gw.example/v1", "claw_test_PLANTED")
    assert env["TELEGRAM_BOT_TOKEN"] == "123:PLANTED" and "DISCORD_BOT_TOKEN" not in env
    other = yaml.safe_load(document(TEMPLATE, Spec("n", "d", "o", "gpt-3.2", "discord"), SECRETS, "u"))
    theirs = dict(line.split("=", 1) for line in other["services"]["bot"]["env"])
    assert theirs["MODEL_ID"] == "gpt-3.2" and theirs["DISCORD_BOT_TOKEN"] == "123:PLANTED" and "TELEGRAM_BOT_TOKEN" not in theirs
    # Each start has a gateway token of its own.
    assert env["OPENCLAW_GATEWAY_TOKEN"] != theirs["OPENCLAW_GATEWAY_TOKEN"]


@given(st.text(max_size=60))
def test_no_token_bends_the_sdl(token: str) -> None:
    made = yaml.safe_load(document(TEMPLATE, SPEC, Secrets("k", token), "u"))
    env = dict(line.split("=", 1) for line in made["services"]["bot"]["env"])
    assert env["TELEGRAM_BOT_TOKEN"] == token and len(made["services"]["bot"]["env"]) == 18


@pytest.mark.parametrize("image", ["bot", "bot:latest", "registry:5000/bot", ""])
def test_an_image_needs_a_fixed_tag(image: str) -> None:
    with pytest.raises(ValidationError, match="fixed tag"):
        BotTemplate(image=image)


async def test_prices_are_exact_and_only_open_bids_count(calm: AkashSimulator, driver: AkashDriver) -> None:
    await calm.post(
        "/_sim/providers",
        {
            "akash1a": {"price": "0.000000000000000001", "uptime": 0.991, "audited": True},
            "akash1b": {"price": "0.000000000000000002", "online": False},
            "akash1c": {"price": "1", "bid_state": "lost"},
        },
    )
    order = await driver.create(SPEC, SECRETS, "s")
    offers = {offer.provider: offer for offer in await driver.offers(order)}
    # 600 blocks an hour; the bids in another currency are not of the SDL's.
    assert offers["akash1a"].price == Decimal("1E-24") * 600 and offers["akash1b"].price == Decimal("2E-24") * 600
    assert set(offers) == {"akash1a", "akash1b"}
    assert (offers["akash1a"].uptime, offers["akash1a"].audited, offers["akash1b"].online) == (Decimal("0.991"), True, False)
    await driver.close(order.id)


@pytest.mark.parametrize(
    ("fault", "blame", "words"),
    [
        ({"kind": "status", "status": 400, "message": "Invalid SDL: API_KEY=claw_test_PLANTED"}, "request", "malformed"),
        ({"kind": "status", "status": 400, "message": "deposit too low"}, "request", "deposit"),
        ({"kind": "status", "status": 401}, "market", "key"),
        ({"kind": "status", "status": 402}, "market", "balance"),
        ({"kind": "status", "status": 409, "code": "wallet_provisioning"}, "market", "wallet"),
        ({"kind": "status", "status": 429}, "market", "often"),
        ({"kind": "status", "status": 503}, "market", "not available"),
        ({"kind": "html"}, "market", "as expected"),
        ({"kind": "html_200"}, "market", "as expected"),
        ({"kind": "cut"}, "market", "does not answer"),
        ({"kind": "hang"}, "market", "does not answer"),
    ],
)
async def test_whom_a_failure_is_put_down_to(
    calm: AkashSimulator, driver: AkashDriver, capfd: pytest.CaptureFixture[str], fault: dict[str, Any], blame: str, words: str
) -> None:
    await calm.post("/_sim/faults", {"call": "create"} | fault)
    with pytest.raises(ProviderError, match=words) as failed:
        await driver.create(SPEC, SECRETS, "s")
    assert failed.value.blame == blame
    assert failed.value.retry_after_s == (1 if fault.get("status") == 429 else 0)
    printed = capfd.readouterr()
    assert "PLANTED" not in printed.out + printed.err + str(failed.value)


async def test_only_our_name_is_found(calm: AkashSimulator, driver: AkashDriver) -> None:
    await calm.post("/_sim/strangers", {"names": [None, "somebody", "clawplane-dep_11", *[f"x{n}" for n in range(250)]]})
    order = await driver.create(SPEC, SECRETS, "s")
    # Behind more than a page of others'; asked for by ten at once.
    assert await asyncio.gather(*(driver.find(SPEC.name) for _ in range(10))) == [[order.id]] * 10
    await calm.post("/_sim/settings", {"null_names": True})
    assert await driver.find(SPEC.name) == []
    await calm.post("/_sim/settings", {"null_names": False})
    await driver.close(order.id)
    await driver.close(order.id)
    assert await driver.find(SPEC.name) == []


async def test_a_lost_manifest_is_no_lease(calm: AkashSimulator, driver: AkashDriver) -> None:
    order = await driver.create(SPEC, SECRETS, "s")
    (offer, *_) = await driver.offers(order)
    with pytest.raises(ProviderError) as failed:
        await driver.lease(Order(order.id, order.name), offer)
    assert failed.value.blame == "order"
    lease = await driver.lease(order, offer)
    assert await driver.lease(order, offer) == lease and lease.id.count("/") == 4
    assert (await driver.observe(order.id)).phase == "ready"
    await calm.post("/_sim/kill", name=SPEC.name, reason="lease_closed_insufficient_funds")
    lost = await driver.observe(order.id)
    assert (lost.phase, lost.is_ours) == ("lost", True) and "insufficient" in lost.reason
    await driver.close(order.id)


# What Akash does is the same to both engines; what the steps write is tried on both elsewhere.
PASSING = [
    *[
        (call, {"kind": "status", "status": status})
        for call in ("create", "bids", "lease", "observe", "list")
        for status in (401, 402, 429, 503)
    ],
    ("create", {"kind": "status", "status": 400}), ("create", {"kind": "status", "status": 409, "code": "wallet_provisioning"}),
    *[(call, {"kind": kind}) for call in ("create", "bids", "lease", "observe") for kind in ("html", "html_200", "cut", "hang", "lost", "lost_slowly")],
    ("bids", {"kind": "no_bids"}), ("bids", {"kind": "status", "status": 404}), ("lease", {"kind": "status", "status": 404}),
    ("lease", {"kind": "status", "status": 409, "code": "bid_closed"}), ("lease", {"kind": "status", "status": 400}),
    ("lease", {"kind": "status", "status": 422}),
]  # fmt: skip


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_each_failure_that_passes_ends_with_one_bot(akash: Stack, calm: AkashSimulator) -> None:
    """Every documented failure, each for a deployment of its own, all at once."""
    await calm.post("/_sim/strangers", {"names": [None, "theirs"]})

    async def one(call: str, fault: dict[str, Any]) -> None:
        person = await akash.person()
        d = await akash.order(person)
        about = {} if call == "list" else {"name": name_of(d)}
        await calm.post("/_sim/faults", {"call": call} | about | fault)
        await akash.sandbox_act(d, "pay")
        live = await akash.until(d.id, deployment_pb2.STATE_ACTIVE, timeout_s=60)
        if about:
            assert await met(calm, d, fault["kind"]) == 1, (call, fault)
        (order,) = await orders(calm, d)
        assert order["dseq"] == live.akash_deployment_id and order["lease"]["state"] == "active", (call, fault)
        assert (await calm.get("/_sim/peaks"))[name_of(d)] == 1, (call, fault)
        assert not live.error_message and live.provider_url.startswith("http://")
        await akash.deployments.CloseDeployment(deployment_service_pb2.CloseDeploymentRequest(id=d.id), metadata=akash.operator)
        await akash.until(d.id, deployment_pb2.STATE_CLOSED, timeout_s=30)
        assert not await orders(calm, d), (call, fault)

    await asyncio.gather(*(one(call, fault) for call, fault in PASSING))
    assert not [one for one in await calm.get("/_sim/orders") if one["touched"]]


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_providers_that_fail_are_left_for_the_next(akash: Stack, calm: AkashSimulator) -> None:
    await calm.post(
        "/_sim/providers",
        {
            "akash1x1": {"price": "1", "refuses": True}, "akash1x2": {"price": "2", "takes_no_manifest": True},
            "akash1x3": {"price": "3", "never_ready": True}, "akash1x4": {"price": "4", "dies_s": 0.01, "ready_s": 60},
            "akash1x5": {"price": "5"},
        },
    )  # fmt: skip
    person = await akash.person()
    d = await akash.live(person)
    assert d.provider == "akash1x5" and len(await orders(calm, d)) == 1
    # None of these failures was the deployment's: it is its first attempt still, and each is told.
    listed = deployment_service_pb2.ListDeploymentEventsRequest(deployment_id=d.id)
    events = (await akash.deployments.ListDeploymentEvents(listed, metadata=person.metadata)).events
    failed = [event.message for event in events if event.kind == "attempt.failed"]
    assert len(failed) == 4 and all(message.startswith("attempt 1 failed") for message in failed)
    chosen = [event.message for event in events if event.kind == "provider.chosen"]
    assert "akash1x5 at" in chosen[-1] and "score" in chosen[-1]


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_a_lease_that_dies_later_is_replaced(akash: Stack, calm: AkashSimulator) -> None:
    person: Person = await akash.person()
    d = await akash.live(person)
    await calm.post("/_sim/kill", name=name_of(d))

    async def replaced() -> Any:
        now = await akash.get(d.id)
        return now if now.state == deployment_pb2.STATE_ACTIVE and now.akash_deployment_id != d.akash_deployment_id else None

    await eventually(replaced, 20)
    assert len(await orders(calm, d)) == 1


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_a_bot_that_stays_silent_is_lost(databases: Databases, calm: AkashSimulator, tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = calm.settings() | {"silent_timeout_s": 1}
    async with running(tmp_path_factory.mktemp("silent"), databases.make(), deployment=settings) as stack:
        d = await stack.live(await stack.person())
        await calm.post("/_sim/providers", {d.provider: {"price": "9", "never_ready": True}, "akash1other": {"price": "10"}})

        async def moved() -> Any:
            now = await stack.get(d.id)
            return now if now.state == deployment_pb2.STATE_ACTIVE and now.provider == "akash1other" else None

        await eventually(moved, 30)
        assert len(await orders(calm, d)) == 1


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_an_order_that_comes_late_is_closed(akash: Stack, calm: AkashSimulator, driver: AkashDriver) -> None:
    """As when Akash carries out, long after we gave up on it, what it was asked to create."""
    d = await akash.live(await akash.person())
    late = await driver.create(Spec(name_of(d), d.id, d.org_id, d.model, "telegram"), SECRETS, "s")

    async def closed() -> bool:
        return [one["dseq"] for one in await orders(calm, d, "closed")] == [late.id]

    await eventually(closed)
    (order,) = await orders(calm, d)
    assert order["dseq"] == d.akash_deployment_id and (await akash.get(d.id)).state == deployment_pb2.STATE_ACTIVE


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_a_failed_provider_keeps_no_valid_key(akash: Stack, calm: AkashSimulator) -> None:
    """It was handed the bot's key with the manifest, and the bot is not up anywhere yet."""
    bad = {f"akash1y{number}": {"price": str(number), "takes_no_manifest": True} for number in (1, 2)}
    await calm.post("/_sim/providers", bad | {"akash1y3": {"price": "3", "never_ready": True}})
    d = await akash.order(await akash.person())
    await akash.sandbox_act(d, "pay")

    async def leased() -> Any:
        (*_, last) = await orders(calm, d) or [{"lease": None}]
        return last["lease"] and last["lease"]["id"]["provider"] == "akash1y3"

    await eventually(leased)

    async def answer(order: dict[str, Any]) -> int:
        key = next(line[8:] for line in order["sdl"]["services"]["bot"]["env"] if line.startswith("API_KEY="))
        return (await akash.http.get("/v1/models", headers={"authorization": f"Bearer {key}"})).status_code

    assert [await answer(order) for order in await orders(calm, d, "closed")] == [401, 401]
    assert [await answer(order) for order in await orders(calm, d)] == [200]
    assert (await akash.get(d.id)).state == deployment_pb2.STATE_DEPLOYING
    await akash.deployments.CloseDeployment(deployment_service_pb2.CloseDeploymentRequest(id=d.id), metadata=akash.operator)
    await akash.until(d.id, deployment_pb2.STATE_CLOSED)
