"""API keys: made, changed, rotated and ended; what they may do; and what VerifyApiKey says of them."""

import asyncio
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, timedelta
from typing import Any

import grpc
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import create_async_engine

from clawplane.deployment.v1 import deployment_pb2, deployment_service_pb2
from clawplane.user.v1 import access_service_pb2, claw_key_service_pb2, user_service_pb2
from clawplane.user.v1 import api_key_pb2 as pb
from clawplane.user.v1 import api_key_service_pb2 as rpc
from clawplane.user.v1.organization_pb2 import Role
from services.kit import ids, keys, vault
from services.kit.call import Plan
from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.devkeys import settings_for
from services.kit.secrets import SecretBox
from services.kit.settings import KitSettings, decode_key
from services.user_svc.api_keys.models import ApiKey, ApiKeySecret
from services.user_svc.api_keys.repository import finder, use_writer
from services.user_svc.base import AuditEvent, IdempotencyKey
from services.user_svc.organizations.models import Membership
from services.user_svc.organizations.roles import OF_EVERY_KEY, OF_PEOPLE_ALONE
from tests.harness import Metadata, Person, Stack, eventually
from tests.test_auth import bearer, code_of
from tests.test_secrets_stay_secret import everything_in

Code = grpc.StatusCode
LIST = deployment_service_pb2.ListDeploymentsRequest()
VALID, NOT_FOUND, DISABLED = rpc.API_KEY_OUTCOME_VALID, rpc.API_KEY_OUTCOME_NOT_FOUND, rpc.API_KEY_OUTCOME_DISABLED
EXPIRED, LIMITED, LACKING = rpc.API_KEY_OUTCOME_EXPIRED, rpc.API_KEY_OUTCOME_RATE_LIMITED, rpc.API_KEY_OUTCOME_INSUFFICIENT_PERMISSIONS


async def verify(stack: Stack, key: str, *permissions: str, **more: Any) -> rpc.VerifyApiKeyResponse:
    """What the platform is told of a key."""
    request = rpc.VerifyApiKeyRequest(key=key, permissions=permissions, **more)
    return await stack.api_keys.VerifyApiKey(request, metadata=stack.operator)


async def becomes(stack: Stack, key: str, outcome: int) -> None:
    """A key has an outcome within a second and some."""

    async def check() -> bool:
        return (await verify(stack, key)).outcome == outcome

    await eventually(check, 1.5)


async def in_users(stack: Stack, statement: Any) -> Any:
    """Runs a statement in the user service's database."""
    engine = create_async_engine(stack.urls["user_svc"])
    async with engine.begin() as connection:
        result = await connection.execute(statement)
        found = result.all() if result.returns_rows else None
    await engine.dispose()
    return found


async def member(stack: Stack, organization: Person, role: int) -> Person:
    """Somebody else with a role in a person's organization, acting there."""
    other = await stack.person()
    values = {"id": ids.new("mem"), "org_id": organization.org_id, "user_id": other.user.id, "role": role}
    await in_users(stack, sa.insert(Membership).values(**values, created_at=now(), updated_at=now()))
    return Person(other.user, (*other.metadata, ("clawplane-org", organization.org_id)))


async def get(stack: Stack, who: Metadata, key_id: str) -> pb.ApiKey:
    """The key as somebody sees it."""
    return await stack.api_keys.GetApiKey(rpc.GetApiKeyRequest(id=key_id), metadata=who)


async def test_a_key_is_shown_once_and_does_what_it_may(stack: Stack, person: Person) -> None:
    made = await stack.key(person, "deployments.list", "usage.read", metadata={"team": "a"})
    assert made.key.startswith(f"cp_test_{made.api_key.id[4:]}_") and made.api_key.is_active
    assert (made.api_key.user_id, made.api_key.org_id) == (person.user.id, person.org_id)
    seen = await get(stack, person.metadata, made.api_key.id)
    assert seen == made.api_key and dict(seen.metadata.items()) == {"team": "a"} and [text.number for text in seen.secrets] == [1]
    assert made.key.split("_")[3] not in await everything_in(stack.urls["user_svc"])
    # In both services.
    key = bearer(made.key)
    await stack.deployments.ListDeployments(LIST, metadata=key)
    who = await stack.access.WhoAmI(access_service_pb2.WhoAmIRequest(), metadata=key)
    assert (who.kind, who.key_id, who.user_id, who.org_id) == ("key", made.api_key.id, person.user.id, person.org_id)
    assert set(who.permissions) == {"deployments.list", "usage.read"} | OF_EVERY_KEY
    assert (await stack.access.WhoAmI(access_service_pb2.WhoAmIRequest(), metadata=person.metadata)).kind == "user"
    create = deployment_service_pb2.CreateDeploymentRequest(model="gpt-3.2", channel=deployment_pb2.CHANNEL_WEB)
    code, text = await code_of(stack.deployments.CreateDeployment(create, metadata=key))
    assert code is Code.PERMISSION_DENIED and "deployments.create" in text
    # Nor in another organization, nor does it make another key.
    elsewhere = (*key, ("clawplane-org", (await stack.person()).org_id))
    assert (await code_of(stack.deployments.ListDeployments(LIST, metadata=elsewhere)))[0] is Code.NOT_FOUND
    assert (await code_of(stack.key(Person(person.user, key), "usage.read")))[0] is Code.PERMISSION_DENIED


async def test_a_key_orders_for_its_creator(stack: Stack, person: Person) -> None:
    made = await stack.key(person, "deployments.create")
    d = await stack.order(Person(person.user, bearer(made.key)))
    assert (d.user_id, d.org_id, d.email) == (person.user.id, person.org_id, person.user.email)


async def test_what_a_key_cannot_be_given(stack: Stack, person: Person) -> None:
    developer = await member(stack, person, Role.ROLE_DEVELOPER)
    past = pb.ApiKey()
    past.expires_at.FromDatetime(now() - timedelta(seconds=1))
    reader = Person(person.user, stack.token_for(person.user.id, ["api_keys.create", "deployments.list"]))
    wrong: list[tuple[Person, Any, str]] = [
        (person, {}, "permissions"),
        (developer, {"permissions": ["audit.list"]}, "audit.list"),
        (reader, {"permissions": ["deployments.list", "usage.read"]}, "usage.read"),
        (person, {"permissions": ["no.such"]}, "no.such"),
        (person, {"permissions": ["usage.read"], "expires_at": past.expires_at}, "expires_at"),
        (person, {"permissions": ["usage.read"], "rate": "5 a day"}, "rate"),
        (person, {"permissions": ["usage.read"], "metadata": {"x": "y" * 4096}}, "metadata"),
        *((person, {"permissions": [one]}, "people alone") for one in sorted(OF_PEOPLE_ALONE)),
    ]
    for who, wish, said in wrong:
        given_permissions = wish.pop("permissions", [])
        code, text = await code_of(stack.key(who, *given_permissions, **wish))
        assert code is Code.INVALID_ARGUMENT and said in text, (wish, text)
    for change, said in (({"name": " "}, "name"), ({"environment": 0}, "environment")):
        wish = pb.ApiKey(name="x", environment=pb.API_KEY_ENVIRONMENT_LIVE, permissions=["usage.read"])
        for name, value in change.items():  # type: ignore[attr-defined]
            setattr(wish, name, value)
        code, text = await code_of(stack.api_keys.CreateApiKey(rpc.CreateApiKeyRequest(api_key=wish), metadata=person.metadata))
        assert code is Code.INVALID_ARGUMENT and said in text
    viewer = await member(stack, person, Role.ROLE_VIEWER)
    assert (await code_of(stack.key(viewer, "usage.read")))[0] is Code.PERMISSION_DENIED


async def test_each_sees_and_changes_what_is_his(stack: Stack, person: Person) -> None:
    ann, bob = [await member(stack, person, Role.ROLE_DEVELOPER) for _ in range(2)]
    of_ann, of_bob = [(await stack.key(one, "usage.read")).api_key for one in (ann, bob)]

    async def listed(who: Person, **more: Any) -> list[str]:
        answer = await stack.api_keys.ListApiKeys(rpc.ListApiKeysRequest(**more), metadata=who.metadata)
        return [key.id for key in answer.api_keys]

    assert await listed(ann) == [of_ann.id] and await listed(bob) == [of_bob.id]
    assert await listed(person) == [of_bob.id, of_ann.id]
    for call in (
        get(stack, ann.metadata, of_bob.id),
        stack.api_keys.RevokeApiKey(rpc.RevokeApiKeyRequest(id=of_bob.id), metadata=ann.metadata),
        stack.api_keys.RotateApiKey(rpc.RotateApiKeyRequest(id=of_bob.id, request_id=str(uuid.uuid4())), metadata=ann.metadata),
        stack.api_keys.UpdateApiKey(rpc.UpdateApiKeyRequest(api_key=pb.ApiKey(id=of_bob.id, name="x")), metadata=ann.metadata),
    ):
        assert (await code_of(call))[0] is Code.NOT_FOUND
    off = await stack.api_keys.DeactivateApiKey(rpc.DeactivateApiKeyRequest(id=of_ann.id), metadata=person.metadata)
    assert not off.is_active
    assert (await listed(person, is_active=True), await listed(person, is_active=False)) == ([of_bob.id], [of_ann.id])
    page = await stack.api_keys.ListApiKeys(rpc.ListApiKeysRequest(page_size=1), metadata=person.metadata)
    rest = await stack.api_keys.ListApiKeys(rpc.ListApiKeysRequest(page_size=1, page_token=page.next_page_token), metadata=person.metadata)
    assert [key.id for key in (*page.api_keys, *rest.api_keys)] == [of_bob.id, of_ann.id]


async def test_changing_a_key(stack: Stack, person: Person) -> None:
    made = await stack.key(person, "deployments.list")
    key_id = made.api_key.id
    assert (await verify(stack, made.key, "usage.read")).outcome == LACKING
    wish = pb.ApiKey(id=key_id, name="other", permissions=["usage.read"], rate="5/hour", metadata={"a": 1}, etag=made.api_key.etag)
    update = rpc.UpdateApiKeyRequest(api_key=wish)
    after = await stack.api_keys.UpdateApiKey(update, metadata=person.metadata)
    assert (after.name, list(after.permissions), after.rate, dict(after.metadata.items())) == ("other", ["usage.read"], "5/hour", {"a": 1})
    assert after.environment == made.api_key.environment and after.etag != made.api_key.etag
    assert (await code_of(stack.api_keys.UpdateApiKey(update, metadata=person.metadata)))[0] is Code.ABORTED

    async def has_it() -> bool:
        return (await verify(stack, made.key, "usage.read")).outcome == VALID

    await eventually(has_it, 1.5)
    for paths, api_key, said in (
        (["permissions"], {}, "permissions"), (["name"], {}, "name"), (["permissions"], {"permissions": ["api_keys.admin"]}, "people alone"),
        (["environment"], {"environment": pb.API_KEY_ENVIRONMENT_LIVE}, "cannot be changed"), (["nonsense"], {}, "nonsense"),
    ):  # fmt: skip
        request = rpc.UpdateApiKeyRequest(api_key={"id": key_id, **api_key}, update_mask={"paths": paths})  # type: ignore[arg-type]
        code, text = await code_of(stack.api_keys.UpdateApiKey(request, metadata=person.metadata))
        assert code is Code.INVALID_ARGUMENT and said in text, text
    assert list((await get(stack, person.metadata, key_id)).permissions) == ["usage.read"]


async def test_switched_off_and_on_and_revoked(stack: Stack, person: Person) -> None:
    made = await stack.key(person, "deployments.list")
    key, who = made.api_key.id, person.metadata
    await becomes(stack, made.key, VALID)
    await stack.api_keys.DeactivateApiKey(rpc.DeactivateApiKeyRequest(id=key), metadata=who)
    await becomes(stack, made.key, DISABLED)
    await stack.api_keys.ActivateApiKey(rpc.ActivateApiKeyRequest(id=key), metadata=who)
    await becomes(stack, made.key, VALID)
    first = await stack.api_keys.RevokeApiKey(rpc.RevokeApiKeyRequest(id=key, reason="leaked"), metadata=who)
    again = await stack.api_keys.RevokeApiKey(rpc.RevokeApiKeyRequest(id=key, reason="other"), metadata=who)
    assert (again.revoked_at, again.revoke_reason) == (first.revoked_at, "leaked")
    await becomes(stack, made.key, DISABLED)
    answer = await verify(stack, made.key)
    assert (answer.key_id, answer.org_id, list(answer.permissions)) == (key, person.org_id, [])
    assert (await code_of(stack.deployments.ListDeployments(LIST, metadata=bearer(made.key))))[0] is Code.UNAUTHENTICATED
    for call in (
        stack.api_keys.ActivateApiKey(rpc.ActivateApiKeyRequest(id=key), metadata=who),
        stack.api_keys.UpdateApiKey(rpc.UpdateApiKeyRequest(api_key=pb.ApiKey(id=key, name="x")), metadata=who),
        stack.api_keys.RotateApiKey(rpc.RotateApiKeyRequest(id=key, request_id=str(uuid.uuid4())), metadata=who),
    ):
        assert (await code_of(call))[0] is Code.FAILED_PRECONDITION


async def test_a_leaked_key_ends_itself_whatever_it_may(stack: Stack, person: Person) -> None:
    made = await stack.key(person, "usage.read")
    request = rpc.RevokeCurrentApiKeyRequest(reason="found in a repository")
    # Nobody else has a key that calls.
    assert (await code_of(stack.api_keys.RevokeCurrentApiKey(request, metadata=person.metadata)))[0] is Code.PERMISSION_DENIED
    assert (await code_of(stack.api_keys.RevokeCurrentApiKey(request, metadata=stack.operator)))[0] is Code.NOT_FOUND
    ended = await stack.api_keys.RevokeCurrentApiKey(request, metadata=bearer(made.key))
    assert (ended.id, ended.revoke_reason) == (made.api_key.id, "found in a repository")
    await becomes(stack, made.key, DISABLED)
    bot = await stack.claw_key(await stack.order(person))
    ended = await stack.api_keys.RevokeCurrentApiKey(request, metadata=bot)
    assert ended.HasField("revoked_at") and ended.deployment_id
    said = await in_users(stack, sa.select(AuditEvent.subject, AuditEvent.org_id).where(AuditEvent.resource_id == made.api_key.id))
    assert (made.api_key.id, person.org_id) in {(row.subject, row.org_id) for row in said}


async def test_expiry_counts_by_the_clock(stack: Stack, person: Person) -> None:
    ends = pb.ApiKey()
    ends.expires_at.FromDatetime(now() + timedelta(seconds=3))
    made = await stack.key(person, "deployments.list", expires_at=ends.expires_at)
    answer = await verify(stack, made.key)
    assert answer.outcome == VALID and answer.expires_at == made.api_key.expires_at
    await stack.deployments.ListDeployments(LIST, metadata=bearer(made.key))
    await asyncio.sleep(made.api_key.expires_at.ToDatetime(UTC).timestamp() - time.time() + 0.1)
    assert (await verify(stack, made.key)).outcome == EXPIRED
    assert (await code_of(stack.deployments.ListDeployments(LIST, metadata=bearer(made.key))))[0] is Code.UNAUTHENTICATED


async def test_the_rate_of_a_key(stack: Stack, person: Person) -> None:
    made = await stack.key(person, "usage.read", rate="3/day")
    outcomes = [(await verify(stack, made.key)).outcome for _ in range(4)]
    assert outcomes == [VALID] * 3 + [LIMITED]
    limited = await verify(stack, made.key)
    assert 0 < limited.retry_after.ToTimedelta().total_seconds() <= 86400
    # What it lacks is said first and costs nothing; whoever only asks is told.
    assert (await verify(stack, made.key, "models.call")).outcome == LACKING
    assert (await verify(stack, made.key, uncounted=True)).outcome == VALID
    unlimited = await stack.key(person, "usage.read")
    assert {(await verify(stack, unlimited.key)).outcome for _ in range(20)} == {VALID}


async def test_a_key_is_never_more_than_its_creator(stack: Stack, person: Person) -> None:
    developer = await member(stack, person, Role.ROLE_DEVELOPER)
    made = await stack.key(developer, "usage.record", "usage.read")
    assert set((await verify(stack, made.key)).permissions) == {"usage.record", "usage.read"}
    of_him = (Membership.user_id == developer.user.id, Membership.org_id == person.org_id)
    await in_users(stack, sa.update(Membership).where(*of_him).values(role=Role.ROLE_VIEWER))
    await announce(stack, developer)

    async def shrunk() -> bool:
        answer = await verify(stack, made.key, "usage.record")
        return (answer.outcome, list(answer.permissions), list(answer.missing_permissions)) == (LACKING, ["usage.read"], ["usage.record"])

    await eventually(shrunk, 1.5)
    await in_users(stack, sa.delete(Membership).where(*of_him))
    await announce(stack, developer)
    await becomes(stack, made.key, DISABLED)


async def announce(stack: Stack, person: Person) -> None:
    """Has the feed tell of a person's access, as the RPCs that change members do."""
    request = user_service_pb2.UpdateUserAccountRequest(id=person.user.id, is_active=True)
    for active in (False, True):
        request.is_active = active
        await stack.users.UpdateUserAccount(request, metadata=stack.operator)


async def test_a_key_ends_with_its_creator(stack: Stack, person: Person) -> None:
    made = await stack.key(person, "usage.read")
    await becomes(stack, made.key, VALID)
    request = user_service_pb2.UpdateUserAccountRequest(id=person.user.id, is_active=False)
    await stack.users.UpdateUserAccount(request, metadata=stack.operator)
    await becomes(stack, made.key, DISABLED)
    request.is_active = True
    await stack.users.UpdateUserAccount(request, metadata=stack.operator)
    await becomes(stack, made.key, VALID)
    await stack.users.DeleteUser(user_service_pb2.DeleteUserRequest(id=person.user.id), metadata=stack.operator)
    await becomes(stack, made.key, DISABLED)


async def rotate(stack: Stack, person: Person, key_id: str, request_id: str, grace_s: int = 0) -> rpc.RotateApiKeyResponse:
    """Another text for a key."""
    request = rpc.RotateApiKeyRequest(id=key_id, request_id=request_id)
    request.grace.FromSeconds(grace_s)
    return await stack.api_keys.RotateApiKey(request, metadata=person.metadata)


async def test_rotation(stack: Stack, person: Person) -> None:
    made = await stack.key(person, "usage.read")
    wish = str(uuid.uuid4())
    second = await rotate(stack, person, made.api_key.id, wish, 3600)
    assert await rotate(stack, person, made.api_key.id, wish, 3600) == second
    assert second.api_key.id == made.api_key.id and second.key != made.key
    old, new = [await verify(stack, key) for key in (made.key, second.key)]
    assert (old.outcome, new.outcome, old.key_id) == (VALID, VALID, new.key_id)
    left = old.expires_at.ToDatetime() - now().replace(tzinfo=None)
    assert timedelta(minutes=59) < left <= timedelta(hours=1) and not new.HasField("expires_at")
    assert [(text.number, text.HasField("expires_at")) for text in second.api_key.secrets] == [(2, False), (1, True)]
    # Without grace all that came before ends at once; the lineage is kept.
    third = await rotate(stack, person, made.api_key.id, str(uuid.uuid4()))
    await becomes(stack, made.key, EXPIRED)
    await becomes(stack, second.key, EXPIRED)
    assert (await verify(stack, third.key)).outcome == VALID and len(third.api_key.secrets) == 3
    # After ten minutes the answer is gone, and the wish is still known.
    await in_users(stack, sa.update(IdempotencyKey).values(created_at=now() - timedelta(minutes=11)))
    code, text = await code_of(rotate(stack, person, made.api_key.id, wish, 3600))
    assert code is Code.FAILED_PRECONDITION and made.api_key.id in text
    assert len((await get(stack, person.metadata, made.api_key.id)).secrets) == 3


async def test_rotation_and_making_ask_for_a_fresh_sign_in(stack: Stack, person: Person) -> None:
    made = await stack.key(person, "usage.read", "api_keys.revoke", "api_keys.list", "api_keys.get")
    key = Person(person.user, bearer(made.key))
    assert (await code_of(rotate(stack, key, made.api_key.id, str(uuid.uuid4()))))[0] is Code.PERMISSION_DENIED
    assert (await get(stack, key.metadata, made.api_key.id)).id == made.api_key.id
    for method in ("CreateApiKey", "RotateApiKey"):
        assert Plan.of(rpc.DESCRIPTOR.services_by_name["ApiKeyService"].methods_by_name[method]).fresh
    over = rpc.RotateApiKeyRequest(id=made.api_key.id, request_id=str(uuid.uuid4()))
    over.grace.FromSeconds(86401)
    code, text = await code_of(stack.api_keys.RotateApiKey(over, metadata=person.metadata))
    assert code is Code.INVALID_ARGUMENT and "grace" in text
    none = rpc.RotateApiKeyRequest(id=made.api_key.id)
    assert (await code_of(stack.api_keys.RotateApiKey(none, metadata=person.metadata)))[0] is Code.INVALID_ARGUMENT


async def test_a_bots_key_is_nobodys_to_change(stack: Stack, person: Person) -> None:
    d = await stack.order(person)
    first = await stack.claw_key(d)
    second = (await stack.claw_key(d))[0][1].removeprefix("Bearer ")
    await becomes(stack, first[0][1].removeprefix("Bearer "), DISABLED)
    answer = await verify(stack, second)
    assert (answer.outcome, answer.deployment_id, set(answer.permissions)) == (VALID, d.id, {"models.call", "usage.record", "usage.reserve", "quotas.read"})
    found = await stack.api_keys.ListApiKeys(rpc.ListApiKeysRequest(deployment_id=d.id), metadata=person.metadata)
    assert {key.id for key in found.api_keys} >= {answer.key_id} and {key.deployment_id for key in found.api_keys} == {d.id}
    assert not (await stack.api_keys.ListApiKeys(rpc.ListApiKeysRequest(), metadata=person.metadata)).api_keys
    for call in (
        stack.api_keys.RevokeApiKey(rpc.RevokeApiKeyRequest(id=answer.key_id), metadata=person.metadata),
        rotate(stack, person, answer.key_id, str(uuid.uuid4())),
        stack.api_keys.DeactivateApiKey(rpc.DeactivateApiKeyRequest(id=answer.key_id), metadata=person.metadata),
    ):
        code, text = await code_of(call)
        assert code is Code.FAILED_PRECONDITION and "RotateClawKey" in text
    # A call that comes late neither makes a key nor ends a newer one.
    request = claw_key_service_pb2.MintClawKeyRequest(key_id=answer.key_id, deployment_id=d.id, org_id=d.org_id, user_id=d.user_id)
    assert (await code_of(stack.claw_keys.MintClawKey(request, metadata=stack.operator)))[0] is Code.FAILED_PRECONDITION
    request.key_id = ids.lowest("key")
    assert (await code_of(stack.claw_keys.MintClawKey(request, metadata=stack.operator)))[0] is Code.FAILED_PRECONDITION
    end = claw_key_service_pb2.RevokeClawKeysRequest(key_id=ids.lowest("key"), deployment_id=d.id, org_id=d.org_id, user_id=d.user_id)
    assert (await stack.claw_keys.RevokeClawKeys(end, metadata=stack.operator)).revoked == 0
    assert (await verify(stack, second)).outcome == VALID
    # An end that comes before what it ends.
    end.key_id = request.key_id = ids.new("key")
    assert (await stack.claw_keys.RevokeClawKeys(end, metadata=stack.operator)).revoked == 1
    assert (await code_of(stack.claw_keys.MintClawKey(request, metadata=stack.operator)))[0] is Code.FAILED_PRECONDITION
    await becomes(stack, second, DISABLED)


async def test_last_use_is_written_down_later_and_together(stack: Stack, person: Person) -> None:
    made = [await stack.key(person, "deployments.list") for _ in range(3)]
    with statements("UPDATE api_keys") as seen:
        for _ in range(20):
            await verify(stack, made[0].key)
        await stack.deployments.ListDeployments(LIST, metadata=bearer(made[1].key))
        at_once = len(seen)

        async def written() -> bool:
            return all([(await get(stack, person.metadata, one.api_key.id)).HasField("last_used_at") for one in made[:2]])

        await eventually(written, 8)
    assert at_once <= 1 and len(seen) <= 4, seen
    used = await get(stack, person.metadata, made[0].api_key.id)
    assert abs(used.last_used_at.ToDatetime() - now().replace(tzinfo=None)) < timedelta(seconds=8)
    assert (used.etag, used.updated_at) == (made[0].api_key.etag, made[0].api_key.updated_at)
    assert not (await get(stack, person.metadata, made[2].api_key.id)).HasField("last_used_at")
    # Asked in the very same words, which are answered without looking at the key anew.
    await verify(stack, made[0].key)

    async def used_again() -> bool:
        again = await get(stack, person.metadata, made[0].api_key.id)
        return again.last_used_at.ToDatetime() > used.last_used_at.ToDatetime()

    await eventually(used_again, 8)


async def test_processes_that_write_down_the_same_uses_hardly_hold_each_other_up(stack: Stack, person: Person) -> None:
    """Rows on which they meet are looked at again once the first has committed: 2000 took four seconds, when each look read all ids anew."""
    row = {"org_id": person.org_id, "user_id": person.user.id, "name": "x", "environment": pb.API_KEY_ENVIRONMENT_TEST, "permissions": []}
    rows = [row | {"id": ids.new("key")} for _ in range(2000)]
    used = sorted(one["id"] for one in rows)
    db, other = (Database(stack.urls["user_svc"], KitSettings(), "test") for _ in range(2))
    write = use_writer(other)
    async with db.transaction(ALL) as session:
        await session.execute(sa.insert(ApiKey), rows)
    # By then PostgreSQL has one plan for whatever ids come.
    for _ in range(8):
        await write(used)
    if not db.is_sqlite:
        async with db.transaction(ALL) as session:
            first = sa.update(ApiKey).where(ApiKey.id.in_(used)).values(last_used_at=now() - timedelta(hours=1))
            await session.execute(first.execution_options(synchronize_session=False))
            writing = asyncio.create_task(write(used))

            async def waits() -> bool:
                behind_us = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))")
                return bool(await session.scalar(behind_us))

            await eventually(waits)
        started = time.monotonic()
        await writing
        assert time.monotonic() - started < 1.5
    found = await in_users(stack, sa.select(ApiKey.last_used_at).where(ApiKey.id.in_(used)))
    assert len(found) == 2000 and all(one.last_used_at > now() - timedelta(minutes=1) for one in found)
    await db.close()
    await other.close()


async def test_a_key_is_hashed_anew_when_the_server_has_another_key(stack: Stack, person: Person) -> None:
    made = await stack.key(person, "usage.read")
    config = KitSettings(**settings_for(stack.keys, "user_svc"))  # type: ignore[arg-type]
    first = vault.open_box(config)
    later = SecretBox(first.ring, {"": decode_key(config.hmac_key, "hmac_key"), "h2": os.urandom(32)}, "h2")
    db = Database(stack.urls["user_svc"], config, "test")
    for box, under in ((first, ""), (later, "h2"), (later, "h2")):
        found = await finder(db, box)(made.key)
        assert found is not None and found.caller.key_id == made.api_key.id
        rows = await in_users(stack, sa.select(ApiKeySecret.digest_key_id).where(ApiKeySecret.key_id == made.api_key.id))
        assert [row.digest_key_id for row in rows] == [under]
    # Who has only the first key knows it no more: each process learns of a key before one uses it.
    assert await finder(db, first)(made.key) is None
    await db.close()


@contextmanager
def statements(start: str) -> Iterator[list[str]]:
    """The statements of this process, whose services are all in it, that hold a text."""
    seen: list[str] = []

    def listen(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if start in statement:
            seen.append(statement)

    sa.event.listen(Engine, "before_cursor_execute", listen)
    try:
        yield seen
    finally:
        sa.event.remove(Engine, "before_cursor_execute", listen)


async def test_garbage_reads_nothing_and_drives_nothing_out(stack: Stack, person: Person) -> None:
    made = await stack.key(person, "usage.read")
    await becomes(stack, made.key, VALID)
    typo = made.key[:-1] + ("0" if made.key[-1] != "0" else "1")
    with statements("api_key_secrets") as seen:
        for text in ("", "x", "cp_", "cp_test_x", typo, made.key.upper(), made.key + "0", "💥" * 50, made.key.replace("cp_", "sk_")):
            assert (await verify(stack, text)).outcome == NOT_FOUND
            call = stack.deployments.ListDeployments(LIST, metadata=bearer(text)) if text.isascii() else None
            assert call is None or (await code_of(call))[0] is Code.UNAUTHENTICATED
        assert not seen
        # With a right checksum it costs a look, and is not remembered.
        for _ in range(3):
            assert (await verify(stack, keys.mint("cp", "test", "key").text)).outcome == NOT_FOUND
        assert 1 <= len(seen) <= 3
        seen.clear()
        assert (await verify(stack, made.key)).outcome == VALID
        assert not seen


_TEXTS = st.one_of(
    st.text(max_size=200),
    st.from_regex(r"(cp|claw|key|sess)_(live|test)_[0-9a-f]{32}_[0-9A-Za-z]{43}_[0-9A-Za-z]{6}", fullmatch=True),
    st.lists(st.text(alphabet="cp_clawtestlive0123456789abcdef\0\u00e9", max_size=40), max_size=7).map("_".join),
)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=_TEXTS, permissions=st.lists(st.text(max_size=64), max_size=5))
async def test_whatever_is_verified_has_an_outcome(stack: Stack, text: str, permissions: list[str]) -> None:
    request = rpc.VerifyApiKeyRequest(key=text, permissions=permissions)
    if "\0" in text or any("\0" in one for one in permissions):
        assert (await code_of(stack.api_keys.VerifyApiKey(request, metadata=stack.operator)))[0] is Code.INVALID_ARGUMENT
        return
    assert (await stack.api_keys.VerifyApiKey(request, metadata=stack.operator)).outcome == NOT_FOUND


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(_TEXTS)
def test_the_parser_takes_what_it_made_and_nothing_else(text: str) -> None:
    found = keys.parse(text, "cp", "key")
    assert found is None or found.text == text
    made = keys.mint("cp", "live", "key")
    assert keys.parse(made.text, "cp", "key") == made
    at = len(text) % len(made.text)
    changed = made.text[:at] + text[:1] + made.text[at + 1 :]
    assert changed == made.text or keys.parse(changed, "cp", "key") is None
