"""Provisioning against a market that breaks: what passes is ridden out, what lasts is said, and one bot runs in the end."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from clawplane.deployment.v1 import deployment_pb2, deployment_service_pb2
from clawplane.user.v1 import api_key_service_pb2
from tests.harness import Person, Stack, eventually
from tests.simulators.market import MarketSimulator

PAY = "pay"
CALLS = ("find", "create", "offers", "lease", "observe")
KINDS = ("error", "drop_after", "hang", "hang_after")
ONCE = [(call, kind) for call in CALLS for kind in KINDS] + [("offers", "no_bids"), ("lease", "refuse")]


def name_of(d: deployment_pb2.Deployment) -> str:
    """What the market knows it by."""
    return f"clawplane-{d.id}"


async def close(stack: Stack, d: deployment_pb2.Deployment) -> None:
    """Asks for the end, and waits for it."""
    await stack.deployments.CloseDeployment(deployment_service_pb2.CloseDeploymentRequest(id=d.id), metadata=stack.operator)
    await stack.until(d.id, deployment_pb2.STATE_CLOSED, timeout_s=30)


async def living(market: MarketSimulator, d: deployment_pb2.Deployment) -> list[dict[str, Any]]:
    """The orders of a deployment that cost money."""
    return [order for order in await market.get("/_sim/orders") if order["name"] == name_of(d) and order["state"] != "closed"]


@pytest_asyncio.fixture
async def calm(market: MarketSimulator) -> AsyncIterator[MarketSimulator]:
    """The market, and no fault of this test is left for the next."""
    yield market
    await market.post("/_sim/calm")
    await market.post("/_sim/providers", {f"p{n}": {"price": f"0.0{n}"} for n in range(1, 6)})
    await market.post("/_sim/settings", {"ready_delay": 0})


async def test_each_fault_that_passes_ends_with_one_bot(stack: Stack, calm: MarketSimulator) -> None:
    async def one(call: str, kind: str) -> None:
        person = await stack.person()
        d = await stack.order(person)
        await calm.post("/_sim/faults", {"step": call, "kind": kind, "name": name_of(d)})
        await stack.sandbox_act(d, PAY)
        live = await stack.until(d.id, deployment_pb2.STATE_ACTIVE, timeout_s=40)
        met = [entry for entry in await calm.get("/_sim/log") if entry["name"] == name_of(d) and entry["fault"] == kind]
        assert len(met) == 1, (call, kind)
        assert (await calm.get("/_sim/peaks"))[name_of(d)] == 1, (call, kind)
        (order,) = await living(calm, d)
        assert (order["id"], order["state"]) == (live.akash_deployment_id, "leased"), (call, kind)
        assert not live.error_message, (call, kind)
        # Every key of a start that came to nothing has ended, and the bot's own holds.
        listed = api_key_service_pb2.ListApiKeysRequest(deployment_id=d.id, is_active=True)
        (key,) = (await stack.api_keys.ListApiKeys(listed, metadata=stack.operator)).api_keys
        assert key.id[4:] == order["secrets"]["claw_key"].split("_")[2], (call, kind)
        await close(stack, d)
        assert not await living(calm, d), (call, kind)
        assert not (await stack.api_keys.ListApiKeys(listed, metadata=stack.operator)).api_keys, (call, kind)

    await asyncio.gather(*(one(call, kind) for call, kind in ONCE))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_a_close_that_breaks_is_repeated(stack: Stack, person: Person, calm: MarketSimulator, kind: str) -> None:
    d = await stack.live(person)
    await calm.post("/_sim/faults", {"step": "close", "kind": kind, "name": name_of(d)})
    await close(stack, d)
    assert not await living(calm, d)


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_a_provider_that_refuses_is_left_for_the_next(stack: Stack, person: Person, calm: MarketSimulator) -> None:
    await calm.post("/_sim/providers", {"p1": {"price": "0.01", "lease_fails": True}, "p2": {"price": "0.02", "never_ready": True}, "p3": {"price": "0.03"}})
    d = await stack.live(person)
    assert d.provider == "p3"
    assert len(await living(calm, d)) == 1
    tried = [entry["provider"] for entry in await calm.get("/_sim/log") if entry["name"] == name_of(d) and entry["step"] == "lease"]
    assert tried == ["p1", "p2", "p3"]


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_a_lasting_fault_of_the_providers_is_said_and_can_be_retried(stack: Stack, person: Person, calm: MarketSimulator) -> None:
    d = await stack.order(person)
    await calm.post("/_sim/faults", {"step": "lease", "kind": "refuse", "name": name_of(d), "times": 10_000})
    await stack.sandbox_act(d, PAY)
    failed = await stack.until(d.id, deployment_pb2.STATE_FAILED, timeout_s=30)
    assert "refused" in failed.error_message and failed.status == deployment_pb2.STATUS_FAILED

    async def undone() -> bool:
        return not await living(calm, d)

    await eventually(undone)
    tried = {entry["provider"] for entry in await calm.get("/_sim/log") if entry["name"] == name_of(d) and entry["step"] == "lease"}
    assert tried == {"p1", "p2", "p3", "p4", "p5"}
    # A failed one is no longer worked on, and takes no place of the tier.
    calls = len(await calm.get("/_sim/log"))
    await asyncio.sleep(1)
    assert len([e for e in (await calm.get("/_sim/log"))[calls:] if e["name"] == name_of(d)]) == 0
    await calm.post("/_sim/calm")
    retry = deployment_service_pb2.RetryDeploymentRequest(id=d.id)
    again = await stack.deployments.RetryDeployment(retry, metadata=person.metadata)
    assert again.state == deployment_pb2.STATE_DEPLOYING
    live = await stack.until(d.id, deployment_pb2.STATE_ACTIVE)
    assert not live.error_message and len(await living(calm, d)) == 1
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.deployments.RetryDeployment(retry, metadata=person.metadata)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_no_bidder_at_all_is_a_lasting_fault(stack: Stack, person: Person, calm: MarketSimulator) -> None:
    d = await stack.order(person)
    await calm.post("/_sim/faults", {"step": "offers", "kind": "no_bids", "name": name_of(d), "times": 10_000})
    await stack.sandbox_act(d, PAY)
    failed = await stack.until(d.id, deployment_pb2.STATE_FAILED, timeout_s=30)
    assert "no provider made an offer" in failed.error_message


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
@pytest.mark.parametrize("call", ["create", "offers", "observe"])
async def test_a_market_that_is_down_is_waited_for(stack: Stack, person: Person, calm: MarketSimulator, call: str) -> None:
    d = await stack.order(person)
    await calm.post("/_sim/faults", {"step": call, "kind": "error", "name": name_of(d), "times": 10_000})
    await stack.sandbox_act(d, PAY)
    # Much longer than providers are given.
    await asyncio.sleep(3)
    waiting = await stack.get(d.id)
    assert waiting.state == deployment_pb2.STATE_DEPLOYING and "503" in waiting.error_message
    await calm.post("/_sim/calm")
    live = await stack.until(d.id, deployment_pb2.STATE_ACTIVE)
    assert not live.error_message and len(await living(calm, d)) == 1


async def test_a_lost_bot_is_started_again_under_another_key(stack: Stack, person: Person, calm: MarketSimulator) -> None:
    d = await stack.live(person)
    (before,) = await living(calm, d)
    await calm.post("/_sim/kill", name=name_of(d))

    async def restarted() -> Any:
        now = await stack.get(d.id)
        return now if now.state == deployment_pb2.STATE_ACTIVE and now.akash_deployment_id != before["id"] else None

    await eventually(restarted)
    (after,) = await living(calm, d)
    assert before["secrets"]["claw_key"] != after["secrets"]["claw_key"]
    assert after["secrets"]["channel_token"] == before["secrets"]["channel_token"]
    events = await stack.deployments.ListDeploymentEvents(
        deployment_service_pb2.ListDeploymentEventsRequest(deployment_id=d.id), metadata=person.metadata
    )
    assert [event.kind for event in events.events if event.kind.startswith("state.")] == [
        "state.pending", "state.deploying", "state.active", "state.deploying", "state.active",
    ]  # fmt: skip
    assert any("host died" in event.message for event in events.events)


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
@pytest.mark.parametrize("call", ["find", "create", "offers", "lease", "observe"])
async def test_a_close_in_the_middle_leaves_nothing(stack: Stack, person: Person, calm: MarketSimulator, call: str) -> None:
    d = await stack.order(person)
    await calm.post("/_sim/faults", {"step": call, "kind": "hang_after", "name": name_of(d)})
    await stack.sandbox_act(d, PAY)

    async def there() -> Any:
        return [entry for entry in await calm.get("/_sim/log") if entry["name"] == name_of(d) and entry["fault"]]

    await eventually(there)
    await close(stack, d)
    assert not await living(calm, d)
    # Nothing comes after: a step that was under way writes no more.
    await asyncio.sleep(0.5)
    assert not await living(calm, d) and (await stack.get(d.id)).state == deployment_pb2.STATE_CLOSED
