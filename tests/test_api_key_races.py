"""API keys between processes: a rotation is one rotation, and what was ended is ended everywhere, whether the feed is heard or not."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from clawplane.deployment.v1 import deployment_service_pb2
from clawplane.user.v1 import api_key_pb2 as pb
from clawplane.user.v1 import api_key_service_pb2 as rpc
from clawplane.user.v1 import api_key_service_pb2_grpc
from tests.conftest import Databases
from tests.harness import Metadata
from tests.processes import OPTIONS, Client, Processes
from tests.test_auth import bearer, code_of

CALLS = 50
VALID, DISABLED = rpc.API_KEY_OUTCOME_VALID, rpc.API_KEY_OUTCOME_DISABLED
LIST = deployment_service_pb2.ListDeploymentsRequest()
USERS = (0, 2)
"""The user services among the processes; 1 is a deployment service."""


class Keys:
    """API keys by the two user services, and the deployment service as their third reader."""

    def __init__(self, processes: Processes, person: Metadata) -> None:
        self.processes, self.person = processes, person
        self.channels = [grpc.aio.insecure_channel(f"127.0.0.1:{processes.ports[number]}", options=OPTIONS) for number in USERS]
        self.stubs = [api_key_service_pb2_grpc.ApiKeyServiceStub(channel) for channel in self.channels]
        self.deployments = Client(processes)

    async def make(self, name: str = "x") -> rpc.CreateApiKeyResponse:
        """A new key."""
        wish = pb.ApiKey(name=name, environment=pb.API_KEY_ENVIRONMENT_LIVE, permissions=["deployments.list"])
        return await self.stubs[0].CreateApiKey(rpc.CreateApiKeyRequest(api_key=wish), metadata=self.person)

    async def rotate(self, number: int, key_id: str, request_id: str) -> rpc.RotateApiKeyResponse:
        """Rotates in one process, with grace."""
        request = rpc.RotateApiKeyRequest(id=key_id, request_id=request_id)
        request.grace.FromSeconds(600)
        return await self.stubs[number % 2].RotateApiKey(request, metadata=self.person, timeout=60)

    async def outcomes(self, key: str) -> set[int]:
        """What each process says of a key, the deployment service in the words of the user service."""
        request = rpc.VerifyApiKeyRequest(key=key)
        found: list[Any] = await asyncio.gather(*(stub.VerifyApiKey(request, metadata=self.processes.operator) for stub in self.stubs))
        code, _ = await code_of(self.deployments.deployments.ListDeployments(LIST, metadata=bearer(key)))
        words = {grpc.StatusCode.OK: VALID, grpc.StatusCode.UNAUTHENTICATED: DISABLED}
        return {*(answer.outcome for answer in found), words[code]}

    async def ended_within(self, key: str, seconds: float) -> None:
        """Every process refuses a key in time."""
        started = time.monotonic()
        while (said := await self.outcomes(key)) != {DISABLED}:
            assert time.monotonic() - started < seconds, said
            await asyncio.sleep(0.02)


@pytest_asyncio.fixture
async def made(databases: Databases, tmp_path: Path) -> AsyncIterator[Keys]:
    """Three processes, and somebody with keys."""
    processes = Processes(databases, tmp_path, users=2)
    try:
        await processes.ready()
        keys = Keys(processes, await processes.person())
        yield keys
        for channel in (*keys.channels, keys.deployments.channel):
            await channel.close()
    finally:
        processes.stop()


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_fifty_rotations_under_traffic(made: Keys) -> None:
    key = await made.make()
    failed: list[int] = []

    async def traffic(stub: Any) -> None:
        while True:
            outcome = (await stub.VerifyApiKey(rpc.VerifyApiKeyRequest(key=key.key), metadata=made.processes.operator)).outcome
            if outcome != VALID:
                failed.append(outcome)

    callers = [asyncio.create_task(traffic(stub)) for stub in made.stubs]
    try:
        wish = str(uuid.uuid4())
        same = await asyncio.gather(*(made.rotate(number, key.api_key.id, wish) for number in range(CALLS)))
        assert len({answer.key for answer in same}) == 1 and {len(answer.api_key.secrets) for answer in same} == {2}
        other = await asyncio.gather(*(made.rotate(number, key.api_key.id, str(uuid.uuid4())) for number in range(CALLS)))
    finally:
        for caller in callers:
            caller.cancel()
        done = await asyncio.gather(*callers, return_exceptions=True)
    assert not failed and all(isinstance(one, asyncio.CancelledError) for one in done)
    seen = await made.stubs[1].GetApiKey(rpc.GetApiKeyRequest(id=key.api_key.id), metadata=made.person)
    assert [text.number for text in seen.secrets] == list(range(CALLS + 2, 0, -1))
    assert [text.HasField("expires_at") for text in seen.secrets] == [False] + [True] * (CALLS + 1)
    texts = {key.key, same[0].key, *(answer.key for answer in other)}
    assert len(texts) == CALLS + 2
    assert [await made.outcomes(text) for text in texts] == [{VALID}] * len(texts)


async def test_what_is_revoked_ends_everywhere_within_a_second(made: Keys) -> None:
    keys = [await made.make() for _ in range(3)]
    for key in keys:
        for _ in range(2):
            assert await made.outcomes(key.key) == {VALID}
    await made.stubs[1].RevokeApiKey(rpc.RevokeApiKeyRequest(id=keys[0].api_key.id), metadata=made.person)
    await made.ended_within(keys[0].key, 1)
    assert await made.outcomes(keys[1].key) == {VALID}
    # From here nobody hears of anything, and what was remembered counts for a second.
    async with cut_feed(made, f"UPDATE api_keys SET is_active = {'0' if is_sqlite(made) else 'false'} WHERE id = '{keys[1].api_key.id[4:]}'"):
        await made.ended_within(keys[1].key, 1.3)
        assert await made.outcomes(keys[2].key) == {VALID}
    assert await made.outcomes(keys[2].key) == {VALID}


def is_sqlite(made: Keys) -> bool:
    """Which engine it is."""
    return made.processes.env["CLAWPLANE_USER_DATABASE_URL"].startswith("sqlite")


@contextlib.asynccontextmanager
async def cut_feed(made: Keys, beside: str) -> AsyncIterator[None]:
    """The table that the feed is read from is away, from the same moment in which something else is done."""
    engine = create_async_engine(made.processes.env["CLAWPLANE_USER_DATABASE_URL"])
    try:
        async with engine.begin() as connection:
            await connection.execute(sa.text("ALTER TABLE changes RENAME TO changes_elsewhere"))
            await connection.execute(sa.text(beside))
        yield
        async with engine.begin() as connection:
            await connection.execute(sa.text("ALTER TABLE changes_elsewhere RENAME TO changes"))
    finally:
        await engine.dispose()
