"""Users: made, found, linked, and never taken over."""

import asyncio
import secrets
from typing import Any

import grpc
import pytest

from clawplane.user.v1 import access_service_pb2, entitlement_service_pb2, organization_pb2, user_pb2
from clawplane.user.v1 import user_service_pb2 as rpc
from tests.harness import Person, Stack


async def create(stack: Stack, email: str, **more: Any) -> user_pb2.User:
    """Makes a user as an operator."""
    request = rpc.CreateUserRequest(user=user_pb2.User(email=email, **more.pop("user", {})), **more)
    return await stack.users.CreateUser(request, metadata=stack.operator)


async def refused(call: Any) -> grpc.aio.AioRpcError:
    """The error of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await call
    return refusal.value


def fresh(name: str = "") -> str:
    """An address that nobody has."""
    return f"{name or 'someone'}+{secrets.token_hex(6)}@example.com"


async def test_made_with_an_organization_and_found_again(stack: Stack) -> None:
    email = fresh("Ann")
    identity = user_pb2.Identity(provider="clerk", subject=f"user_{secrets.token_hex(6)}")
    user = await create(stack, email.upper().replace("EXAMPLE", "Example"), identity=identity, email_verified=True)
    assert (user.email, user.tier, user.is_active, user.email_verified) == (email.lower(), "starter", True, True)
    assert user.username.startswith("ann-") and user.clerk_user_id == identity.subject and user.personal_org_id.startswith("org_")
    for by in ({"email": email.title()}, {"username": user.username}, {"clerk_user_id": identity.subject}):
        found = await stack.users.LookupUser(rpc.LookupUserRequest(**by), metadata=stack.operator)
        assert found == user, by
    mine = await stack.users.GetUser(rpc.GetUserRequest(id=user.id), metadata=stack.token_for(user.id))
    assert mine == user
    access = await stack.access.ResolveAccess(access_service_pb2.ResolveAccessRequest(user_id=user.id), metadata=stack.operator)
    assert (access.org_id, access.role) == (user.personal_org_id, organization_pb2.ROLE_OWNER)


async def test_what_is_output_only_is_ignored(stack: Stack) -> None:
    user = await create(
        stack, fresh(), user={"tier": "business", "is_premium": True, "clerk_user_id": "user_x", "id": "usr_" + "1" * 32, "stripe_customer_id": "cus_x"}
    )
    assert (user.tier, user.is_premium, user.clerk_user_id, user.stripe_customer_id) == ("starter", False, "", "")
    assert user.id != "usr_" + "1" * 32


async def test_an_address_is_taken_in_any_case(stack: Stack) -> None:
    email = fresh()
    await create(stack, email)
    error = await refused(create(stack, email.upper()))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS and "email" in (error.details() or "")


async def test_colliding_names_are_made_unique_under_concurrency(stack: Stack) -> None:
    base = f"sam{secrets.token_hex(3)}"
    users = await asyncio.gather(*(create(stack, f"{base}@{n}.example.com") for n in range(12)))
    assert len({user.username for user in users}) == 12
    assert all(user.username.startswith(base) for user in users)
    error = await refused(create(stack, fresh(), user={"username": users[0].username}))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS and "username" in (error.details() or "")


async def ensure(stack: Stack, email: str, subject: str, verified: bool, provider: str = "google") -> user_pb2.User:
    """Ensures the user of an identity."""
    request = rpc.EnsureUserRequest(
        identity=user_pb2.Identity(provider=provider, subject=subject), email=email, email_verified=verified, full_name="Some One"
    )
    return await stack.users.EnsureUser(request, metadata=stack.operator)


async def test_ensured_at_the_same_moment_is_one_user(stack: Stack) -> None:
    email, subject = fresh(), secrets.token_hex(8)
    users = await asyncio.gather(*(ensure(stack, email, subject, True) for _ in range(12)))
    assert len({user.id for user in users}) == 1


@pytest.mark.parametrize(("ours", "theirs", "linked"), [(True, True, True), (True, False, False), (False, True, False), (False, False, False)])
async def test_linked_only_when_both_sides_have_proven_the_address(stack: Stack, ours: bool, theirs: bool, linked: bool) -> None:
    email = fresh()
    known = await create(stack, email, email_verified=ours)
    if linked:
        assert (await ensure(stack, email, secrets.token_hex(8), theirs)).id == known.id
    else:
        error = await refused(ensure(stack, email, secrets.token_hex(8), theirs))
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_fields_have_rules(stack: Stack) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"username": "No Spaces"}, "user.username"),
        ({"avatar_url": "http://example.com/a.png"}, "user.avatar_url"),
        ({"bio": "x" * 2001}, "user.bio"),
        ({"preferences": {"x": "y" * 20_000}}, "user.preferences"),
    ]
    for fields, name in cases:
        error = await refused(create(stack, fresh(), user=fields))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and name in (error.details() or ""), fields
    assert "user.email" in ((await refused(create(stack, "no address"))).details() or "")


async def test_entitlements(stack: Stack, person: Person) -> None:
    request = entitlement_service_pb2.GetEntitlementsRequest()
    mine = await stack.entitlements.GetEntitlements(request, metadata=person.metadata)
    assert (mine.org_id, mine.tier, mine.price_minor, mine.currency, mine.live_deployments) == (person.org_id, "starter", 2900, "usd", 3)
    other = await stack.person()
    request.org_id = other.org_id
    assert (await refused(stack.entitlements.GetEntitlements(request, metadata=person.metadata))).code() is grpc.StatusCode.NOT_FOUND
    seen = await stack.entitlements.GetEntitlements(request, metadata=stack.operator)
    assert seen.org_id == other.org_id
