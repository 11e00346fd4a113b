"""Session tokens of Clerk as credentials: every check, rotation of keys, and what was taken away."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import rsa

from clawplane.deployment.v1 import deployment_service_pb2
from clawplane.user.v1 import user_pb2, user_service_pb2
from tests.conftest import Databases
from tests.harness import Stack, eventually, free_port, running

ORIGIN = "https://app.example.com"


class Clerk:
    """Publishes keys as Clerk does, and signs sessions."""

    def __init__(self) -> None:
        self.issuer, self.fetches, self.is_down = f"http://127.0.0.1:{free_port()}", 0, False
        self.rotate("one")

    def rotate(self, kid: str) -> None:
        """Another key, under a name."""
        self.kid, self.key = kid, rsa.generate_private_key(65537, 2048)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """GET /.well-known/jwks.json."""
        request = await reader.readuntil(b"\r\n\r\n")
        self.fetches += 1
        public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(self.key.public_key())) | {"kid": self.kid, "use": "sig", "alg": "RS256"}
        good = request.startswith(b"GET /.well-known/jwks.json ") and not self.is_down
        body = json.dumps({"keys": [public]}).encode() if good else b""
        status = b"200 OK" if good else b"503 Unavailable"
        writer.write(b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s" % (status, len(body), body))
        await writer.drain()
        writer.close()

    def session(self, sub: str, key: Any = None, alg: str = "RS256", **claims: Any) -> str:
        """A token of version 2."""
        now = int(time.time())
        known = {"azp": ORIGIN, "exp": now + 60, "fva": [0, -1], "iat": now, "iss": self.issuer, "jti": uuid.uuid4().hex, "nbf": now - 10, "sub": sub, "v": 2}
        content = {name: value for name, value in (known | claims).items() if value is not None}
        return jwt.encode(content, key or self.key, algorithm=alg, headers={"kid": self.kid, "cat": "cl_B7d4PD111AAA"})


@asynccontextmanager
async def published() -> AsyncIterator[Clerk]:
    """Clerk's keys on a real port."""
    clerk = Clerk()
    server = await asyncio.start_server(clerk.answer, "127.0.0.1", int(clerk.issuer.rpartition(":")[2]))
    try:
        yield clerk
    finally:
        server.close()


@pytest_asyncio.fixture
async def signed_in(databases: Databases, tmp_path: Path) -> AsyncIterator[tuple[Stack, Clerk, str, user_pb2.User]]:
    """A stack that takes Clerk's sessions, and a user of Clerk's."""
    async with published() as clerk:
        accept = {"clerk_issuer": clerk.issuer, "clerk_authorized_parties": [ORIGIN]}
        async with running(tmp_path, databases.make(), deployment=accept, user=accept) as stack:
            sub = f"user_{uuid.uuid4().hex}"
            wish = user_service_pb2.EnsureUserRequest(
                identity=user_pb2.Identity(provider="clerk", subject=sub), email=f"{sub[5:15]}@example.com", email_verified=True
            )
            user = await stack.users.EnsureUser(wish, metadata=stack.operator)
            yield stack, clerk, sub, user


async def listed(stack: Stack, token: str, *more: tuple[str, str]) -> grpc.StatusCode:
    """How the deployment service takes a token."""
    try:
        await stack.deployments.ListDeployments(
            deployment_service_pb2.ListDeploymentsRequest(), metadata=(("authorization", f"Bearer {token}"), *more)
        )
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_a_session_acts_for_its_user_until_switched_off(signed_in: tuple[Stack, Clerk, str, user_pb2.User]) -> None:
    stack, clerk, sub, user = signed_in
    token = clerk.session(sub)
    metadata = (("authorization", f"Bearer {token}"),)
    assert (await stack.users.GetUser(user_service_pb2.GetUserRequest(id=user.id), metadata=metadata)).id == user.id
    assert [await listed(stack, token) for _ in range(5)] == [grpc.StatusCode.OK] * 5
    # One look each at start: the signature check of a token is remembered.
    assert clerk.fetches == 2
    assert await listed(stack, token, ("clawplane-org", user.personal_org_id)) is grpc.StatusCode.OK
    stranger = await stack.person()
    assert await listed(stack, token, ("clawplane-org", stranger.org_id)) is grpc.StatusCode.NOT_FOUND
    request = user_service_pb2.UpdateUserAccountRequest(id=user.id, is_active=False)
    await stack.users.UpdateUserAccount(request, metadata=stack.operator)
    started = time.monotonic()

    async def refused() -> bool:
        return await listed(stack, token) is grpc.StatusCode.UNAUTHENTICATED

    await eventually(refused, 5, 0.02)
    assert time.monotonic() - started < 1


Make = Callable[[Clerk, str], str]
OTHER = rsa.generate_private_key(65537, 2048)
BAD: dict[str, Make] = {
    "expired": lambda clerk, sub: clerk.session(sub, exp=int(time.time()) - 30),
    "not yet": lambda clerk, sub: clerk.session(sub, nbf=int(time.time()) + 60),
    "without an end": lambda clerk, sub: clerk.session(sub, exp=None),
    "another origin": lambda clerk, sub: clerk.session(sub, azp="https://evil.example.com"),
    "no origin": lambda clerk, sub: clerk.session(sub, azp=None),
    "another issuer": lambda clerk, sub: clerk.session(sub, iss="https://clerk.evil.example.com"),
    "pending": lambda clerk, sub: clerk.session(sub, sts="pending"),
    "another key": lambda clerk, sub: clerk.session(sub, OTHER),
    "no user of ours": lambda clerk, sub: clerk.session(f"user_{'0' * 32}"),
    "no user at all": lambda clerk, sub: clerk.session("machine_1"),
    "another algorithm": lambda clerk, sub: clerk.session(sub, alg="RS512"),
    "symmetric": lambda clerk, sub: clerk.session(sub, "a secret of thirty-two letters..", alg="HS256"),
    "unsigned": lambda clerk, sub: clerk.session(sub).rpartition(".")[0] + ".",
}


@pytest.mark.any_engine
async def test_what_does_not_hold_is_refused(signed_in: tuple[Stack, Clerk, str, user_pb2.User]) -> None:
    stack, clerk, sub, _ = signed_in
    assert await listed(stack, clerk.session(sub)) is grpc.StatusCode.OK
    for what, make in BAD.items():
        assert await listed(stack, make(clerk, sub)) is grpc.StatusCode.UNAUTHENTICATED, what
    # None of them made us ask Clerk over and over.
    assert clerk.fetches <= 3


@pytest.mark.any_engine
@pytest.mark.parametrize("kid", ["one", "two"])
async def test_a_rotated_key_is_fetched_once(signed_in: tuple[Stack, Clerk, str, user_pb2.User], kid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack, clerk, sub, _ = signed_in
    assert await listed(stack, clerk.session(sub)) is grpc.StatusCode.OK
    clerk.rotate(kid)
    before = clerk.fetches
    # Not at once: whoever sends tokens of a wrong key must not make us ask each time.
    assert await listed(stack, clerk.session(sub)) is grpc.StatusCode.UNAUTHENTICATED and clerk.fetches == before
    monkeypatch.setattr("services.kit.clerk._REFRESH_S", 0.0)
    assert await listed(stack, clerk.session(sub)) is grpc.StatusCode.OK and clerk.fetches == before + 1


@pytest.mark.any_engine
async def test_without_clerks_keys_it_is_unavailable(signed_in: tuple[Stack, Clerk, str, user_pb2.User]) -> None:
    stack, clerk, sub, _ = signed_in
    clerk.is_down = True
    assert await listed(stack, clerk.session(sub)) is grpc.StatusCode.UNAVAILABLE
    clerk.is_down = False
    assert await listed(stack, clerk.session(sub)) is grpc.StatusCode.OK
