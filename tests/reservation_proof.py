"""Many callers at several processes reserve, settle, release, renew and are late, while others report usage: what must hold.

At every moment, what is settled and what is held together are within every hard limit, but for what was beyond a reservation's own bounds:
too late, or more than was held. Looked at in one snapshot of the database, again and again while it goes on.
"""

import asyncio
import os
import random
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc
import sqlalchemy as sa

from clawplane.deployment.v1 import quota_pb2, quota_service_pb2, quota_service_pb2_grpc
from clawplane.deployment.v1 import usage_reservation_service_pb2 as rpc
from clawplane.deployment.v1 import usage_reservation_service_pb2_grpc as reserving
from clawplane.user.v1 import user_pb2, user_service_pb2, user_service_pb2_grpc
from services.deployment_svc.usage.models import UsageCounter, UsageEvent
from services.deployment_svc.usage_reservations.models import UsageReservation
from services.kit.db import ALL, Database
from tests.conftest import Databases
from tests.processes import OPTIONS, Processes

TOKENS, MONEY = 150, Decimal("0.0015")
"""What there is for each caller, of a day and of a month: less than he wants to hold. When half of it is used up, there is more."""
_SHORT_S = 2
"""Some are held so shortly that what is done with them comes just in time or just too late."""
_LOOK = sa.text("""
SELECT
    (SELECT coalesce(sum(tokens), 0) FROM usage_counters WHERE org_id = :org AND scope = 'organization' AND period = 'day'),
    (SELECT coalesce(sum(cost), 0) FROM usage_counters WHERE org_id = :org AND scope = 'organization' AND period = 'month'),
    (SELECT coalesce(sum(tokens_in + tokens_out), 0) FROM usage_reservations WHERE org_id = :org AND NOT settled AND expires_at > clock_timestamp()),
    (SELECT coalesce(sum(cost_held), 0) FROM usage_reservations WHERE org_id = :org AND NOT settled AND expires_at > clock_timestamp()),
    (SELECT coalesce(sum(tokens_total), 0) FROM usage_events AS e WHERE org_id = :org AND EXISTS (
        SELECT FROM usage_reservations AS r WHERE r.org_id = :org AND 'call_' || replace(r.id::text, '-', '') = e.id AND settled_late)),
    (SELECT coalesce(sum(cost), 0) FROM usage_events AS e WHERE org_id = :org AND EXISTS (
        SELECT FROM usage_reservations AS r WHERE r.org_id = :org AND 'call_' || replace(r.id::text, '-', '') = e.id AND settled_late)),
    (SELECT amount_tokens FROM quotas WHERE org_id = :org AND unit = 'tokens'), (SELECT amount_cost FROM quotas WHERE org_id = :org AND unit = 'money')
""")


class Proof:
    """The running processes and one organization, whose limits everybody wants to use up."""

    def __init__(self, processes: Processes, db: Database, who: Any, org_id: str) -> None:
        self.processes, self.db, self.who, self.org_id = processes, db, who, org_id
        self.channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) for port in processes.ports[1:]]
        self.stubs = [reserving.UsageReservationServiceStub(channel) for channel in self.channels]
        self.said: Counter[str] = Counter()
        self.events: dict[str, int] = {}
        """Tokens by the id of each event that was acknowledged."""
        self.amounts: dict[int, Decimal] = {}
        self.over = asyncio.Event()

    async def look(self) -> tuple[int, Decimal]:
        """Everything within its bounds, in one snapshot: what is left to be used."""
        async with self.db.reading.connect() as connection:
            row = (await connection.execute(_LOOK, {"org": self.org_id[-32:]})).one()
        tokens, cost, tokens_held, cost_held, tokens_late, cost_late, most_tokens, most_cost = row
        assert tokens + tokens_held - tokens_late <= most_tokens, row
        assert cost + cost_held - cost_late <= most_cost, row
        self.said["looks"] += 1
        return most_tokens - tokens, most_cost - cost

    async def limit(self, tokens: int, cost: Decimal) -> None:
        """So much more than what is used already."""
        quotas = quota_service_pb2_grpc.QuotaServiceStub(random.choice(self.channels))
        for amount, period, unit in ((tokens, quota_pb2.QUOTA_PERIOD_DAY, quota_pb2.QUOTA_UNIT_TOKENS),
                                     (cost, quota_pb2.QUOTA_PERIOD_MONTH, quota_pb2.QUOTA_UNIT_MONEY)):  # fmt: skip
            self.amounts[unit] = self.amounts.get(unit, Decimal(0)) + amount
            limit = quota_pb2.Quota(
                org_id=self.org_id, scope=quota_pb2.QUOTA_SCOPE_ORGANIZATION, period=period, unit=unit, amount=f"{self.amounts[unit]:f}"
            )
            await quotas.SetQuota(quota_service_pb2.SetQuotaRequest(quota=limit), metadata=self.processes.operator)

    async def watch(self, callers: int) -> None:
        """Looks until it is over, and raises what is nearly used up."""
        while not self.over.is_set():
            tokens, cost = await self.look()
            if tokens < TOKENS * callers / 2 or cost < MONEY * callers / 2:
                await self.limit(TOKENS * callers, MONEY * callers)
                self.said["raised"] += 1
            await asyncio.sleep(0.01)

    async def caller(self, number: int) -> None:
        """Reserves and does with it what callers do."""
        dice = random.Random(number)
        while not self.over.is_set():
            request = rpc.ReserveUsageRequest(
                provider="anthropic", model="claude-opus-4.5", tokens_in=dice.randrange(1, 400), tokens_out=dice.randrange(1, 100),
                ttl_s=dice.choice([_SHORT_S, 60, 60]),
            )  # fmt: skip
            held = await self.ask("ReserveUsage", request, dice)
            if held is None:
                self.said["refused"] += 1
                await asyncio.sleep(dice.uniform(0, 0.03))
                continue
            self.said["granted"] += 1
            await asyncio.sleep(dice.choice([0, _SHORT_S - 0.1, _SHORT_S, _SHORT_S + 0.1]) if request.ttl_s == _SHORT_S else dice.uniform(0, 0.05))
            await self.end(held, request, dice)

    async def end(self, held: Any, request: rpc.ReserveUsageRequest, dice: random.Random) -> None:
        """Settles it, several times and by several processes, or releases it, or forgets it; some hold it longer before."""
        if dice.random() < 0.2 and await self.ask("RenewUsageReservation", rpc.RenewUsageReservationRequest(id=held.id, ttl_s=_SHORT_S), dice):
            self.said["renewed"] += 1
            await asyncio.sleep(dice.uniform(0, 0.3))
        fate = dice.random()
        if fate < 0.25:
            if await self.ask("ReleaseUsage", rpc.ReleaseUsageRequest(id=held.id), dice) is not None:
                self.said["released"] += 1
        elif fate < 0.9:
            # Little, so that there is room for more.
            settle = rpc.SettleUsageRequest(
                id=held.id, tokens_in=dice.randrange(0, request.tokens_in // 20 + 1), tokens_out=dice.randrange(0, request.tokens_out // 20 + 1)
            )
            done = [one for one in await asyncio.gather(*(self.ask("SettleUsage", settle, dice) for _ in range(dice.choice([1, 2])))) if one]
            assert [one.duplicate for one in done].count(False) <= 1
            if done:
                self.events[held.id] = done[0].event.tokens_total
                self.said["late" if done[0].late else "settled"] += 1

    async def ask(self, method: str, request: Any, dice: random.Random) -> Any:
        """The answer of any of the processes; None when it is refused. One that dies is asked again, as clients do."""
        while True:
            try:
                return await getattr(dice.choice(self.stubs), method)(request, metadata=self.who, timeout=20)
            except grpc.aio.AioRpcError as error:
                if error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION):
                    return None
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                    raise
                self.said["asked again"] += 1
                await asyncio.sleep(0.2)

    async def compare(self) -> None:
        """What was acknowledged is in the ledger, and the counters are what the ledger says."""
        await self.look()
        async with self.db.read(ALL) as session:
            events = {event.id: event for event in await session.scalars(sa.select(UsageEvent).where(UsageEvent.org_id == self.org_id))}
            counted = (await session.scalars(sa.select(UsageCounter.tokens).where(UsageCounter.org_id == self.org_id, UsageCounter.period == "day"))).all()
            left = (await session.scalars(sa.select(UsageReservation.id).where(UsageReservation.settled.is_(False)))).all()
        assert {key: events[key].tokens_total for key in self.events} == self.events
        assert sum(counted) == sum(event.tokens_total for event in events.values())
        assert not set(left) & set(events)


async def prove(databases: Databases, folder: Path, processes: int, callers: int, seconds: float, kills: int = 0) -> Counter[str]:
    """Runs it for so long; what happened."""
    tiers = '{"starter": {"price_minor": 2900, "monthly_tokens": 0, "monthly_credit_minor": 0, "live_deployments": 0}}'
    # So many that start at once take turns for longer than one waits elsewhere.
    more = {"CLAWPLANE_TIERS": tiers, "CLAWPLANE_POOL_SIZE": "3", "CLAWPLANE_MAX_OVERFLOW": "2", "CLAWPLANE_LOCK_TIMEOUT_S": "30"}
    started = Processes(databases, folder, deployments=processes, **more)
    db = Database(started.env["CLAWPLANE_DEPLOYMENT_DATABASE_URL"], started.signer().settings, "test")
    try:
        await started.ready()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{started.ports[0]}", options=OPTIONS) as channel:
            wish = user_service_pb2.CreateUserRequest(user=user_pb2.User(email=f"{os.urandom(6).hex()}@example.com"))
            user = await user_service_pb2_grpc.UserServiceStub(channel).CreateUser(wish, metadata=started.operator)
        who = (("authorization", f"Bearer {started.signer().sign(['*'], user=user.id, lifetime_s=900)}"),)
        proof = Proof(started, db, who, user.personal_org_id)
        await proof.limit(TOKENS * callers, MONEY * callers)
        await _run(proof, callers, seconds, kills)
        for channel in proof.channels:
            await channel.close()
        return proof.said
    finally:
        await db.close()
        started.stop()


async def _run(proof: Proof, callers: int, seconds: float, kills: int) -> None:
    work = [asyncio.create_task(proof.caller(number)) for number in range(callers)]
    work += [asyncio.create_task(proof.watch(callers))]
    deadline = time.monotonic() + seconds
    for number in range(kills):
        await asyncio.sleep(seconds / (kills + 1))
        await proof.processes.kill_and_restart(1 + number % len(proof.channels))
    await asyncio.sleep(max(0, deadline - time.monotonic()))
    proof.over.set()
    await asyncio.gather(*work)
    await proof.compare()
