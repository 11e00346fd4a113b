"""Stored usage priced anew: told first, then done; cut off and gone on with; and the sums are right whatever runs meanwhile."""

import asyncio
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import grpc
import pytest
import sqlalchemy as sa

from clawplane.deployment.v1 import quota_pb2, quota_service_pb2
from clawplane.deployment.v1 import usage_event_pb2 as pb
from clawplane.deployment.v1 import usage_service_pb2 as rpc
from services.deployment_svc.base import AuditEvent
from services.deployment_svc.usage.models import UsageCounter, UsageEvent
from services.kit import ids
from services.kit.db import ALL
from tests.harness import Person, Stack
from tests.recount import cost_of, ledger_of, recount
from tests.test_adjust import correct
from tests.test_prices import START, create, price, provider, refused


def event(of: str, **more: Any) -> pb.UsageEvent:
    """A call of a million tokens in."""
    return pb.UsageEvent(**{"id": str(ids.uuid7()), "provider": of, "model": "m", "tokens_in": 1_000_000, **more})


async def report(stack: Stack, person: Person, *events: pb.UsageEvent) -> None:
    """Records them."""
    answer = await stack.usage.BatchRecordUsage(rpc.BatchRecordUsageRequest(events=events), metadata=person.metadata, timeout=60)
    assert answer.accepted == len(events)


def recosting(stack: Stack, **more: Any) -> Any:
    """The stream."""
    return stack.usage.RecostUsage(rpc.RecostUsageRequest(**more), metadata=stack.operator, timeout=60)


async def recost(stack: Stack, **more: Any) -> rpc.RecostUsageResponse:
    """The last message; those before lead there."""
    said = [one async for one in recosting(stack, **more)]
    assert [one.done for one in said] == [False] * (len(said) - 1) + [True] and all(one.position for one in said)
    assert [one.seen for one in said] == sorted(one.seen for one in said)
    return said[-1]


async def test_told_first_then_done(stack: Stack, person: Person) -> None:
    of, other = provider(), await stack.person()
    now = datetime.now(UTC)
    for who in (person, other):
        last_month = event(of, id="old", occurred_at=now.replace(day=1) - timedelta(days=1))
        await report(stack, who, *(event(of, deployment_id="", model=name) for name in ("m", "m", "n", "unknown")), last_month)
    await create(stack, price(of, model="m", effective_from=START))
    await create(stack, price(of, model="n", effective_from=START, tokens_in="3"))
    before = await recount(stack, person.org_id)
    assert cost_of(before) == 0
    said = await recost(stack, org_id=person.org_id)
    assert (said.seen, said.changed, said.cost_before, said.cost_after, said.unpriced) == (5, 4, "0", "6", 1)
    assert cost_of(await recount(stack, person.org_id)) == 0
    said = await recost(stack, org_id=person.org_id, apply=True)
    assert (said.seen, said.changed, said.cost_before, said.cost_after, said.unpriced) == (5, 4, "0", "6", 1)
    after = await recount(stack, person.org_id)
    assert cost_of(after) == 6 and {(one.cost, one.price_id is None) for one in after} == {(1, False), (3, False), (None, True)}
    said = await recost(stack, org_id=person.org_id, apply=True)
    assert (said.seen, said.changed, said.cost_before, said.cost_after, said.unpriced) == (5, 0, "0", "0", 1)
    # Nothing of anybody else.
    assert cost_of(await recount(stack, other.org_id)) == 0
    assert (await recost(stack, provider=of, apply=True)).changed == 4
    assert cost_of(await recount(stack, other.org_id)) == 6


async def test_only_what_is_asked_for(stack: Stack, person: Person) -> None:
    of, another = provider(), provider()
    now = datetime.now(UTC)
    hour = timedelta(hours=1)
    await report(
        stack, person, event(of, id="a", occurred_at=now - 3 * hour), event(of, id="b", occurred_at=now - 2 * hour),
        event(of, id="c", occurred_at=now - hour, model="n"), event(another, id="d", occurred_at=now - hour),
    )  # fmt: skip
    for name in (of, another):
        await create(stack, price(name, model="*", effective_from=START))
    ask: dict[str, Any] = {"org_id": person.org_id}
    for more, seen in (
        ({"provider": of}, 3), ({"model": "n"}, 1), ({"provider": another, "model": "n"}, 0), ({"start": now - 2 * hour}, 3),
        ({"end": now - 2 * hour}, 1), ({"start": now - 2 * hour, "end": now - hour}, 1), ({"unpriced_only": True}, 4),
        ({"end": now - timedelta(days=10_000)}, 0), ({"start": now + timedelta(days=400)}, 0), ({}, 4),
    ):  # fmt: skip
        assert (await recost(stack, **ask, **more)).seen == seen, more
    assert (await recost(stack, **ask, provider=of, model="m", apply=True)).changed == 2
    assert (await recost(stack, **ask, unpriced_only=True)).seen == 2
    assert {one.id for one in await recount(stack, person.org_id) if one.cost is not None} == {"a", "b"}


async def test_a_price_put_right_goes_both_ways(stack: Stack, person: Person) -> None:
    of = provider()
    wrong = await create(stack, price(of, effective_from=START, tokens_in="10"))
    await report(stack, person, *(event(of) for _ in range(3)))
    # From yesterday on something else, and from then on nothing.
    right = await create(stack, price(of, effective_from=datetime.now(UTC) - timedelta(days=1), tokens_in="4"))
    said = await recost(stack, org_id=person.org_id, apply=True)
    assert (said.changed, said.cost_before, said.cost_after) == (3, "30", "12")
    assert {one.price_id for one in await recount(stack, person.org_id)} == {right.id}
    end = rpc_end(right.id, datetime.now(UTC) - timedelta(hours=1))
    await stack.prices.EndPrice(end, metadata=stack.operator)
    said = await recost(stack, org_id=person.org_id, apply=True)
    assert (said.changed, said.cost_before, said.cost_after, said.unpriced) == (3, "12", "0", 3)
    events = await recount(stack, person.org_id)
    assert {(one.cost, one.price_id) for one in events} == {(None, None)} and wrong.id != right.id


def rpc_end(price_id: str, at: datetime) -> Any:
    """Ends a price."""
    from clawplane.deployment.v1 import price_service_pb2

    return price_service_pb2.EndPriceRequest(id=price_id, effective_to=at)


async def test_corrections_follow_their_event(stack: Stack, person: Person) -> None:
    of = provider()
    one, other = event(of, tokens_in=300_000), event(of, tokens_in=300_000)
    await report(stack, person, one, other)
    for first in (one, other):
        first.org_id = person.org_id
    # Without a price as yet; then a cost that was agreed on; and what was known before.
    unknown = await correct(stack, one, tokens_in=-200_000)
    agreed = await correct(stack, one, cost="0.25", tokens_in=-10_000)
    await create(stack, price(of, effective_from=START))
    known = await correct(stack, one, tokens_in=10_000)
    said = await recost(stack, org_id=person.org_id, apply=True)
    assert (said.seen, said.changed, said.cost_before, said.cost_after) == (5, 3, "0", "0.4")
    cost = {row.id: row.cost for row in await recount(stack, person.org_id)}
    assert [cost[row.id] for row in (one, unknown, agreed, known)] == [Decimal(text) for text in ("0.3", "-0.2", "0.25", "0.01")]
    # With a price by length of context, what remains costs what it would have cost at once, but for what was agreed on.
    await create(stack, price(of, effective_from=START, tokens_in="10", above_tokens_in=200_000))
    await recost(stack, org_id=person.org_id, apply=True)
    cost = {row.id: row.cost for row in await recount(stack, person.org_id)}
    assert [cost[row.id] for row in (one, unknown, agreed, known)] == [Decimal(text) for text in ("3", "-2.9", "0.25", "0.01")]
    assert (await recost(stack, org_id=person.org_id, apply=True)).changed == 0


async def test_cut_off_and_gone_on_with(stack: Stack, person: Person) -> None:
    of = provider()
    await create(stack, price(of, effective_from=START, tokens_in="2"))
    await report(stack, person, *(event(of, model=f"m{number % 3}") for number in range(1300)))
    await create(stack, price(of, effective_from=datetime.now(UTC) - timedelta(days=1), tokens_in="3"))
    ask: dict[str, Any] = {"org_id": person.org_id, "apply": True}
    stream = recosting(stack, **ask)
    first = None
    while first is None or not first.seen:
        first = await stream.read()
    stream.cancel()
    assert not first.done and 0 < first.changed == first.seen < 1300
    # What has been told is done, and no event is half done.
    events = await recount(stack, person.org_id)
    done = sum(one.cost == 3 for one in events)
    assert first.changed <= done < 1300 and {int(one.cost or 0) for one in events} == {2, 3}
    rest = await recost(stack, **ask, after_position=first.position)
    assert rest.seen == 1300 - first.seen and rest.changed <= 1300 - first.changed
    assert cost_of(await recount(stack, person.org_id)) == 3900
    # From the beginning once more, and from the end.
    again = await recost(stack, **ask)
    assert (again.seen, again.changed) == (1300, 0)
    assert (await recost(stack, **ask, after_position=again.position)).seen == 0
    for other in ({"org_id": person.org_id}, {**ask, "provider": of}):
        await refused(recosting(stack, **other, after_position=first.position).read(), grpc.StatusCode.INVALID_ARGUMENT, "after_position")
    await refused(recosting(stack, after_position="nonsense").read(), grpc.StatusCode.INVALID_ARGUMENT, "after_position")


async def test_whatever_runs_meanwhile_the_sums_are_right(stack: Stack, person: Person) -> None:
    of, seconds = provider(), 3.0
    key = await stack.key(person, "usage.record")
    quota = quota_pb2.Quota(
        org_id=person.org_id, scope=quota_pb2.QUOTA_SCOPE_API_KEY, period=quota_pb2.QUOTA_PERIOD_DAY, unit=quota_pb2.QUOTA_UNIT_TOKENS,
        amount="1000000000000",
    )  # fmt: skip
    await stack.quotas.SetQuota(quota_service_pb2.SetQuotaRequest(quota=quota), metadata=stack.operator)
    reporter = Person(person.user, (("authorization", f"Bearer {key.key}"),))
    await report(stack, reporter, *(event(of, model=f"m{number % 5}") for number in range(700)))
    first = event(of)
    await report(stack, reporter, first)
    first.org_id = person.org_id
    ends = asyncio.get_running_loop().time() + seconds

    async def while_it_lasts(work: Any) -> int:
        times = 0
        while asyncio.get_running_loop().time() < ends:
            await work(times)
            times += 1
        return times

    async def ingest(number: int) -> None:
        # Names that two collations order otherwise.
        await report(stack, reporter, *(event(of, model=name) for name in ("m0", "M0", "m-1", f"m{number % 7}", "m_2", "unknown")))

    async def change(number: int) -> None:
        await create(stack, price(of, model=("m*", "M*", "m0")[number % 3], tokens_in=str(number + 1), effective_from=START + timedelta(days=number)))
        await asyncio.sleep(0.1)

    async def price_anew(_: int) -> None:
        await recost(stack, org_id=person.org_id, apply=True)

    async def amend(number: int) -> None:
        await correct(stack, first, tokens_in=(number % 3 - 1) * 10 or 5)

    works = (ingest, ingest, change, price_anew, price_anew, amend)
    times = await asyncio.gather(*(while_it_lasts(work) for work in works))
    assert all(times)
    await recost(stack, org_id=person.org_id, apply=True)
    events = await recount(stack, person.org_id)
    said = await recost(stack, org_id=person.org_id)
    assert (said.seen, said.changed) == (len(events), 0) and len(events) > 700
    async with ledger_of(stack) as db, db.read(ALL) as session:
        counters = sa.select(UsageCounter).where(UsageCounter.org_id == person.org_id, UsageCounter.scope == "api_key")
        rows = (await session.scalars(counters)).all()
    assert sum(row.tokens for row in rows) == sum(one.tokens_total for one in events)
    assert sum(row.cost for row in rows) == cost_of(events)


async def test_what_would_cost_too_much_is_said(stack: Stack, person: Person) -> None:
    of = provider()
    await report(stack, person, event(of, id="dear", occurred_at=datetime.now(UTC), tokens_in=1_000_000_000))
    made = await create(stack, price(of, effective_from=START, tokens_in="999999"))
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await recost(stack, org_id=person.org_id, apply=True)
    assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "event dear" in (refusal.value.details() or "") and made.id in (refusal.value.details() or "")
    assert cost_of(await recount(stack, person.org_id)) == 0


async def test_events_of_another_currency_are_left_alone(stack: Stack, person: Person) -> None:
    of = provider()
    await report(stack, person, event(of, id="old", occurred_at=datetime.now(UTC)))
    async with ledger_of(stack) as db, db.transaction(ALL) as session:
        await session.execute(sa.update(UsageEvent).where(UsageEvent.org_id == person.org_id).values(currency="eur"))
    await create(stack, price(of, effective_from=START))
    assert (await recost(stack, org_id=person.org_id)).seen == 0
    first = pb.UsageEvent(org_id=person.org_id, id="old")
    await refused(correct(stack, first, tokens_in=1), grpc.StatusCode.INVALID_ARGUMENT, "cost")
    assert (await correct(stack, first, tokens_in=1, cost="0.5")).currency == "eur"


async def test_it_is_in_the_audit_log_with_what_it_did(stack: Stack, person: Person) -> None:
    of = provider()
    await report(stack, person, *(event(of) for _ in range(2)))
    await create(stack, price(of, effective_from=START))
    stream = recosting(stack, org_id=person.org_id, apply=True)
    await stream.read()
    stream.cancel()
    async with ledger_of(stack) as db, db.read(ALL) as session:
        rows = (await session.scalars(sa.select(AuditEvent).where(AuditEvent.org_id == person.org_id))).all()
    (row,) = [row for row in rows if row.method.endswith("/RecostUsage")]
    assert row.after == {"org_id": person.org_id, "apply": True} and row.subject == "operator"


async def test_only_operators(stack: Stack, person: Person) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as denied:
        await stack.usage.RecostUsage(rpc.RecostUsageRequest(org_id=person.org_id), metadata=person.metadata).read()
    assert denied.value.code() is grpc.StatusCode.PERMISSION_DENIED
