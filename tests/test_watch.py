"""Watches: nothing is missed, nothing comes twice, a broken stream resumes, and what was taken away ends it."""

import asyncio
import time
from typing import Any

import grpc
import pytest

from clawplane.deployment.v1 import deployment_pb2
from clawplane.deployment.v1 import deployment_service_pb2 as rpc
from clawplane.user.v1 import user_service_pb2
from services.deployment_svc.deployments import repository
from services.deployment_svc.deployments.models import Deployment
from services.kit import ids
from services.kit.db import ALL, Database
from services.kit.settings import KitSettings
from tests.harness import Person, Stack, eventually

LIFE = ["state.pending", "state.deploying", "state.active", "state.closing", "state.closed"]


async def some(stream: Any, until: str) -> list[rpc.WatchDeploymentResponse]:
    """What comes up to an event of the given kind."""
    seen = []
    async with asyncio.timeout(20):
        while True:
            message = await stream.read()
            assert message is not grpc.aio.EOF
            seen.append(message)
            if message.HasField("event") and message.event.kind == until:
                return seen


async def history(stack: Stack, person: Person, d: deployment_pb2.Deployment) -> list[str]:
    """The ids of all events of a deployment."""
    request = rpc.ListDeploymentEventsRequest(deployment_id=d.id, page_size=250)
    return [event.id for event in (await stack.deployments.ListDeploymentEvents(request, metadata=person.metadata)).events]


async def test_a_life_as_it_is_watched(stack: Stack, person: Person) -> None:
    everything = stack.deployments.WatchDeployments(rpc.WatchDeploymentsRequest(), metadata=person.metadata)
    # The stream is open once its first look is taken: an order made right after the call may come before it.
    await asyncio.sleep(0.5)
    d = await stack.order(person)
    one = stack.deployments.WatchDeployment(rpc.WatchDeploymentRequest(id=d.id), metadata=person.metadata)
    first = await one.read()
    assert not first.HasField("event") and (first.deployment.id, first.deployment.state) == (d.id, deployment_pb2.STATE_PENDING)
    await stack.sandbox_act(d, "pay")
    seen = await some(one, "state.active")
    assert seen[-1].deployment.state == deployment_pb2.STATE_ACTIVE and seen[-1].deployment.provider_url
    one.cancel()
    await stack.deployments.CloseDeployment(rpc.CloseDeploymentRequest(id=d.id), metadata=person.metadata)
    await stack.until(d.id, deployment_pb2.STATE_CLOSED)
    # What happened while nobody listened comes first.
    request = rpc.WatchDeploymentRequest(id=d.id, after_event_id=seen[-1].event.id)
    resumed = stack.deployments.WatchDeployment(request, metadata=person.metadata)
    assert (await resumed.read()).deployment.state == deployment_pb2.STATE_CLOSED
    rest = await some(resumed, "state.closed")
    known = await history(stack, person, d)
    got = [message.event.id for message in [*seen, *rest]]
    assert got == known[-len(got):] and len(set(got)) == len(got)
    all_of_it = await some(everything, "state.closed")
    assert [message.event.id for message in all_of_it] == known
    assert [m.event.kind for m in all_of_it if m.event.kind.startswith("state.")] == LIFE


async def test_a_stranger_sees_nothing(stack: Stack, person: Person) -> None:
    d = await stack.order(person)
    stranger = await stack.person()
    for request in (rpc.WatchDeploymentRequest(id=d.id), rpc.WatchDeploymentRequest(id=ids.new("dep"))):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stack.deployments.WatchDeployment(request, metadata=stranger.metadata).read()
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    # Another organization's event is no place to resume.
    event = (await history(stack, person, d))[0]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.deployments.WatchDeployments(rpc.WatchDeploymentsRequest(after_event_id=event), metadata=stranger.metadata).read()
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_what_was_taken_away_ends_the_stream(stack: Stack, person: Person) -> None:
    d = await stack.order(person)
    stream = stack.deployments.WatchDeployment(rpc.WatchDeploymentRequest(id=d.id), metadata=person.metadata)
    await stream.read()
    request = user_service_pb2.UpdateUserAccountRequest(id=person.user.id, is_active=False)
    await stack.users.UpdateUserAccount(request, metadata=stack.operator)
    started = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        async with asyncio.timeout(5):
            await stream.read()
    assert ended.value.code() is grpc.StatusCode.UNAUTHENTICATED and time.monotonic() - started < 2


async def test_an_event_that_commits_later_is_not_missed(stack: Stack, person: Person) -> None:
    """A writer is held open while others want to write: whoever sees a later event has seen the earlier one."""
    made = [await stack.order(person, f"33333333{n}:" + "O" * 35) for n in range(3)]
    db = Database(stack.urls["deployment_svc"], KitSettings(), "other")
    seen: list[str] = []

    async def follow() -> None:
        stream = stack.deployments.WatchDeployments(rpc.WatchDeploymentsRequest(), metadata=person.metadata)
        while (message := await stream.read()) is not grpc.aio.EOF:
            seen.append(message.event.message)

    async def write(number: int, held_s: float) -> None:
        async with db.transaction(ALL) as session:
            d = await session.get(Deployment, made[number].id)
            assert d is not None
            repository.note(session, d, "test", f"note {number}")
            await session.flush()
            await asyncio.sleep(held_s)

    following = asyncio.create_task(follow())
    await asyncio.sleep(0.6)
    slow = asyncio.create_task(write(0, 1.0))
    await asyncio.sleep(0.2)
    await asyncio.gather(write(1, 0), write(2, 0), slow)

    async def complete() -> bool:
        return len(seen) >= 3

    await eventually(complete, 5)
    following.cancel()
    assert seen[0] == "note 0" and sorted(seen) == ["note 0", "note 1", "note 2"]
    await db.close()


def test_ids_after_a_clock_that_runs_ahead() -> None:
    ahead = f"devt_{'f' * 8}{ids.new('devt')[13:]}"
    assert ids.new_after("devt", ahead) > ahead and ids.new_after("devt", "") > ids.lowest("devt")
    one = ids.new("devt")
    assert ids.new_after("devt", one) > one
