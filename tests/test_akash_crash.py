"""kill -9 of the deployment service at every call to Akash, with other faults on: one lease in the end, and no escrow left open."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clawplane.deployment.v1 import deployment_pb2, deployment_service_pb2
from tests.conftest import Databases
from tests.harness import eventually
from tests.processes import Client, Processes
from tests.simulators.akash import KEY, AkashSimulator

# Each call, and how many of its kind pass before it; "list" is the look for what carries our name, shared by all who look at once, so last.
STEPS = [("create", 0), ("bids", 0), ("lease", 0), ("observe", 0), ("close", 0), ("list", 0), ("list", 1)]
BEFORE, AFTER = "hang", "lost_slowly"


@pytest.fixture
def console() -> Iterator[AkashSimulator]:
    with AkashSimulator() as started:
        yield started


def env_of(console: AkashSimulator) -> dict[str, str]:
    """The settings that put a process on the simulator."""
    return {
        "CLAWPLANE_DRIVER": "akash", "CLAWPLANE_AKASH_API_KEY": KEY, "CLAWPLANE_AKASH_API_BASE": console.url,
        "CLAWPLANE_AKASH_BOT": json.dumps({"image": "registry.example/bot:1.2.3"}), "CLAWPLANE_BID_WINDOW_S": "0.2",
        "CLAWPLANE_STEP_TIMEOUT_S": "30", "CLAWPLANE_LEASE_S": "1", "CLAWPLANE_FAIL_AFTER_S": "600",
    }  # fmt: skip


async def active(console: AkashSimulator, deployment_id: str) -> list[dict[str, Any]]:
    """The open escrows of a deployment."""
    orders = await console.get("/_sim/orders")
    return [one for one in orders if one["name"] == f"clawplane-{deployment_id}" and one["state"] == "active"]


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
@pytest.mark.parametrize("when", [BEFORE, AFTER])
async def test_killed_at_every_call(databases: Databases, console: AkashSimulator, tmp_path: Path, when: str) -> None:
    await console.post("/_sim/strangers", {"names": [None, "theirs", "clawplane-dep_"]})
    processes = Processes(databases, tmp_path, **env_of(console))
    try:
        await processes.ready()
        async with Client(processes) as client:
            stuck: list[tuple[str, str]] = []
            for number, (call, skip) in enumerate(STEPS):
                owner = await processes.person()
                d = await client.order(owner, token=f"{100000 + number}:{'A' * 35}")
                about = {} if call == "list" else {"name": f"clawplane-{d.id}"}
                fault = {"call": call, "kind": when, "skip": skip} | about
                if call == "close":
                    await client.pay(d)
                    await client.until(d.id, deployment_pb2.STATE_ACTIVE)
                    await console.post("/_sim/faults", fault)
                    await client.deployments.CloseDeployment(deployment_service_pb2.CloseDeploymentRequest(id=d.id), metadata=owner)
                else:
                    await console.post("/_sim/faults", fault)
                    await client.pay(d)
                met = len(stuck) + 1

                async def reached(wanted: int = met) -> bool:
                    return len([one for one in await console.get("/_sim/log") if one["fault"] == when]) >= wanted

                await eventually(reached, 20)
                stuck.append((call, d.id))
            # What comes after the restart breaks as well, here and there.
            for call in ("list", "create", "bids", "lease", "observe", "close"):
                for fault in ({"kind": "status", "status": 503}, {"kind": "html"}, {"kind": "lost"}):
                    await console.post("/_sim/faults", {"call": call, "skip": 1} | fault)
            await processes.kill_and_restart()
            for call, deployment_id in stuck:
                ending = call == "close"
                await client.until(deployment_id, deployment_pb2.STATE_CLOSED if ending else deployment_pb2.STATE_ACTIVE, timeout_s=60)
                assert len(await active(console, deployment_id)) == (0 if ending else 1), call
            # And nothing is left when all have been closed.
            for _, deployment_id in stuck:
                request = deployment_service_pb2.CloseDeploymentRequest(id=deployment_id)
                await client.deployments.CloseDeployment(request, metadata=processes.operator)
            await asyncio.gather(*(client.until(one, deployment_pb2.STATE_CLOSED) for _, one in stuck))
            left = [one for one in await console.get("/_sim/orders") if one["state"] == "active"]
            assert sorted(str(one["name"]) for one in left) == ["None", "clawplane-dep_", "theirs"]
            assert not [one for one in left if one["touched"]]
    finally:
        processes.stop()
