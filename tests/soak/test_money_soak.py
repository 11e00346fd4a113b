"""Ten thousand duplicated, shuffled, partly and wholly lost payment events over five hundred deployments.

Each deployment has a fate, acted out at the payment provider (the sandbox). What the provider's webhooks say of it arrives several times,
in any order, with gaps, from many connections at once. Whatever arrives, each deployment that was paid starts exactly once at the market,
which counts every start in a process of its own, and no other ever does.
"""

import asyncio
import collections
import json
import random
import time
from pathlib import Path
from typing import Any

import httpx
import orjson
import psutil
import pytest

from clawplane.deployment.v1 import deployment_pb2, deployment_service_pb2, payment_service_pb2, sandbox_service_pb2
from gateway import sandbox_events
from gateway.webhooks.stripe import sign
from services.deployment_svc.markets.local import LocalDriver
from services.user_svc.settings import TIERS, Tier
from tests.conftest import Databases
from tests.harness import Person, Stack, eventually, running
from tests.simulators.market import MarketSimulator

DEPLOYMENTS, EVENTS, CALLERS = 500, 10_000, 16
FATES = {
    "paid": ["pay"],
    "refused, then paid": ["fail", "pay"],
    "expired": ["expire"],
    "refused": ["fail"],
    "paid, then refunded": ["pay", "refund"],
    "untouched": [],
}
WEIGHTS = [50, 15, 12, 8, 8, 7]


class Fate:
    """What happens to one deployment."""

    def __init__(self, name: str, lost: str) -> None:
        self.name, self.lost = name, lost
        self.deployment_id = ""
        self.events: list[dict[str, Any]] = []

    @property
    def is_paid(self) -> bool:
        return "pay" in FATES[self.name]

    @property
    def is_refunded(self) -> bool:
        return "refund" in FATES[self.name]


async def act_out(stack: Stack, person: Person, fate: Fate, number: int) -> None:
    """Orders, and lets the fate happen at the provider; the webhooks of it are kept for later."""
    d = await stack.order(person, f"1000{number:05d}:" + "S" * 35)
    fate.deployment_id = d.id
    at = int(time.time())
    for step, name in enumerate(FATES[fate.name]):
        action = sandbox_events.ACTIONS[name]
        request = sandbox_service_pb2.ActOnSandboxSessionRequest(id=d.stripe_session_id, action=action.action)
        session = await stack.sandbox.ActOnSandboxSession(request, metadata=stack.operator)
        fate.events.append(sandbox_events.build(session, action, at + step))


def deliveries(fates: list[Fate], wanted: int, dice: random.Random) -> list[dict[str, Any]]:
    """The events as they arrive: some never, the others several times, in any order."""
    heard = [
        event for fate in fates for event in fate.events
        if not (fate.lost == "wholly" or (fate.lost == "partly" and dice.random() < 0.5))
    ]  # fmt: skip
    result = list(heard)
    result += dice.choices(heard, k=max(0, wanted - len(result)))
    dice.shuffle(result)
    return result


async def deliver(stack: Stack, events: list[dict[str, Any]], callers: int) -> collections.Counter[int]:
    """Posts signed webhooks from several connections at once; as a provider does, again whatever was not taken."""
    key = stack.keys["sandbox_webhook_secret"].encode()
    queue = collections.deque(events)
    statuses: collections.Counter[int] = collections.Counter()

    async def caller() -> None:
        async with httpx.AsyncClient(base_url=stack.url, trust_env=False, timeout=60) as http:
            while queue:
                payload = orjson.dumps(queue.popleft())
                for _ in range(5):
                    headers = {"content-type": "application/json", "stripe-signature": sign(payload, key, int(time.time()))}
                    answer = await http.post("/webhooks/stripe", content=payload, headers=headers)
                    statuses[answer.status_code] += 1
                    if answer.status_code == 200:
                        break

    await asyncio.gather(*(caller() for _ in range(callers)))
    return statuses


Counts = tuple[dict[str, int], dict[str, int]]
"""How often each deployment was started, and how many bots it has now."""


async def counted_by_market(market: MarketSimulator) -> Counts:
    """As the market's own process has it."""
    starts, alive = await market.get("/_sim/starts"), await market.get("/_sim/running")
    return {name.removeprefix("clawplane-"): n for name, n in starts.items()}, {name.removeprefix("clawplane-"): n for name, n in alive.items()}


async def counted_here(stack: Stack, fates: list[Fate]) -> Counts:
    """As this machine's processes and the deployments' histories have it."""
    alive: collections.Counter[str] = collections.Counter()
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words and words[-1].startswith(str(stack.data_dir)) and any(word.endswith("bot.py") for word in words):
            alive[json.loads((Path(words[-1]) / "order.json").read_text())["deployment_id"]] += 1
    starts = {}
    for fate in fates:
        request = deployment_service_pb2.ListDeploymentEventsRequest(deployment_id=fate.deployment_id, page_size=100)
        events = (await stack.deployments.ListDeploymentEvents(request, metadata=stack.operator)).events
        starts[fate.deployment_id] = sum(event.kind == "lease.created" for event in events)
    return starts, alive


async def run(databases: Databases, market: MarketSimulator | None, folder: Path, deployments: int, events: int, seed: int) -> None:
    """The whole proof at a given size; without a market the bots are real processes of the local driver."""
    dice = random.Random(seed)
    tiers = TIERS | {"starter": Tier(price_minor=2900, monthly_tokens=0, monthly_credit_minor=0, live_deployments=0)}
    options: dict[str, Any] = {"payment_check_s": 4, "refund_check_s": 3, "watch_s": 60}
    if market is not None:
        options |= {"driver": "tests.simulators.market:MarketDriver", "driver_options": {"url": market.url}}
    async with running(folder, databases.make(), deployment=options, user={"tiers": tiers}) as stack:
        people = [await stack.person() for _ in range(max(1, deployments // 10))]
        fates = [
            Fate(dice.choices(list(FATES), WEIGHTS)[0], dice.choices(["no", "partly", "wholly"], [70, 20, 10])[0])
            for _ in range(deployments)
        ]  # fmt: skip
        started = time.monotonic()
        for start in range(0, deployments, 25):
            await asyncio.gather(*(act_out(stack, people[n // 10 % len(people)], fates[n], n) for n in range(start, min(start + 25, deployments))))
        arriving = deliveries(fates, events, dice)
        print(f"\n[{databases.engine}] {deployments} deployments ordered after {time.monotonic() - started:.0f} s; {len(arriving)} webhooks arrive")
        statuses = await deliver(stack, arriving, CALLERS)
        print(f"[{databases.engine}] delivered after {time.monotonic() - started:.0f} s: {dict(statuses)}")
        assert set(statuses) <= {200, 503}

        async def settled() -> bool:
            for fate in fates:
                state = (await stack.get(fate.deployment_id)).state
                wanted = (
                    (deployment_pb2.STATE_CLOSED, deployment_pb2.STATE_CANCELED) if fate.is_refunded
                    else (deployment_pb2.STATE_ACTIVE,) if fate.is_paid
                    else (deployment_pb2.STATE_EXPIRED,) if fate.name == "expired"
                    else (deployment_pb2.STATE_PENDING,)
                )  # fmt: skip
                if state not in wanted:
                    unsettled[fate.name, fate.lost, deployment_pb2.State.Name(state)] += 1
                    return False
            return True

        unsettled: collections.Counter[tuple[str, str, str]] = collections.Counter()
        try:
            await eventually(settled, 240, 1)
        except AssertionError:
            raise AssertionError(f"never settled: {unsettled.most_common(5)}") from None
        starts, alive = await (counted_by_market(market) if market is not None else counted_here(stack, fates))
        for fate in fates:
            name = fate.deployment_id
            if not fate.is_paid:
                assert starts.get(name, 0) == 0, (fate.name, fate.lost)
            elif not fate.is_refunded:
                assert (starts.get(name, 0), alive.get(name, 0)) == (1, 1), (fate.name, fate.lost)
            else:
                assert starts.get(name, 0) <= 1 and alive.get(name, 0) == 0, (fate.name, fate.lost)
        due = await stack.payments.ListPayments(payment_service_pb2.ListPaymentsRequest(refund_due=True), metadata=stack.operator)
        assert not due.payments
        paid = sum(fate.is_paid and not fate.is_refunded for fate in fates)
        print(f"[{databases.engine}] {paid} paid deployments started exactly once, no other; {time.monotonic() - started:.0f} s in all")


@pytest.mark.soak
@pytest.mark.timeout(600)
async def test_every_paid_deployment_starts_exactly_once(databases: Databases, market: MarketSimulator, tmp_path: Path) -> None:
    await market.post("/_sim/reset")
    await run(databases, market, tmp_path, DEPLOYMENTS, EVENTS, seed=20261120)


async def test_every_paid_deployment_starts_exactly_once_small(databases: Databases, market: MarketSimulator, tmp_path: Path) -> None:
    await run(databases, market, tmp_path, 20, 400, seed=7)


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_every_paid_deployment_is_one_process(databases: Databases, tmp_path: Path) -> None:
    try:
        await run(databases, None, tmp_path, 5, 100, seed=22)
    finally:
        driver = LocalDriver(tmp_path / "local", "")
        await driver.stop_all()
        await driver.shutdown()
