"""The feed of changes: in commit order, and nothing lost for who was away, however long."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from google.rpc import error_details_pb2

from clawplane.deployment.v1 import deployment_pb2
from clawplane.user.v1 import change_service_pb2, change_service_pb2_grpc, user_service_pb2, user_service_pb2_grpc
from services.kit import ids
from services.kit.db import ALL, Database
from services.user_svc.changes.repository import record
from services.user_svc.settings import UserSettings
from tests.conftest import Databases
from tests.harness import Person, Stack
from tests.kit.echo import detail
from tests.processes import OPTIONS, Client, Processes, market_env
from tests.simulators.market import MarketSimulator

ACCESS = change_service_pb2.CHANGE_KIND_USER_ACCESS


def watch(stack: Stack, after_seq: int) -> Any:
    """The feed after a number."""
    request = change_service_pb2.WatchChangesRequest(after_seq=after_seq)
    return change_service_pb2_grpc.ChangeServiceStub(stack.channel).WatchChanges(request, metadata=stack.operator)


def switch(stack: Stack, person: Person, active: bool) -> Any:
    """A change of somebody's access."""
    request = user_service_pb2.UpdateUserAccountRequest(id=person.user.id, is_active=active)
    return stack.users.UpdateUserAccount(request, metadata=stack.operator)


async def test_a_writer_held_open_is_not_overtaken(stack: Stack, person: Person) -> None:
    """The one who took the earlier number commits later: a reader that saw the later number must not have missed the earlier."""
    db = Database(stack.urls["user_svc"], UserSettings(data_dir=stack.data_dir), "held")
    feed = watch(stack, -1)
    await feed.read()
    held = ids.new("usr")
    try:
        async with db.transaction(ALL) as session:
            await record(session, ACCESS, person.org_id, held)
            later = asyncio.ensure_future(switch(stack, person, False))
            await asyncio.sleep(0.6)
            assert not later.done()
        await later
    finally:
        await db.close()
    seen: list[Any] = []
    async with asyncio.timeout(10):
        while [change.subject for _, change in seen][-1:] != [person.user.id]:
            message = await feed.read()
            if (message.HasField("change") and message.change.org_id in (person.org_id, "")) or (message.HasField("change") and message.change.subject == person.user.id):
                seen.append((message.seq, message.change))
    feed.cancel()
    subjects = [change.subject for _, change in seen]
    assert subjects.index(held) < subjects.index(person.user.id)
    assert [seq for seq, _ in seen] == sorted(seq for seq, _ in seen)


async def test_a_follower_behind_what_is_kept_is_told(stack: Stack, person: Person) -> None:
    for active in (False, True, False, True):
        await switch(stack, person, active)
    db = Database(stack.urls["user_svc"], UserSettings(data_dir=stack.data_dir), "purged")
    try:
        async with db.transaction(ALL) as session:
            await session.execute(sa.text("DELETE FROM changes WHERE seq < (SELECT max(seq) FROM changes)"))
            newest = await session.scalar(sa.text("SELECT max(seq) FROM changes"))
    finally:
        await db.close()
    for after in (0, 1, newest + 5):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await watch(stack, after).read() or pytest.fail("a stream with a gap")
        assert refused.value.code() is grpc.StatusCode.OUT_OF_RANGE
        assert detail(refused.value, error_details_pb2.ErrorInfo).metadata["latest_seq"] == str(newest)
    feed = watch(stack, newest)
    assert (await feed.read()).seq == newest
    feed.cancel()


async def test_a_user_deleted_while_nobody_listened(databases: Databases, market: MarketSimulator, tmp_path: Path) -> None:
    """deployment_svc is dead when the user is deleted. On PostgreSQL it also stays away until that change is kept no more."""
    processes = Processes(databases, tmp_path, **market_env(market.url))
    try:
        await processes.ready()
        person = await processes.person()
        async with Client(processes) as client:
            d = await client.order(person)
            await client.pay(d)
            live = await client.until(d.id, deployment_pb2.STATE_ACTIVE)
        processes.running[1].kill()
        processes.running[1].wait()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{processes.ports[0]}", options=OPTIONS) as channel:
            users = user_service_pb2_grpc.UserServiceStub(channel)
            await users.DeleteUser(user_service_pb2.DeleteUserRequest(id=live.user_id), metadata=processes.operator)
            if databases.engine == "postgres":
                other = await processes.person()
                request = user_service_pb2.ListUsersRequest(page_size=1)
                newest = (await users.ListUsers(request, metadata=processes.operator)).users[0]
                switch_off = user_service_pb2.UpdateUserAccountRequest(id=newest.id, is_active=False)
                await users.UpdateUserAccount(switch_off, metadata=processes.operator)
                assert other
                db = Database(processes.env["CLAWPLANE_USER_DATABASE_URL"], UserSettings(data_dir=tmp_path), "purged")
                async with db.transaction(ALL) as session:
                    await session.execute(sa.text("DELETE FROM changes WHERE seq < (SELECT max(seq) FROM changes)"))
                await db.close()
        processes.running[1] = processes.start(1)
        await processes.ready()
        async with Client(processes) as client:
            await client.until(d.id, deployment_pb2.STATE_CLOSED)
    finally:
        processes.stop()
