"""Sums of usage: from roll-ups or events, by any calendar, they are what adding up the events gives."""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import grpc
import pytest
import pytest_asyncio
import sqlalchemy as sa
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from clawplane.deployment.v1 import usage_event_pb2 as pb
from clawplane.deployment.v1 import usage_service_pb2 as rpc
from services.deployment_svc.usage import sources
from services.deployment_svc.usage.latency import percentiles
from services.deployment_svc.usage.models import LATENCY_MS
from services.deployment_svc.usage.periods import span_of
from services.deployment_svc.usage.rows import Row
from services.kit import ids
from services.kit.zones import zone_of
from tests.harness import Person, Stack
from tests.usage_rows import THEN, at_random, ledger, row, store

DIMS = {
    "provider": rpc.USAGE_GROUP_PROVIDER, "model": rpc.USAGE_GROUP_MODEL, "type": rpc.USAGE_GROUP_TYPE, "user_id": rpc.USAGE_GROUP_USER,
    "api_key_id": rpc.USAGE_GROUP_API_KEY, "deployment_id": rpc.USAGE_GROUP_DEPLOYMENT, "agent_id": rpc.USAGE_GROUP_AGENT,
    "project_id": rpc.USAGE_GROUP_PROJECT,
}  # fmt: skip
PERIODS = {"": None, "hour": rpc.USAGE_GROUP_HOUR, "day": rpc.USAGE_GROUP_DAY, "month": rpc.USAGE_GROUP_MONTH}
ZONES = ("", "UTC", "Europe/Berlin", "America/New_York", "America/Havana", "Asia/Kathmandu", "Australia/Adelaide", "Pacific/Kiritimati")
ADDED = ("tokens_in", "tokens_out", "tokens_cached", "tokens_reasoning", "tokens_total")
COUNTED = ("events", "errors", "unpriced_events", *ADDED)


async def summary(stack: Stack, person: Person, *groups: int | None, **more: Any) -> rpc.SummarizeUsageResponse:
    """The sums."""
    request = rpc.SummarizeUsageRequest(group_by=[group for group in groups if group], **more)  # type: ignore[misc]
    return await stack.usage.SummarizeUsage(request, metadata=person.metadata)


async def refused(stack: Stack, person: Person, *groups: int, **more: Any) -> str:
    """The text with which it is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await summary(stack, person, *groups, **more)
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return refusal.value.details() or ""


class Sums(NamedTuple):
    """What events add up to, without the code that is being tested."""

    counted: tuple[int, ...]
    cost: Decimal
    latencies: list[int]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Sums":
        rows = list(rows)
        own = [one for one in rows if not one.adjusts]
        counted = [len(own), sum(one.status == pb.USAGE_STATUS_ERROR for one in own), sum(one.cost is None for one in own)]
        counted += [sum(getattr(one, name) for one in rows) for name in ADDED]
        return cls(
            tuple(counted),
            sum((one.cost or Decimal(0) for one in rows), Decimal(0)),
            sorted(one.latency_ms for one in own if one.latency_ms),
        )

    def agrees(self, told: rpc.UsageSum) -> bool:
        """Whether an answer says the same, latencies within their bucket."""
        for hundredths, said in ((50, told.latency_p50_ms), (95, told.latency_p95_ms), (99, told.latency_p99_ms)):
            if bool(said) != bool(self.latencies):
                return False
            if said and bucket(said) != bucket(self.latencies[math.ceil(len(self.latencies) * hundredths / 100) - 1]):
                return False
        return self.counted == tuple(getattr(told, name) for name in COUNTED) and self.cost == Decimal(told.cost)


def bucket(latency_ms: int) -> int:
    """The number of the bucket."""
    return sum(latency_ms >= edge for edge in LATENCY_MS)


def period_of(when: datetime, period: str, zone: str) -> Any:
    """What of the calendar a moment lies in."""
    local = when.astimezone(ZoneInfo(zone or "UTC"))
    if period == "hour":
        return when - timedelta(minutes=local.minute, seconds=local.second, microseconds=local.microsecond)
    return {"day": local.date(), "month": local.date().replace(day=1)}.get(period)


def told_period(one: rpc.UsageSum, period: str, zone: str) -> Any:
    """The same of an answer."""
    if not period:
        assert not one.HasField("period_start")
        return None
    start = one.period_start.ToDatetime(UTC)
    assert one.day == (start.astimezone(ZoneInfo(zone or "UTC")).date().isoformat() if period == "day" else "")
    return start if period == "hour" else start.astimezone(ZoneInfo(zone or "UTC")).date()


def grouped(rows: Sequence[Row], period: str, zone: str, dims: Sequence[str]) -> Mapping[tuple[Any, ...], Sums]:
    """The sums by group."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for one in rows:
        key = (period_of(one.occurred_at, period, zone), *(getattr(one, name) or "" for name in dims))
        groups.setdefault(key, []).append(one)
    return {key: Sums.of(group) for key, group in groups.items()}


@pytest_asyncio.fixture(scope="session")
async def crowd(stack: Stack) -> tuple[Person, list[Row]]:
    """Somebody with events of all kinds."""
    person = await stack.person()
    rows = at_random(person.org_id, random.Random(11), 400)
    await store(stack, rows)
    return person, rows


class Query(NamedTuple):
    """What is asked."""

    period: str
    dims: list[str]
    filters: list[str]
    """By the values of one of the events."""
    zone: str
    first: float
    """Days from THEN."""
    days: float
    picked: int = 0
    compare: bool = True


QUERIES = st.builds(
    Query, st.sampled_from(list(PERIODS)), st.lists(st.sampled_from(list(DIMS)), unique=True, max_size=3),
    st.lists(st.sampled_from(list(DIMS)), unique=True, max_size=2), st.sampled_from(ZONES), st.floats(-50, 50), st.floats(0, 90),
    st.integers(0, 399), st.booleans(),
)  # fmt: skip


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(query=QUERIES)
@example(query=Query("day", ["model", "deployment_id"], ["user_id"], "Europe/Berlin", 0, 29, 3))
@example(query=Query("hour", ["provider", "model", "type"], [], "America/New_York", -8, 30))
@example(query=Query("month", ["user_id", "api_key_id"], [], "Asia/Kathmandu", -45, 90))
async def test_sums_are_what_adding_up_gives(stack: Stack, crowd: tuple[Person, list[Row]], query: Query) -> None:
    period, dims, filters, zone, first, days, picked, compare = query
    person, rows = crowd
    wanted = {name: getattr(rows[picked], name) for name in filters if getattr(rows[picked], name)}
    start, end = THEN + timedelta(days=first), THEN + timedelta(days=first + days)
    reach = 30 if not sources.kind_for({*dims, *wanted}) else 35 if period == "hour" else 400
    assume(days <= reach - 1)
    groups = [PERIODS[period], *(DIMS[name] for name in dims)]
    if not any(groups):
        period, groups = "day", []
    answer = await summary(stack, person, *groups, start=start, end=end, time_zone=zone, compare=compare, **wanted)

    unit = "hour" if period == "hour" else "day"
    low, high = (period_of(when, unit, zone) for when in (start, end))
    fitting = [one for one in rows if all(getattr(one, name) == value for name, value in wanted.items())]
    inside = [one for one in fitting if low <= period_of(one.occurred_at, unit, zone) <= high]
    keys = [(told_period(one, period, zone), *(getattr(one, name) for name in dims)) for one in answer.sums]
    assert keys == sorted(keys) and len(set(keys)) == len(keys)
    found, expected = dict(zip(keys, answer.sums, strict=True)), grouped(inside, period, zone, dims)
    assert expected.keys() <= found.keys() and (compare or expected.keys() == found.keys())
    for key, one in found.items():
        assert expected.get(key, Sums.of([])).agrees(one), key
    assert Sums.of(inside).agrees(answer.total) and answer.total.currency == "usd"
    if not compare:
        return
    # A step back by the length of the whole is a step back by the calendar, but for hours.
    step = high - low + (timedelta(hours=1) if unit == "hour" else timedelta(days=1))
    before = [one for one in fitting if low - step <= period_of(one.occurred_at, unit, zone) < low]
    assert Sums.of(before).agrees(answer.total.previous)
    if period != "month":
        earlier = grouped(before, period, zone, dims)
        was = {(key[0] - step if period else None, *key[1:]): one.previous for key, one in found.items()}
        assert earlier.keys() <= was.keys()
        for key, one in was.items():
            assert earlier.get(key, Sums.of([])).agrees(one), key
            assert told_period(one, period, zone) == key[0]
    assert sum(one.previous.events for one in answer.sums) == answer.total.previous.events


async def test_events_and_rollups_give_the_same(stack: Stack, crowd: tuple[Person, list[Row]], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last digit, latencies too: nobody is to see which of them an answer was made from."""
    person, rows = crowd
    asked: list[tuple[list[int], dict[str, Any]]] = [
        ([], {}), ([rpc.USAGE_GROUP_MODEL], {"type": pb.USAGE_TYPE_TOOL}), ([rpc.USAGE_GROUP_TYPE, rpc.USAGE_GROUP_HOUR], {}),
        ([rpc.USAGE_GROUP_API_KEY, rpc.USAGE_GROUP_USER], {}), ([rpc.USAGE_GROUP_MONTH, rpc.USAGE_GROUP_AGENT], {}),
        ([rpc.USAGE_GROUP_PROJECT], {"deployment_id": next(one.deployment_id for one in rows if one.deployment_id)}),
    ]  # fmt: skip
    span = {"start": THEN - timedelta(days=15), "end": THEN + timedelta(days=15), "time_zone": "America/New_York", "compare": True}
    for groups, filters in asked:
        quick = await summary(stack, person, *groups, **span, **filters)
        with monkeypatch.context() as patch:
            patch.setattr(sources, "kind_for", lambda _: "")
            slow = await summary(stack, person, *groups, **span, **filters)
        assert quick == slow and quick.total.events and quick.total.latency_p99_ms and quick.total.previous.events


async def test_another_organization_sees_nothing(stack: Stack, crowd: tuple[Person, list[Row]]) -> None:
    stranger, span = await stack.person(), {"start": THEN - timedelta(days=15), "end": THEN + timedelta(days=15)}
    for groups in ([rpc.USAGE_GROUP_MODEL], [rpc.USAGE_GROUP_MODEL, rpc.USAGE_GROUP_USER]):
        answer = await summary(stack, stranger, *groups, **span)
        assert not answer.sums and answer.total.events == 0 and answer.total.cost == "0" and answer.total.currency == "usd"


async def test_days_follow_the_clock_of_the_zone(stack: Stack, person: Person) -> None:
    # Berlin's clock is put forward in the night to the last Sunday of March, at one o'clock UTC.
    sunday = next(day for day in (THEN.replace(day=31) - timedelta(days=back) for back in range(7)) if day.weekday() == 6)
    moments = {
        sunday - timedelta(hours=1, seconds=1): -1, sunday - timedelta(hours=1): 0, sunday + timedelta(hours=21, minutes=59): 0,
        sunday + timedelta(hours=22): 1,
    }  # fmt: skip
    await store(stack, [row(person.org_id, when) for when in moments])
    around = {"start": sunday - timedelta(days=2), "end": sunday + timedelta(days=2)}
    answer = await summary(stack, person, rpc.USAGE_GROUP_DAY, time_zone="Europe/Berlin", **around)
    assert {one.day: one.events for one in answer.sums} == {
        (sunday + timedelta(days=shift)).date().isoformat(): count for shift, count in ((-1, 1), (0, 2), (1, 1))
    }
    assert [one.period_start.ToDatetime(UTC) for one in answer.sums][1:] == [sunday - timedelta(hours=1), sunday + timedelta(hours=22)]
    # In UTC it is another day, and by hours of Kathmandu they begin a quarter past.
    assert [one.events for one in (await summary(stack, person, **around)).sums] == [2, 2]
    by_hour = await summary(stack, person, rpc.USAGE_GROUP_HOUR, time_zone="Asia/Kathmandu", **around)
    assert {one.period_start.ToDatetime(UTC).minute for one in by_hour.sums} == {15} and by_hour.total.events == 4


async def test_what_was_before_stands_beside(stack: Stack, person: Person) -> None:
    earlier, later = THEN - timedelta(days=7), THEN
    await store(
        stack,
        [
            row(person.org_id, later, tokens_in=300, latency_ms=90), row(person.org_id, later, tokens_in=200, model="new"),
            row(person.org_id, earlier, tokens_in=100, latency_ms=50), row(person.org_id, earlier, tokens_in=50, model="gone"),
            row(person.org_id, earlier - timedelta(days=7), tokens_in=7),
        ],
    )  # fmt: skip
    week = {"start": THEN - timedelta(days=6), "end": THEN}
    plain = await summary(stack, person, rpc.USAGE_GROUP_MODEL, **week)
    assert [one.model for one in plain.sums] == ["claude-opus-4.5", "new"] and not plain.total.HasField("previous")
    answer = await summary(stack, person, rpc.USAGE_GROUP_MODEL, compare=True, **week)
    assert [(one.model, one.tokens_in, one.previous.tokens_in) for one in answer.sums] == [
        ("claude-opus-4.5", 300, 100), ("gone", 0, 50), ("new", 200, 0)
    ]  # fmt: skip
    assert (answer.total.tokens_in, answer.total.previous.tokens_in) == (500, 150)
    assert bucket(answer.total.latency_p50_ms) == bucket(90) and bucket(answer.total.previous.latency_p50_ms) == bucket(50)
    (day,) = (await summary(stack, person, rpc.USAGE_GROUP_DAY, compare=True, **week)).sums
    assert (day.day, day.previous.day) == (later.date().isoformat(), earlier.date().isoformat())
    assert (day.events, day.previous.events) == (2, 2)


async def test_corrections_change_sums_and_are_no_events(stack: Stack, person: Person) -> None:
    first = row(person.org_id, THEN, latency_ms=80, status=pb.USAGE_STATUS_ERROR)
    await store(
        stack, [first, row(person.org_id, THEN, tokens_in=-400, tokens_out=0, cost=Decimal("-0.002"), latency_ms=80, adjusts=first.id)]
    )
    for groups in ([rpc.USAGE_GROUP_MODEL], [rpc.USAGE_GROUP_MODEL, rpc.USAGE_GROUP_AGENT]):
        told = (await summary(stack, person, *groups, start=THEN, end=THEN)).total
        assert (told.events, told.errors, told.tokens_in, told.tokens_total, told.cost) == (1, 1, 600, 700, "0.0055")


async def test_what_cannot_be_summed_names_the_field(stack: Stack, person: Person) -> None:
    month = {"start": THEN - timedelta(days=40), "end": THEN}
    assert "group_by" in await refused(stack, person, rpc.USAGE_GROUP_DAY, rpc.USAGE_GROUP_HOUR)
    assert "group_by: this combination" in await refused(stack, person, rpc.USAGE_GROUP_MODEL, rpc.USAGE_GROUP_AGENT, **month)
    assert "agent_id: this combination" in await refused(stack, person, rpc.USAGE_GROUP_MODEL, agent_id=ids.new("agnt"), **month)
    assert "user_id: this combination" in await refused(stack, person, model="x", user_id=ids.new("usr"), **month)
    assert "end: is more than 35" in await refused(stack, person, rpc.USAGE_GROUP_HOUR, **month)
    assert "end: is more than 400" in await refused(stack, person, start=THEN - timedelta(days=401), end=THEN)
    assert "start" in await refused(stack, person, start=THEN, end=THEN - timedelta(days=1))
    assert "start" in await refused(stack, person, start=datetime(1, 1, 1, tzinfo=UTC), end=THEN)
    assert "end" in await refused(stack, person, start=THEN, end=datetime(9999, 12, 31, tzinfo=UTC))
    for zone in ("Mars/Olympus", "Europe", "../../etc/passwd", "/etc/localtime", "europe/berlin/", "+05:00", "zone1970"):
        assert "time_zone" in await refused(stack, person, time_zone=zone), zone
    # What the limits still let pass.
    await summary(stack, person, start=THEN - timedelta(days=400), end=THEN, compare=True)
    await summary(stack, person, rpc.USAGE_GROUP_HOUR, start=THEN - timedelta(days=35), end=THEN)
    await summary(stack, person, rpc.USAGE_GROUP_MODEL, rpc.USAGE_GROUP_AGENT)
    await summary(stack, person, rpc.USAGE_GROUP_MODEL, rpc.USAGE_GROUP_AGENT, rpc.USAGE_GROUP_HOUR)


async def test_too_many_rows_are_no_summary(stack: Stack, crowd: tuple[Person, list[Row]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MOST_ROWS", 20)
    monkeypatch.setattr("services.deployment_svc.usage.summary.MOST_ROWS", 20)
    span = {"start": THEN - timedelta(days=15), "end": THEN + timedelta(days=15)}
    assert "more than 20 rows" in await refused(stack, crowd[0], rpc.USAGE_GROUP_DAY, **span)
    assert len((await summary(stack, crowd[0], rpc.USAGE_GROUP_MODEL, **span)).sums) == 4


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_rollups_are_found_by_their_key(stack: Stack, crowd: tuple[Person, list[Row]]) -> None:
    """However many events there are: what is read are the quarters of an hour of one kind, one organization and the time that is asked for."""
    span = span_of(rpc.SummarizeUsageRequest(start=THEN - timedelta(days=10), end=THEN), "day", THEN)  # type: ignore[arg-type]
    source = sources.rollups("model")
    query = source.select(span, [source.dims["model"]], {}).group_by(source.dims["model"])
    query = query.where(sa.literal_column("org_id") == sa.bindparam("org", ids.to_uuid(crowd[0].org_id, "org")))
    async with ledger(stack) as db, db.writing.begin() as connection:
        await connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        text = str(query.compile(connection.sync_connection, compile_kwargs={"literal_binds": True}))
        plan = "\n".join((await connection.scalars(sa.text(f"EXPLAIN {text}"))).all())
    assert "pk_usage_rollups" in plan and "usage_events" not in plan, plan


@pytest.mark.any_engine
@given(st.lists(st.integers(0, 10**6) | st.just(0), min_size=len(LATENCY_MS) + 1, max_size=len(LATENCY_MS) + 1))
def test_percentiles_are_right_within_their_bucket(buckets: list[int]) -> None:
    shares = (1, 50, 95, 99, 100)
    found = percentiles(buckets, *shares)
    assert found == sorted(found) and found[1:4] == percentiles(buckets, 50, 95, 99)
    for share, told in zip(shares, found, strict=True):
        wanted = math.ceil(sum(buckets) * share / 100)
        assert sum(buckets[: bucket(told)]) < wanted <= sum(buckets[: bucket(told) + 1]) if sum(buckets) else told == 0


@pytest.mark.any_engine
@pytest.mark.parametrize(
    ("zone", "first", "last", "hours"),
    [
        ("Europe/Berlin", "2026-03-29", "2026-03-29", 23),
        ("Europe/Berlin", "2026-10-25", "2026-10-25", 25),
        ("America/Havana", "2026-03-08", "2026-03-08", 23),  # its clock skips midnight
        ("America/Havana", "2026-11-01", "2026-11-01", 25),  # and has it twice
        ("Australia/Lord_Howe", "2026-10-04", "2026-10-04", 23.5),
        ("Australia/Lord_Howe", "2026-04-05", "2026-04-05", 24.5),
        ("Pacific/Apia", "2011-12-29", "2011-12-31", 48),  # where a day was left out
        ("Asia/Kathmandu", "2026-01-01", "2026-01-31", 31 * 24),
    ],
)
def test_time_is_split_as_clocks_go(zone: str, first: str, last: str, hours: float) -> None:
    start, end = (datetime.fromisoformat(f"{day}T12:00").replace(tzinfo=ZoneInfo(zone)) for day in (first, last))
    request = rpc.SummarizeUsageRequest(start=start, end=end, time_zone=zone)  # type: ignore[arg-type]
    span = span_of(request, "day", start)
    assert span.end - span.start == timedelta(hours=hours) and span.starts[0] == span.start
    assert list(span.starts) == sorted(span.starts) and all(when < span.end for when in span.starts)
    assert span.before().end == span.start and len(span.before().starts) == len(span.starts)
    by_hour = rpc.SummarizeUsageRequest(start=span.start, end=span.end - timedelta(seconds=1), time_zone=zone)  # type: ignore[arg-type]
    hourly = span_of(by_hour, "hour", start)
    assert (hourly.start, hourly.end) == (span.start, span.end) and len(hourly.starts) == (24 if zone == "Australia/Lord_Howe" else hours)
    local = [when.astimezone(ZoneInfo(zone)) for when in hourly.starts]
    assert sum(when.minute != 0 for when in local) <= (zone == "Australia/Lord_Howe")
    assert list(hourly.starts) == sorted(set(hourly.starts))


@pytest.mark.any_engine
def test_utc_needs_no_database_of_zones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoneinfo.ZoneInfo", None)
    assert zone_of("") is UTC and zone_of("UTC") is UTC
    monkeypatch.undo()
    with pytest.raises(ValueError, match="Nowhere"):
        zone_of("Nowhere")
