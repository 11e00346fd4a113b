"""The ledger as a file: every event once, as it was when the call was made, whole or visibly broken off."""

import asyncio
import csv
import io
import json
import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import grpc
import httpx
import pytest

from clawplane.deployment.v1 import usage_event_pb2 as pb
from clawplane.deployment.v1 import usage_service_pb2 as rpc
from gateway import exports
from services.deployment_svc.usage import reading
from tests.harness import Person, Stack
from tests.usage_rows import THEN, at_random, row, store


async def exported(stack: Stack, person: Person, **more: Any) -> list[rpc.ExportUsageResponse]:
    """The messages of an export."""
    return [one async for one in stack.usage.ExportUsage(rpc.ExportUsageRequest(**more), metadata=person.metadata)]


def ids_of(pieces: list[rpc.ExportUsageResponse]) -> list[str]:
    """The events in their order."""
    return [event.id for piece in pieces for event in piece.events]


async def fetched(stack: Stack, person: Person, kind: str, **query: Any) -> httpx.Response:
    """The file."""
    return await stack.http.get("/v1/usage:export", params={"format": kind, **query}, headers=dict(person.metadata))


def table(text: str) -> list[dict[str, str]]:
    """The rows of CSV."""
    return list(csv.DictReader(io.StringIO(text, newline="")))


async def test_each_event_once_oldest_first_and_on_from_any_position(stack: Stack, person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_PAGE", 7)
    # Several at the same moment: their ids decide.
    rows = [row(person.org_id, THEN + timedelta(minutes=number // 3)) for number in range(40)]
    await store(stack, rows)
    expected = [one.id for one in sorted(rows, key=lambda one: (one.occurred_at, one.id))]
    pieces = await exported(stack, person)
    assert ids_of(pieces) == expected and len(pieces) == 6
    for number, piece in enumerate(pieces):
        rest = await exported(stack, person, after_position=piece.position)
        assert ids_of(rest) == expected[7 * (number + 1) :]
    window = {"start": THEN + timedelta(minutes=2), "end": THEN + timedelta(minutes=5)}
    assert len(ids_of(await exported(stack, person, **window))) == 9
    # A position belongs to its query and its organization, and is none of a list.
    stranger = await stack.person()
    for who, request in (
        (person, {"after_position": pieces[0].position, "model": "x"}), (stranger, {"after_position": pieces[0].position}),
        (person, {"after_position": "nonsense"}), (person, {"after_position": pieces[0].position[:-2]}),
    ):  # fmt: skip
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await exported(stack, who, **request)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "after_position" in (refusal.value.details() or "")
    assert ids_of(await exported(stack, stranger)) == []


async def test_what_comes_in_meanwhile_is_not_part_of_it(stack: Stack, person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_PAGE", 5)
    await store(stack, [row(person.org_id, THEN, id=f"before-{number:03}") for number in range(60)])
    stream = stack.usage.ExportUsage(rpc.ExportUsageRequest(), metadata=person.metadata)
    seen: list[str] = []
    async for piece in stream:
        if not seen:
            await store(stack, [row(person.org_id, THEN + timedelta(days=1), id=f"later-{number}") for number in range(10)])
            await store(stack, [row(person.org_id, THEN, id=f"before-{number:03}x") for number in range(60)])
        seen += [event.id for event in piece.events]
    assert seen == [f"before-{number:03}" for number in range(60)]


async def test_filters_are_those_of_the_list(stack: Stack, person: Person) -> None:
    rows = at_random(person.org_id, random.Random(3), 60)
    await store(stack, rows)
    for name in ("model", "provider", "type", "status", "user_id", "api_key_id", "deployment_id", "agent_id", "project_id"):
        value = next(getattr(one, name) for one in rows if getattr(one, name))
        listed = await stack.usage.ListUsage(rpc.ListUsageRequest(page_size=250, **{name: value}), metadata=person.metadata)
        wanted = sorted((one.occurred_at, one.id) for one in rows if getattr(one, name) == value)
        assert ids_of(await exported(stack, person, **{name: value})) == [key[1] for key in wanted], name
        assert [one.id for one in listed.events] == [key[1] for key in wanted[::-1]], name


async def test_large_events_fit_messages(stack: Stack, person: Person) -> None:
    texts = {f"key-{number}": "💥" * 500 for number in range(20)}
    await store(stack, [row(person.org_id, THEN + timedelta(seconds=number), metadata_=texts) for number in range(120)])
    pieces = await exported(stack, person)
    assert len(ids_of(pieces)) == 120 and max(piece.ByteSize() for piece in pieces) < 2_000_000
    seen: list[str] = []
    token = ""
    while True:
        page = await stack.usage.ListUsage(rpc.ListUsageRequest(page_size=250, page_token=token), metadata=person.metadata)
        seen += [one.id for one in page.events]
        token = page.next_page_token
        if not token:
            break
    assert seen == ids_of(pieces)[::-1]


async def test_files_say_what_the_summary_says(stack: Stack, person: Person) -> None:
    rows = at_random(person.org_id, random.Random(5), 200)
    await store(stack, rows)
    start, end = THEN - timedelta(days=20), THEN + timedelta(days=20)
    query = {"start": start.isoformat(), "end": end.isoformat(), "provider": "anthropic"}
    request = rpc.SummarizeUsageRequest(start=start, end=end - timedelta(days=1), provider="anthropic")  # type: ignore[arg-type]
    total = (await stack.usage.SummarizeUsage(request, metadata=person.metadata)).total
    answer = await fetched(stack, person, "csv", **query)
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["content-disposition"] == f'attachment; filename="usage-{datetime.now(UTC):%Y-%m-%d}.csv"'
    lines = table(answer.text)
    assert list(lines[0])[:3] == ["id", "occurred_at", "org_id"] and answer.text.count("\r\n") == len(lines) + 1
    assert sum(Decimal(one["cost"] or 0) for one in lines) == Decimal(total.cost)
    assert sum(int(one["tokens_total"]) for one in lines) == total.tokens_total
    assert sum(not one["adjusts"] for one in lines) == total.events
    assert sum(not one["adjusts"] and one["status"] == "USAGE_STATUS_ERROR" for one in lines) == total.errors
    told = [json.loads(one) for one in (await fetched(stack, person, "ndjson", **query)).text.splitlines()]
    assert [one["id"] for one in told] == [one["id"] for one in lines]
    listed = (await stack.http.get("/v1/usage", params={"pageSize": 1, **query}, headers=dict(person.metadata))).json()["events"]
    assert told[-1] == listed[0]


async def test_texts_cannot_become_formulas(stack: Stack, person: Person) -> None:
    evil = {
        "=HYPERLINK(\"http://x\")": "'=HYPERLINK(\"http://x\")", "+1+1": "'+1+1", "-2+3": "'-2+3", "@SUM(A1)": "'@SUM(A1)", "\t=1": "'\t=1",
        "plain, with \"quotes\"\r\nand lines": "plain, with \"quotes\"\r\nand lines", "-5": "-5",
    }  # fmt: skip
    for number, text in enumerate(evil):
        await store(
            stack,
            [
                row(
                    person.org_id,
                    THEN + timedelta(seconds=number),
                    adjusts="x",
                    reason=text,
                    cost=Decimal("-0.5"),
                    tokens_in=-1000,
                    tokens_out=0,
                )
            ],
        )
    lines = table((await fetched(stack, person, "csv")).text)
    assert [one["reason"] for one in lines] == list(evil.values())
    assert {(one["cost"], one["tokens_in"]) for one in lines} == {("-0.5", "-1000")}


async def test_streams_of_events_are_resumed(stack: Stack, person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_PAGE", 2)
    await store(stack, [row(person.org_id, THEN, id=f"event-{number}") for number in range(5)])
    answer = await stack.http.get("/v1/usage:export", headers=dict(person.metadata))
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [dict(line.split(": ", 1) for line in block.splitlines()) for block in answer.text.split("\n\n") if "data: " in block]
    assert [[one["id"] for one in json.loads(event["data"])["events"]] for event in events] == [
        ["event-0", "event-1"], ["event-2", "event-3"], ["event-4"]
    ]  # fmt: skip
    rest = await stack.http.get("/v1/usage:export", headers=dict(person.metadata) | {"last-event-id": events[1]["id"]})
    assert "event-4" in rest.text and "event-3" not in rest.text


async def test_refusals_are_no_files(stack: Stack, person: Person) -> None:
    for query, field in (
        ({"format": "xlsx"}, "format"),
        ({"format": ["csv", "csv"]}, "format"),
        ({"format": "csv", "nonsense": 1}, "nonsense"),
    ):
        answer = await stack.http.get("/v1/usage:export", params=query, headers=dict(person.metadata))  # type: ignore[arg-type]
        assert answer.status_code == 400 and field in answer.json()["error"]["message"]
    assert (await stack.http.get("/v1/usage:export", params={"format": "csv"})).status_code == 401
    bad = await fetched(stack, person, "csv", afterPosition="nonsense")
    assert bad.status_code == 400 and "after_position" in bad.json()["error"]["message"]
    assert (await fetched(stack, person, "csv")).text.splitlines()[0].startswith("id,occurred_at,")
    assert (await fetched(stack, person, "ndjson")).text == ""
    head = await stack.http.head("/v1/usage:export", params={"format": "csv"}, headers=dict(person.metadata))
    assert head.status_code == 200 and "attachment" in head.headers["content-disposition"] and not head.content


async def test_a_part_does_not_look_like_the_whole(stack: Stack, person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_PAGE", 3)
    await store(stack, [row(person.org_id, THEN, id=f"event-{number}") for number in range(9)])
    pieces = reading._pieces

    def failing(rows: Any) -> Any:
        if any(one.id == "event-6" for one in rows):
            raise ConnectionError
        return pieces(rows)

    monkeypatch.setattr(reading, "_pieces", failing)
    for kind in exports.KINDS:
        seen = b""
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
            async with stack.http.stream("GET", "/v1/usage:export", params={"format": kind}, headers=dict(person.metadata)) as answer:
                assert answer.status_code == 200
                async for chunk in answer.aiter_bytes():
                    seen += chunk
        assert b"event-5" in seen and b"event-6" not in seen


async def test_whoever_may_no_longer_gets_no_more(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_PAGE", 1)
    person = await stack.person()
    made = await stack.key(person, "usage.read")
    await store(stack, [row(person.org_id, THEN, id=f"event-{number:04}") for number in range(2000)])
    from clawplane.user.v1 import api_key_service_pb2

    stream = stack.usage.ExportUsage(rpc.ExportUsageRequest(), metadata=(("authorization", f"Bearer {made.key}"),))
    seen = 0
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        async for piece in stream:
            seen += len(piece.events)
            if seen == 1:
                await stack.api_keys.RevokeApiKey(api_key_service_pb2.RevokeApiKeyRequest(id=made.api_key.id), metadata=person.metadata)
            await asyncio.sleep(0.005)
    assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED and 0 < seen < 2000


async def test_no_transaction_stays_open_while_a_reader_is_slow(stack: Stack, person: Person) -> None:
    texts = {f"key-{number}": "x" * 500 for number in range(20)}
    await store(stack, [row(person.org_id, THEN + timedelta(seconds=number), metadata_=texts) for number in range(1500)])
    async with stack.http.stream("GET", "/v1/usage:export", params={"format": "ndjson"}, headers=dict(person.metadata)) as answer:
        chunks = answer.aiter_raw(1000)
        await anext(chunks)
        await asyncio.sleep(0.5)
        # Writers are not held up, and no more of the file is in memory than a message or two.
        await asyncio.wait_for(store(stack, [row(person.org_id, THEN)]), 5)
        size = 1000 + sum([len(chunk) async for chunk in chunks])
    assert size > 1500 * 10_000


class Endless:
    """A call that says nothing more after its first message."""

    canceled = False

    async def read(self) -> Any:
        await asyncio.Event().wait()

    def cancel(self) -> None:
        self.canceled = True


async def test_a_gateway_that_stops_breaks_the_file_off_and_a_reader_that_leaves_ends_the_call() -> None:
    first, stopping = rpc.ExportUsageResponse(), asyncio.Event()
    call = Endless()
    body = exports._body(call, first, b"head", lambda _: b"rows", stopping)
    assert [await anext(body), await anext(body)] == [b"head", b"rows"]
    rest = asyncio.ensure_future(anext(body))
    stopping.set()
    with pytest.raises(exports.BrokenOff, match="stops"):
        await rest
    assert call.canceled
    left = Endless()
    body = exports._body(left, first, b"", lambda _: b"rows", asyncio.Event())
    assert await anext(body) == b"rows"
    await body.aclose()  # type: ignore[attr-defined]
    assert left.canceled


@pytest.mark.any_engine
def test_cells_of_every_kind() -> None:
    event = pb.UsageEvent(id="=1", estimated=True, metadata={"b": "2", "a": "1"}, status=pb.USAGE_STATUS_OK, latency_ms=5)
    event.created_at.FromDatetime(datetime(2027, 1, 31, 12, tzinfo=UTC))
    columns = list(pb.UsageEvent.DESCRIPTOR.fields)
    cells = dict(zip((one.name for one in columns), next(csv.reader([exports._csv(columns, [event]).decode()])), strict=True))
    assert (cells["id"], cells["estimated"], cells["metadata"], cells["status"]) == ("'=1", "true", '{"a":"1","b":"2"}', "USAGE_STATUS_OK")
    assert (cells["created_at"], cells["occurred_at"], cells["type"], cells["latency_ms"]) == ("2027-01-31T12:00:00Z", "", "", "5")


async def test_a_full_batch_comes_in_as_json(stack: Stack, person: Person) -> None:
    """As many as the method takes, each with what one usually has."""
    one = {"provider": "anthropic", "model": "claude-opus-4.5", "tokensIn": "1200", "tokensOut": "300", "tokensCached": "100", "latencyMs": "950"}
    at = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    batch = {"events": [one | {"id": f"request-of-the-day-{number:07}", "occurredAt": at, "operationId": "from the shop"} for number in range(5000)]}
    answer = await stack.http.post("/v1/usage:batch", json=batch, headers=dict(person.metadata), timeout=60)
    assert answer.status_code == 200 and answer.json()["accepted"] == 5000, answer.text[:300]
