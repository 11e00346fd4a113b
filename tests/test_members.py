"""Members: nobody raises himself, ranks hold, who is out is out everywhere within a second, and there is always one owner."""

import itertools
import time
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from clawplane.deployment.v1 import deployment_service_pb2
from clawplane.user.v1 import access_service_pb2
from clawplane.user.v1 import member_service_pb2 as rpc
from clawplane.user.v1.organization_pb2 import ROLE_ADMIN, ROLE_DEVELOPER, ROLE_OWNER, ROLE_VIEWER
from services.user_svc.base import AuditEvent
from services.user_svc.organizations.roles import PERMISSIONS
from tests.harness import Person, Stack, eventually
from tests.teams import ROLES, Code, Refusal, Team, at, invite, refusal, team

LIST = deployment_service_pb2.ListDeploymentsRequest()


def update(made: Team, by: str, whom: str, role: int) -> Any:
    """The call that gives a member a role."""
    return made.stack.members.UpdateMember(rpc.UpdateMemberRequest(user_id=made.user(whom), role=role), metadata=made.at(by))  # type: ignore[arg-type]


def remove(made: Team, by: str, whom: str) -> Any:
    """The call that takes a member out."""
    return made.stack.members.RemoveMember(rpc.RemoveMemberRequest(user_id=made.user(whom)), metadata=made.at(by))


def leave(made: Team, who: str) -> Any:
    """The call with which a member goes."""
    return made.stack.members.LeaveOrganization(rpc.LeaveOrganizationRequest(), metadata=made.at(who))


def transfer(made: Team, by: str, whom: str) -> Any:
    """The call that makes another one the owner."""
    return made.stack.members.TransferOwnership(rpc.TransferOwnershipRequest(user_id=made.user(whom)), metadata=made.at(by))


def test_a_higher_role_may_all_that_a_lower_one_may() -> None:
    order = [PERMISSIONS[role] for role in (ROLE_VIEWER, ROLE_DEVELOPER, ROLE_ADMIN, ROLE_OWNER)]
    assert all(low < high for low, high in itertools.pairwise(order))


async def test_listed_in_the_order_in_which_they_came(stack: Stack) -> None:
    made = await team(stack, "viewer", "developer", "admin")
    seen, token = [], ""
    while True:
        page = await stack.members.ListMembers(rpc.ListMembersRequest(page_size=3, page_token=token), metadata=made.at("viewer"))
        seen += list(page.members)
        token = page.next_page_token
        if not token:
            break
    assert [(m.user_id, m.role) for m in seen] == [(made.user(name), ROLES[name]) for name in ("owner", "viewer", "developer", "admin")]
    assert all(m.org_id == made.id and m.email and m.full_name and m.HasField("joined_at") for m in seen)


async def test_nobody_raises_himself_or_touches_whom_he_must_not(stack: Stack) -> None:
    made = await team(stack, "viewer", "developer", "admin", "admin2")
    before = await made.roles()
    stays = Refusal(Code.FAILED_PRECONDITION, "OWNER_REQUIRED")

    def lacks(permission: str) -> Refusal:
        return Refusal(Code.PERMISSION_DENIED, "PERMISSION_DENIED", (("permission", permission),))

    for low in ("viewer", "developer"):
        for whom in made.people:
            assert await refusal(update(made, low, whom, ROLE_ADMIN)) == lacks("members.update")
            assert await refusal(remove(made, low, whom)) == lacks("members.remove")
            assert await refusal(transfer(made, low, whom)) == lacks("organizations.transfer")
    for whom in ("admin", "viewer"):
        assert await refusal(transfer(made, "admin", whom)) == lacks("organizations.transfer")
        # The role of an owner is no role to give, whoever asks.
        for by in ("admin", "owner"):
            assert (await refusal(update(made, by, whom, ROLE_OWNER))).code is Code.INVALID_ARGUMENT
    assert await refusal(update(made, "admin", "admin2", ROLE_VIEWER)) == lacks("members.admin")
    assert await refusal(remove(made, "admin", "admin2")) == lacks("members.admin")
    for by in ("admin", "owner"):
        assert await refusal(update(made, by, "owner", ROLE_VIEWER)) == stays
        assert await refusal(remove(made, by, "owner")) == stays
    assert await refusal(leave(made, "owner")) == stays
    assert await made.roles() == before
    # What they may.
    await update(made, "admin", "viewer", ROLE_ADMIN)
    await update(made, "admin", "admin", ROLE_DEVELOPER)
    await update(made, "owner", "admin2", ROLE_VIEWER)
    after = await made.roles()
    assert [after[made.user(name)] for name in ("viewer", "admin", "admin2")] == [ROLE_ADMIN, ROLE_DEVELOPER, ROLE_VIEWER]


async def test_members_of_another_organization_are_not_found(stack: Stack) -> None:
    """To own one organization gives nothing over another one's members, nor over those who are in neither."""
    victim, thief, stranger = await team(stack, "admin"), await team(stack), await stack.person()
    thief.people |= {"theirs": victim.people["admin"], "their owner": victim.people["owner"], "nobody": stranger}
    for whom in ("theirs", "their owner", "nobody"):
        for call in (update(thief, "owner", whom, ROLE_VIEWER), remove(thief, "owner", whom), transfer(thief, "owner", whom)):
            assert (await refusal(call)).code is Code.NOT_FOUND
    assert (await refusal(stack.members.ListMembers(rpc.ListMembersRequest(), metadata=at(stranger, victim.id)))).code is Code.NOT_FOUND
    assert len(await victim.roles()) == 2


@pytest.mark.parametrize("way", ["removed", "left"])
async def test_who_is_out_is_out_everywhere_within_a_second(stack: Stack, way: str) -> None:
    made = await team(stack, "developer")
    who = made.at("developer")
    await stack.deployments.ListDeployments(LIST, metadata=who)
    await stack.members.ListMembers(rpc.ListMembersRequest(), metadata=who)
    await (remove(made, "owner", "developer") if way == "removed" else leave(made, "developer"))
    started = time.monotonic()

    async def out() -> bool:
        calls = (stack.deployments.ListDeployments(LIST, metadata=who), stack.members.ListMembers(rpc.ListMembersRequest(), metadata=who))
        return [(await refusal(call)).code for call in calls] == [Code.NOT_FOUND, Code.NOT_FOUND]

    await eventually(out, 5, 0.02)
    assert time.monotonic() - started < 1
    assert list(await made.roles()) == [made.user("owner")]
    # At home nothing has changed, and whoever is asked again may come again.
    await stack.deployments.ListDeployments(LIST, metadata=made.people["developer"].metadata)
    await made.add("viewer", made.people["developer"])


async def test_a_lower_role_counts_within_a_second(stack: Stack) -> None:
    made = await team(stack, "developer")
    who = made.at("developer")
    listed = (await stack.access.WhoAmI(access_service_pb2.WhoAmIRequest(), metadata=who)).permissions
    assert "deployments.create" in listed
    await update(made, "owner", "developer", ROLE_VIEWER)
    started = time.monotonic()
    order = deployment_service_pb2.CreateDeploymentRequest(model="claude-opus-4.5", channel=5)  # type: ignore[arg-type]

    async def refused() -> bool:
        told = await refusal(stack.deployments.CreateDeployment(order, metadata=who))
        return told["permission"] == "deployments.create"

    await eventually(refused, 5, 0.02)
    assert time.monotonic() - started < 1


async def test_ownership_passes_on_and_the_owner_stays_an_admin(stack: Stack) -> None:
    made = await team(stack, "viewer")
    assert (await refusal(transfer(made, "owner", "owner"))).code is Code.FAILED_PRECONDITION
    member = await transfer(made, "owner", "viewer")
    assert (member.user_id, member.role) == (made.user("viewer"), ROLE_OWNER)
    assert await made.roles() == {made.user("viewer"): ROLE_OWNER, made.user("owner"): ROLE_ADMIN}

    async def counts() -> bool:
        return (await refusal(transfer(made, "owner", "viewer"))).code is Code.PERMISSION_DENIED

    await eventually(counts, 2)
    await leave(made, "owner")


async def test_a_personal_organization_has_guests_but_one_owner(stack: Stack, person: Person) -> None:
    made = await team(stack)
    home = Team(stack, made.organization, {"owner": person})
    home.organization.id = person.org_id
    await home.add("admin")
    for call in (transfer(home, "owner", "admin"), leave(home, "owner")):
        assert (await refusal(call)).code is Code.FAILED_PRECONDITION
    await leave(home, "admin")


async def test_an_old_sign_in_hands_nothing_over(stack: Stack) -> None:
    """Fresh means within the hour: what cannot be undone is not done with a token that was left lying about."""
    made = await team(stack, "admin")
    owner = made.people["owner"]
    limited = stack.token_for(owner.user.id, ["members.list", "members.update"])
    told = await refusal(
        stack.members.TransferOwnership(rpc.TransferOwnershipRequest(user_id=made.user("admin")), metadata=at(Person(owner.user, limited), made.id))
    )
    assert told["permission"] == "organizations.transfer"


async def test_the_log_of_the_organization_says_who_changed_whom(stack: Stack) -> None:
    made = await team(stack, "viewer")
    await update(made, "owner", "viewer", ROLE_DEVELOPER)
    await invite(stack, made.at("owner"), "new@example.com")
    rows = await audit_of(stack, made.id)
    said = [(row["method"].rpartition("/")[2], row["resource_id"][:4], row["before"], row["after"]) for row in rows]
    assert said[0][:2] == ("CreateOrganization", "org_")
    assert ("UpdateMember", "usr_", {"role": "viewer"}, {"role": "developer"}) in said
    assert [name for name, *_ in said].count("CreateInvitation") == 2 and "AcceptInvitation" in [name for name, *_ in said]


async def audit_of(stack: Stack, org_id: str) -> list[dict[str, Any]]:
    """The audit rows of an organization in the user service, the oldest first."""
    engine = create_async_engine(stack.urls["user_svc"])
    async with engine.connect() as connection:
        rows = await connection.execute(sa.select(AuditEvent.__table__).where(AuditEvent.org_id == org_id).order_by(AuditEvent.id))
        found = [dict(row._mapping) for row in rows]
    await engine.dispose()
    return found
