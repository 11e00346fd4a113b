"""Limits: which hold, how they stand, what they refuse, and what is told of them once."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import pytest_asyncio
import sqlalchemy as sa
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from clawplane.deployment.v1 import quota_pb2 as pb
from clawplane.deployment.v1 import quota_service_pb2 as rpc
from clawplane.deployment.v1 import usage_event_pb2, usage_service_pb2, usage_service_pb2_grpc
from clawplane.deployment.v1 import usage_reservation_service_pb2 as reserving
from clawplane.user.v1.entitlement_service_pb2 import Entitlements
from services.deployment_svc.prices.book import Line, PriceBook
from services.deployment_svc.quotas import rules, watch
from services.deployment_svc.quotas.models import QuotaNotice
from services.deployment_svc.quotas.rules import Limit, Standing, Standings, Who
from services.deployment_svc.quotas.watch import Watcher
from services.deployment_svc.usage.models import UsageCounter
from services.deployment_svc.usage.rules import period_end, period_of
from services.deployment_svc.usage_reservations.rules import most_cost
from services.kit import ids
from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.errors import InvalidArgument
from services.user_svc.settings import Tier
from tests.conftest import Databases
from tests.harness import Metadata, Person, Stack, eventually, running
from tests.processes import OPTIONS, Processes
from tests.usage_rows import ledger

ORG, USER, KEY, DEPLOYMENT = (pb.QUOTA_SCOPE_ORGANIZATION, pb.QUOTA_SCOPE_USER, pb.QUOTA_SCOPE_API_KEY, pb.QUOTA_SCOPE_DEPLOYMENT)
HOUR, DAY, MONTH = pb.QUOTA_PERIOD_HOUR, pb.QUOTA_PERIOD_DAY, pb.QUOTA_PERIOD_MONTH
TOKENS, MONEY = pb.QUOTA_UNIT_TOKENS, pb.QUOTA_UNIT_MONEY
Code = grpc.StatusCode
MODEL = {"provider": "anthropic", "model": "claude-opus-4.5"}


def quota(org_id: str, amount: object, period: int = DAY, unit: int = TOKENS, scope: int = ORG, subject: str = "", **more: Any) -> pb.Quota:
    """A limit."""
    return pb.Quota(org_id=org_id, amount=str(amount), period=period, unit=unit, scope=scope, subject=subject, **more)  # type: ignore[arg-type]


async def set_quota(stack: Stack, wish: pb.Quota) -> pb.Quota:
    """Sets it as an operator."""
    return await stack.quotas.SetQuota(rpc.SetQuotaRequest(quota=wish), metadata=stack.operator)


async def check(stack: Stack, who: Metadata, **more: Any) -> rpc.CheckQuotaResponse:
    """How things stand for somebody."""
    return await stack.quotas.CheckQuota(rpc.CheckQuotaRequest(**more), metadata=who)


async def record(stack: Stack, who: Metadata, tokens: int = 100, **more: Any) -> None:
    """Uses something; what is reported is never refused."""
    event = usage_event_pb2.UsageEvent(**{"id": str(ids.uuid7()), "tokens_in": tokens, **MODEL, **more})
    await stack.usage.RecordUsage(usage_service_pb2.RecordUsageRequest(event=event), metadata=who)


async def reserve(stack: Stack, who: Metadata, tokens: int, **more: Any) -> Any:
    """Holds so many tokens."""
    return await stack.reservations.ReserveUsage(reserving.ReserveUsageRequest(tokens_in=tokens, **{**MODEL, **more}), metadata=who)


async def refusal(call: Any) -> tuple[Code, str, dict[str, str], float | None]:
    """How a call is refused: code, text, what is said of the reason, and when to try again, in seconds."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    status = rpc_status.from_call(refused.value)  # type: ignore[arg-type]
    assert status is not None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    wait_s = None
    for detail in status.details:
        detail.Unpack(info)
        if detail.Unpack(retry):
            wait_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return refused.value.code(), status.message, {"reason": info.reason, **info.metadata}, wait_s


def told(answer: rpc.CheckQuotaResponse) -> dict[tuple[int, int, int], tuple[str, str, str]]:
    """(amount, used, held) by (scope, period, unit)."""
    return {(one.scope, one.period, one.unit): (one.amount, one.used, one.held) for one in answer.quotas}


@pytest_asyncio.fixture(autouse=True)
async def _not_at_the_end_of_an_hour() -> None:
    """What is counted by the hour is not to be in two of them."""
    left_s = (period_end("hour", period_of("hour", now())) - now()).total_seconds()
    if left_s < 20:
        await asyncio.sleep(left_s + 0.1)


# Rules.


def test_a_quota_takes_the_place_of_what_was_paid_for() -> None:
    paid_for = rules.entitled(Entitlements(monthly_credit_minor=1050, monthly_tokens=0, hourly_tokens=100))
    assert [(limit.period, limit.unit, limit.amount) for limit in paid_for] == [("month", "money", Decimal("10.5")), ("hour", "tokens", 100)]
    who = Who("org_1", "usr_1", "key_1", "")
    assert rules.holding(paid_for, [], who) is paid_for
    quotas = [
        Limit("organization", "", "hour", "tokens", 7, soft=True, quota_id="quo_1"), Limit("user", "", "day", "tokens", 5, quota_id="quo_2"),
        Limit("api_key", "", "day", "tokens", 4, quota_id="quo_3"), Limit("api_key", "key_1", "day", "tokens", 3, quota_id="quo_4"),
        Limit("api_key", "key_2", "day", "tokens", 2, quota_id="quo_5"), Limit("deployment", "", "day", "tokens", 1, quota_id="quo_6"),
    ]  # fmt: skip
    held = rules.holding(paid_for, quotas, who)
    assert [(limit.scope, limit.subject, limit.amount, limit.soft) for limit in held] == [
        ("organization", "", Decimal("10.5"), False), ("organization", "", 7, True), ("user", "usr_1", 5, False), ("api_key", "key_1", 3, False),
    ]  # fmt: skip


def test_the_limit_that_lasts_longest_is_told() -> None:
    at = datetime(2026, 2, 3, 4, 30, tzinfo=UTC)
    who = Who("org_1", "usr_1")
    hour, month = Limit("organization", "", "hour", "tokens", 100), Limit("user", "usr_1", "month", "tokens", 1000)
    credit = Limit("organization", "", "month", "money", Decimal(10))

    def refused(needed: int, price: Decimal | None, *limits: Limit, **standing: Any) -> Any:
        keys = [("org_1", limit.scope, limit.subject, limit.period) for limit in limits]
        return rules.refusal(limits, Standings(at, {}, dict.fromkeys(keys, Standing(**standing))), who, needed, price, "usd")

    assert refused(100, Decimal(1), hour, month, credit) is None
    assert refused(0, Decimal(0), hour, tokens=100) is None
    # Whoever is beyond a limit gets nothing more, not even what costs nothing.
    assert refused(0, Decimal(0), hour, tokens=101) is not None
    by_hour = refused(50, Decimal(0), hour, month, tokens=60)
    assert (by_hour.metadata["period"], by_hour.retry_after_s) == ("hour", 1800)
    assert by_hour.metadata == {
        "scope": "organization", "subject": "", "period": "hour", "unit": "tokens", "amount": "100", "used": "60", "held": "0", "needed": "50"
    }  # fmt: skip
    by_user = refused(50, Decimal(0), hour, month, tokens=999)
    assert (by_user.metadata["subject"], by_user.retry_after_s) == ("usr_1", timedelta(days=25, hours=19, minutes=30).total_seconds())
    assert refused(50, Decimal(9), hour, month, credit, tokens=999, cost=Decimal(2)).reason != by_user.reason
    # Only calls under way are in the way; and what never fits need not be tried again.
    assert refused(50, Decimal(0), hour, tokens_held=60).retry_after_s == 5
    assert refused(101, Decimal(0), hour).retry_after_s is None
    assert isinstance(refused(1, None, hour, credit), InvalidArgument) and refused(1, None, hour) is None
    assert refused(1000, Decimal(0), hour._replace(soft=True)) is None


def test_shares_of_a_limit() -> None:
    assert [rules.percent(used, 3) for used in (0, 1, 2, 3, 7)] == [0, 33, 66, 100, 233]
    assert rules.percent(Decimal("0.499999999999"), Decimal(1)) == 49 and rules.percent(0, 0) == 100
    assert rules.tightness(1, 1, 4) == 0.5 and rules.tightness(0, 0, 0) > 1e9
    assert [rules.exact(amount) for amount in (5, Decimal("1E+3"), Decimal("0.50"), Decimal("0E-12"))] == ["5", "1000", "0.5", "0"]
    for at in (datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC), datetime(2024, 2, 29, tzinfo=UTC)):
        for period in ("hour", "day", "month"):
            assert period_of(period, at) <= at < period_end(period, period_of(period, at))


def test_a_call_never_costs_more_than_it_may_at_most() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)

    def line(above: int, into: int, out: int, cached: int, reasoning: int) -> Line:
        return Line("prc_1", "p", "m*", above, datetime(2000, 1, 1, tzinfo=UTC), None, into, out, cached, reasoning)

    # Cached tokens that cost more, reasoning that costs more, and long contexts that cost less.
    book = PriceBook.of("usd", 1, [line(0, 3, 10, 4, 20), line(100, 1, 10, 1, 10)])
    assert most_cost(book, "p", "other", 1, 1, at) is None and most_cost(book, "p", "m1", 0, 0, at) == 0
    most = most_cost(book, "p", "m1", 120, 5, at)
    assert most == Decimal(100 * 4 + 5 * 20).scaleb(-12)
    for tokens_in in range(121):
        found = book.find("p", "m1", tokens_in, at)
        assert found is not None and most is not None
        assert all(found.cost(tokens_in, 5, cached, reasoning) <= most for cached in (0, tokens_in) for reasoning in (0, 5))
    dear = PriceBook.of("usd", 2, [line(0, 10**10, 0, 0, 0)])
    with pytest.raises(InvalidArgument, match="tokens_in"):
        most_cost(dear, "p", "m1", 1_000_000_000, 0, at)


# Setting and reading.


async def test_what_contradicts_itself_is_refused(stack: Stack, person: Person) -> None:
    other = await stack.live(await stack.person())
    org = person.org_id
    for wish, field in (
        (quota(org, "1.5"), "quota.amount"), (quota(org, "9000001", unit=MONEY), "quota.amount"), (quota(org, "-1"), "quota.amount"),
        (quota(org, 1, subject=person.user.id), "quota.subject"), (quota(org, 1, scope=KEY, subject=person.user.id), "quota.subject"),
        (quota(org, 1, scope=DEPLOYMENT, subject=other.id), "quota.subject"), (quota(org, 1, suspends=True), "quota.suspends"),
        (quota(org, 1, scope=USER, unit=MONEY, suspends=True), "quota.suspends"), (quota("org_1", 1), "quota.org_id"),
        (quota(org, 1, period=0), "quota.period"),
    ):  # fmt: skip
        code, text, *_ = await refusal(set_quota(stack, wish))
        assert code is Code.INVALID_ARGUMENT and field in text, (wish, text)
    assert (await refusal(set_quota(stack, quota("org_" + "0" * 32, 1))))[0] is Code.NOT_FOUND
    assert (await refusal(stack.quotas.SetQuota(rpc.SetQuotaRequest(quota=quota(org, 1)), metadata=person.metadata)))[0] is Code.PERMISSION_DENIED


async def test_one_of_each_kind(stack: Stack, person: Person) -> None:
    first = await set_quota(stack, quota(person.org_id, 100))
    again = await set_quota(stack, quota(person.org_id, "0.25", unit=MONEY))
    replaced = await set_quota(stack, quota(person.org_id, 50, soft=True))
    assert (replaced.id, replaced.amount, replaced.soft, again.amount) == (first.id, "50", True, "0.25")
    assert replaced.updated_at.ToNanoseconds() > first.updated_at.ToNanoseconds()
    listed = await stack.quotas.ListQuotas(rpc.ListQuotasRequest(), metadata=person.metadata)
    assert [one.id for one in listed.quotas] == [again.id, first.id]
    by_operator = await stack.quotas.ListQuotas(rpc.ListQuotasRequest(org_id=person.org_id), metadata=stack.operator)
    assert by_operator.quotas == listed.quotas
    other = await stack.person()
    assert (await refusal(stack.quotas.ListQuotas(rpc.ListQuotasRequest(org_id=person.org_id), metadata=other.metadata)))[0] is Code.NOT_FOUND
    await stack.quotas.DeleteQuota(rpc.DeleteQuotaRequest(id=first.id), metadata=stack.operator)
    assert (await refusal(stack.quotas.DeleteQuota(rpc.DeleteQuotaRequest(id=first.id), metadata=stack.operator)))[0] is Code.NOT_FOUND
    assert [one.amount for one in (await check(stack, person.metadata)).quotas if one.quota_id] == ["0.25"]


async def test_many_at_once_are_one(stack: Stack, person: Person) -> None:
    made = await asyncio.gather(*(set_quota(stack, quota(person.org_id, 10 + n, scope=USER)) for n in range(12)))
    assert len({one.id for one in made}) == 1
    listed = await stack.quotas.ListQuotas(rpc.ListQuotasRequest(), metadata=person.metadata)
    assert len(listed.quotas) == 1


@pytest_asyncio.fixture(scope="module")
async def limited(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """A stack whose tiers have every limit, looked at often."""
    starter = Tier(price_minor=2900, monthly_tokens=1_000_000, monthly_credit_minor=1000, live_deployments=3, hourly_tokens=100_000)
    folder = tmp_path_factory.mktemp("limited")
    async with running(folder, databases.make(), user={"tiers": {"starter": starter}}, deployment={"limits_s": 0.1}) as made:
        yield made


async def test_how_things_stand(limited: Stack) -> None:
    who = await limited.person()
    await record(limited, who.metadata, 30_000)
    held = await reserve(limited, who.metadata, 10_000, tokens_out=2_000)
    answer = await check(limited, who.metadata)
    # 5 USD for a million in, 25 for a million out.
    assert told(answer) == {
        (ORG, HOUR, TOKENS): ("100000", "30000", "12000"), (ORG, MONTH, TOKENS): ("1000000", "30000", "12000"),
        (ORG, MONTH, MONEY): ("10", "0.15", "0.1"),
    }  # fmt: skip
    assert answer.allowed and [one.percent for one in answer.quotas] == [30, 3, 1]
    at = now()
    assert answer.quotas[0].resets_at.ToDatetime(UTC) == period_end("hour", period_of("hour", at))
    assert (await check(limited, who.metadata, tokens=58_000)).allowed and not (await check(limited, who.metadata, tokens=58_001)).allowed
    assert (await check(limited, who.metadata, cost="9.75")).allowed and not (await check(limited, who.metadata, cost="9.750000000001")).allowed
    await limited.reservations.ReleaseUsage(reserving.ReleaseUsageRequest(id=held.id), metadata=who.metadata)
    assert told(await check(limited, who.metadata))[ORG, HOUR, TOKENS] == ("100000", "30000", "0")
    assert (await refusal(check(limited, limited.operator)))[0] is Code.FAILED_PRECONDITION


async def test_the_hourly_throttle(limited: Stack) -> None:
    """100,000 tokens an hour: counted as they are used, and not as they are asked for; told in seconds."""
    who = await limited.person()
    small = [await reserve(limited, who.metadata, 0, tokens_out=1000) for _ in range(10)]
    for one in small:
        done = reserving.SettleUsageRequest(id=one.id, tokens_out=100)
        await limited.reservations.SettleUsage(done, metadata=who.metadata)
    assert told(await check(limited, who.metadata))[ORG, HOUR, TOKENS] == ("100000", "1000", "0")
    code, text, said, wait_s = await refusal(reserve(limited, who.metadata, 99_001))
    assert code is Code.RESOURCE_EXHAUSTED and "100000 tokens an hour" in text
    assert (said["reason"], said["scope"], said["period"], said["used"], said["needed"]) == ("QUOTA_EXHAUSTED", "organization", "hour", "1000", "99001")
    left = (period_end("hour", period_of("hour", now())) - now()).total_seconds()
    assert wait_s is not None and left - 5 < wait_s <= left + 5
    # Refused at once, and nothing is charged for it.
    assert told(await check(limited, who.metadata))[ORG, HOUR, TOKENS] == ("100000", "1000", "0")
    assert await reserve(limited, who.metadata, 99_000)


async def test_what_is_reported_is_never_refused_and_blocks_what_comes(limited: Stack) -> None:
    who = await limited.person()
    await record(limited, who.metadata, 150_000)
    answer = await check(limited, who.metadata)
    assert not answer.allowed and (answer.quotas[0].used, answer.quotas[0].percent) == ("150000", 150)
    assert (await refusal(reserve(limited, who.metadata, 0)))[0] is Code.RESOURCE_EXHAUSTED
    # An operator's word takes the place of the tier's.
    await set_quota(limited, quota(who.org_id, 200_000, period=HOUR))
    assert (await check(limited, who.metadata)).allowed and await reserve(limited, who.metadata, 50_000)
    await set_quota(limited, quota(who.org_id, 10, period=HOUR, soft=True))
    assert (await check(limited, who.metadata, tokens=10**6)).allowed is False, "the month's tokens"
    assert (await check(limited, who.metadata, tokens=10**5)).allowed and await reserve(limited, who.metadata, 50_000)


async def test_limits_of_users_keys_and_deployments(stack: Stack, person: Person) -> None:
    """Each has his own; one by name has another; and what one uses is no other's."""
    d = await stack.live(person)
    bot = await stack.claw_key(d)
    key, other = [(await stack.key(person, "usage.reserve", "usage.record", "quotas.read")) for _ in range(2)]
    with_key, with_other = [(("authorization", f"Bearer {made.key}"),) for made in (key, other)]
    org = person.org_id
    await set_quota(stack, quota(org, 1000, scope=KEY))
    await set_quota(stack, quota(org, 500, scope=KEY, subject=other.api_key.id))
    await set_quota(stack, quota(org, 300, scope=DEPLOYMENT, period=HOUR))
    await set_quota(stack, quota(org, "1", scope=USER, unit=MONEY, period=MONTH))
    await record(stack, with_key, 900)
    await record(stack, bot, 100)
    assert told(await check(stack, with_key))[KEY, DAY, TOKENS] == ("1000", "900", "0")
    assert told(await check(stack, with_other))[KEY, DAY, TOKENS] == ("500", "0", "0")
    mine = await check(stack, bot)
    assert told(mine)[DEPLOYMENT, HOUR, TOKENS] == ("300", "100", "0")
    assert {one.subject for one in mine.quotas} >= {d.id, person.user.id}
    # A session has no key, and asks for no deployment unless it says so.
    assert set(told(await check(stack, person.metadata))) == {(ORG, MONTH, MONEY), (USER, MONTH, MONEY)}
    assert told(await check(stack, person.metadata, deployment_id=d.id))[DEPLOYMENT, HOUR, TOKENS] == ("300", "100", "0")
    # The user's money: what all of these have cost together.
    assert told(mine)[USER, MONTH, MONEY] == ("1", "0.005", "0")
    await reserve(stack, with_key, 100)
    for call, subject in ((reserve(stack, with_key, 1), key.api_key.id), (reserve(stack, with_other, 501), other.api_key.id),
                          (reserve(stack, bot, 201), d.id), (reserve(stack, person.metadata, 201, deployment_id=d.id), d.id)):  # fmt: skip
        code, _, said, _ = await refusal(call)
        assert (code, said["reason"], said["subject"]) == (Code.RESOURCE_EXHAUSTED, "QUOTA_EXHAUSTED", subject)
    assert await reserve(stack, bot, 200) and await reserve(stack, person.metadata, 1000)


@pytest.mark.parametrize("period", [HOUR, DAY, MONTH])
@pytest.mark.parametrize("scope", [ORG, USER, KEY, DEPLOYMENT])
async def test_a_new_limit_knows_what_was_used_before(stack: Stack, person: Person, scope: int, period: int) -> None:
    """Also while more is being reported, nothing is counted twice or not at all; and again after it was taken away for a while."""
    key = await stack.key(person, "usage.record", "quotas.read")
    who: Metadata = (("authorization", f"Bearer {key.key}"),)
    d = await stack.order(person)
    of_bot = {"deployment_id": d.id}
    await asyncio.gather(*(record(stack, who, 10, **of_bot) for _ in range(20)))
    # Of an earlier period, as a late report may be.
    await record(stack, who, 7, occurred_at=now() - timedelta(days=31), id="of-last-month", **of_bot)

    async def used() -> str:
        return told(await check(stack, who, **of_bot))[scope, period, TOKENS][1]

    calls = [record(stack, who, 10, **of_bot) for _ in range(60)]
    made, *_ = await asyncio.gather(set_quota(stack, quota(person.org_id, 10**6, scope=scope, period=period)), *calls)
    assert await used() == "800"
    await stack.quotas.DeleteQuota(rpc.DeleteQuotaRequest(id=made.id), metadata=stack.operator)
    await record(stack, who, 10, **of_bot)
    calls = [record(stack, who, 10, **of_bot) for _ in range(19)]
    await asyncio.gather(set_quota(stack, quota(person.org_id, 10**6, scope=scope, period=period)), *calls)
    assert await used() == "1000"
    # The same scope and period in money counts along from the start.
    await set_quota(stack, quota(person.org_id, 100, scope=scope, period=period, unit=MONEY))
    assert told(await check(stack, who, **of_bot))[scope, period, MONEY][1] == "0.005"


# What is told.


async def notices(stack: Stack, who: Person) -> list[pb.QuotaNotice]:
    """Everything that was noticed."""
    listed = await stack.quotas.ListQuotaNotices(rpc.ListQuotaNoticesRequest(page_size=250), metadata=who.metadata)
    return list(listed.notices)


async def test_each_part_is_told_once(limited: Stack) -> None:
    who = await limited.person()
    await set_quota(limited, quota(who.org_id, 1000, soft=True))
    await set_quota(limited, quota(who.org_id, 400, scope=USER))

    async def until(count: int) -> list[pb.QuotaNotice]:
        async def there() -> Any:
            found = await notices(limited, who)
            return found if len(found) >= count else None

        found: list[pb.QuotaNotice] = await eventually(there, 10)
        return found

    await record(limited, who.metadata, 499)
    found = await until(3)
    # The user's limit is used up at once; of the organization's not even the half.
    assert {(one.scope, one.subject, one.percent, one.amount, one.used) for one in found} == {
        (USER, who.user.id, percent, "400", "499") for percent in (50, 75, 100)
    }  # fmt: skip
    for tokens, percents in ((1, {50}), (250, {50, 75}), (10_000, {50, 75, 100})):
        await record(limited, who.metadata, tokens)
        found = await until(3 + len(percents))
        assert {one.percent for one in found if one.scope == ORG} == percents
    await asyncio.sleep(0.5)
    found = await notices(limited, who)
    assert len(found) == 6 and found[0].percent == 100 and found[0].used == "10750"
    assert {one.period_start.ToDatetime(UTC) for one in found} == {period_of("day", now())}
    assert not await notices(limited, await limited.person())


async def entitled_to(org_id: str) -> Entitlements:
    """A tier with one limit."""
    return Entitlements(org_id=org_id, hourly_tokens=1000)


async def test_what_a_dead_process_did_not_tell_is_told(limited: Stack) -> None:
    """Two that sweep at once, neither of which has moved a counter, tell each thing once."""
    who = await limited.person()
    async with ledger(limited) as db:
        async with db.transaction(ALL) as session:
            for period in ("hour", "month"):
                session.add(
                    UsageCounter(org_id=who.org_id, scope="organization", subject="", period=period, starts_at=period_of(period, now()),
                                 tokens=800, cost=Decimal(0))
                )  # fmt: skip
        watchers = [Watcher(db, SimpleNamespace(touched=set()), entitled_to) for _ in range(2)]  # type: ignore[arg-type]
        await asyncio.gather(*(watcher.tick() for watcher in watchers for _ in range(3)))
        assert sorted(one.percent for one in await notices(limited, who)) == [50, 75]
        # In the next hour, anew.
        async with db.transaction(ALL) as session:
            earlier = period_of("hour", now()) - timedelta(hours=1)
            await session.execute(sa.update(QuotaNotice).where(QuotaNotice.org_id == who.org_id).values(period_start=earlier))
        await Watcher(db, SimpleNamespace(touched=set()), entitled_to).tick()  # type: ignore[arg-type]
    assert sorted(one.percent for one in await notices(limited, who)) == [50, 50, 75, 75]


async def test_a_watcher_that_fails_forgets_nothing(limited: Stack) -> None:
    async def broken(org_id: str) -> Entitlements:
        raise ConnectionError

    async with ledger(limited) as db:
        moved = SimpleNamespace(touched={"org_" + "1" * 32})
        watcher = Watcher(db, moved, broken)  # type: ignore[arg-type]
        with pytest.raises(ConnectionError):
            await watcher.tick()
        assert "org_" + "1" * 32 in moved.touched


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_two_processes_tell_each_part_once(databases: Databases, tmp_path: Path) -> None:
    processes = Processes(databases, tmp_path, deployments=2, CLAWPLANE_LIMITS_S="0.05")
    try:
        await processes.ready()
        who = await processes.person()
        channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) for port in processes.ports[1:]]
        stubs = [usage_service_pb2_grpc.UsageServiceStub(channel) for channel in channels]

        async def use(number: int) -> None:
            event = usage_event_pb2.UsageEvent(id=str(ids.uuid7()), tokens_in=20_000, **MODEL)  # type: ignore[arg-type]
            await stubs[number % 2].RecordUsage(usage_service_pb2.RecordUsageRequest(event=event), metadata=who)

        # Ten cents each of ten dollars, and of 100,000 and of a million tokens.
        for start in range(0, 120, 6):
            await asyncio.gather(*(use(start + n) for n in range(6)))
        db = Database(processes.env["CLAWPLANE_DEPLOYMENT_DATABASE_URL"], processes.signer().settings, "test")

        async def all_told() -> Any:
            async with db.read(ALL) as session:
                rows = (await session.scalars(sa.select(QuotaNotice))).all()
            return rows if len(rows) >= 9 else None

        rows = await eventually(all_told, 20)
        assert sorted((row.period, row.unit, row.percent) for row in rows) == sorted(
            (period, unit, percent) for period, unit in ((HOUR, TOKENS), (MONTH, TOKENS), (MONTH, MONEY)) for percent in (50, 75, 100)
        )  # fmt: skip
        await db.close()
        for channel in channels:
            await channel.close()
    finally:
        processes.stop()


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_connections_that_are_cut_are_made_anew(limited: Stack) -> None:
    """As by a restart of the database: who meets one is told to come again, and the next is served."""
    who = await limited.person()
    await asyncio.gather(*(check(limited, who.metadata) for _ in range(20)))
    async with ledger(limited) as db, db.reading.connect() as connection:
        cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        assert (await connection.execute(sa.text(cut))).scalar_one() >= 1
    failures = []
    for _ in range(30):
        try:
            await check(limited, who.metadata)
            await reserve(limited, who.metadata, 1)
        except grpc.aio.AioRpcError as error:
            failures.append(error.code())
    assert set(failures) <= {Code.UNAVAILABLE} and len(failures) <= 5, failures
    assert (await check(limited, who.metadata)).allowed


async def test_any_number_of_notices_is_stored(stack: Stack, person: Person) -> None:
    """Of many users at once, after a restart."""
    about = {"org_id": person.org_id, "scope": USER, "period": MONTH, "unit": TOKENS, "period_start": period_of("month", now()), "percent": 50}
    said = {"amount": "10", "used": "5", "created_at": now(), "updated_at": now()}
    rows = [about | said | {"id": ids.new("qnt"), "subject": ids.new("usr")} for _ in range(3000)]
    async with ledger(stack) as db:
        await db.run(lambda session: watch._store(session, rows), ALL)
        await db.run(lambda session: watch._store(session, rows), ALL)
        async with db.read(ALL) as session:
            assert await session.scalar(sa.select(sa.func.count()).where(QuotaNotice.org_id == person.org_id)) == 3000
