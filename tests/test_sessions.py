"""Signing in by a one-time link: once, in time, hashed; and sessions that end everywhere within a second."""

import asyncio
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from clawplane.deployment.v1 import blacklist_service_pb2, deployment_service_pb2, provider_service_pb2
from clawplane.user.v1 import access_service_pb2, session_service_pb2, sign_in_link_service_pb2, user_service_pb2
from services.kit import auth, keys
from services.kit.columns import now
from services.user_svc.sessions.models import Session
from services.user_svc.settings import UserSettings
from services.user_svc.sign_in_links.models import SignInLink
from tests.conftest import Databases
from tests.harness import Metadata, Stack, eventually, running
from tests.test_auth import bearer, code_of
from tests.test_secrets_stay_secret import everything_in

LIST = deployment_service_pb2.ListDeploymentsRequest()
NOT_FOUND, UNAUTHENTICATED = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAUTHENTICATED


def redeem(stack: Stack, token: str) -> Any:
    """The call that signs in with a link."""
    return stack.sign_in_links.RedeemSignInLink(sign_in_link_service_pb2.RedeemSignInLinkRequest(token=token))


def who(stack: Stack, metadata: Metadata) -> Any:
    """Asks who a credential is."""
    return stack.access.WhoAmI(access_service_pb2.WhoAmIRequest(), metadata=metadata)


def session_id(metadata: Metadata) -> str:
    """The id of the session that a credential is."""
    key = keys.parse(metadata[0][1].removeprefix("Bearer "), auth.SESSION, "ses")
    assert key is not None
    return key.id


async def set_in(stack: Stack, model: Any, **values: Any) -> None:
    """Changes every row of a table of the user service."""
    engine = create_async_engine(stack.urls["user_svc"])
    async with engine.begin() as connection:
        await connection.execute(sa.update(model).values(**values))
    await engine.dispose()


async def test_a_link_signs_in_once_even_when_asked_ten_times_at_once(stack: Stack) -> None:
    token = await stack.link()
    answers = await asyncio.gather(*(redeem(stack, token) for _ in range(10)), return_exceptions=True)
    taken = [answer for answer in answers if not isinstance(answer, BaseException)]
    assert len(taken) == 1 and {error.code() for error in answers if isinstance(error, grpc.aio.AioRpcError)} == {NOT_FOUND}
    session = taken[0].session
    lifetime = session.expires_at.ToDatetime() - session.created_at.ToDatetime()
    assert lifetime == timedelta(days=7)
    access = await who(stack, bearer(taken[0].token))
    assert (access.user_id, access.email, access.is_operator) == (session.user_id, "operator@clawplane.local", True)
    user = await stack.users.GetUser(user_service_pb2.GetUserRequest(id=session.user_id), metadata=bearer(taken[0].token))
    assert user.is_operator and user.HasField("last_login_at")


async def test_links_are_for_one_operator_and_do_not_hold_each_other_up(stack: Stack) -> None:
    tokens = await asyncio.gather(*(stack.link() for _ in range(4)))
    signed_in = [await redeem(stack, token) for token in tokens]
    assert len({answer.session.user_id for answer in signed_in}) == 1 and len({answer.token for answer in signed_in}) == 4


async def test_links_that_do_not_hold(stack: Stack) -> None:
    token = await stack.link()
    wrong = keys.mint("link", "test", "sil").text
    for text in ("x", "sess_x", token[:-1] + ("0" if token[-1] != "0" else "1"), wrong, token.replace("link", "sess", 1)):
        assert (await code_of(redeem(stack, text)))[0] is NOT_FOUND, text
    assert (await code_of(redeem(stack, "")))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_neither_link_nor_session_outlives_its_time(databases: Databases, tmp_path: Path) -> None:
    async with running(tmp_path, databases.make()) as stack:
        late = await stack.link()
        await set_in(stack, SignInLink, expires_at=now() - timedelta(seconds=1))
        assert (await code_of(redeem(stack, late)))[0] is NOT_FOUND
        operator = await stack.sign_in()
        await stack.deployments.ListDeployments(LIST, metadata=operator.metadata)
        # The time that was remembered with the session counts as well as that in the table.
        await set_in(stack, Session, expires_at=now() - timedelta(seconds=1))
        fresh = await stack.sign_in()
        await set_in(stack, Session, expires_at=now() + timedelta(seconds=1.5))
        await stack.access.WhoAmI(access_service_pb2.WhoAmIRequest(), metadata=fresh.metadata)
        started = time.monotonic()
        await stack.deployments.ListDeployments(LIST, metadata=fresh.metadata)
        assert time.monotonic() - started < 1.4
        await asyncio.sleep(1.6)
        assert (await code_of(stack.deployments.ListDeployments(LIST, metadata=fresh.metadata)))[0] is UNAUTHENTICATED
        assert (await code_of(who(stack, fresh.metadata)))[0] is UNAUTHENTICATED


async def test_only_hashes_are_stored(databases: Databases, tmp_path: Path) -> None:
    async with running(tmp_path, databases.make()) as stack:
        link = await stack.link()
        answer = await redeem(stack, link)
        stored = await everything_in(stack.urls["user_svc"])
        for text in (link, answer.token):
            secret = text.split("_")[3]
            assert len(secret) == 43 and secret not in stored
        assert keys.parse(link, "link", "sil").sha256().hex() in stored.replace("\\x", "") or repr(keys.parse(link, "link", "sil").sha256()) in stored  # type: ignore[union-attr]


async def test_a_session_that_was_ended_is_refused_by_both_services_within_a_second(stack: Stack) -> None:
    operator, other = await stack.sign_in(), await stack.sign_in()
    for _ in range(3):
        await stack.deployments.ListDeployments(LIST, metadata=operator.metadata)
        await who(stack, operator.metadata)
    revoke = session_service_pb2.RevokeSessionRequest(id=session_id(operator.metadata))
    assert (await stack.sessions.RevokeSession(revoke, metadata=operator.metadata)).HasField("revoked_at")

    async def refused() -> bool:
        codes = [await code_of(call) for call in (stack.deployments.ListDeployments(LIST, metadata=operator.metadata), who(stack, operator.metadata))]
        return {code for code, _ in codes} == {UNAUTHENTICATED}

    await eventually(refused, timeout_s=1.5)
    await who(stack, other.metadata)


async def test_a_session_is_ended_by_its_own_user_alone(stack: Stack) -> None:
    operator, stranger = await stack.sign_in(), await stack.person()
    answer = await redeem(stack, await stack.link())
    revoke = session_service_pb2.RevokeSessionRequest(id=answer.session.id)
    assert (await code_of(stack.sessions.RevokeSession(revoke, metadata=stranger.metadata)))[0] is NOT_FOUND
    await who(stack, bearer(answer.token))
    first = await stack.sessions.RevokeSession(revoke, metadata=operator.metadata)
    again = await stack.sessions.RevokeSession(revoke, metadata=operator.metadata)
    assert first.revoked_at == again.revoked_at


async def test_an_operator_acts_for_the_platform_there_alone(stack: Stack) -> None:
    """Whoever has both hats sees all tenants where the RPC is the platform's, and only his own where it is a tenant's."""
    operator, person = await stack.sign_in(), await stack.person()
    d = await stack.order(person)
    await stack.providers.ListProviders(provider_service_pb2.ListProvidersRequest(), metadata=operator.metadata)
    found = await stack.deployments.LookupDeployment(
        deployment_service_pb2.LookupDeploymentRequest(stripe_session_id=d.stripe_session_id), metadata=operator.metadata
    )
    assert found.id == d.id
    get = deployment_service_pb2.GetDeploymentRequest(id=d.id)
    assert (await code_of(stack.deployments.GetDeployment(get, metadata=operator.metadata)))[0] is NOT_FOUND
    other = (*operator.metadata, ("clawplane-org", person.org_id))
    assert (await code_of(stack.deployments.ListDeployments(LIST, metadata=other)))[0] is NOT_FOUND
    add = blacklist_service_pb2.AddBlacklistEntryRequest(provider_address="p", reason="r")
    code, text = await code_of(stack.blacklist.AddBlacklistEntry(add, metadata=person.metadata))
    assert code is grpc.StatusCode.PERMISSION_DENIED and "blacklist.write" in text


async def test_an_operator_who_is_switched_off_is_nobody_within_a_second(databases: Databases, tmp_path: Path) -> None:
    async with running(tmp_path, databases.make()) as stack:
        operator = await stack.sign_in()
        await stack.providers.ListProviders(provider_service_pb2.ListProvidersRequest(), metadata=operator.metadata)
        off = user_service_pb2.UpdateUserAccountRequest(id=operator.user.id, is_active=False)
        await stack.users.UpdateUserAccount(off, metadata=stack.operator)

        async def refused() -> bool:
            call = stack.providers.ListProviders(provider_service_pb2.ListProvidersRequest(), metadata=operator.metadata)
            return (await code_of(call))[0] is UNAUTHENTICATED

        await eventually(refused, timeout_s=1.5)


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
async def test_without_the_embedded_default_there_are_no_links(databases: Databases, tmp_path: Path) -> None:
    async with running(tmp_path, databases.make(), user={"sign_in_links": False}) as stack:
        assert (await code_of(redeem(stack, "x")))[0] is grpc.StatusCode.UNIMPLEMENTED
        call = stack.sign_in_links.CreateSignInLink(sign_in_link_service_pb2.CreateSignInLinkRequest(), metadata=stack.operator)
        assert (await code_of(call))[0] is grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(ValueError, match="SIGN_IN_LINKS"):
        UserSettings(environment="production", sign_in_links=True)
