"""The spend cap: what an organization runs is taken down when it is reached, and comes back with the next period or an operator's word."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
import sqlalchemy as sa

from clawplane.deployment.v1 import (
    deployment_pb2,
    quota_service_pb2,
    quota_service_pb2_grpc,
    usage_event_pb2,
    usage_service_pb2,
    usage_service_pb2_grpc,
)
from clawplane.deployment.v1 import deployment_service_pb2 as rpc
from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.deployments.spend_cap import SpendCap
from services.deployment_svc.usage.models import UsageCounter
from services.deployment_svc.usage.rules import period_end, period_of
from services.kit import ids
from services.kit.columns import now
from services.kit.db import ALL
from tests.conftest import Databases
from tests.harness import Person, Stack, eventually, running
from tests.processes import OPTIONS, Client, Processes, market_env
from tests.simulators.akash import AkashSimulator
from tests.simulators.market import MarketSimulator
from tests.test_quotas import DAY, HOUR, MONEY, MONTH, quota, record, set_quota
from tests.test_quotas import _not_at_the_end_of_an_hour as _not_at_the_end_of_an_hour  # noqa: PLC0414 - a fixture
from tests.usage_rows import ledger

ACTIVE, DEPLOYING, SUSPENDED, CLOSED = (
    deployment_pb2.STATE_ACTIVE, deployment_pb2.STATE_DEPLOYING, deployment_pb2.STATE_SUSPENDED, deployment_pb2.STATE_CLOSED
)  # fmt: skip
A_DOLLAR = 200_000
"""So many tokens cost one."""
QUICK = {"limits_s": 0.1}


@pytest_asyncio.fixture(scope="module")
async def local(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """A stack whose bots are real processes."""
    async with running(tmp_path_factory.mktemp("local"), databases.make(), deployment=QUICK) as made:
        yield made


@pytest_asyncio.fixture(scope="module")
async def counted(databases: Databases, market: MarketSimulator, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """A stack on the counting market."""
    options = {"driver": "tests.simulators.market:MarketDriver", "driver_options": {"url": market.url}}
    async with running(tmp_path_factory.mktemp("counted"), databases.make(), deployment=QUICK | options) as made:
        yield made


async def cap(stack: Stack, who: Person, amount: object, period: int = MONTH, **more: Any) -> Any:
    """Sets a spend cap."""
    return await set_quota(stack, quota(who.org_id, amount, period=period, unit=MONEY, suspends=True, **more))


async def next_period(stack: Stack, who: Person, period: str) -> None:
    """What was used lies in the period before, from here on."""
    start = period_of(period, now())
    earlier = period_of(period, start - timedelta(seconds=1))
    async with ledger(stack) as db, db.transaction(ALL) as session:
        mine = (UsageCounter.org_id == who.org_id, UsageCounter.period == period)
        await session.execute(sa.delete(UsageCounter).where(*mine, UsageCounter.starts_at < start))
        await session.execute(sa.update(UsageCounter).where(*mine).values(starts_at=earlier))
        # And whoever was left alone until its end is not any more.
        for d in await session.scalars(sa.select(Deployment).where(Deployment.org_id == who.org_id, Deployment.resumed_until.is_not(None))):
            assert d.resumed_until == period_end(period, start)
            d.resumed_until = start


async def kinds(stack: Stack, who: Person, d: deployment_pb2.Deployment) -> list[str]:
    """What happened to a deployment, by kind."""
    request = rpc.ListDeploymentEventsRequest(deployment_id=d.id, page_size=250)
    return [event.kind for event in (await stack.deployments.ListDeploymentEvents(request, metadata=who.metadata)).events]


async def answers(url: str) -> bool:
    """Whether a bot is there."""
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=2) as http:
            return (await http.get(f"{url}/health")).status_code == 200
    except httpx.HTTPError:
        return False


async def move(stack: Stack, d: deployment_pb2.Deployment, to: int) -> deployment_pb2.Deployment:
    """Moves it as an operator."""
    request = rpc.UpdateDeploymentStatusRequest(id=d.id, state=to, message="by hand")  # type: ignore[arg-type]
    return await stack.deployments.UpdateDeploymentStatus(request, metadata=stack.operator)


async def down(stack: Stack, d: deployment_pb2.Deployment) -> deployment_pb2.Deployment:
    """The deployment once it is suspended and nothing of it is left at the market."""

    async def there() -> Any:
        async with ledger(stack) as db, db.read(ALL) as session:
            row = await session.get_one(Deployment, d.id)
        return row.state == SUSPENDED and not row.undoing and not row.akash_deployment_id and not row.order_intended

    await stack.until(d.id, SUSPENDED)
    await eventually(there)
    return await stack.get(d.id)


async def test_what_runs_is_taken_down_and_comes_back(local: Stack) -> None:
    who, other = await local.person(), await local.person()
    bots = [await local.live(who, f"{number}23456789:" + "C" * 35) for number in (1, 2)]
    bystander = await local.live(other)
    await cap(local, who, 1)
    await record(local, who.metadata, A_DOLLAR - 1)
    await asyncio.sleep(0.4)
    assert (await local.get(bots[0].id)).state == ACTIVE and await answers(bots[0].provider_url)
    await record(local, who.metadata, 1)
    for d in bots:
        gone = await down(local, d)
        assert not await answers(d.provider_url)
        assert "spend cap of 1 USD a month" in gone.error_message and "by an operator" in gone.error_message
        assert f"{period_end('month', period_of('month', now())):%Y-%m-%d %H:%M} UTC" in gone.error_message
        assert (await kinds(local, who, d)).count("state.suspended") == 1
    assert (await local.get(bystander.id)).state == ACTIVE and await answers(bystander.provider_url)
    await next_period(local, who, "month")
    for d in bots:
        back = await local.until(d.id, ACTIVE)
        assert back.generation == d.generation + 1 and not back.error_message and await answers(back.provider_url)
        assert (await kinds(local, who, d)).count("state.suspended") == 1
    # And again, as soon as that is used up.
    await record(local, who.metadata, A_DOLLAR)
    await down(local, bots[0])
    for d in bots:
        await local.deployments.CloseDeployment(rpc.CloseDeploymentRequest(id=d.id), metadata=who.metadata)
        await local.until(d.id, CLOSED)


@pytest.mark.parametrize("end", ["raised", "deleted", "no cap any more"])
async def test_a_limit_that_is_not_reached_any_more(counted: Stack, end: str) -> None:
    who = await counted.person()
    d = await counted.live(who)
    made = await cap(counted, who, "0.5", HOUR)
    await record(counted, who.metadata, A_DOLLAR)
    await down(counted, d)
    if end == "raised":
        await cap(counted, who, 2, HOUR)
    elif end == "deleted":
        await counted.quotas.DeleteQuota(quota_service_pb2.DeleteQuotaRequest(id=made.id), metadata=counted.operator)
    else:
        await set_quota(counted, quota(who.org_id, "0.5", period=HOUR, unit=MONEY))
    assert not (await counted.until(d.id, ACTIVE)).error_message


async def test_an_operator_sets_it_going_for_the_rest_of_the_period(counted: Stack) -> None:
    who = await counted.person()
    d = await counted.live(who)
    await cap(counted, who, 1, DAY)
    await record(counted, who.metadata, 3 * A_DOLLAR)
    await down(counted, d)
    assert (await move(counted, d, DEPLOYING)).state == DEPLOYING
    await counted.until(d.id, ACTIVE)
    await record(counted, who.metadata, A_DOLLAR)
    await asyncio.sleep(0.5)
    assert (await counted.get(d.id)).state == ACTIVE
    # What is ordered meanwhile was not set going by anybody.
    second = await counted.order(who, "223456789:" + "D" * 35)
    await counted.sandbox_act(second, "pay")
    await down(counted, second)
    await next_period(counted, who, "day")
    await counted.until(second.id, ACTIVE)
    await record(counted, who.metadata, A_DOLLAR)
    await down(counted, d)
    await down(counted, second)


async def test_what_an_operator_has_suspended_stays_so(counted: Stack) -> None:
    who = await counted.person()
    d, other = await counted.live(who), await counted.live(who, "323456789:" + "E" * 35)
    await cap(counted, who, 1, DAY)
    await move(counted, d, SUSPENDED)
    await record(counted, who.metadata, A_DOLLAR)
    await down(counted, other)
    await next_period(counted, who, "day")
    await counted.until(other.id, ACTIVE)
    assert (await counted.get(d.id)).state == SUSPENDED and (await counted.get(d.id)).error_message == "by hand"
    # Set going again by an operator who did not know of any cap, it is suspended as any other.
    await move(counted, d, DEPLOYING)
    await counted.until(d.id, ACTIVE)
    await record(counted, who.metadata, A_DOLLAR)
    await down(counted, d)


async def test_what_is_being_brought_up_is_caught_when_it_runs(counted: Stack, market: MarketSimulator) -> None:
    who = await counted.person()
    d = await counted.order(who)
    await market.post("/_sim/faults", {"step": "offers", "kind": "no_bids", "name": f"clawplane-{d.id}", "times": 3})
    await counted.sandbox_act(d, "pay")
    await cap(counted, who, 0)
    await down(counted, d)
    happened = await kinds(counted, who, d)
    assert happened.index("state.active") < happened.index("state.suspended")
    orders = [one for one in await market.get("/_sim/orders") if one["name"] == f"clawplane-{d.id}"]
    assert orders and {one["state"] for one in orders} == {"closed"}


async def test_ten_that_look_at_once_suspend_once(counted: Stack) -> None:
    who = await counted.person()
    bots = [await counted.live(who, f"{number}23456789:" + "F" * 35) for number in (1, 2, 3)]
    async with ledger(counted) as db:
        async with db.transaction(ALL) as session:
            session.add(
                UsageCounter(org_id=who.org_id, scope="organization", subject="", period="day", starts_at=period_of("day", now()), tokens=1, cost=Decimal(5))
            )
            session.add(_capped(who.org_id))
        woken: list[bool] = []
        await asyncio.gather(*(SpendCap(db, "usd", lambda: woken.append(True)).tick() for _ in range(10)))
        for d in bots:
            await down(counted, d)
            assert (await kinds(counted, who, d)).count("state.suspended") == 1
        assert len(woken) <= 3
        async with db.transaction(ALL) as session:
            await session.execute(sa.delete(UsageCounter).where(UsageCounter.org_id == who.org_id))
        await asyncio.gather(*(SpendCap(db, "usd", lambda: None).tick() for _ in range(10)))
    for d in bots:
        await counted.until(d.id, ACTIVE)
        assert (await kinds(counted, who, d)).count("state.deploying") == 2


def _capped(org_id: str) -> Any:
    from services.deployment_svc.quotas.models import Quota

    return Quota(
        org_id=org_id, scope=1, subject="", period=DAY, unit=MONEY, amount_tokens=None, amount_cost=Decimal(5), soft=True, suspends=True
    )  # fmt: skip


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_on_akash_no_escrow_is_left(databases: Databases, tmp_path: Path) -> None:
    with AkashSimulator() as console:
        async with running(tmp_path, databases.make(), deployment=QUICK | console.settings()) as stack:
            who = await stack.person()
            d = await stack.live(who)

            async def open_escrows() -> list[dict[str, Any]]:
                return [one for one in await console.get("/_sim/orders") if one["name"] == f"clawplane-{d.id}" and one["state"] == "active"]

            assert len(await open_escrows()) == 1
            await cap(stack, who, 1)
            # Its close fails at first.
            await console.post("/_sim/faults", {"call": "close", "kind": "status", "status": 503, "times": 2})
            await record(stack, who.metadata, A_DOLLAR)
            gone = await down(stack, d)
            assert not await open_escrows() and "spend cap" in gone.error_message
            await next_period(stack, who, "month")
            await stack.until(d.id, ACTIVE)
            assert len(await open_escrows()) == 1


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_killed_in_the_middle_it_ends_as_it_should(databases: Databases, market: MarketSimulator, tmp_path: Path) -> None:
    """Two processes, one cap; the one that takes the bot down is killed while the market does not answer."""
    more = {"CLAWPLANE_LIMITS_S": "0.1", "CLAWPLANE_STEP_TIMEOUT_S": "30", "CLAWPLANE_LEASE_S": "1"}
    processes = Processes(databases, tmp_path, deployments=2, **market_env(market.url), **more)
    try:
        await processes.ready()
        who = await processes.person()
        async with Client(processes) as client:
            d = await client.order(who)
            await client.pay(d)
            await client.until(d.id, ACTIVE)
            name = f"clawplane-{d.id}"
            await market.post("/_sim/faults", {"step": "close", "kind": "hang", "name": name})
            await _cap_and_use(processes, d.org_id, who)

            async def hangs() -> Any:
                return [entry for entry in await market.get("/_sim/log") if entry["name"] == name and entry["fault"] == "hang"]

            await eventually(hangs, 20)
            for number in (1, 2):
                await processes.kill_and_restart(number)

            async def closed() -> bool:
                orders = [one for one in await market.get("/_sim/orders") if one["name"] == name]
                return bool(orders) and all(one["state"] == "closed" for one in orders)

            await eventually(closed, 30)
            assert (await client.get(d.id)).state == SUSPENDED
            events = await client.deployments.ListDeploymentEvents(rpc.ListDeploymentEventsRequest(deployment_id=d.id), metadata=who)
            assert [event.kind for event in events.events].count("state.suspended") == 1
    finally:
        processes.stop()


async def _cap_and_use(processes: Processes, org_id: str, who: Any) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{processes.ports[1]}", options=OPTIONS) as channel:
        wish = quota(org_id, 1, period=MONTH, unit=MONEY, suspends=True)
        await quota_service_pb2_grpc.QuotaServiceStub(channel).SetQuota(
            quota_service_pb2.SetQuotaRequest(quota=wish), metadata=processes.operator
        )
        event = usage_event_pb2.UsageEvent(id=str(ids.uuid7()), tokens_in=A_DOLLAR, provider="anthropic", model="claude-opus-4.5")
        await usage_service_pb2_grpc.UsageServiceStub(channel).RecordUsage(usage_service_pb2.RecordUsageRequest(event=event), metadata=who)
