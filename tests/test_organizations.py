"""Organizations: made, listed, renamed, deleted for everybody within a second, and brought back by their owner alone."""

import time
from datetime import timedelta

import grpc
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from clawplane.deployment.v1 import deployment_pb2, deployment_service_pb2
from clawplane.user.v1 import organization_service_pb2 as rpc
from clawplane.user.v1 import user_pb2, user_service_pb2
from clawplane.user.v1.organization_pb2 import ROLE_OWNER, ROLE_VIEWER
from services.kit import ids
from services.kit.columns import now
from services.user_svc.organizations.models import Organization
from tests.harness import Person, Stack, eventually
from tests.teams import Code, Team, at, create, refusal, team

LIST = deployment_service_pb2.ListDeploymentsRequest()


async def mine(stack: Stack, person: Person, **more: object) -> dict[str, int]:
    """The organizations of a person, with his roles."""
    listed = await stack.organizations.ListOrganizations(rpc.ListOrganizationsRequest(**more), metadata=person.metadata)  # type: ignore[arg-type]
    return {organization.id: organization.my_role for organization in listed.organizations}


async def delete(made: Team, who: str = "owner") -> None:
    """Deletes the organization."""
    await made.stack.organizations.DeleteOrganization(rpc.DeleteOrganizationRequest(id=made.id), metadata=made.at(who))


async def test_made_listed_and_renamed(stack: Stack, person: Person) -> None:
    made = await create(stack, person, "  Blue Room ")
    assert (made.name, made.my_role, made.is_personal, made.tier) == ("Blue Room", ROLE_OWNER, False, "starter")
    assert await mine(stack, person) == {made.id: ROLE_OWNER, person.org_id: ROLE_OWNER}
    first = await stack.organizations.ListOrganizations(rpc.ListOrganizationsRequest(page_size=1), metadata=person.metadata)
    second = await stack.organizations.ListOrganizations(
        rpc.ListOrganizationsRequest(page_size=1, page_token=first.next_page_token), metadata=person.metadata
    )
    assert [o.id for o in (*first.organizations, *second.organizations)] == [made.id, person.org_id] and not second.next_page_token
    there = at(person, made.id)
    change = rpc.UpdateOrganizationRequest(organization={"id": made.id, "name": "Red Room", "etag": made.etag, "is_personal": True, "tier": "pro"})
    changed = await stack.organizations.UpdateOrganization(change, metadata=there)
    assert (changed.name, changed.is_personal, changed.tier) == ("Red Room", False, "starter") and changed.etag != made.etag
    assert (await refusal(stack.organizations.UpdateOrganization(change, metadata=there))).code is Code.ABORTED
    blank = rpc.UpdateOrganizationRequest(organization={"id": made.id, "name": " "}, update_mask={"paths": ["name"]})
    assert (await refusal(stack.organizations.UpdateOrganization(blank, metadata=there))).code is Code.INVALID_ARGUMENT
    got = await stack.organizations.GetOrganization(rpc.GetOrganizationRequest(id=made.id), metadata=there)
    assert got == changed
    for_operators = await stack.organizations.GetOrganization(rpc.GetOrganizationRequest(id=made.id), metadata=stack.operator)
    assert (for_operators.name, for_operators.my_role) == ("Red Room", 0)
    for name in ("two\nlines", " ", "", "x" * 201):
        assert (await refusal(create(stack, person, name))).code is Code.INVALID_ARGUMENT


async def test_a_repeated_request_makes_one(stack: Stack, person: Person) -> None:
    request_id = str(ids.uuid7())
    assert (await create(stack, person, request_id=request_id)) == (await create(stack, person, request_id=request_id))
    assert len(await mine(stack, person)) == 2


async def test_one_owns_so_many_and_no_more(stack: Stack, person: Person) -> None:
    made = [await create(stack, person) for _ in range(20)]
    full = await refusal(create(stack, person))
    assert (full.code, full.reason, full["limit"]) == (Code.RESOURCE_EXHAUSTED, "LIMIT_REACHED", "20")
    there = at(person, made[0].id)
    await stack.organizations.DeleteOrganization(rpc.DeleteOrganizationRequest(id=made[0].id), metadata=there)
    await create(stack, person)
    # What was deleted to make room does not come back beyond the limit.
    back = stack.organizations.UndeleteOrganization(rpc.UndeleteOrganizationRequest(id=made[0].id), metadata=person.metadata)
    assert (await refusal(back)).reason == "LIMIT_REACHED"


async def test_the_organization_is_the_calls_and_never_the_requests(stack: Stack) -> None:
    """What another system's worst bug allowed: to own one organization, and to act in another one by naming it in the body."""
    victim, thief = await team(stack, "viewer"), await team(stack)
    thief.people["guest"] = victim.people["viewer"]
    service = stack.organizations
    for who in (thief.at("owner"), thief.people["owner"].metadata, victim.people["viewer"].metadata):
        for call in (
            service.UpdateOrganization(rpc.UpdateOrganizationRequest(organization={"id": victim.id, "name": "Mine"}), metadata=who),
            service.DeleteOrganization(rpc.DeleteOrganizationRequest(id=victim.id), metadata=who),
            service.UndeleteOrganization(rpc.UndeleteOrganizationRequest(id=victim.id), metadata=who),
            service.GetOrganization(rpc.GetOrganizationRequest(id=victim.id), metadata=who),
        ):
            assert (await refusal(call)).code is Code.NOT_FOUND
    for call in (
        service.UpdateOrganization(rpc.UpdateOrganizationRequest(organization={"id": victim.id, "name": "Mine"}), metadata=victim.at("viewer")),
        service.DeleteOrganization(rpc.DeleteOrganizationRequest(id=victim.id), metadata=victim.at("viewer")),
    ):
        assert (await refusal(call)).code is Code.PERMISSION_DENIED
    got = await service.GetOrganization(rpc.GetOrganizationRequest(id=victim.id), metadata=victim.at("viewer"))
    assert (got.name, got.my_role) == ("Team", ROLE_VIEWER)


async def test_a_deleted_organization_admits_nobody_and_runs_nothing(stack: Stack) -> None:
    made = await team(stack, "admin", "developer")
    for name, person in made.people.items():
        made.people[name] = Person(person.user, made.at(person))
    live = await stack.live(made.people["developer"])
    assert live.org_id == made.id
    everybody = [made.at(name) for name in made.people]
    for who in everybody:
        await stack.deployments.ListDeployments(LIST, metadata=who)
    assert (await refusal(delete(made, "admin"))).code is Code.PERMISSION_DENIED
    await delete(made)
    started = time.monotonic()

    async def all_out() -> bool:
        calls = [stack.deployments.ListDeployments(LIST, metadata=who) for who in everybody]
        calls += [stack.organizations.GetOrganization(rpc.GetOrganizationRequest(id=made.id), metadata=who) for who in everybody]
        return {(await refusal(call)).code for call in calls} == {Code.NOT_FOUND}

    await eventually(all_out, 5, 0.02)
    assert time.monotonic() - started < 1
    await stack.until(live.id, deployment_pb2.STATE_CLOSED)


async def test_its_owner_alone_brings_it_back_from_elsewhere(stack: Stack) -> None:
    made = await team(stack, "admin")
    owner, admin = made.people["owner"], made.people["admin"]
    await delete(made)
    assert made.id not in await mine(stack, owner)
    assert made.id in await mine(stack, owner, show_deleted=True) and made.id not in await mine(stack, admin, show_deleted=True)
    request = rpc.UndeleteOrganizationRequest(id=made.id)
    service = stack.organizations
    assert (await refusal(service.UndeleteOrganization(request, metadata=admin.metadata))).code is Code.NOT_FOUND

    async def within(seconds: float) -> None:
        engine = create_async_engine(stack.urls["user_svc"])
        async with engine.begin() as connection:
            at_ = now() - timedelta(days=30) + timedelta(seconds=seconds)
            await connection.execute(sa.update(Organization).where(Organization.id == made.id).values(deleted_at=at_))
        await engine.dispose()

    await within(-1)
    assert (await refusal(service.UndeleteOrganization(request, metadata=owner.metadata))).code is Code.FAILED_PRECONDITION
    await within(60)
    back = await service.UndeleteOrganization(request, metadata=owner.metadata)
    assert back.my_role == ROLE_OWNER and not back.HasField("deleted_at")
    assert (await refusal(service.UndeleteOrganization(request, metadata=owner.metadata))).code is Code.FAILED_PRECONDITION
    assert await mine(stack, admin) and len(await made.roles()) == 2


async def test_a_personal_one_goes_with_its_user_alone(stack: Stack, person: Person) -> None:
    remove = stack.organizations.DeleteOrganization(rpc.DeleteOrganizationRequest(id=person.org_id), metadata=person.metadata)
    assert (await refusal(remove)).code is Code.FAILED_PRECONDITION


async def test_a_person_changes_his_profile_wherever_he_acts(stack: Stack) -> None:
    made = await team(stack, "viewer")
    user = user_pb2.User(id=made.user("viewer"), bio="I look.")
    changed = await stack.users.UpdateUser(user_service_pb2.UpdateUserRequest(user=user), metadata=made.at("viewer"))
    assert changed.bio == "I look."


async def test_services_own_no_organizations(stack: Stack) -> None:
    for call in (
        stack.organizations.CreateOrganization(rpc.CreateOrganizationRequest(organization={"name": "x"}), metadata=stack.operator),
        stack.organizations.ListOrganizations(rpc.ListOrganizationsRequest(), metadata=stack.operator),
    ):
        told = await refusal(call)
        assert (told.code, told.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "USER_REQUIRED")
