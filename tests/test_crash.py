"""kill -9 of the deployment service at every step of provisioning: ends as it should, with exactly one bot."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
import pytest_asyncio

from clawplane.deployment.v1 import deployment_pb2, deployment_service_pb2
from clawplane.user.v1 import api_key_service_pb2, api_key_service_pb2_grpc
from services.deployment_svc.deployments.state import Step
from tests.conftest import Databases
from tests.harness import eventually
from tests.processes import OPTIONS, Client, Processes, market_env
from tests.simulators.market import MarketSimulator

# Each call that a step makes of the market; "skip" lets earlier calls of the same kind pass.
CALLS: dict[Step, list[tuple[str, int]]] = {
    Step.CREATE: [("find", 0), ("create", 0)],
    Step.CHOOSE: [("offers", 0)],
    Step.LEASE: [("lease", 0)],
    Step.READY: [("observe", 0)],
    Step.CLOSE: [("close", 0), ("find", 1)],
}
WITHOUT_A_CALL = {Step.NOTHING, Step.INTEND, Step.WATCH, Step.UNDO}
"""INTEND only writes, and what it writes is there or not; WATCH and UNDO are proven with the local driver and the provisioning tests."""
BEFORE, AFTER = "hang", "hang_after"


def test_no_step_is_forgotten() -> None:
    assert set(CALLS) | WITHOUT_A_CALL == set(Step)


@pytest_asyncio.fixture
async def processes(databases: Databases, market: MarketSimulator, tmp_path: Path) -> AsyncIterator[Processes]:
    """The services on the counting market, in processes that can be killed."""
    started = Processes(databases, tmp_path, **market_env(market.url), CLAWPLANE_STEP_TIMEOUT_S="30", CLAWPLANE_LEASE_S="1")
    try:
        await started.ready()
        yield started
    finally:
        started.stop()


async def reached(market: MarketSimulator, name: str, fault: str) -> None:
    """Waits until a call about a name hangs."""

    async def check() -> Any:
        return [entry for entry in await market.get("/_sim/log") if entry["name"] == name and entry["fault"] == fault]

    await eventually(check, 20)


async def stuck_at(processes: Processes, market: MarketSimulator, step: Step, call: str, skip: int, when: str) -> tuple[Step, str, str]:
    """One deployment, brought to the given call and held there: (step, deployment id, call)."""
    person = await processes.person()
    async with Client(processes) as client:
        d = await client.order(person)
        name = f"clawplane-{d.id}"
        fault = {"step": call, "kind": when, "skip": skip, "name": name}
        if step is Step.CLOSE:
            await client.pay(d)
            await client.until(d.id, deployment_pb2.STATE_ACTIVE)
            fault["skip"] = 0
            await market.post("/_sim/faults", fault)
            await client.deployments.CloseDeployment(deployment_service_pb2.CloseDeploymentRequest(id=d.id), metadata=person)
        else:
            await market.post("/_sim/faults", fault)
            await client.pay(d)
        await reached(market, name, when)
        return step, d.id, call


async def recovered(processes: Processes, market: MarketSimulator, step: Step, deployment_id: str, call: str, when: str) -> None:
    """After the restart it goes on where it was, and ends with exactly one bot, or none when it was being closed."""
    name = f"clawplane-{deployment_id}"
    async with Client(processes) as client:
        if step is Step.CLOSE:
            await client.until(deployment_id, deployment_pb2.STATE_CLOSED)
            assert (await market.get("/_sim/running")).get(name, 0) == 0, (call, when)
            assert not await valid_keys(processes, deployment_id), (call, when)
            return
        await client.until(deployment_id, deployment_pb2.STATE_ACTIVE)
        assert (await market.get("/_sim/running"))[name] == 1, (step, call, when)
        assert (await market.get("/_sim/peaks"))[name] == 1, (step, call, when)
        living = [order for order in await market.get("/_sim/orders") if order["name"] == name and order["state"] != "closed"]
        assert len(living) == 1, (step, call, when, living)
        # The one key that holds is the one that the bot has.
        assert await valid_keys(processes, deployment_id) == [living[0]["secrets"]["claw_key"].split("_")[2]], (step, call, when)


async def valid_keys(processes: Processes, deployment_id: str) -> list[str]:
    """The digits of the keys with which a bot of the deployment could call."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{processes.ports[0]}", options=OPTIONS) as channel:
        request = api_key_service_pb2.ListApiKeysRequest(deployment_id=deployment_id, is_active=True)
        found = await api_key_service_pb2_grpc.ApiKeyServiceStub(channel).ListApiKeys(request, metadata=processes.operator)
    return [key.id.removeprefix("key_") for key in found.api_keys]


async def test_the_user_service_dies_before_bots_have_their_keys(processes: Processes, market: MarketSimulator) -> None:
    """Nothing starts without a key; and whatever was made of one meanwhile, one holds in the end, which the bot has."""
    async with Client(processes) as client:
        ordered = [await client.order(await processes.person()) for _ in range(3)]
        await asyncio.gather(*(client.pay(d) for d in ordered))
        await processes.kill_and_restart(0)
    for d in ordered:
        await recovered(processes, market, Step.CREATE, d.id, "mint", "killed")


@pytest.mark.parametrize("when", [BEFORE, AFTER])
async def test_killed_at_every_call(processes: Processes, market: MarketSimulator, when: str) -> None:
    """A deployment for each call of each step; all of them stand there when the service is killed."""
    calls = [(step, call, skip) for step, found in CALLS.items() for call, skip in found]
    stuck = await asyncio.gather(*(stuck_at(processes, market, step, call, skip, when) for step, call, skip in calls))
    await processes.kill_and_restart()
    await asyncio.gather(*(recovered(processes, market, *one, when) for one in stuck))


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_a_bot_outlives_the_service_and_is_adopted(databases: Databases, tmp_path: Path) -> None:
    processes = Processes(databases, tmp_path, CLAWPLANE_LEASE_S="1")
    bot = httpx.AsyncClient(trust_env=False, timeout=5)
    try:
        await processes.ready()
        person = await processes.person()
        async with Client(processes) as client:
            d = await client.order(person)
            await client.pay(d)
            live = await client.until(d.id, deployment_pb2.STATE_ACTIVE)
            fact = json.loads(next((tmp_path / "local").glob("ord-*/bot.json")).read_text())
            processes.running[1].kill()
            processes.running[1].wait()
            assert (await bot.get(f"{live.provider_url}/health")).json()["status"] == "ok"
            # Its model cannot be asked meanwhile, which it says.
            refused = await bot.post(f"{live.provider_url}/chat", json={"message": "still there?"})
            assert (refused.status_code, refused.json()["error"]["field"]) == (502, "model")
            processes.running[1] = processes.start(1)
            await processes.ready()
            await asyncio.sleep(2)
            again = await client.until(d.id, deployment_pb2.STATE_ACTIVE)
            assert (again.provider_url, again.akash_lease_id) == (live.provider_url, live.akash_lease_id)
            # A dead bot is started again, as another process; exactly one is there.
            psutil.Process(fact["pid"]).kill()

            async def replaced() -> Any:
                now = await client.get(d.id)
                return now if now.state == deployment_pb2.STATE_ACTIVE and now.provider_url != live.provider_url else None

            fresh = await eventually(replaced, 20)
            assert (await bot.get(f"{fresh.provider_url}/health")).json()["deployment_id"] == d.id
            bots = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or []) and "bot.py" in " ".join(p.info["cmdline"])]
            assert len(bots) == 1
            await client.deployments.CloseDeployment(deployment_service_pb2.CloseDeploymentRequest(id=d.id), metadata=person)
            await client.until(d.id, deployment_pb2.STATE_CLOSED)
            assert not list((tmp_path / "local").glob("ord-*")) and not bots[0].is_running()
    finally:
        await bot.aclose()
        processes.stop()
