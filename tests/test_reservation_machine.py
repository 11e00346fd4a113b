"""Reservations in any order, against a model that adds up by hand: what is granted, what is refused, and how things stand after each step."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from clawplane.deployment.v1 import quota_pb2, usage_event_pb2
from clawplane.user.v1.entitlement_service_pb2 import Entitlements
from services.deployment_svc.app import PARTITIONED
from services.deployment_svc.prices import seed
from services.deployment_svc.prices.repository import Prices
from services.deployment_svc.quotas import repository as quotas
from services.deployment_svc.quotas.models import PERIOD, SCOPE, UNIT, Quota
from services.deployment_svc.quotas.rules import Limit, Who, entitled, holding
from services.deployment_svc.usage.ledger import Ledger
from services.deployment_svc.usage.models import UsageCounter
from services.deployment_svc.usage.rows import make, read
from services.deployment_svc.usage.rules import period_of
from services.deployment_svc.usage_reservations import repository
from services.deployment_svc.usage_reservations.engine import Reservations
from services.deployment_svc.usage_reservations.models import UsageReservation
from services.deployment_svc.usage_reservations.rules import Used
from services.kit import ids
from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.errors import Error, Exhausted, InvalidState, NotFound
from services.kit.migrate import migrate
from services.kit.partitions import ensure
from services.kit.settings import KitSettings
from tests.conftest import Databases

PROVIDER, MODEL = "anthropic", "claude-opus-4.5"
LIVE, EXPIRED, DONE, RELEASED = "live", "expired", "done", "released"
UNCLAIMED: Any = SimpleNamespace(claim=None)


@dataclass
class Held:
    """A reservation as the model knows it."""

    id: str
    who: Who
    tokens_in: int
    tokens_out: int
    cost: Decimal
    at: datetime
    of_endpoint: bool
    state: str = LIVE
    over: tuple[int, Decimal, bool] = (0, Decimal(0), False)

    @property
    def tokens(self) -> int:
        """What it holds."""
        return self.tokens_in + self.tokens_out


@dataclass
class World:
    """What is shared by all runs: the database, the engine, and the loop that they live in."""

    run: Callable[[Coroutine[Any, Any, Any]], Any]
    db: Database
    ledger: Ledger
    engines: list[Reservations] = field(default_factory=list)
    tiers: dict[str, Entitlements] = field(default_factory=dict)


amounts = st.integers(0, 60)
dice = st.integers(0, 2**16)


class Machine(RuleBasedStateMachine):
    """One organization with two users, two keys and two bots."""

    world: World
    reservations = Bundle("reservations")

    @initialize(hourly=st.sampled_from([0, 150, 400]), credit=st.sampled_from([0, 1, 100]), limits=st.lists(dice, max_size=4))
    def begin(self, hourly: int, credit: int, limits: list[int]) -> None:
        self.org = ids.new("org")
        self.users, self.keys, self.bots = ([ids.new(prefix) for _ in range(2)] for prefix in ("usr", "key", "dep"))
        self.world.tiers[self.org] = Entitlements(org_id=self.org, hourly_tokens=hourly, monthly_credit_minor=credit)
        self.limits: dict[tuple[str, str, str, str], Limit] = {}
        self.held: list[Held] = []
        self.used: list[tuple[Who, datetime, int, Decimal]] = []
        for number in limits:
            self.set_quota(number, number % 300)

    # What the model knows.

    def who(self, number: int) -> Who:
        """Somebody: with or without a key, with or without a bot."""
        key, bot = ([*things, ""][number // 2 % 3 if things is self.keys else number // 6 % 3] for things in (self.keys, self.bots))
        return Who(self.org, self.users[number % 2], key, bot)

    def holding(self, who: Who) -> list[Limit]:
        """The limits that hold for somebody."""
        ordered = sorted(self.limits.values(), key=lambda limit: limit.subject)
        return list(holding(entitled(self.world.tiers[self.org]), ordered, who))

    def standing(self, limit: Limit) -> tuple[Any, Any]:
        """(used, held), added up by hand."""
        start = period_of(limit.period, now())

        def counts(who: Who, at: datetime) -> bool:
            return at >= start and (limit.scope == "organization" or (limit.scope, limit.subject) in set(who.subjects()))

        tokens = limit.unit == "tokens"
        used = sum(((t if tokens else c) for who, at, t, c in self.used if counts(who, at)), start=0 if tokens else Decimal(0))
        # What settles itself holds until it is settled.
        holds = [one for one in self.held if counts(one.who, one.at) and (one.state == LIVE or (one.state == EXPIRED and one.of_endpoint))]
        return used, sum(((one.tokens if tokens else one.cost) for one in holds), start=0 if tokens else Decimal(0))

    def fits(self, who: Who, tokens: int, cost: Decimal) -> bool:
        """Whether every hard limit covers so much more."""
        for limit in self.holding(who):
            used, held = self.standing(limit)
            if not limit.soft and used + held + (tokens if limit.unit == "tokens" else cost) > limit.amount:
                return False
        return True

    @staticmethod
    def price(tokens_in: int, tokens_out: int) -> Decimal:
        """Five dollars a million in, twenty-five a million out."""
        return Decimal(tokens_in * 5 + tokens_out * 25) / 1_000_000

    def engine(self, number: int) -> Reservations:
        """One of two, as if in two processes."""
        return self.world.engines[number % 2]

    # What happens.

    async def _grant(self, number: int, tokens_in: int, tokens_out: int, of_endpoint: bool) -> Any:
        engine = self.engine(number)
        wish = await engine.wish(self.who(number), PROVIDER, MODEL, tokens_in, tokens_out, 3600, settles_itself=of_endpoint)
        try:
            return await engine.grant(wish, UNCLAIMED)
        except Exhausted as refused:
            return refused

    def granted(self, answer: Any, number: int, tokens_in: int, tokens_out: int, of_endpoint: bool) -> Held | None:
        """Holds the answer against the model."""
        who, cost = self.who(number), self.price(tokens_in, tokens_out)
        fits = self.fits(who, tokens_in + tokens_out, cost)
        assert fits == (not isinstance(answer, Exhausted)), (answer, [(limit, self.standing(limit)) for limit in self.holding(who)])
        if not fits:
            return None
        assert answer["cost_held"] == cost
        self.held.append(Held(answer["id"], who, tokens_in, tokens_out, cost, answer["created_at"], of_endpoint))
        return self.held[-1]

    @rule(target=reservations, number=dice, tokens_in=amounts, tokens_out=amounts, of_endpoint=st.booleans())
    def reserve(self, number: int, tokens_in: int, tokens_out: int, of_endpoint: bool) -> Any:
        answer = self.world.run(self._grant(number, tokens_in, tokens_out, of_endpoint))
        return self.granted(answer, number, tokens_in, tokens_out, of_endpoint)

    @rule(numbers=st.lists(dice, min_size=2, max_size=6), tokens=st.integers(20, 60))
    def reserve_many(self, numbers: list[int], tokens: int) -> None:
        """At one engine in one moment: as if one after the other."""

        async def all_at_once() -> list[Any]:
            return await asyncio.gather(*(self._grant(number & ~1, tokens, 0, False) for number in numbers))

        for number, answer in zip(numbers, self.world.run(all_at_once()), strict=True):
            self.granted(answer, number & ~1, tokens, 0, False)

    @rule(one=reservations, more=st.sampled_from([0, 0, 0, 1, 70]), share=st.integers(0, 4), number=dice)
    def settle(self, one: Held | None, more: int, share: int, number: int) -> None:
        if one is None:
            return
        tokens_in, tokens_out = one.tokens_in * share // 4 + more, one.tokens_out * share // 4
        used = Used(one.id, tokens_in, tokens_out, org_id="" if one.of_endpoint else self.org)
        if one.of_endpoint:
            (answer,) = self.world.run(self.engine(number).settle_many([used]))
            if one.state in (DONE, RELEASED):
                assert isinstance(answer, NotFound)
                return
        else:
            answer = self.world.run(self._error(self.engine(number).settle(used)))
            if one.state == RELEASED:
                assert isinstance(answer, NotFound)
                return
            if one.state == DONE:
                assert answer.duplicate and (answer.tokens_overrun, answer.cost_overrun, answer.late) == one.over
                return
        cost = self.price(tokens_in, tokens_out)
        late = one.state == EXPIRED and not one.of_endpoint
        one.over = (max(0, tokens_in + tokens_out - one.tokens), max(Decimal(0), cost - one.cost), late)
        assert not answer.duplicate and (answer.tokens_overrun, answer.cost_overrun, answer.late) == one.over
        one.state = DONE
        self.used.append((one.who, one.at, tokens_in + tokens_out, cost))

    @staticmethod
    async def _error(work: Coroutine[Any, Any, Any]) -> Any:
        try:
            return await work
        except Error as error:
            return error

    @rule(one=reservations, renews=st.booleans())
    def renew_or_release(self, one: Held | None, renews: bool) -> None:
        if one is None:
            return

        async def change(session: Any) -> str:
            row, at = await repository.own(session, self.org, one.id, "")
            if row is None:
                return "nothing"
            if row.settles_itself and not row.settled:
                raise repository.of_the_endpoint()
            if renews and not row.settled and row.expires_at > at:
                row.expires_at = at + timedelta(hours=1)
            elif not renews and (row.released or not row.settled):
                row.settled = row.released = True
            return "changed"

        answer = self.world.run(self._error(self.world.db.run(change, self.org)))
        if one.of_endpoint and one.state in (LIVE, EXPIRED):
            assert isinstance(answer, InvalidState)
        elif one.state in (LIVE, EXPIRED) and not renews:
            one.state = RELEASED

    @rule(one=consumes(reservations))
    def expire(self, one: Held | None) -> None:
        if one is None or one.state != LIVE:
            return
        self.world.run(self._move(one.id, expires_at=now() - timedelta(seconds=1)))
        one.state = EXPIRED

    @rule(target=reservations, pick=st.integers(0, 100))
    def look_again(self, pick: int) -> Any:
        """What has expired may still be settled."""
        return self.held[pick % len(self.held)] if self.held else None

    async def _move(self, reservation_id: str, **values: Any) -> None:
        async with self.world.db.transaction(ALL) as session:
            row = await session.get(UsageReservation, reservation_id)
            if row is not None:
                for name, value in values.items():
                    setattr(row, name, value)

    @rule()
    def settle_the_abandoned(self) -> None:
        self.world.run(self.engine(0).tick())
        for one in self.held:
            if one.of_endpoint and one.state == EXPIRED:
                one.state = DONE
                self.used.append((one.who, one.at, one.tokens, one.cost))

    @rule(number=dice, tokens=st.integers(1, 90))
    def report(self, number: int, tokens: int) -> None:
        """Never refused, whatever the limits say."""
        who, at = self.who(number), now()
        event = usage_event_pb2.UsageEvent(provider=PROVIDER, model=MODEL, tokens_in=tokens, type=usage_event_pb2.USAGE_TYPE_CHAT)
        identity = (who.org_id, who.user_id, who.api_key_id or None, who.deployment_id or None)
        row = make(read(event), identity, str(ids.uuid7()), at, at, self.world.ledger.book)
        assert self.world.run(self.world.ledger.record(row, self.world.ledger.book))
        self.used.append((who, at, tokens, self.price(tokens, 0)))

    @rule(number=dice, amount=st.integers(0, 500))
    def set_quota(self, number: int, amount: int) -> None:
        """A limit of any kind; what it counts is right from the start. By the hour only before the first hour has passed."""
        scope = ("organization", "user", "api_key", "deployment")[number % 4]
        period = ("day", "month", "hour")[number // 4 % (2 if self.has_passed else 3)]
        unit, soft = ("tokens", "money")[number // 12 % 2], number % 7 == 0
        of_own = {"user": self.users, "api_key": self.keys, "deployment": self.bots}.get(scope)
        subject = of_own[number // 24 % 2] if of_own and number // 48 % 2 else ""
        exact = amount if unit == "tokens" else Decimal(amount) / 100_000
        wish = quota_pb2.Quota(
            org_id=self.org, scope=SCOPE.numbers[scope], subject=subject, period=PERIOD.numbers[period], unit=UNIT.numbers[unit], soft=soft
        )
        self.world.run(self.world.db.run(lambda session: quotas.set_quota(session, wish, exact), ALL))
        self.limits[scope, subject, period, unit] = Limit(scope, subject, period, unit, exact, soft)

    @precondition(lambda self: self.limits)
    @rule(number=dice)
    def delete_quota(self, number: int) -> None:
        scope, subject, period, unit = key = list(self.limits)[number % len(self.limits)]
        del self.limits[key]

        async def gone(session: Any) -> None:
            same = (Quota.org_id == self.org, Quota.scope == SCOPE.numbers[scope], Quota.subject == subject)
            await session.execute(sa.delete(Quota).where(*same, Quota.period == PERIOD.numbers[period], Quota.unit == UNIT.numbers[unit]))

        self.world.run(self.world.db.run(gone, ALL))

    @property
    def has_passed(self) -> bool:
        """Whether an hour has been made to pass."""
        return any(at < period_of("hour", now()) for at in [*(one.at for one in self.held), *(one[1] for one in self.used)])

    @precondition(lambda self: (self.held or self.used) and period_of("day", now()) <= min(
        [one.at for one in self.held] + [one[1] for one in self.used]) - timedelta(hours=1))  # fmt: skip
    @rule()
    def an_hour_passes(self) -> None:
        """Everything that is there lies an hour further back, in the same day."""
        hour = timedelta(hours=1)

        async def back(session: Any) -> None:
            for row in await session.scalars(sa.select(UsageReservation).where(UsageReservation.org_id == self.org)):
                row.created_at -= hour
            mine = (UsageCounter.org_id == self.org, UsageCounter.period == "hour")
            await session.execute(sa.delete(UsageCounter).where(*mine, UsageCounter.starts_at < period_of("hour", now())))
            await session.execute(sa.update(UsageCounter).where(*mine).values(starts_at=period_of("hour", now()) - hour))

        self.world.run(self.world.db.run(back, ALL))
        for one in self.held:
            one.at -= hour
        self.used = [(who, at - hour, tokens, cost) for who, at, tokens, cost in self.used]

    @invariant()
    def how_things_stand(self) -> None:
        """What everybody is told is what was added up."""
        if not hasattr(self, "org"):
            return
        whos = [self.who(number) for number in range(18)]
        found = self.world.run(quotas.look(self.world.db, whos))
        for who in whos:
            for limit in self.holding(who):
                assert found.of(self.org, limit) == self.standing(limit), (limit, who)


@pytest.fixture
def world(databases: Databases) -> Iterator[World]:
    """A database with everything but services."""
    loop = asyncio.new_event_loop()
    db = Database(databases.make()["deployment_svc"], KitSettings(max_overflow=0), "machine")
    prices = Prices(db, "usd")
    ledger = Ledger(db, prices, 1000)
    made = World(loop.run_until_complete, db, ledger)

    async def tier(org_id: str) -> Entitlements:
        return made.tiers[org_id]

    async def prepare() -> None:
        await migrate(db, "deployment_svc")
        if not db.is_sqlite:
            await ensure(db, PARTITIONED)
        await seed.fill(prices)

    loop.run_until_complete(prepare())
    made.engines = [Reservations(db, ledger, tier, 3600) for _ in range(2)]
    yield made
    loop.run_until_complete(db.close())
    loop.close()


@pytest.mark.parametrize("way", ["settled", "renewed"])
def test_nothing_is_granted_between_a_last_moment_and_its_commit(world: World, way: str) -> None:
    """What was settled or renewed just in time, and is committed after it would have expired, leaves no room in between."""
    org, user = ids.new("org"), ids.new("usr")
    world.tiers[org] = Entitlements(org_id=org, hourly_tokens=100)
    one, other = world.engines

    async def reserve(engine: Reservations, lifetime_s: float) -> Any:
        return await engine.grant(await engine.wish(Who(org, user), PROVIDER, MODEL, 100, 0, lifetime_s), UNCLAIMED)

    async def both() -> Any:
        held = await reserve(one, 0.4)
        async with world.db.transaction(ALL) as session:
            if way == "settled":
                (done,) = await repository.settle(session, [Used(held["id"], 100, org_id=org)], world.ledger.book)
                assert not done.late
            else:
                row, at = await repository.own(session, org, held["id"], "")
                assert row is not None and row.expires_at > at
                row.expires_at = at + timedelta(hours=1)
            await asyncio.sleep(0.5)
            second = asyncio.create_task(reserve(other, 60))
            await asyncio.sleep(0.3)
            assert not second.done()
        with pytest.raises(Exhausted):
            await second

    world.run(both())


def run(world: World, examples: int, steps: int) -> None:
    """Tries so many orders of so many steps."""
    kind = type("Machine", (Machine,), {"world": world})
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    # Each step asks a database: making a failure shorter would take longer than anybody waits.
    how = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=checks, phases=[Phase.generate], database=None
    )  # fmt: skip
    run_state_machine_as_test(kind, settings=how)


def test_reservations_in_any_order(world: World) -> None:
    left_s = 3600 - now().timestamp() % 3600
    if left_s < 60:
        world.run(asyncio.sleep(left_s))
    run(world, examples=12, steps=25)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
def test_reservations_in_very_many_orders(world: World) -> None:
    run(world, examples=300, steps=50)
