"""The price book: what counts when, exactly; new prices, ends, files; and that no event is stored at a price that no longer counts."""

import asyncio
import secrets
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given, settings
from hypothesis import strategies as st

from clawplane.deployment.v1 import price_pb2, usage_event_pb2
from clawplane.deployment.v1 import price_service_pb2 as pb
from clawplane.deployment.v1 import usage_service_pb2 as usage
from services.deployment_svc.prices import rules
from services.deployment_svc.prices.book import Line, PriceBook, charged
from services.deployment_svc.prices.models import Price
from services.kit import ids
from tests.conftest import Databases
from tests.harness import Person, Stack, running
from tests.recount import recount

NOW = datetime(2026, 6, 1, tzinfo=UTC)
START = datetime(2000, 1, 1, tzinfo=UTC)


def provider() -> str:
    """A provider that no other test uses."""
    return f"p-{secrets.token_hex(6)}"


def price(of: str, **more: Any) -> price_pb2.Price:
    """A price of some models."""
    return price_pb2.Price(**{"provider": of, "model": "m*", "tokens_in": "1", "tokens_out": "2", **more})


async def create(stack: Stack, one: price_pb2.Price, **more: Any) -> price_pb2.Price:
    """Adds it to the book."""
    return await stack.prices.CreatePrice(pb.CreatePriceRequest(price=one, **more), metadata=stack.operator)


async def listed(stack: Stack, of: str, at: datetime | None = None) -> list[price_pb2.Price]:
    """The prices of a provider, the newest first."""
    answer = await stack.prices.ListPrices(pb.ListPricesRequest(provider=of, effective_at=at), metadata=stack.operator)
    return list(answer.prices)


async def take(stack: Stack, text: str, **more: Any) -> tuple[int, int]:
    """(created, unchanged) of an import."""
    answer = await stack.prices.ImportPrices(pb.ImportPricesRequest(yaml=text, **more), metadata=stack.operator)
    return answer.created, answer.unchanged


async def use(stack: Stack, person: Person, of: str, **more: Any) -> usage_event_pb2.UsageEvent:
    """An event of a million tokens in."""
    given: dict[str, Any] = {"id": str(ids.uuid7()), "provider": of, "model": "model", "tokens_in": 1_000_000, **more}
    request = usage.RecordUsageRequest(event=usage_event_pb2.UsageEvent(**given))
    return (await stack.usage.RecordUsage(request, metadata=person.metadata)).event


async def refused(call: Any, code: grpc.StatusCode, field: str) -> str:
    """The text of an answer that names a field."""
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await call
    status = rpc_status.from_call(refusal.value)  # type: ignore[arg-type]
    bad = error_details_pb2.BadRequest()
    for detail in status.details if status is not None else ():
        detail.Unpack(bad)
    assert refusal.value.code() is code, refusal.value
    assert [violation.field for violation in bad.field_violations] == [field]
    return refusal.value.details() or ""


# ---- which price counts

names = st.text("abc", min_size=1, max_size=5)
patterns = st.text("abc*", min_size=1, max_size=5)
days = st.integers(0, 6).map(lambda day: NOW + timedelta(days=day))


def fits(pattern: str, model: str) -> bool:
    """Whether a pattern names a model, said in another way."""
    if not pattern:
        return not model
    if pattern[0] == "*":
        return any(fits(pattern[1:], model[start:]) for start in range(len(model) + 1))
    return model[:1] == pattern[0] and fits(pattern[1:], model[1:])


@st.composite
def lines(draw: st.DrawFn) -> Line:
    begin, tokens = draw(days), draw(st.integers(0, 50))
    end = draw(st.none() | st.integers(1, 4).map(lambda length: begin + timedelta(days=length)))
    return Line(ids.new("prc"), draw(st.sampled_from("pq")), draw(patterns), draw(st.sampled_from((0, 10, 100))), begin, end, tokens, 0, 0, 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(lines(), max_size=12), st.lists(st.tuples(st.sampled_from("pq"), names, st.sampled_from((0, 10, 11, 100, 101)), days), max_size=8))
def test_the_closest_pattern_then_the_longest_context_then_the_latest(book: list[Line], calls: list[tuple[str, str, int, datetime]]) -> None:
    made = PriceBook.of("usd", 1, book)
    for of, model, tokens_in, when in calls:
        candidates = [
            line for line in book
            if line.provider == of and fits(line.model, model) and line.effective_from <= when
            and (line.effective_to is None or when < line.effective_to)
            and (line.above_tokens_in == 0 or tokens_in > line.above_tokens_in)
        ]  # fmt: skip
        found = made.find(of, model, tokens_in, when)
        assert (found is None) == (not candidates)
        if found is None:
            continue
        assert found in candidates

        def rank(line: Line) -> tuple[bool, int, int, str]:
            return "*" not in line.model, len(line.model.replace("*", "")), -line.model.count("*"), line.model

        closest = max(map(rank, candidates))
        alike = [line for line in candidates if rank(line) == closest]
        longest = max(line.above_tokens_in for line in alike)
        latest = max(line.effective_from for line in alike if line.above_tokens_in == longest)
        assert (rank(found), found.above_tokens_in, found.effective_from) == (closest, longest, latest)


@pytest.mark.parametrize(
    ("pattern", "model", "closer"),
    [("a*b*c*d*ef", "abcdef", "abcde*"), ("gpt-4", "gpt-4", "gpt-*"), ("gpt-4*", "gpt-4", "gpt-*4")],
    ids=["more characters of its own", "a plain name", "always the same"],
)
def test_of_patterns_that_fit(pattern: str, model: str, closer: str) -> None:
    both = [Line(name, "p", name, 0, NOW, None, 1, 1, 1, 1) for name in (pattern, closer)]
    for order in (both, both[::-1]):
        found = PriceBook.of("usd", 1, order).find("p", model, 1, NOW)
        assert found is not None and found.id == pattern


def test_costs_are_exact() -> None:
    # Half of a millionth of a cent either way is rounded to even.
    assert [charged(Decimal(p), Decimal(m)) for p, m in (("1", "0.2"), ("0.000001", "0.5"), ("0.000003", "0.5"), ("999999.999999", "9"))] == [
        1_200_000, 2, 4, 9_999_999_999_990,
    ]  # fmt: skip
    line = Line("x", "p", "m", 0, NOW, None, 3_000_000, 15_000_000, 300_000, 60_000_000)
    assert line.cost(1000, 100, 400, 10) == Decimal("0.00387") == (600 * 3 + 400 * Decimal("0.3") + 90 * 15 + 10 * 60) / Decimal(1_000_000)
    assert line.cost(1, 0, 1, 0) == Decimal("0.0000003") and line.cost(-1000, 0, -400, 0) == -line.cost(1000, 0, 400, 0)


# ---- how prices follow each other

steps = st.lists(st.tuples(st.integers(0, 12), st.none() | st.integers(1, 6)), max_size=10, unique_by=lambda step: step[0])


@settings(max_examples=100, deadline=None)
@given(steps)
def test_of_one_key_one_price_counts_at_a_time(made: list[tuple[int, int | None]]) -> None:
    book: list[Price] = []
    for begin, length in made:
        start = NOW + timedelta(hours=begin)
        row = Price(id=ids.new("prc"), effective_from=start, effective_to=start + timedelta(hours=length) if length else None)
        if rules.begins_with(row, book):
            continue
        _, resumed = rules.place(row, book)
        book += [row] if resumed is None else [row, resumed]
        assert rules.in_force(book, start) is row
    for hour in range(20):
        at = NOW + timedelta(hours=hour)
        counting = [row for row in book if row.effective_from <= at and (row.effective_to is None or at < row.effective_to)]
        # None other than the last that began: what one took over stays taken over.
        begun = [row for row in book if row.effective_from <= at]
        assert counting in ([], [max(begun, key=lambda row: row.effective_from)] if begun else [])
        if begun and all(length is None for _, length in made):
            assert counting


async def test_a_price_for_a_time_leaves_no_gap_behind_it(stack: Stack) -> None:
    """Else the usage after it would cost nothing."""
    of = provider()
    march, april = START + timedelta(days=30), START + timedelta(days=60)
    first = await create(stack, price(of, effective_from=START))
    await create(stack, price(of, effective_from=march, effective_to=april, tokens_in="9"))
    listed = (await stack.prices.ListPrices(pb.ListPricesRequest(provider=of), metadata=stack.operator)).prices
    times = sorted((one.effective_from.ToDatetime(UTC), one.HasField("effective_to") and one.effective_to.ToDatetime(UTC), one.tokens_in) for one in listed)
    assert times == [(START, march, first.tokens_in), (march, april, "9"), (april, False, first.tokens_in)]


async def test_a_price_takes_over_from_the_one_before(stack: Stack, person: Person) -> None:
    of = provider()
    first = await create(stack, price(of, effective_from=START, tokens_cached="0.5", markup="0.25"))
    assert (first.tokens_in, first.tokens_cached, first.tokens_reasoning, first.markup, first.currency) == ("1", "0.5", "2", "0.25", "usd")
    assert first.effective_from.ToDatetime(UTC) == START and not first.HasField("effective_to") and first.created_at.seconds
    assert await stack.prices.GetPrice(pb.GetPriceRequest(id=first.id), metadata=stack.operator) == first
    old = await use(stack, person, of)
    assert (old.price_id, old.cost) == (first.id, "1.25")
    second = await create(stack, price(of, tokens_in="50"))
    assert (second.tokens_in, second.tokens_cached, second.markup) == ("50", "50", "0")
    assert abs(second.effective_from.ToDatetime(UTC) - datetime.now(UTC)) < timedelta(seconds=20)
    both = await listed(stack, of)
    assert [one.id for one in both] == [second.id, first.id] and both[1].effective_to == second.effective_from
    assert both[1].updated_at.ToDatetime() > both[1].created_at.ToDatetime()
    new = await use(stack, person, of)
    assert (new.price_id, new.cost) == (second.id, "50")
    # What occurred before is priced by what counted then, and a price in between ends where the later begins.
    late = await use(stack, person, of, id="late", occurred_at=datetime.now(UTC) - timedelta(days=2))
    assert late.price_id == first.id
    between = await create(stack, price(of, tokens_in="7", effective_from=datetime.now(UTC) - timedelta(days=3)))
    assert between.effective_to == second.effective_from
    assert (await use(stack, person, of, id="later", occurred_at=datetime.now(UTC) - timedelta(days=2))).price_id == between.id
    assert [one.id for one in await listed(stack, of, datetime.now(UTC))] == [second.id]
    assert [one.id for one in await listed(stack, of, datetime.now(UTC) - timedelta(days=2))] == [between.id]
    await recount(stack, person.org_id)


async def test_tiers_by_length_of_context(stack: Stack, person: Person) -> None:
    of = provider()
    base = await create(stack, price(of, effective_from=START))
    tier = await create(stack, price(of, tokens_in="10", above_tokens_in=200_000, effective_from=START))
    assert [one.HasField("effective_to") for one in await listed(stack, of)] == [False, False]
    assert (await use(stack, person, of, tokens_in=200_000)).price_id == base.id
    long = await use(stack, person, of, tokens_in=200_001)
    assert (long.price_id, long.cost) == (tier.id, "2.00001")


async def test_what_is_refused(stack: Stack) -> None:
    of, code = provider(), grpc.StatusCode
    made = await create(stack, price(of, effective_from=START))
    text = await refused(create(stack, price(of, effective_from=START, tokens_in="3")), code.ALREADY_EXISTS, "price.effective_from")
    assert "effective_from" in text
    for wrong, field in (
        ({"currency": "eur"}, "price.currency"), ({"tokens_in": "1e3"}, "price.tokens_in"), ({"tokens_in": "0.1234567"}, "price.tokens_in"),
        ({"tokens_out": ""}, "price.tokens_out"), ({"markup": "-1"}, "price.markup"), ({"effective_to": START}, "price.effective_to"),
        ({"above_tokens_in": -1}, "price.above_tokens_in"), ({"model": "a b"}, "price.model"),
    ):  # fmt: skip
        await refused(create(stack, price(of, **wrong)), code.INVALID_ARGUMENT, field)
    for wrong_time in (Timestamp(seconds=10**15), Timestamp(seconds=-(10**15))):
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await create(stack, price(of, effective_from=wrong_time))
        assert refusal.value.code() is code.INVALID_ARGUMENT
    assert [one.id for one in await listed(stack, of)] == [made.id]
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await stack.prices.GetPrice(pb.GetPriceRequest(id=ids.new("prc")), metadata=stack.operator)
    assert unknown.value.code() is code.NOT_FOUND


async def test_the_same_request_makes_one_price(stack: Stack) -> None:
    of, request_id = provider(), str(uuid.uuid4())
    made = await asyncio.gather(*(create(stack, price(of), request_id=request_id) for _ in range(5)))
    assert len({one.id for one in made}) == 1 and len(await listed(stack, of)) == 1
    # Without one, whoever comes first does, and the next takes over from him.
    await asyncio.gather(*(create(stack, price(of, tokens_in=str(number))) for number in range(5)))
    line = sorted(await listed(stack, of), key=lambda one: one.effective_from.ToNanoseconds())
    assert [one.effective_to for one in line[:-1]] == [one.effective_from for one in line[1:]] and not line[-1].HasField("effective_to")


async def test_a_price_ends(stack: Stack, person: Person) -> None:
    of = provider()
    made = await create(stack, price(of, effective_from=START))

    async def end(one: price_pb2.Price, at: datetime | None = None) -> price_pb2.Price:
        return await stack.prices.EndPrice(pb.EndPriceRequest(id=one.id, effective_to=at), metadata=stack.operator)

    ended = await end(made)
    assert abs(ended.effective_to.ToDatetime(UTC) - datetime.now(UTC)) < timedelta(seconds=20)
    # Once more is no later end; another time moves it.
    assert (await end(made)).effective_to == ended.effective_to
    assert (await use(stack, person, of)).price_id == ""
    await refused(end(made, START), grpc.StatusCode.INVALID_ARGUMENT, "effective_to")
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    assert (await end(made, tomorrow)).effective_to.ToDatetime(UTC) == tomorrow
    assert (await use(stack, person, of)).price_id == made.id
    await create(stack, price(of, effective_from=tomorrow))
    await refused(end(made, tomorrow + timedelta(seconds=1)), grpc.StatusCode.INVALID_ARGUMENT, "effective_to")
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await stack.prices.EndPrice(pb.EndPriceRequest(id=ids.new("prc")), metadata=stack.operator)
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


# ---- never a price that no longer counts


async def test_no_event_is_stored_at_a_price_that_was_replaced(stack: Stack, person: Person) -> None:
    of = provider()
    made = {one.id: one for one in [await create(stack, price(of, effective_from=START))]}

    async def change() -> None:
        for number in range(2, 8):
            one = await create(stack, price(of, tokens_in=str(number)))
            made[one.id] = one

    async def report(number: int) -> usage_event_pb2.UsageEvent:
        await asyncio.sleep(number * 0.004)
        return await use(stack, person, of)

    events, _ = await asyncio.gather(asyncio.gather(*(report(number) for number in range(50))), change())
    assert len({event.price_id for event in events}) > 1
    for event in events:
        assert event.cost == made[event.price_id].tokens_in
        at, begins = event.occurred_at.ToDatetime(UTC), made[event.price_id].effective_from.ToDatetime(UTC)
        assert begins <= at
    # Nothing would cost anything else by the book as it is now.
    request = usage.RecostUsageRequest(org_id=person.org_id)
    (*_, last) = [one async for one in stack.usage.RecostUsage(request, metadata=stack.operator)]
    assert (last.seen, last.changed, last.done) == (50, 0, True)
    await recount(stack, person.org_id)


@pytest_asyncio.fixture
async def two(databases: Databases, tmp_path: Path) -> AsyncIterator[tuple[Stack, Stack]]:
    """Two stacks on the same databases."""
    urls = databases.make()
    async with running(tmp_path / "one", urls) as one, running(tmp_path / "two", urls, keys=one.keys) as other:
        yield one, other


async def test_a_price_made_in_one_process_counts_in_the_other_at_once(two: tuple[Stack, Stack]) -> None:
    one, other = two
    person, of = await one.person(), provider()
    assert (await use(other, person, of)).cost == ""
    for number in range(1, 6):
        made = await create(one, price(of, tokens_in=str(number)))
        first, second = await asyncio.gather(use(other, person, of), use(one, person, of))
        assert (first.price_id, first.cost) == (second.price_id, second.cost) == (made.id, str(number))
    await recount(one, person.org_id)


# ---- models without a price


async def test_models_without_a_price_are_listed(stack: Stack, person: Person) -> None:
    of, other = provider(), await stack.person()
    for who, model, times in ((person, "rare", 1), (person, "often", 2), (other, "often", 2), (person, "other", 1)):
        for _ in range(times):
            assert (await use(stack, who, of, model=model, tokens_in=100, tokens_out=1)).cost == ""
    found, token = [], ""
    while True:
        request = pb.ListUnpricedModelsRequest(page_size=2, page_token=token)
        answer = await stack.prices.ListUnpricedModels(request, metadata=stack.operator)
        found += [(one.events, one.provider, one.model, one.tokens_total) for one in answer.models]
        token = answer.next_page_token
        if not token:
            break
    # Those of other tests stand between them.
    assert found == sorted(found, reverse=True) and len({one[1:3] for one in found}) == len(found)
    assert [one[0::2] for one in found if one[1] == of] == [(4, "often"), (1, "rare"), (1, "other")]
    assert [one[3] for one in found if one[1] == of] == [404, 101, 101]
    await create(stack, price(of, model="often", effective_from=START))
    async for _ in stack.usage.RecostUsage(usage.RecostUsageRequest(provider=of, apply=True), metadata=stack.operator):
        pass
    answer = await stack.prices.ListUnpricedModels(pb.ListUnpricedModelsRequest(page_size=250), metadata=stack.operator)
    assert {one.model for one in answer.models if one.provider == of} == {"rare", "other"}
    for who in (person, other):
        await recount(stack, who.org_id)
    await refused(
        stack.prices.ListUnpricedModels(pb.ListUnpricedModelsRequest(page_token="x"), metadata=stack.operator),
        grpc.StatusCode.INVALID_ARGUMENT, "page_token",
    )  # fmt: skip
