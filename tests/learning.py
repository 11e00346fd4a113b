"""Many bots at once over a market of which some providers are bad: what must hold, at any size."""

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from clawplane.deployment.v1 import blacklist_service_pb2, deployment_pb2, provider_pb2, provider_service_pb2
from services.user_svc.settings import TIERS, Tier
from tests.harness import Stack, running
from tests.simulators.akash import AkashSimulator

BAD: list[dict[str, Any]] = [{"refuses": True}, {"takes_no_manifest": True}, {"never_ready": True}]
RULE = {"blacklist_failures": 3, "score_window_s": 7 * 24 * 3600, "org_deploying": 1000, "all_deploying": 1000, "concurrency": 32}


def market(providers: int, bad: int) -> dict[str, dict[str, Any]]:
    """The bad ones are the cheapest, so that price alone would choose nobody else."""
    made = {}
    for number in range(providers):
        is_bad = number < bad
        trait = BAD[number % len(BAD)] if is_bad else {"ready_s": 0.2}
        made[f"akash1{'bad' if is_bad else 'good'}{number}"] = {"price": f"{1 + number}.25", "uptime": 0.99, "audited": not is_bad} | trait
    return made


@asynccontextmanager
async def learning_stack(folder: Path, urls: dict[str, str], console: AkashSimulator, **more: Any) -> Any:
    """A stack on Akash with the rule as it is in production, but for the pace."""
    tier = Tier(price_minor=2900, monthly_tokens=0, monthly_credit_minor=1000, live_deployments=0)
    settings = console.settings() | RULE | {"ready_timeout_s": 2} | more
    async with running(folder, urls, deployment=settings, user={"tiers": TIERS | {"starter": tier}}) as stack:
        yield stack


async def providers_of(stack: Stack) -> dict[str, provider_pb2.Provider]:
    """All providers by address."""
    found = await stack.providers.ListProviders(provider_service_pb2.ListProvidersRequest(page_size=250), metadata=stack.operator)
    return {one.address: one for one in found.providers}


async def prove(stack: Stack, console: AkashSimulator, deployments: int, providers: int, bad: int) -> dict[str, int]:
    """Orders so many bots at once; the failures of each bad provider."""
    await console.post("/_sim/providers", market(providers, bad))
    person = await stack.person()
    ordered = [await stack.order(person, token=f"{100000 + number}:{'A' * 35}") for number in range(deployments)]
    most_excluded = 0

    async def watch() -> None:
        nonlocal most_excluded
        request = blacklist_service_pb2.ListBlacklistEntriesRequest(page_size=250)
        while True:
            entries = (await stack.blacklist.ListBlacklistEntries(request, metadata=stack.operator)).entries
            most_excluded = max(most_excluded, len(entries))
            await asyncio.sleep(0.1)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(stack.sandbox_act(d, "pay") for d in ordered))
    await asyncio.gather(*(stack.until(d.id, deployment_pb2.STATE_ACTIVE, timeout_s=300) for d in ordered))
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    known = await providers_of(stack)
    failures = {address: one.failures for address, one in known.items() if "bad" in address}
    assert len(failures) == bad and not [one for one in known.values() if "good" in one.address and one.failures]
    for address, count in failures.items():
        one = known[address]
        assert one.health == provider_pb2.PROVIDER_HEALTH_EXCLUDED and one.blacklist_entry.by_rule, one
        assert count <= 5, one
        assert len(one.blacklist_entry.evidence) >= 3 and one.blacklist_entry.strikes == 1
    assert most_excluded <= providers // 3
    placed = Counter(one["name"] for one in await console.get("/_sim/orders") if one["state"] == "active")
    assert set(placed.values()) == {1} and len(placed) == deployments
    peaks = await console.get("/_sim/peaks")
    assert set(peaks.values()) == {1}
    return failures
