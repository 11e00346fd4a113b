"""Streams as server-sent events, over the real services."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from clawplane.deployment.v1 import deployment_service_pb2 as rpc
from clawplane.user.v1 import user_service_pb2
from services.kit import ids
from tests.harness import Person, Stack, eventually, running

Event = dict[str, str]


@asynccontextmanager
async def listening(stack: Stack, path: str, person: Person, **headers: str) -> AsyncIterator[AsyncIterator[Event]]:
    """The events of an address, as a browser parses them."""
    credential = dict(person.metadata) | headers
    async with httpx.AsyncClient(base_url=stack.url, trust_env=False, timeout=20) as http, http.stream("GET", path, headers=credential) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")

        async def events() -> AsyncIterator[Event]:
            event: Event = {}
            async for line in answer.aiter_lines():
                name, _, value = line.partition(": ")
                if name in ("id", "event", "data"):
                    event[name] = value
                elif not line and event:
                    yield event
                    event = {}

        yield events()


async def until(events: AsyncIterator[Event], kind: str) -> list[dict[str, Any]]:
    """What comes up to an event of a kind."""
    seen = []
    async with asyncio.timeout(20):
        async for event in events:
            seen.append(json.loads(event["data"]))
            assert event.get("id", "") == (seen[-1].get("event") or {}).get("id", "")
            if (seen[-1].get("event") or {}).get("kind") == kind:
                break
    return seen


async def test_a_deployment_is_watched_and_resumed(stack: Stack, person: Person) -> None:
    d = await stack.order(person)
    path = f"/v1/deployments/{d.id}:watch"
    async with listening(stack, path, person) as events:
        first = json.loads((await anext(events))["data"])
        assert first["deployment"]["state"] == "STATE_PENDING" and not first.get("event")
        await stack.sandbox_act(d, "pay")
        seen = await until(events, "state.active")
        assert seen[-1]["deployment"]["state"] == "STATE_ACTIVE"
    last = seen[-1]["event"]["id"]
    await stack.deployments.CloseDeployment(rpc.CloseDeploymentRequest(id=d.id), metadata=person.metadata)
    async with listening(stack, path, person, **{"last-event-id": last}) as events:
        rest = [one["event"]["id"] for one in await until(events, "state.closed") if one.get("event")]
    listed = await stack.deployments.ListDeploymentEvents(
        rpc.ListDeploymentEventsRequest(deployment_id=d.id, page_size=250), metadata=person.metadata
    )
    known = [event.id for event in listed.events]
    assert rest == known[known.index(last) + 1 :]
    async with listening(stack, f"{path}?afterEventId={known[0]}", person, **{"last-event-id": last}) as events:
        # The query wins: it is what the program asks for, the header what the browser remembers.
        again = [one["event"]["id"] for one in await until(events, "state.closed") if one.get("event")]
    assert again == known[1:]


@pytest.mark.any_engine
async def test_errors_come_as_a_status_and_later_as_an_event(stack: Stack, person: Person) -> None:
    unknown = await stack.http.get(f"/v1/deployments/{ids.new('dep')}:watch", headers=dict(person.metadata))
    assert (unknown.status_code, unknown.json()["error"]["status"]) == (404, "NOT_FOUND")
    nobody = await stack.http.get("/v1/deployments:watch")
    assert nobody.status_code == 401
    bad = await stack.http.get("/v1/deployments:watch", headers=dict(person.metadata) | {"last-event-id": "nonsense"})
    assert bad.status_code == 400 and "after_event_id" in bad.text
    d = await stack.order(person)
    async with listening(stack, f"/v1/deployments/{d.id}:watch", person) as events:
        await anext(events)
        request = user_service_pb2.UpdateUserAccountRequest(id=person.user.id, is_active=False)
        await stack.users.UpdateUserAccount(request, metadata=stack.operator)
        async with asyncio.timeout(5):
            last = await anext(events)
    assert last["event"] == "error" and json.loads(last["data"])["error"]["status"] == "UNAUTHENTICATED"


async def test_a_client_that_leaves_and_a_gateway_that_stops_end_the_stream(tmp_path: Path) -> None:
    async with running(tmp_path) as stack:
        person = await stack.person()
        grpc_server = stack.stack.grpc
        assert grpc_server is not None
        streams = grpc_server.apps[1].kit.streams
        async with listening(stack, "/v1/deployments:watch", person):
            assert len(streams) == 1

        async def gone() -> bool:
            return not streams

        await eventually(gone, 5)
        started = 0.0
        async with listening(stack, "/v1/deployments:watch", person) as events:
            started = time.monotonic()
            stopping = asyncio.create_task(stack.stack.stop())
            assert [event async for event in events] == []
            await stopping
        assert time.monotonic() - started < 2
