"""Who may do what, with which credential."""

import base64
import os
import time
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from clawplane.deployment.v1 import (
    blacklist_service_pb2,
    deployment_pb2,
    deployment_service_pb2,
    payment_service_pb2,
    usage_event_pb2,
    usage_service_pb2,
)
from clawplane.user.v1 import claw_key_service_pb2, user_service_pb2
from services.deployment_svc.claw_keys import repository as claw_keys
from services.deployment_svc.claw_keys.models import ClawKey
from services.kit import ids, keys, vault
from services.kit.db import ALL, Database
from services.kit.devkeys import settings_for
from services.kit.settings import KitSettings
from tests.harness import Metadata, Person, Stack, eventually

LIST = deployment_service_pb2.ListDeploymentsRequest()


async def code_of(call: Any) -> tuple[grpc.StatusCode, str]:
    """Status code and text of a call."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


def bearer(token: str) -> Metadata:
    """Metadata with a credential."""
    return (("authorization", f"Bearer {token}"),)


def forged(stack: Stack, **changes: Any) -> str:
    """A token as the stack's own, but for some claims; ``key`` and ``algorithm`` change how it is signed."""
    now = int(time.time())
    seed = base64.b64decode(stack.keys["seed_cli"])
    key = changes.pop("key", Ed25519PrivateKey.from_private_bytes(seed))
    algorithm = changes.pop("algorithm", "EdDSA")
    claims = {"iss": "cli", "sub": "cli", "aud": "clawplane", "iat": now, "exp": now + 300, "permissions": ["*"]} | changes
    return jwt.encode({name: value for name, value in claims.items() if value is not None}, key, algorithm=algorithm)


@pytest.mark.any_engine
async def test_tokens_that_do_not_hold(stack: Stack, person: Person) -> None:
    now = int(time.time())
    assert (await code_of(stack.deployments.ListDeployments(LIST, metadata=bearer(forged(stack)))))[0] is grpc.StatusCode.OK
    public = base64.b64decode(__import__("json").loads(stack.keys["service_public_keys"])["cli"])
    wrong = {
        "stranger's key": forged(stack, key=Ed25519PrivateKey.from_private_bytes(os.urandom(32))),
        "unknown issuer": forged(stack, iss="nobody"),
        "another service's name": forged(stack, iss="gateway"),
        "wrong audience": forged(stack, aud="other"),
        "expired": forged(stack, iat=now - 600, exp=now - 60),
        "not yet": forged(stack, iat=now + 600, exp=now + 900),
        "lives too long": forged(stack, exp=now + 3600),
        "no expiry": forged(stack, exp=None),
        "no subject": forged(stack, sub=None),
        "no permissions": forged(stack, permissions=None),
        "permissions of another kind": forged(stack, permissions="*"),
        "user of another kind": forged(stack, user="org_" + "1" * 32),
        "unknown user": forged(stack, user="usr_" + "1" * 32),
        "malformed user": forged(stack, user="usr_x"),
        "public key as a shared secret": forged(stack, key=public, algorithm="HS256"),
        "unsigned": forged(stack, key=None, algorithm="none"),
        "no token at all": "x",
        "empty key": "claw_",
    }
    for why, token in wrong.items():
        code, text = await code_of(stack.deployments.ListDeployments(LIST, metadata=bearer(token)))
        assert code is grpc.StatusCode.UNAUTHENTICATED, (why, code, text)
    assert (await code_of(stack.deployments.ListDeployments(LIST)))[0] is grpc.StatusCode.UNAUTHENTICATED
    basic = (("authorization", "Basic eDp5"),)
    assert (await code_of(stack.deployments.ListDeployments(LIST, metadata=basic)))[0] is grpc.StatusCode.UNAUTHENTICATED


async def test_a_token_may_hold_less_than_its_user(stack: Stack, person: Person) -> None:
    reader = stack.token_for(person.user.id, ["deployments.list"])
    assert (await code_of(stack.deployments.ListDeployments(LIST, metadata=reader)))[0] is grpc.StatusCode.OK
    request = deployment_service_pb2.CreateDeploymentRequest(model="claude-opus-4.5", channel=deployment_pb2.CHANNEL_WEB)
    code, text = await code_of(stack.deployments.CreateDeployment(request, metadata=reader))
    assert code is grpc.StatusCode.PERMISSION_DENIED and "deployments.create" in text


async def test_people_are_no_platform(stack: Stack, person: Person) -> None:
    blacklist = blacklist_service_pb2.AddBlacklistEntryRequest(provider_address="p1")
    look = user_service_pb2.LookupUserRequest(email=person.user.email)
    apply = payment_service_pb2.ApplyPaymentEventRequest()
    for call, permission in (
        (stack.blacklist.AddBlacklistEntry(blacklist, metadata=person.metadata), "blacklist.write"),
        (stack.users.LookupUser(look, metadata=person.metadata), "users.lookup"),
        (stack.payments.ApplyPaymentEvent(apply, metadata=person.metadata), "payments.apply"),
    ):
        code, text = await code_of(call)
        assert code is grpc.StatusCode.PERMISSION_DENIED and permission in text


async def test_the_platform_orders_nothing_by_itself(stack: Stack) -> None:
    request = deployment_service_pb2.CreateDeploymentRequest(model="claude-opus-4.5", channel=deployment_pb2.CHANNEL_WEB)
    code, text = await code_of(stack.deployments.CreateDeployment(request, metadata=stack.operator))
    assert code is grpc.StatusCode.FAILED_PRECONDITION and "user" in text


async def test_an_organization_counts_only_for_its_members(stack: Stack, person: Person) -> None:
    other = await stack.person()
    for org, wanted in (
        (person.org_id, grpc.StatusCode.OK),
        (other.org_id, grpc.StatusCode.NOT_FOUND),
        ("org_" + "1" * 32, grpc.StatusCode.NOT_FOUND),
        ("nonsense", grpc.StatusCode.NOT_FOUND),
    ):
        metadata = (*person.metadata, ("clawplane-org", org))
        assert (await code_of(stack.deployments.ListDeployments(LIST, metadata=metadata)))[0] is wanted, org
    # Nor does a token reach further than its own claim.
    assert (await code_of(stack.deployments.ListDeployments(LIST, metadata=stack.token_for(person.user.id, org=other.org_id))))[
        0
    ] is grpc.StatusCode.UNAUTHENTICATED
    # Nobody is a member as an operator.
    metadata = (*stack.operator, ("clawplane-org", person.org_id))
    assert (await code_of(stack.deployments.ListDeployments(LIST, metadata=metadata)))[0] is grpc.StatusCode.NOT_FOUND


async def test_another_tenants_row_looks_like_none(stack: Stack, person: Person) -> None:
    other = await stack.person()
    theirs = await stack.order(other)
    nothing = ids.new("dep")
    calls = [
        (stack.deployments.GetDeployment, deployment_service_pb2.GetDeploymentRequest),
        (stack.deployments.CloseDeployment, deployment_service_pb2.CloseDeploymentRequest),
        (stack.deployments.RetryDeployment, deployment_service_pb2.RetryDeploymentRequest),
    ]
    for method, request in calls:
        seen = []
        for deployment_id in (theirs.id, nothing):
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await method(request(id=deployment_id), metadata=(*person.metadata, ("x-request-id", "same")))
            error = refusal.value
            seen.append((error.code(), error.details(), tuple(error.trailing_metadata() or ())))
        assert seen[0][0] is grpc.StatusCode.NOT_FOUND
        assert seen[0] == seen[1]
    assert (await stack.get(theirs.id)) == theirs
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await stack.users.GetUser(user_service_pb2.GetUserRequest(id=other.user.id), metadata=person.metadata)
    assert refusal.value.code() is grpc.StatusCode.NOT_FOUND


async def test_claw_keys(stack: Stack, person: Person) -> None:
    d = await stack.order(person)
    bot = await stack.claw_key(d)
    await holds_as_a_bots(stack, d.id, bot)
    end = claw_key_service_pb2.RevokeClawKeysRequest(key_id=ids.new("key"), deployment_id=d.id, org_id=d.org_id, user_id=d.user_id)
    assert (await stack.claw_keys.RevokeClawKeys(end, metadata=stack.operator)).revoked == 1

    async def refused() -> bool:
        return (await code_of(stack.usage.RecordUsage(one_use(), metadata=bot)))[0] is grpc.StatusCode.UNAUTHENTICATED

    await eventually(refused, 1.5)


def one_use() -> usage_service_pb2.RecordUsageRequest:
    """The report of one call."""
    event = usage_event_pb2.UsageEvent(id=str(ids.uuid7()), provider="openai", model="gpt-3.2", tokens_in=1)
    return usage_service_pb2.RecordUsageRequest(event=event)


async def holds_as_a_bots(stack: Stack, deployment_id: str, bot: Metadata) -> None:
    """A bot's key may report usage, and nothing of its user's."""
    assert (await stack.usage.RecordUsage(one_use(), metadata=bot)).event.deployment_id == deployment_id
    create = deployment_service_pb2.CreateDeploymentRequest(model="gpt-3.2", channel=deployment_pb2.CHANNEL_WEB)
    get = deployment_service_pb2.GetDeploymentRequest(id=deployment_id)
    for call, permission in (
        (stack.deployments.GetDeployment(get, metadata=bot), "deployments.get"),
        (stack.deployments.ListDeployments(LIST, metadata=bot), "deployments.list"),
        (stack.deployments.CreateDeployment(create, metadata=bot), "deployments.create"),
        (stack.payments.ListPayments(payment_service_pb2.ListPaymentsRequest(), metadata=bot), "payments.list"),
    ):
        code, text = await code_of(call)
        assert code is grpc.StatusCode.PERMISSION_DENIED and permission in text
    typo = bot[0][1][:-1] + ("0" if bot[0][1][-1] != "0" else "1")
    assert (await code_of(stack.usage.RecordUsage(one_use(), metadata=(("authorization", typo),))))[0] is grpc.StatusCode.UNAUTHENTICATED


async def test_keys_of_bots_that_were_started_before_hold_on(stack: Stack, person: Person) -> None:
    d = await stack.order(person)
    settings = KitSettings(**settings_for(stack.keys, "deployment_svc"))  # type: ignore[arg-type]
    db, box = Database(stack.urls["deployment_svc"], settings, "test"), vault.open_box(settings)
    key = keys.mint("claw", "test", "ckey")
    async with db.transaction(ALL) as session:
        session.add(ClawKey(id=key.id, org_id=d.org_id, deployment_id=d.id, user_id=d.user_id, digest=key.digest(box)))
    await holds_as_a_bots(stack, d.id, bearer(key.text))
    async with db.transaction(ALL) as session:
        await claw_keys.revoke_old(session, d.id, but=key.id)
    assert (await code_of(stack.usage.RecordUsage(one_use(), metadata=bearer(key.text))))[0] is grpc.StatusCode.OK
    async with db.transaction(ALL) as session:
        await claw_keys.revoke_old(session, d.id)
    assert (await code_of(stack.usage.RecordUsage(one_use(), metadata=bearer(key.text))))[0] is grpc.StatusCode.UNAUTHENTICATED
    await db.close()
