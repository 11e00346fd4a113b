"""The ledger: each event once, its cost exact, its sums in the same transaction."""

import asyncio
import random
import time
import uuid
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import grpc
import pytest
import sqlalchemy as sa

from clawplane.deployment.v1 import usage_event_pb2 as pb
from clawplane.deployment.v1 import usage_service_pb2 as rpc
from services.deployment_svc.usage import postgres
from services.deployment_svc.usage.models import UsageCounter, UsageRollup
from services.kit import ids
from services.kit.db import ALL, Database
from services.kit.settings import KitSettings
from tests.harness import Metadata, Person, Stack
from tests.test_auth import bearer
from tests.usage_rows import ledger


def event(**more: object) -> pb.UsageEvent:
    """A chat call with an id that carries its time."""
    given: dict[str, object] = {
        "id": str(ids.uuid7()), "provider": "anthropic", "model": "claude-opus-4.5", "tokens_in": 1000, "tokens_out": 100, **more
    }  # fmt: skip
    return pb.UsageEvent(**given)  # type: ignore[arg-type]


async def record(stack: Stack, who: Metadata, one: pb.UsageEvent) -> rpc.RecordUsageResponse:
    """Records one event."""
    return await stack.usage.RecordUsage(rpc.RecordUsageRequest(event=one), metadata=who)


async def total(stack: Stack, who: Metadata, *groups: int) -> rpc.SummarizeUsageResponse:
    """The summary of the last days."""
    return await stack.usage.SummarizeUsage(rpc.SummarizeUsageRequest(group_by=groups), metadata=who)  # type: ignore[arg-type]


async def refused(stack: Stack, who: Metadata, one: pb.UsageEvent) -> str:
    """The text with which an event is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await record(stack, who, one)
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return refusal.value.details() or ""


async def test_counted_once_however_often_it_is_sent(stack: Stack, person: Person) -> None:
    one = event()
    answers = await asyncio.gather(*(record(stack, person.metadata, one) for _ in range(50)))
    assert sorted(answer.duplicate for answer in answers) == [False] + [True] * 49
    stored = answers[0].event
    assert (stored.org_id, stored.user_id, stored.tokens_total) == (person.org_id, person.user.id, 1100)
    assert Decimal(stored.cost) == (Decimal(5) * 1000 + Decimal(25) * 100) / 1_000_000
    # Another spelling of the same UUID is the same event.
    assert (await record(stack, person.metadata, event(id=uuid.UUID(one.id).hex.upper()))).duplicate
    found = await total(stack, person.metadata)
    assert (found.total.events, found.total.tokens_total) == (1, 1100)


async def test_a_known_event_costs_those_beside_it_nothing(stack: Stack, person: Person) -> None:
    """Written as if all were new, a batch begins again where one is not: all others are stored, once, and the connection is kept."""
    kept = []
    for count in (9, 9, 200):
        known, fresh = event(), [event() for _ in range(count)]
        await record(stack, person.metadata, known)
        # As if nothing had been sent again for long.
        postgres._asks_until = 0.0
        backends = await _backends(stack)
        answer = await stack.usage.BatchRecordUsage(rpc.BatchRecordUsageRequest(events=[*fresh[:4], known, *fresh[4:]]), metadata=person.metadata)
        assert (answer.accepted, answer.duplicates, answer.rejected) == (count, 1, 0)
        # A try has failed, so this one asks at once.
        assert not backends or postgres._asks_until > time.monotonic()
        answer = await stack.usage.BatchRecordUsage(rpc.BatchRecordUsageRequest(events=[known, *fresh]), metadata=person.metadata)
        assert (answer.accepted, answer.duplicates, answer.rejected) == (0, count + 1, 0)
        kept.append(backends <= await _backends(stack))
    # A loop may have closed one of its own meanwhile, but not each time.
    assert any(kept)
    found = await total(stack, person.metadata)
    assert (found.total.events, found.total.tokens_total) == (221, 221 * 1100)


async def _backends(stack: Stack) -> set[int]:
    """Who serves the connections of the deployment service; nobody on SQLite."""
    async with ledger(stack) as db:
        if db.is_sqlite:
            return set()
        ours = "datname = current_database() AND application_name LIKE 'clawplane-%' AND application_name <> 'clawplane-test'"
        async with db.transaction(ALL) as session:
            return set(await session.scalars(sa.text(f"SELECT pid FROM pg_stat_activity WHERE {ours}")))


async def test_whether_tokens_are_estimated_is_not_the_callers_to_say(stack: Stack, person: Person) -> None:
    one = event(estimated=True)
    assert not (await record(stack, person.metadata, one)).event.estimated
    (listed,) = (await stack.usage.ListUsage(rpc.ListUsageRequest(), metadata=person.metadata)).events
    assert not listed.estimated


async def test_the_same_id_of_two_organizations_is_two_events(stack: Stack, person: Person) -> None:
    other, one = await stack.person(), event()
    assert not (await record(stack, person.metadata, one)).duplicate
    assert not (await record(stack, other.metadata, one)).duplicate


async def test_what_is_refused_names_the_field(stack: Stack, person: Person) -> None:
    now = datetime.now(UTC)
    cases = [
        (event(id="my-own-id"), "occurred_at"),
        (event(id="my-own-id", occurred_at=now - timedelta(days=40)), "occurred_at"),
        (event(id="my-own-id", occurred_at=now + timedelta(minutes=10)), "occurred_at"),
        (event(occurred_at=now - timedelta(days=32)), "occurred_at"),
        (event(tokens_cached=2000), "tokens_cached"),
        (event(tokens_in=-1), "tokens_in"),
        (event(model="a model"), "model"),
        (event(deployment_id="dep_" + "1" * 32), "deployment_id"),
    ]
    for one, field in cases:
        assert f"event.{field}" in await refused(stack, person.metadata, one), field
    assert (await total(stack, person.metadata)).total.events == 0


async def test_a_callers_cost_is_not_believed(stack: Stack, person: Person) -> None:
    answer = await record(stack, person.metadata, event(cost="0.000001", org_id="org_" + "1" * 32, user_id="usr_" + "1" * 32))
    assert Decimal(answer.event.cost) == Decimal("0.0075") and answer.event.org_id == person.org_id
    assert answer.event.user_id == person.user.id
    unknown = await record(stack, person.metadata, event(provider="nobody", model="new-model"))
    assert unknown.event.cost == ""
    found = await total(stack, person.metadata)
    assert (found.total.events, found.total.unpriced_events, Decimal(found.total.cost)) == (2, 1, Decimal("0.0075"))


async def test_tiny_costs_add_up_exactly(stack: Stack, person: Person) -> None:
    # 5e-7 dollars each, a number that no binary float holds.
    events = [event(tokens_in=1, tokens_out=0, tokens_cached=1) for _ in range(3001)]
    answer = await stack.usage.BatchRecordUsage(rpc.BatchRecordUsageRequest(events=events), metadata=person.metadata, timeout=60)
    assert (answer.accepted, answer.duplicates, answer.rejected) == (3001, 0, 0)
    assert Decimal((await total(stack, person.metadata)).total.cost) == Decimal("0.0000005") * 3001


async def test_a_bad_event_does_not_sink_its_batch(stack: Stack, person: Person) -> None:
    good = [event() for _ in range(5)]
    batch = [*good, good[0], event(tokens_in=-1), event(id="no-time"), event(provider="")]
    answer = await stack.usage.BatchRecordUsage(rpc.BatchRecordUsageRequest(events=batch), metadata=person.metadata)
    assert (answer.accepted, answer.duplicates, answer.rejected) == (5, 1, 3)
    assert [(error.index, error.field) for error in answer.errors] == [(6, "tokens_in"), (7, "occurred_at"), (8, "provider")]
    again = await stack.usage.BatchRecordUsage(rpc.BatchRecordUsageRequest(events=good), metadata=person.metadata)
    assert (again.accepted, again.duplicates) == (0, 5)


async def test_five_thousand_at_once(stack: Stack, person: Person) -> None:
    batch = rpc.BatchRecordUsageRequest(events=[event() for _ in range(5000)])
    assert (await stack.usage.BatchRecordUsage(batch, metadata=person.metadata, timeout=120)).accepted == 5000
    batch.events.add(id="x")
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await stack.usage.BatchRecordUsage(batch, metadata=person.metadata)
    assert "events" in (refusal.value.details() or "")


async def test_concurrent_batches_agree_with_their_sums(stack: Stack, person: Person) -> None:
    models = [("anthropic", "claude-opus-4.5"), ("openai", "gpt-3.2"), ("google", "gemini-3-flash"), ("minimax", "minimax-m2.5")]
    events = [event(provider=p, model=m, tokens_in=n) for n in range(1, 101) for p, m in models]

    async def send(seed: int) -> None:
        mixed = list(events)
        random.Random(seed).shuffle(mixed)
        for start in range(0, len(mixed), 50):
            await stack.usage.BatchRecordUsage(
                rpc.BatchRecordUsageRequest(events=mixed[start : start + 50]), metadata=person.metadata, timeout=60
            )

    await asyncio.gather(*(send(seed) for seed in range(6)))
    found = await total(stack, person.metadata, rpc.USAGE_GROUP_PROVIDER, rpc.USAGE_GROUP_MODEL)
    assert {(row.provider, row.model): (row.events, row.tokens_in) for row in found.sums} == dict.fromkeys(models, (100, 5050))
    by_day = await total(stack, person.metadata, rpc.USAGE_GROUP_DAY)
    assert sum(row.events for row in by_day.sums) == by_day.total.events == 400
    assert Decimal(found.total.cost) == sum(Decimal(row.cost) for row in found.sums)


async def test_a_bot_reports_for_itself_alone(stack: Stack, person: Person) -> None:
    mine, other = await stack.order(person), await stack.person()
    foreign = await stack.order(other)
    bot = await stack.claw_key(mine)
    answer = await record(stack, bot, event(deployment_id=foreign.id, org_id=other.org_id, user_id=other.user.id))
    assert (answer.event.deployment_id, answer.event.org_id, answer.event.user_id) == (mine.id, person.org_id, person.user.id)
    assert answer.event.api_key_id.startswith("key_")
    found = await total(stack, person.metadata, rpc.USAGE_GROUP_DEPLOYMENT)
    assert [row.deployment_id for row in found.sums] == [mine.id]
    assert (await total(stack, other.metadata)).total.events == 0
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await total(stack, bot)
    assert refusal.value.code() is grpc.StatusCode.PERMISSION_DENIED and "usage.read" in (refusal.value.details() or "")
    # A person may name his own deployments only.
    assert "deployment_id" in await refused(stack, person.metadata, event(deployment_id=foreign.id))


async def test_months_have_partitions_on_postgresql(stack: Stack, person: Person) -> None:
    now = datetime.now(UTC)
    await record(stack, person.metadata, event())
    await record(stack, person.metadata, event(id="last-month", occurred_at=now.replace(day=1) - timedelta(days=1)))
    if "postgresql" not in stack.urls["deployment_svc"]:
        return
    db = Database(stack.urls["deployment_svc"], KitSettings(), "test")
    async with db.writing.begin() as connection:
        query = sa.text("SELECT DISTINCT tableoid::regclass::text FROM usage_events WHERE org_id = :org")
        tables = set((await connection.scalars(query, {"org": ids.to_uuid(person.org_id, "org")})).all())
    await db.close()
    assert f"usage_events_{now:%Y_%m}" in tables and "usage_events_default" not in tables


async def test_summaries_have_bounds(stack: Stack, person: Person) -> None:
    now = datetime.now(UTC)
    for request, field in (
        (rpc.SummarizeUsageRequest(start=now, end=now - timedelta(days=2)), "start"),
        (rpc.SummarizeUsageRequest(start=now - timedelta(days=500), end=now), "end"),
        (rpc.SummarizeUsageRequest(group_by=[1, 1]), "group_by"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await stack.usage.SummarizeUsage(request, metadata=person.metadata)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT and field in (refusal.value.details() or "")


async def test_events_are_listed_in_pages_latest_first(stack: Stack, person: Person) -> None:
    now = datetime.now(UTC)
    for number in range(7):
        # Two in the same moment, and one id in two months: still each once.
        when = now - timedelta(minutes=number // 2)
        await record(stack, person.metadata, event(id=f"list-{number}", occurred_at=when, model="claude-opus-4.5" if number else "other"))
    stranger = await stack.person()
    seen: list[str] = []
    token = ""
    while True:
        answer = await stack.usage.ListUsage(rpc.ListUsageRequest(page_size=3, page_token=token), metadata=person.metadata)
        seen += [one.id for one in answer.events]
        token = answer.next_page_token
        if not token:
            break
    assert sorted(seen) == [f"list-{n}" for n in range(7)] and seen[-1] == "list-6"
    only = await stack.usage.ListUsage(rpc.ListUsageRequest(model="other"), metadata=person.metadata)
    assert [one.id for one in only.events] == ["list-0"]
    window = rpc.ListUsageRequest(start=now - timedelta(minutes=1, seconds=30), end=now - timedelta(seconds=30))
    assert {one.id for one in (await stack.usage.ListUsage(window, metadata=person.metadata)).events} == {"list-2", "list-3"}
    assert not (await stack.usage.ListUsage(rpc.ListUsageRequest(), metadata=stranger.metadata)).events


NASTY = ['"', "\\", '\\"', "{}", "a,b", "NULL", "null", "é\n\t", "\x1f", "💥", "'", "{\"a\"}", " ", "\\\\n"]


async def test_any_text_is_stored_as_it_is(stack: Stack, person: Person) -> None:
    """Singly and in a batch large enough for columns that are written once."""
    for count in (1, 150):
        events = [event(operation_id=NASTY[n % len(NASTY)] if count > 1 else NASTY[2], metadata={text: text for text in NASTY}) for n in range(count)]
        answer = await stack.usage.BatchRecordUsage(rpc.BatchRecordUsageRequest(events=events), metadata=person.metadata)
        assert answer.accepted == count, answer
        stored = {one.id: one for one in (await stack.usage.ListUsage(rpc.ListUsageRequest(page_size=250), metadata=person.metadata)).events}
        for sent in events:
            found = stored[sent.id]
            assert (found.operation_id, dict(found.metadata)) == (sent.operation_id, dict(sent.metadata))
            assert (found.agent_id, found.user_id, found.attempt, found.stated_cost) == ("", person.user.id, 0, "")


async def test_columns_of_all_kinds_of_batches_are_what_was_sent(stack: Stack, person: Person) -> None:
    """Whatever columns happen to say the same in all rows of a batch."""
    chance, agents = random.Random(5), [ids.new("agnt") for _ in range(3)]
    columns: dict[str, list[object]] = {
        "agent_id": ["", *agents], "thread_id": ["", ids.new("thrd")], "project_id": ["", ids.new("prj")], "tokens_out": [0, 5], "attempt": [0, 1],
        "operation_id": ["", "op"], "latency_ms": [0, 70], "status": [0, 2], "type": [0, 3], "model": ["a", "gpt-3.2"],
    }  # fmt: skip
    for _ in range(20):
        fixed = {name: chance.choice(values) for name, values in columns.items() if chance.random() < 0.6}
        events = [event(**({name: chance.choice(values) for name, values in columns.items()} | fixed)) for _ in range(120)]
        answer = await stack.usage.BatchRecordUsage(rpc.BatchRecordUsageRequest(events=events), metadata=person.metadata)
        assert answer.accepted == 120
        stored = {one.id: one for one in (await stack.usage.ListUsage(rpc.ListUsageRequest(page_size=250), metadata=person.metadata)).events}
        for sent in events:
            found = stored[sent.id]
            unset = {"type": pb.USAGE_TYPE_CHAT, "status": pb.USAGE_STATUS_OK}
            assert {name: getattr(found, name) for name in columns} == {name: getattr(sent, name) or unset.get(name, getattr(sent, name)) for name in columns}


async def test_one_text_that_cannot_be_stored_sinks_no_batch(stack: Stack, person: Person) -> None:
    batch = [event(), event(operation_id="a\0b"), event(metadata={"why": "\0"}), event()]
    answer = await stack.usage.BatchRecordUsage(rpc.BatchRecordUsageRequest(events=batch), metadata=person.metadata)
    assert (answer.accepted, answer.rejected) == (2, 2)
    assert [(one.index, one.field) for one in answer.errors] == [(1, "operation_id"), (2, "metadata")]
    assert "U+0000" in await refused(stack, person.metadata, event(operation_id="a\0b"))


async def test_a_time_that_no_calendar_has_names_its_field(stack: Stack, person: Person) -> None:
    never = event(id="mine")
    never.occurred_at.seconds = 10**12
    answer = await stack.usage.BatchRecordUsage(rpc.BatchRecordUsageRequest(events=[never]), metadata=person.metadata)
    assert answer.errors[0].field == "occurred_at"
    assert "occurred_at" in await refused(stack, person.metadata, never)


async def test_a_stated_cost_is_kept_beside_the_computed_one(stack: Stack, person: Person) -> None:
    may = await stack.key(person, "usage.record", "usage.state_cost")
    stored = (await record(stack, bearer(may.key), event(stated_cost="0.5"))).event
    assert (Decimal(stored.stated_cost), Decimal(stored.cost)) == (Decimal("0.5"), Decimal("0.0075"))
    lacks = await stack.key(person, "usage.record")
    assert "usage.state_cost" in await refused(stack, bearer(lacks.key), event(stated_cost="0.5"))


async def test_whoever_may_only_record_is_told_of_his_own_events_alone(stack: Stack, person: Person) -> None:
    mine, other = [bearer((await stack.key(person, "usage.record")).key) for _ in range(2)]
    one = event(metadata={"customer": "secret"})
    assert (await record(stack, mine, one)).event.metadata["customer"] == "secret"
    again = await record(stack, mine, one)
    assert again.duplicate and again.event.metadata["customer"] == "secret"
    guessed = await record(stack, other, one)
    assert guessed.duplicate and not guessed.HasField("event")
    assert (await record(stack, person.metadata, one)).event.metadata["customer"] == "secret"


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_sums_are_locked_in_one_order_by_all_who_write_them(stack: Stack, person: Person) -> None:
    """Roll-ups before counters, as whoever prices anew does: else the two wait for each other in a circle."""
    await record(stack, person.metadata, event())
    async with ledger(stack) as db:
        org = sa.bindparam("org", person.org_id, UsageCounter.org_id.type)
        rollups = sa.select(UsageRollup.starts_at).where(UsageRollup.org_id == org).with_for_update(nowait=True)
        async with db.writing.connect() as holder, db.writing.connect() as looker:
            held = (await holder.execute(sa.select(UsageCounter.tokens).where(UsageCounter.org_id == org).with_for_update())).all()
            assert len(held) == 2
            waiting = asyncio.create_task(record(stack, person.metadata, event()))
            await asyncio.sleep(0.5)
            assert not waiting.done()
            with pytest.raises(sa.exc.DBAPIError, match="could not obtain lock"):
                await looker.execute(rollups)
            await looker.rollback()
            await holder.rollback()
        assert not (await waiting).duplicate
