"""Corrections: signed events that refer to the first; less than nothing never remains of it, and their sums are right."""

import asyncio
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawplane.deployment.v1 import model_call_service_pb2
from clawplane.deployment.v1 import usage_event_pb2 as pb
from clawplane.deployment.v1 import usage_service_pb2 as rpc
from services.deployment_svc.prices.book import Line, PriceBook
from services.deployment_svc.usage import adjust
from services.deployment_svc.usage.rows import Row, price
from services.kit import ids
from tests.harness import Metadata, Person, Stack
from tests.recount import cost_of, recount
from tests.test_prices import START, create, provider, refused
from tests.test_prices import price as price_of

Code = grpc.StatusCode
KINDS = adjust.KINDS


async def record(stack: Stack, person: Person, of: str, **more: Any) -> pb.UsageEvent:
    """An event of a thousand tokens in and a hundred out."""
    given: dict[str, Any] = {
        "id": str(ids.uuid7()), "provider": of, "model": "m", "tokens_in": 1000, "tokens_out": 100, "tokens_cached": 500, "tokens_reasoning": 50,
        "latency_ms": 70, "operation_id": "op", "attempt": 2, "metadata": {"a": "b"}, "status": pb.USAGE_STATUS_ERROR, **more,
    }  # fmt: skip
    request = rpc.RecordUsageRequest(event=pb.UsageEvent(**given))
    return (await stack.usage.RecordUsage(request, metadata=person.metadata)).event


async def correct(stack: Stack, event: pb.UsageEvent, who: Metadata = (), **more: Any) -> pb.UsageEvent:
    """Corrects an event."""
    request = rpc.AdjustUsageRequest(**{"org_id": event.org_id, "event_id": event.id, "reason": "counted twice", **more})
    return await stack.usage.AdjustUsage(request, metadata=who or stack.operator)


async def summed(stack: Stack, person: Person) -> pb.UsageEvent:
    """What the month comes to, as the organization sees it."""
    return (await stack.usage.SummarizeUsage(rpc.SummarizeUsageRequest(), metadata=person.metadata)).total


async def test_a_correction_is_an_event_that_refers_to_the_first(stack: Stack, person: Person) -> None:
    of = provider()
    made = await create(stack, price_of(of, effective_from=START, tokens_in="4", tokens_out="10", tokens_cached="1", tokens_reasoning="20"))
    first = await record(stack, person, of)
    assert first.cost == "0.004" and first.price_id == made.id
    one = await correct(stack, first, tokens_in=-400, tokens_out=-10, tokens_cached=-500)
    assert one.id.startswith("adj_") and one.id != first.id and one.created_at.seconds
    assert (one.adjusts, one.reason, one.price_id, one.cost) == (first.id, "counted twice", made.id, "-0.0002")
    assert (one.tokens_in, one.tokens_out, one.tokens_cached, one.tokens_reasoning, one.tokens_total) == (-400, -10, -500, 0, -410)
    same = (
        "org_id", "user_id", "api_key_id", "deployment_id", "provider", "model", "type", "occurred_at", "currency", "status", "operation_id",
        "attempt", "estimated",
    )  # fmt: skip
    assert {name: getattr(one, name) for name in same} == {name: getattr(first, name) for name in same}
    assert (one.latency_ms, dict(one.metadata), one.stated_cost) == (0, {}, "")
    total = await summed(stack, person)
    assert (total.events, total.errors, total.tokens_in, total.tokens_out, total.tokens_cached, total.cost) == (1, 1, 600, 90, 0, "0.0038")
    answer = await stack.usage.ListUsage(rpc.ListUsageRequest(), metadata=person.metadata)
    assert {event.id: event for event in answer.events} == {first.id: first, one.id: one}
    await recount(stack, person.org_id)


async def test_a_cost_that_is_given_is_taken(stack: Stack, person: Person) -> None:
    of = provider()
    first = await record(stack, person, of)
    assert first.cost == ""
    # An event without a price may be given a cost, and no more be taken than there is.
    credit = await correct(stack, first, cost="1.000000000001")
    assert (credit.cost, credit.price_id, credit.tokens_total) == ("1.000000000001", "", 0)
    await refused(correct(stack, first, cost="-1.000000000002"), Code.FAILED_PRECONDITION, "cost")
    assert (await correct(stack, first, cost="-1.000000000001", tokens_in=5)).tokens_in == 5
    total = await summed(stack, person)
    # The event itself is still one without a price.
    assert (total.cost, total.events, total.unpriced_events, total.tokens_in) == ("0", 1, 1, 1005)
    unknown = await correct(stack, first, tokens_in=-5)
    assert (unknown.cost, unknown.price_id) == ("", "")
    assert (await summed(stack, person)).unpriced_events == 1
    await recount(stack, person.org_id)


async def test_less_than_nothing_never_remains(stack: Stack, person: Person) -> None:
    of = provider()
    await create(stack, price_of(of, effective_from=START))
    first = await record(stack, person, of)
    for wrong, field in (
        ({"tokens_in": -1001, "tokens_cached": -500}, "tokens_in"), ({"tokens_out": -101, "tokens_reasoning": -50}, "tokens_out"),
        ({"tokens_cached": -501}, "tokens_cached"), ({"tokens_reasoning": -51}, "tokens_reasoning"), ({"tokens_in": -501}, "tokens_cached"),
        ({"tokens_cached": 501}, "tokens_cached"), ({"tokens_out": -51}, "tokens_reasoning"), ({"cost": "-0.0013"}, "cost"),
    ):  # fmt: skip
        await refused(correct(stack, first, **wrong), Code.FAILED_PRECONDITION, field)
    await correct(stack, first, tokens_in=-1000, tokens_out=-100, tokens_cached=-500, tokens_reasoning=-50)
    await refused(correct(stack, first, tokens_in=-1), Code.FAILED_PRECONDITION, "tokens_in")
    total = await summed(stack, person)
    assert (total.tokens_total, total.cost, total.events) == (0, "0", 1)
    await recount(stack, person.org_id)


async def test_what_was_credited_is_not_given_back_twice(stack: Stack, person: Person) -> None:
    of = provider()
    made = await create(stack, price_of(of, effective_from=START, tokens_in="1000"))
    first = await record(stack, person, of, tokens_out=0, tokens_reasoning=0, tokens_cached=0)
    assert first.cost == "1"
    await correct(stack, first, cost="-0.75")
    text = await refused(correct(stack, first, tokens_in=-1000), Code.FAILED_PRECONDITION, "cost")
    assert "would be -0.75" in text
    assert (await correct(stack, first, tokens_in=-250)).cost == "-0.25"
    # At a price that is dearer by now, more is taken away than stands there until the event itself is priced anew.
    dearer = await create(stack, price_of(of, effective_from=made.effective_from.ToDatetime(UTC) + timedelta(days=1), tokens_in="2000"))
    assert (await correct(stack, first, tokens_in=-250)).cost == "-0.5"
    assert cost_of(await recount(stack, person.org_id)) == Decimal("-0.5")
    async for _ in stack.usage.RecostUsage(rpc.RecostUsageRequest(org_id=person.org_id, apply=True), metadata=stack.operator):
        pass
    events = await recount(stack, person.org_id)
    assert cost_of(events) == Decimal("0.25") == 500 * Decimal("0.002") - Decimal("0.75") and {one.price_id for one in events} == {dearer.id, None}


async def test_corrections_at_once_take_no_more_than_there_is(stack: Stack, person: Person) -> None:
    of = provider()
    await create(stack, price_of(of, effective_from=START))
    first = await record(stack, person, of, tokens_cached=0)

    async def one() -> str:
        try:
            await correct(stack, first, tokens_in=-300)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"

    assert sorted(await asyncio.gather(*(one() for _ in range(10)))) == ["FAILED_PRECONDITION"] * 7 + ["OK"] * 3
    assert (await summed(stack, person)).tokens_in == 100
    await recount(stack, person.org_id)


async def test_the_same_request_corrects_once(stack: Stack, person: Person) -> None:
    first, request_id = await record(stack, person, provider()), str(uuid.uuid4())
    answers = await asyncio.gather(*(correct(stack, first, tokens_in=-100, request_id=request_id) for _ in range(5)))
    assert len({answer.id for answer in answers}) == 1
    assert (await summed(stack, person)).tokens_in == 900
    await refused(correct(stack, first, tokens_in=-101, request_id=request_id), Code.INVALID_ARGUMENT, "request_id")


async def test_which_event_is_meant(stack: Stack, person: Person) -> None:
    of, other = provider(), await stack.person()
    now = datetime.now(UTC)
    last_month = now.replace(day=1) - timedelta(days=1)
    for when in (now, last_month):
        await record(stack, person, of, id="twice", occurred_at=when)
    await record(stack, person, of, id="once", occurred_at=last_month)
    event = pb.UsageEvent(org_id=person.org_id, id="twice")
    await refused(correct(stack, event, tokens_in=1), Code.INVALID_ARGUMENT, "occurred_at")
    made = await correct(stack, event, tokens_in=1, occurred_at=last_month.replace(day=1))
    assert made.occurred_at.ToDatetime(UTC) == last_month
    assert (await correct(stack, event, tokens_in=1, occurred_at=now)).occurred_at.ToDatetime(UTC) == now
    assert (await correct(stack, pb.UsageEvent(org_id=person.org_id, id="once"), tokens_in=1)).adjusts == "once"
    # Any spelling of a UUID.
    first = await record(stack, person, of)
    assert (await correct(stack, pb.UsageEvent(org_id=person.org_id, id=uuid.UUID(first.id).hex.upper()), tokens_in=1)).adjusts == first.id
    for wrong in (
        pb.UsageEvent(org_id=other.org_id, id=first.id), pb.UsageEvent(org_id=person.org_id, id=str(ids.uuid7())),
        pb.UsageEvent(org_id=person.org_id, id="call_" + "0" * 32),
    ):  # fmt: skip
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await correct(stack, wrong, tokens_in=1)
        assert unknown.value.code() is Code.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await correct(stack, pb.UsageEvent(org_id=person.org_id, id="once"), tokens_in=1, occurred_at=now)
    assert unknown.value.code() is Code.NOT_FOUND
    text = await refused(correct(stack, made, tokens_in=1), Code.INVALID_ARGUMENT, "event_id")
    assert "correct the event twice" in text
    await recount(stack, person.org_id)


async def test_what_a_correction_must_say(stack: Stack, person: Person) -> None:
    first = await record(stack, person, provider())
    await refused(correct(stack, first), Code.INVALID_ARGUMENT, "tokens_in")
    await refused(correct(stack, first, tokens_in=1, reason=""), Code.INVALID_ARGUMENT, "reason")
    await refused(correct(stack, first, cost="1e3"), Code.INVALID_ARGUMENT, "cost")
    await refused(correct(stack, first, tokens_in=1, org_id="x"), Code.INVALID_ARGUMENT, "org_id")
    with pytest.raises(grpc.aio.AioRpcError) as denied:
        await correct(stack, first, person.metadata, tokens_in=1)
    assert denied.value.code() is Code.PERMISSION_DENIED


async def test_a_call_of_the_model_endpoint(stack: Stack, person: Person) -> None:
    opened = await stack.model_calls.OpenModelCall(
        model_call_service_pb2.OpenModelCallRequest(provider="openai", model="gpt-3.2", tokens_in_estimate=100, max_tokens=100),
        metadata=person.metadata,
    )
    used = model_call_service_pb2.ModelCallUsage(id=opened.id, tokens_in=100, tokens_out=10)
    settle = model_call_service_pb2.BatchSettleModelCallsRequest(usages=[used])
    assert list((await stack.model_calls.BatchSettleModelCalls(settle, metadata=stack.operator)).settled) == [True]
    made = await correct(stack, pb.UsageEvent(org_id=person.org_id, id=opened.id), tokens_out=-10)
    assert made.adjusts == opened.id and Decimal(made.cost) == -10 * Decimal("1.5") / 1_000_000
    await recount(stack, person.org_id)


async def test_another_length_of_context_has_another_price(stack: Stack, person: Person) -> None:
    of = provider()
    base = await create(stack, price_of(of, effective_from=START, tokens_in="5"))
    tier = await create(stack, price_of(of, effective_from=START, tokens_in="10", above_tokens_in=200_000))
    first = await record(stack, person, of, tokens_in=300_000, tokens_out=0, tokens_cached=0, tokens_reasoning=0)
    assert (first.cost, first.price_id) == ("3", tier.id)
    # What remains costs what it would have cost at once.
    less = await correct(stack, first, tokens_in=-200_000)
    assert (less.cost, less.price_id) == ("-2.5", base.id) and (await summed(stack, person)).cost == "0.5"
    more = await correct(stack, first, tokens_in=150_000)
    assert (more.cost, more.price_id) == ("2", tier.id) and (await summed(stack, person)).cost == "2.5"
    assert cost_of(await recount(stack, person.org_id)) == Decimal("2.5")


# ---- what corrections cost

BOOK = PriceBook.of("usd", 1, [
    Line("low", "p", "m", 0, START, None, 3, 7, 1, 11), Line("high", "p", "m", 100, START, None, 5, 13, 2, 17),
])  # fmt: skip
deltas = st.tuples(*(st.integers(-60, 120) for _ in KINDS))


def event(tokens: Sequence[int]) -> Row:
    """An event of so many tokens."""
    at = datetime(2026, 6, 1, tzinfo=UTC)
    given = dict(zip(KINDS, tokens, strict=True))
    row = Row(
        org_id="o", id="e", month=at.date(), occurred_at=at, user_id=None, api_key_id=None, deployment_id=None, agent_id=None, thread_id=None,
        project_id=None, provider="p", model="m", type=1, **given, tokens_total=tokens[0] + tokens[1], cost=None, stated_cost=None, price_id=None,
        currency="usd", latency_ms=0, status=1, operation_id="", attempt=0, estimated=False, adjusts="", reason="", metadata_={}, created_at=at,
    )  # fmt: skip
    return row.priced(BOOK)


@settings(max_examples=100, deadline=None)
@given(st.tuples(st.integers(0, 250), st.integers(0, 250)), st.lists(deltas, max_size=6))
def test_all_together_come_to_the_price_of_what_remains(first: tuple[int, int], wanted: list[tuple[int, ...]]) -> None:
    begun = event((*first, first[0] // 2, first[1] // 2))
    known: list[Row] = []
    for delta in wanted:
        request = rpc.AdjustUsageRequest(**dict(zip(KINDS, delta, strict=True)), reason="x")
        left = [getattr(begun, name) + sum(getattr(one, name) for one in known) + more for name, more in zip(KINDS, delta, strict=True)]
        is_sound = min(left) >= 0 and left[2] <= left[0] and left[3] <= left[1]
        try:
            row = adjust._correction(request, begun, known, BOOK)
        except adjust.InvalidState:
            assert not is_sound
            continue
        assert is_sound
        assert not known or row.id > known[-1].id
        known.append(row)
        remains = adjust.corrected(begun, known)
        assert [getattr(remains, name) for name in KINDS] == left
        assert (cost_of([begun, *known]), row.price_id) == price(BOOK, remains)  # type: ignore[list-item]
