"""The blacklist's own rule, against a simulated Akash."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from clawplane.deployment.v1 import blacklist_service_pb2, deployment_pb2, provider_pb2, provider_service_pb2
from tests.conftest import Databases
from tests.harness import Stack, eventually
from tests.learning import learning_stack, prove, providers_of
from tests.simulators.akash import AkashSimulator


@pytest.fixture
def console() -> Iterator[AkashSimulator]:
    with AkashSimulator() as started:
        yield started


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_bad_providers_are_excluded_soon_and_never_too_many(databases: Databases, console: AkashSimulator, tmp_path: Path) -> None:
    async with learning_stack(tmp_path, databases.make(), console) as stack:
        await prove(stack, console, deployments=20, providers=9, bad=3)


async def entry_of(stack: Stack, address: str) -> Any:
    request = blacklist_service_pb2.GetBlacklistEntryRequest(provider_address=address)
    return await stack.blacklist.GetBlacklistEntry(request, metadata=stack.operator)


async def live(stack: Stack, number: int) -> deployment_pb2.Deployment:
    return await stack.live(await stack.person(), token=f"{100000 + number}:{'A' * 35}")


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_probation_doubling_and_forgiveness(databases: Databases, console: AkashSimulator, tmp_path: Path) -> None:
    good = {f"akash1good{number}": {"price": f"{5 + number}"} for number in range(2)}
    await console.post("/_sim/providers", {"akash1a": {"price": "0.001", "refuses": True}} | good)
    term = {"blacklist_first_s": 1.5, "blacklist_window_s": 60}
    async with learning_stack(tmp_path, databases.make(), console, **term) as stack:
        for number in range(3):
            assert (await live(stack, number)).provider != "akash1a"
        first = await entry_of(stack, "akash1a")
        assert first.by_rule and first.strikes == 1 and "3 failures of 3 deployments" in first.reason, first

        async def probing() -> Any:
            one = (await providers_of(stack))["akash1a"]
            return one.health == provider_pb2.PROVIDER_HEALTH_PROBING

        await eventually(probing)
        # On probation, one failure is enough, and the term doubles.
        await live(stack, 4)
        second = await entry_of(stack, "akash1a")
        assert second.strikes == 2
        length = second.expires_at.ToDatetime(UTC) - second.updated_at.ToDatetime(UTC)
        assert abs(length - timedelta(seconds=3)) < timedelta(seconds=0.5)
        await console.post("/_sim/providers", {"akash1a": {"price": "0.001"}} | good)
        await eventually(probing)
        assert (await live(stack, 5)).provider == "akash1a"
        third = await entry_of(stack, "akash1a")
        assert third.strikes == 1 and (await providers_of(stack))["akash1a"].health != provider_pb2.PROVIDER_HEALTH_PROBING


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_an_operators_word_stands(databases: Databases, console: AkashSimulator, tmp_path: Path) -> None:
    """A permanent entry is never shortened; failures during an exclusion, as of leases in flight, change nothing."""
    providers = {"akash1a": {"price": "0.001", "never_ready": True}} | {f"akash1good{number}": {"price": "5"} for number in range(3)}
    await console.post("/_sim/providers", providers)
    async with learning_stack(tmp_path, databases.make(), console) as stack:
        person = await stack.person()
        ordered = [await stack.order(person, token=f"{100000 + number}:{'A' * 35}") for number in range(3)]
        for d in ordered:
            await stack.sandbox_act(d, "pay")

        async def all_there() -> bool:
            one = (await providers_of(stack)).get("akash1a")
            return one is not None and one.in_flight == 3

        await eventually(all_there)
        add = blacklist_service_pb2.AddBlacklistEntryRequest(provider_address="akash1a", reason="by hand")
        await stack.blacklist.AddBlacklistEntry(add, metadata=stack.operator)
        for d in ordered:
            assert (await stack.until(d.id, deployment_pb2.STATE_ACTIVE, timeout_s=30)).provider != "akash1a"
        entry = await entry_of(stack, "akash1a")
        assert not entry.HasField("expires_at") and (entry.reason, entry.by_rule) == ("by hand", False)
        outcomes = provider_service_pb2.ListProviderOutcomesRequest(provider_address="akash1a", failures_only=True)
        found = (await stack.providers.ListProviderOutcomes(outcomes, metadata=stack.operator)).outcomes
        assert len(found) == 3 and all("did not answer in time" in one.reason for one in found)
        assert all(one.created_at.ToDatetime(UTC) < datetime.now(UTC) for one in found)


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_what_is_our_own_fault_is_nobodys(databases: Databases, console: AkashSimulator, tmp_path: Path) -> None:
    async with learning_stack(tmp_path, databases.make(), console) as stack:
        for number, status in enumerate((400, 401, 402)):
            person = await stack.person()
            d = await stack.order(person, token=f"{200000 + number}:{'A' * 35}")
            for call in ("create", "lease"):
                fault = {"call": call, "kind": "status", "status": status, "name": f"clawplane-{d.id}"}
                await console.post("/_sim/faults", fault)
            await stack.sandbox_act(d, "pay")
            await stack.until(d.id, deployment_pb2.STATE_ACTIVE, timeout_s=30)
        known = await providers_of(stack)
        assert known and not [one for one in known.values() if one.failures or one.HasField("blacklist_entry")]
