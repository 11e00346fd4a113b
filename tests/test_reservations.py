"""Reservations: held before, settled once after, in full; within every hard limit at each grant, in any order and from any process."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import sqlalchemy as sa

from clawplane.deployment.v1 import model_call_service_pb2, usage_service_pb2
from clawplane.deployment.v1 import usage_reservation_pb2 as pb
from clawplane.deployment.v1 import usage_reservation_service_pb2 as rpc
from clawplane.deployment.v1.usage_event_pb2 import USAGE_STATUS_ERROR, USAGE_STATUS_OK
from services.deployment_svc.prices import repository as prices
from services.deployment_svc.prices.models import Price
from services.deployment_svc.usage_reservations import repository
from services.deployment_svc.usage_reservations.models import UsageReservation
from services.kit import ids
from services.kit.columns import now
from services.kit.db import ALL
from tests.conftest import Databases
from tests.harness import Metadata, Person, Stack, running
from tests.reservation_proof import prove
from tests.test_quotas import DAY, DEPLOYMENT, HOUR, MONEY, MONTH, ORG, TOKENS, check, quota, refusal, reserve, set_quota, told
from tests.test_quotas import _not_at_the_end_of_an_hour as _not_at_the_end_of_an_hour  # noqa: PLC0414 - a fixture
from tests.usage_rows import ledger

Code = grpc.StatusCode
HELD, EXPIRED, SETTLED = (
    pb.USAGE_RESERVATION_STATE_HELD, pb.USAGE_RESERVATION_STATE_EXPIRED, pb.USAGE_RESERVATION_STATE_SETTLED
)  # fmt: skip


async def settle(stack: Stack, who: Metadata, one: Any, tokens_in: int = 0, tokens_out: int = 0, **more: Any) -> rpc.SettleUsageResponse:
    """Says what was used."""
    request = rpc.SettleUsageRequest(id=getattr(one, "id", one), tokens_in=tokens_in, tokens_out=tokens_out, **more)
    return await stack.reservations.SettleUsage(request, metadata=who)


async def release(stack: Stack, who: Metadata, reservation_id: str) -> rpc.ReleaseUsageResponse:
    """Gives it back."""
    return await stack.reservations.ReleaseUsage(rpc.ReleaseUsageRequest(id=reservation_id), metadata=who)


async def renew(stack: Stack, who: Metadata, reservation_id: str, ttl_s: int = 0) -> pb.UsageReservation:
    """Holds it longer."""
    return await stack.reservations.RenewUsageReservation(rpc.RenewUsageReservationRequest(id=reservation_id, ttl_s=ttl_s), metadata=who)


async def listed(stack: Stack, who: Metadata, state: int = 0) -> list[pb.UsageReservation]:
    """What is there to be seen."""
    request = rpc.ListUsageReservationsRequest(page_size=250, state=state)  # type: ignore[arg-type]
    return list((await stack.reservations.ListUsageReservations(request, metadata=who)).reservations)


async def age(stack: Stack, reservation_id: str, by: timedelta = timedelta(hours=2), column: str = "expires_at") -> None:
    """Makes it expire, or another of its times lie further back."""
    async with ledger(stack) as db, db.transaction(ALL) as session:
        row = await session.get_one(UsageReservation, reservation_id)
        setattr(row, column, getattr(row, column) - by)


async def used(stack: Stack, who: Person) -> int:
    """Tokens in the ledger."""
    found = await stack.usage.SummarizeUsage(usage_service_pb2.SummarizeUsageRequest(), metadata=who.metadata)
    return int(found.total.tokens_total)


async def test_the_life_of_a_reservation(stack: Stack, person: Person) -> None:
    who = person.metadata
    made = await reserve(stack, who, 1000, tokens_out=100, ttl_s=60)
    assert (made.org_id, made.user_id, made.state, made.tokens_held) == (person.org_id, person.user.id, HELD, 1100)
    assert Decimal(made.cost_held) == Decimal("0.0075") and made.currency == "usd"
    assert made.expires_at.ToDatetime(UTC) - made.created_at.ToDatetime(UTC) == timedelta(seconds=60)
    assert [one.id for one in await listed(stack, who)] == [made.id] == [one.id for one in await listed(stack, who, HELD)]
    longer = await renew(stack, who, made.id)
    assert timedelta(minutes=14) < longer.expires_at.ToDatetime(UTC) - now() <= timedelta(minutes=15)
    done = await settle(stack, who, made, 900, 50, tokens_cached=400, tokens_reasoning=10, latency_ms=1234)
    assert (done.duplicate, done.late, done.tokens_overrun, done.cost_overrun) == (False, False, 0, "0")
    event = done.event
    assert (event.id, event.tokens_in, event.tokens_out, event.tokens_cached, event.tokens_reasoning) == (made.id, 900, 50, 400, 10)
    assert (event.status, event.latency_ms, event.user_id, event.estimated) == (USAGE_STATUS_OK, 1234, person.user.id, False)
    assert Decimal(event.cost) == (500 * Decimal(5) + 400 * Decimal("0.5") + 50 * Decimal(25)) / 1_000_000
    # Its time is that of the reservation, whoever settles it when.
    assert event.occurred_at == made.created_at
    # Once more says the same, whatever is said the second time.
    for again in await asyncio.gather(settle(stack, who, made, 900, 50), settle(stack, who, made, 1, 1), settle(stack, who, made)):
        assert again.duplicate and again.event == event and not again.late
    assert await used(stack, person) == 950 and not await listed(stack, who)
    for call in (renew(stack, who, made.id), release(stack, who, made.id)):
        assert (await refusal(call))[0] is Code.NOT_FOUND
    failed = await settle(stack, who, await reserve(stack, who, 10), status=USAGE_STATUS_ERROR)
    assert failed.event.status == USAGE_STATUS_ERROR and failed.event.tokens_total == 0


async def test_settled_by_ten_at_once_is_one_event(stack: Stack, person: Person) -> None:
    made = await reserve(stack, person.metadata, 1000)
    answers = await asyncio.gather(*(settle(stack, person.metadata, made, 100 + n) for n in range(10)))
    assert [one.duplicate for one in answers].count(False) == 1 and len({one.event.SerializeToString() for one in answers}) == 1
    assert await used(stack, person) == answers[0].event.tokens_total


async def test_what_is_released_holds_nothing_and_is_nothing_used(stack: Stack, person: Person) -> None:
    who = person.metadata
    await set_quota(stack, quota(person.org_id, 1000))
    made = await reserve(stack, who, 1000)
    assert (await refusal(reserve(stack, who, 1)))[0] is Code.RESOURCE_EXHAUSTED
    await release(stack, who, made.id)
    await release(stack, who, made.id)
    assert not await listed(stack, who) and await reserve(stack, who, 1000)
    for call in (settle(stack, who, made, 1), renew(stack, who, made.id)):
        assert (await refusal(call))[0] is Code.NOT_FOUND
    assert await used(stack, person) == 0
    unknown = "call_" + "0" * 32
    for call in (settle(stack, who, unknown, 1), renew(stack, who, unknown), release(stack, who, unknown)):
        assert (await refusal(call))[0] is Code.NOT_FOUND
    # It is forgotten at last.
    async with ledger(stack) as db:
        await db.run(lambda session: repository.forget_released(session, now() + timedelta(days=1)), ALL)
    assert (await refusal(release(stack, who, made.id)))[0] is Code.NOT_FOUND


async def test_an_overrun_is_counted_in_full_and_shown(stack: Stack, person: Person) -> None:
    who = person.metadata
    await set_quota(stack, quota(person.org_id, 1000))
    made = await reserve(stack, who, 600)
    done = await settle(stack, who, made, 700, 800)
    assert (done.tokens_overrun, Decimal(done.cost_overrun), done.late) == (900, (700 * Decimal(5) + 800 * Decimal(25) - 3000) / 1_000_000, False)
    (seen,) = await listed(stack, who, SETTLED)
    assert (seen.id, seen.state, seen.tokens_overrun, seen.cost_overrun, seen.settled_late) == (made.id, SETTLED, 900, done.cost_overrun, False)
    # The event is as any other, and what comes is refused.
    standing = await check(stack, who)
    assert told(standing)[ORG, DAY, TOKENS] == ("1000", "1500", "0") and not standing.allowed
    assert standing.quotas[0].percent == 150
    assert (await refusal(reserve(stack, who, 0)))[0] is Code.RESOURCE_EXHAUSTED
    again = await settle(stack, who, made, 1)
    assert again.duplicate and (again.tokens_overrun, again.cost_overrun, again.event) == (900, done.cost_overrun, done.event)
    assert (await refusal(release(stack, who, made.id)))[0] is Code.NOT_FOUND


async def test_too_late_is_counted_in_full_and_shown(stack: Stack, person: Person) -> None:
    who = person.metadata
    await set_quota(stack, quota(person.org_id, 1000))
    late = await reserve(stack, who, 1000)
    await age(stack, late.id)
    assert [(one.id, one.state) for one in await listed(stack, who, EXPIRED)] == [(late.id, EXPIRED)]
    # What it held is somebody else's now.
    other = await reserve(stack, who, 900)
    code, text, *_ = await refusal(renew(stack, who, late.id))
    assert code is Code.FAILED_PRECONDITION and "expired" in text
    done = await settle(stack, who, late, 800)
    assert (done.late, done.tokens_overrun) == (True, 0)
    (seen,) = await listed(stack, who, SETTLED)
    assert seen.settled_late and seen.tokens_overrun == 0
    assert told(await check(stack, who))[ORG, DAY, TOKENS] == ("1000", "800", "900")
    assert (await refusal(reserve(stack, who, 0)))[0] is Code.RESOURCE_EXHAUSTED
    assert not (await settle(stack, who, other, 900)).late
    again = await settle(stack, who, late, 1)
    assert again.duplicate and again.late and again.event == done.event
    # One that nobody settles at all gives back what it held, and may be released as well.
    forgotten = await reserve(stack, (await stack.person()).metadata, 5)
    assert forgotten.state == HELD
    mine = await set_quota(stack, quota(person.org_id, 10_000))
    gone = await reserve(stack, who, 10)
    await age(stack, gone.id)
    await release(stack, who, gone.id)
    assert mine.amount == "10000" and not await listed(stack, who, EXPIRED)


async def test_usage_counts_where_it_was_reserved(stack: Stack, person: Person) -> None:
    """A call that goes on into the next hour holds and counts in the one in which it was begun."""
    who = person.metadata
    await set_quota(stack, quota(person.org_id, 1000, period=HOUR))
    made = await reserve(stack, who, 1000)
    await age(stack, made.id, timedelta(hours=1), "created_at")
    assert told(await check(stack, who))[ORG, HOUR, TOKENS] == ("1000", "0", "0")
    next_one = await reserve(stack, who, 1000)
    assert (await settle(stack, who, made, 1000)).event.occurred_at.ToDatetime(UTC) < now() - timedelta(minutes=59)
    assert told(await check(stack, who))[ORG, HOUR, TOKENS] == ("1000", "0", "1000")
    await settle(stack, who, next_one, 1000)
    assert told(await check(stack, who))[ORG, HOUR, TOKENS] == ("1000", "1000", "0")


async def test_what_is_wrong_is_named(stack: Stack, person: Person) -> None:
    other, who = await stack.order(await stack.person()), person.metadata
    made = await reserve(stack, who, 100)
    for call, field in (
        (reserve(stack, who, -1), "tokens_in"), (reserve(stack, who, 1, ttl_s=3601), "ttl_s"), (reserve(stack, who, 1, model="a b"), "model"),
        (reserve(stack, who, 1, deployment_id=other.id), "deployment_id"), (reserve(stack, who, 1, request_id="x"), "request_id"),
        (settle(stack, who, made, 10, tokens_cached=11), "tokens_cached"), (settle(stack, who, made, 0, 1, tokens_reasoning=2), "tokens_reasoning"),
        (settle(stack, who, made, latency_ms=-1), "latency_ms"), (settle(stack, who, "call_x"), "id"),
    ):  # fmt: skip
        code, text, *_ = await refusal(call)
        assert code is Code.INVALID_ARGUMENT and field in text, text
    # It is as it was.
    assert not (await settle(stack, who, made, 10)).duplicate


async def test_what_has_no_price(stack: Stack) -> None:
    """Where money is limited it cannot be held; elsewhere it holds tokens."""
    person = await stack.person()
    code, text, said, _ = await refusal(reserve(stack, person.metadata, 1, provider="nobody", model="unknown"))
    assert code is Code.INVALID_ARGUMENT and said["reason"] == "NO_PRICE" and text.startswith("model:")
    # The tier's credit is only told from here on.
    await set_quota(stack, quota(person.org_id, 5, period=MONTH, unit=MONEY, soft=True))
    await set_quota(stack, quota(person.org_id, 100))
    made = await reserve(stack, person.metadata, 100, provider="nobody", model="unknown")
    assert (made.cost_held, made.tokens_held) == ("0", 100)
    assert (await refusal(reserve(stack, person.metadata, 1, provider="nobody", model="unknown")))[0] is Code.RESOURCE_EXHAUSTED
    done = await settle(stack, person.metadata, made, 100)
    assert (done.event.cost, done.cost_overrun) == ("", "0")


async def test_a_request_id_holds_once(stack: Stack, person: Person) -> None:
    await set_quota(stack, quota(person.org_id, 1000))
    one, other = str(uuid.uuid4()), str(uuid.uuid4())
    made = await asyncio.gather(*(reserve(stack, person.metadata, 600, request_id=one) for _ in range(8)))
    assert len({each.id for each in made}) == 1 and len(await listed(stack, person.metadata)) == 1
    assert (await refusal(reserve(stack, person.metadata, 500, request_id=one)))[0] is Code.INVALID_ARGUMENT
    # A refusal is no answer that is kept.
    assert (await refusal(reserve(stack, person.metadata, 500, request_id=other)))[0] is Code.RESOURCE_EXHAUSTED
    await release(stack, person.metadata, made[0].id)
    assert (await reserve(stack, person.metadata, 500, request_id=other)).tokens_held == 500


async def test_a_bot_holds_for_itself_alone(stack: Stack, person: Person) -> None:
    mine, other = await stack.order(person), await stack.order(person, "123456780:" + "B" * 35)
    bot, sibling, stranger = await stack.claw_key(mine), await stack.claw_key(other), await stack.person()
    made = await reserve(stack, bot, 100, deployment_id=other.id)
    assert (made.deployment_id, made.api_key_id[:4], made.user_id) == (mine.id, "key_", person.user.id)
    of_person = await reserve(stack, person.metadata, 100, deployment_id=other.id)
    for who in (sibling, stranger.metadata):
        for call in (settle(stack, who, made, 1), renew(stack, who, made.id), release(stack, who, made.id)):
            assert (await refusal(call))[0] is Code.NOT_FOUND
    assert (await refusal(settle(stack, bot, of_person, 1)))[0] is Code.NOT_FOUND
    # Its owner sees and settles all of them.
    assert {one.id for one in await listed(stack, person.metadata)} == {made.id, of_person.id}
    assert (await settle(stack, person.metadata, made, 1)).event.deployment_id == mine.id
    assert (await settle(stack, sibling, of_person, 1)).event.deployment_id == other.id
    # Settled or not is no business of a sibling's either.
    assert (await refusal(settle(stack, sibling, made, 1)))[0] is Code.NOT_FOUND
    assert (await refusal(listed(stack, bot)))[2]["permission"] == "usage.read"


async def test_the_endpoints_calls_are_the_endpoints(stack: Stack, person: Person) -> None:
    """Nobody says himself what he has used by the model endpoint; and it settles nothing that is others' to settle."""
    opening = model_call_service_pb2.OpenModelCallRequest(provider="anthropic", model="claude-opus-4.5", tokens_in_estimate=10, max_tokens=10)
    call = await stack.model_calls.OpenModelCall(opening, metadata=person.metadata)
    assert [(one.id, one.state) for one in await listed(stack, person.metadata)] == [(call.id, HELD)]
    for attempt in (settle(stack, person.metadata, call, 0), renew(stack, person.metadata, call.id), release(stack, person.metadata, call.id)):
        code, text, *_ = await refusal(attempt)
        assert code is Code.FAILED_PRECONDITION and "model endpoint" in text
    own = await reserve(stack, person.metadata, 10)
    usages = [model_call_service_pb2.ModelCallUsage(id=one, tokens_in=30, tokens_out=1, tokens_cached=99) for one in (own.id, call.id, call.id)]
    settling = model_call_service_pb2.BatchSettleModelCallsRequest(usages=usages)
    done = await stack.model_calls.BatchSettleModelCalls(settling, metadata=stack.operator)
    assert list(done.settled) == [False, True, False]
    renewing = model_call_service_pb2.BatchRenewModelCallsRequest(ids=[own.id, call.id])
    assert not any((await stack.model_calls.BatchRenewModelCalls(renewing, metadata=stack.operator)).renewed)
    # More than was held, which is shown as well.
    (seen,) = await listed(stack, person.metadata, SETTLED)
    assert (seen.id, seen.tokens_overrun) == (call.id, 11)
    assert (await settle(stack, person.metadata, own, 10)).duplicate is False


async def test_a_renewed_call_stays_open(stack: Stack, person: Person) -> None:
    opening = model_call_service_pb2.OpenModelCallRequest(provider="anthropic", model="claude-opus-4.5", tokens_in_estimate=10, max_tokens=10)
    calls = [await stack.model_calls.OpenModelCall(opening, metadata=person.metadata) for _ in range(3)]
    for call in calls:
        # Nearly over, but not for the loop to find.
        await age(stack, call.id, timedelta(seconds=200))
    renewing = model_call_service_pb2.BatchRenewModelCallsRequest(ids=[one.id for one in calls[:2]])
    assert list((await stack.model_calls.BatchRenewModelCalls(renewing, metadata=stack.operator)).renewed) == [True, True]
    left = {one.id: one.expires_at.ToDatetime(UTC) - now() for one in await listed(stack, person.metadata)}
    assert left[calls[0].id] > timedelta(seconds=290) and left[calls[2].id] < timedelta(seconds=100)


@pytest_asyncio.fixture(scope="module")
async def quick(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """A stack whose calls are abandoned soon."""
    async with running(tmp_path_factory.mktemp("quick"), databases.make(), deployment={"model_call_s": 1}) as made:
        yield made


async def test_an_abandoned_call_holds_until_it_is_settled(quick: Stack) -> None:
    """There is no moment between at which neither what was held nor what was used is counted."""
    person = await quick.person()
    await set_quota(quick, quota(person.org_id, 1000))
    opening = model_call_service_pb2.OpenModelCallRequest(provider="anthropic", model="claude-opus-4.5", tokens_in_estimate=500, max_tokens=500)
    await quick.model_calls.OpenModelCall(opening, metadata=person.metadata)
    for _ in range(150):
        _, amount_used, held = told(await check(quick, person.metadata))[ORG, DAY, TOKENS]
        assert int(amount_used) + int(held) == 1000
        if amount_used == "1000":
            break
        await asyncio.sleep(0.02)
    else:
        raise AssertionError("it was never settled")


async def test_sixty_at_once_never_hold_more_than_there_is(stack: Stack, person: Person) -> None:
    d = await stack.order(person)
    await set_quota(stack, quota(person.org_id, 1000))
    await set_quota(stack, quota(person.org_id, 300, scope=DEPLOYMENT))

    async def attempt(number: int) -> bool:
        try:
            await reserve(stack, person.metadata, 50, deployment_id=d.id if number % 2 else "")
        except grpc.aio.AioRpcError as error:
            assert error.code() is Code.RESOURCE_EXHAUSTED
            return False
        return True

    granted = await asyncio.gather(*(attempt(number) for number in range(60)))
    assert sum(granted) == 20 and sum(granted[1::2]) <= 6


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_processes_together_never_hold_more_than_there_is(databases: Databases, tmp_path: Path) -> None:
    said = await prove(databases, tmp_path, processes=3, callers=24, seconds=4)
    assert said["granted"] > 30 and said["refused"] > 5 and said["settled"] > 10, said


async def test_another_who_names_the_same_id_gets_nothing_and_costs_nothing(stack: Stack, person: Person) -> None:
    """Both in one commit, in either order."""
    other = await stack.person()
    for _ in range(10):
        one = await reserve(stack, person.metadata, 10)
        calls = [settle(stack, who.metadata, one, tokens_in=5) for who in (other, other, person, other, other)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        mine = answers.pop(2)
        assert isinstance(mine, rpc.SettleUsageResponse) and not mine.duplicate and mine.event.org_id == person.org_id
        assert all(isinstance(one, grpc.aio.AioRpcError) and one.code() is Code.NOT_FOUND for one in answers), answers


async def test_what_is_held_is_priced_by_the_book_of_now(stack: Stack, person: Person) -> None:
    """Another process has changed it, and this one has stored nothing since."""
    async with ledger(stack) as db:
        for cost in ("1", "4"):

            async def change(session: Any, cost: str = cost) -> None:
                await prices.changed(session, "usd")
                of = {"provider": "openai", "model": f"fresh-{person.org_id[-8:]}", "above_tokens_in": 0, "currency": "usd", "markup": Decimal(0)}
                await session.execute(sa.delete(Price).where(Price.model == of["model"]).execution_options(synchronize_session=False))
                amounts = dict.fromkeys(("tokens_in", "tokens_out", "tokens_cached", "tokens_reasoning"), Decimal(cost))
                session.add(Price(id=ids.new("prc"), effective_from=now() - timedelta(days=1), effective_to=None, **of, **amounts))

            await db.run(change, ALL)
            held = await reserve(stack, person.metadata, 1_000_000, model=f"fresh-{person.org_id[-8:]}", provider="openai")
            assert Decimal(held.cost_held) == Decimal(cost)
