"""What was taken away counts within a second, and what was deleted is closed, also when nobody listened at the time."""

import asyncio
import time

import grpc
import pytest

from clawplane.deployment.v1 import deployment_pb2, deployment_service_pb2
from clawplane.user.v1 import user_pb2, user_service_pb2
from tests.harness import Person, Stack, eventually


async def listed(stack: Stack, person: Person) -> grpc.StatusCode:
    """The status code of a call as the person."""
    try:
        await stack.deployments.ListDeployments(deployment_service_pb2.ListDeploymentsRequest(), metadata=person.metadata)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_switched_off_counts_within_a_second(stack: Stack, person: Person) -> None:
    assert await listed(stack, person) is grpc.StatusCode.OK
    request = user_service_pb2.UpdateUserAccountRequest(id=person.user.id, is_active=False)
    await stack.users.UpdateUserAccount(request, metadata=stack.operator)
    started = time.monotonic()

    async def refused() -> bool:
        return await listed(stack, person) is grpc.StatusCode.UNAUTHENTICATED

    await eventually(refused, 5, 0.02)
    assert time.monotonic() - started < 1
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await stack.users.GetUser(user_service_pb2.GetUserRequest(id=person.user.id), metadata=person.metadata)
    assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED
    await stack.users.UpdateUserAccount(
        user_service_pb2.UpdateUserAccountRequest(id=person.user.id, is_active=True), metadata=stack.operator
    )

    async def let_in() -> bool:
        return await listed(stack, person) is grpc.StatusCode.OK

    await eventually(let_in, 5)


async def test_a_new_tier_counts_within_a_second(stack: Stack, person: Person) -> None:
    tokens = [f"12345678{n}:" + "B" * 35 for n in range(4)]
    for token in tokens[:3]:
        await stack.order(person, token)
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await stack.order(person, tokens[3])
    assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    request = user_service_pb2.UpdateUserAccountRequest(id=person.user.id, tier="business")
    user = await stack.users.UpdateUserAccount(request, metadata=stack.operator)
    assert (user.tier, user.is_premium) == ("business", True)
    await asyncio.sleep(1)
    assert (await stack.order(person, tokens[3])).price_minor == 9900


async def test_a_deleted_user_closes_what_runs(stack: Stack, person: Person) -> None:
    live = await stack.live(person)
    pending = await stack.order(person, "555555555:" + "C" * 35)
    await stack.users.DeleteUser(user_service_pb2.DeleteUserRequest(id=person.user.id), metadata=stack.operator)
    await stack.until(live.id, deployment_pb2.STATE_CLOSED)
    await stack.until(pending.id, deployment_pb2.STATE_CANCELED)

    async def refused() -> bool:
        return await listed(stack, person) is grpc.StatusCode.UNAUTHENTICATED

    await eventually(refused, 2)
    with pytest.raises(grpc.aio.AioRpcError) as gone:
        await stack.users.GetUser(user_service_pb2.GetUserRequest(id=person.user.id), metadata=stack.operator)
    assert gone.value.code() is grpc.StatusCode.NOT_FOUND
    back = await stack.users.UndeleteUser(user_service_pb2.UndeleteUserRequest(id=person.user.id), metadata=stack.operator)
    assert back.id == person.user.id and not back.HasField("deleted_at")


async def test_people_change_only_what_is_theirs(stack: Stack, person: Person) -> None:
    other = await stack.person()
    wish = user_pb2.User(id=person.user.id, bio="I run bots.", tier="business", email="x@example.com", clerk_user_id="user_1")
    changed = await stack.users.UpdateUser(user_service_pb2.UpdateUserRequest(user=wish, update_mask={"paths": ["bio"]}), metadata=person.metadata)
    assert (changed.bio, changed.tier, changed.email) == ("I run bots.", "starter", person.user.email)
    cases = [
        (user_pb2.User(id=person.user.id, bio="x", etag="1"), ["bio"], person, grpc.StatusCode.ABORTED),
        (user_pb2.User(id=person.user.id, email="new@example.com"), ["email"], person, grpc.StatusCode.INVALID_ARGUMENT),
        (user_pb2.User(id=person.user.id), ["password"], person, grpc.StatusCode.INVALID_ARGUMENT),
        (user_pb2.User(id=person.user.id, bio="mine now"), ["bio"], other, grpc.StatusCode.NOT_FOUND),
        (user_pb2.User(id=person.user.id, username=other.user.username), ["username"], person, grpc.StatusCode.ALREADY_EXISTS),
    ]
    for user, paths, who, code in cases:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await stack.users.UpdateUser(user_service_pb2.UpdateUserRequest(user=user, update_mask={"paths": paths}), metadata=who.metadata)
        assert refusal.value.code() is code, (paths, refusal.value.details())
