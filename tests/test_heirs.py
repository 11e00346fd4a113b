"""Who goes leaves no organization without an owner: he hands over first, or the longest-standing admin follows."""

from types import SimpleNamespace
from typing import Any

import pytest

from clawplane.deployment.v1 import deployment_pb2
from clawplane.user.v1 import organization_service_pb2, user_service_pb2
from clawplane.user.v1.organization_pb2 import ROLE_OWNER, ROLE_VIEWER
from services.kit.call import Call
from services.kit.db import ALL, Database
from services.kit.errors import InvalidState
from services.user_svc.organizations import heirs
from services.user_svc.settings import UserSettings
from services.user_svc.users import repository as users
from tests.harness import Person, Stack, eventually
from tests.teams import Code, Team, at, refusal, team
from tests.test_members import audit_of, leave, remove, update

ADMIN = 3


async def gone(stack: Stack, user_id: str) -> None:
    """An operator deletes a user."""
    await stack.users.DeleteUser(user_service_pb2.DeleteUserRequest(id=user_id), metadata=stack.operator)


async def handed_over(stack: Stack, user_id: str) -> str:
    """Why a user may not delete himself; "" when he may."""
    db = Database(stack.urls["user_svc"], UserSettings(data_dir=stack.data_dir), "test")
    try:
        async with db.transaction(ALL) as session:
            row = await users.lock(session, user_id)
            assert row is not None
            await heirs.check_handed_over(session, row[0])
    except InvalidState as error:
        return error.metadata["org_id"]
    finally:
        await db.close()
    return ""


async def test_who_still_owns_what_others_use_may_not_go(stack: Stack) -> None:
    made = await team(stack, "viewer")
    owner = made.user("owner")
    assert await handed_over(stack, owner) == made.id and await handed_over(stack, made.user("viewer")) == ""
    await remove(made, "owner", "viewer")
    assert await handed_over(stack, owner) == ""
    # Guests of the personal organization would lose it as well.
    home = Team(stack, made.organization, {"owner": made.people["owner"]})
    home.organization.id = made.people["owner"].org_id
    await home.add("viewer")
    assert await handed_over(stack, owner) == home.id
    await leave(home, "viewer")
    assert await handed_over(stack, owner) == ""


@pytest.mark.parametrize("who", ["operator", "clerk"])
async def test_the_longest_standing_admin_who_can_act_follows(stack: Stack, who: str) -> None:
    made = await team(stack, "admin", "developer", "admin2", "admin3")
    # The first admin is switched off; the developer was there before the third, but is an admin only since.
    off = user_service_pb2.UpdateUserAccountRequest(id=made.user("admin"), is_active=False)
    await stack.users.UpdateUserAccount(off, metadata=stack.operator)
    await remove(made, "owner", "admin2")
    await update(made, "owner", "developer", ADMIN)
    owner = made.people["owner"]
    if who == "operator":
        await gone(stack, owner.user.id)
    else:
        linked = user_service_pb2.SyncClerkUserRequest(external_id=f"a-{owner.user.id}", clerk_user_id=f"c-{owner.user.id}", deleted=True)
        linked.occurred_at.GetCurrentTime()
        await _link(stack, owner, f"c-{owner.user.id}")
        await stack.users.SyncClerkUser(linked, metadata=stack.operator)
    made.people["owner"] = made.people["developer"]
    roles = await made.roles()
    assert roles[made.user("developer")] == ROLE_OWNER and owner.user.id not in roles and len(roles) == 3
    (row,) = [row for row in await audit_of(stack, made.id) if row["after"] and "left" in row["after"]]
    assert row["after"] == {"left": owner.user.id, "owner": made.user("developer")} and row["before"] == {"role": "owner"}
    assert row["subject"] == "operator"
    # Who comes back finds that others have gone on.
    back = await stack.users.UndeleteUser(user_service_pb2.UndeleteUserRequest(id=owner.user.id), metadata=stack.operator)
    assert back.id

    async def is_out() -> bool:
        return (await refusal(_get(stack, owner, made.id))).code is Code.NOT_FOUND

    await eventually(is_out, timeout_s=1.5)


async def _link(stack: Stack, person: Person, clerk_id: str) -> None:
    said: Any = user_service_pb2.UpdateUserAccountRequest(id=person.user.id, email_verified=True)
    await stack.users.UpdateUserAccount(said, metadata=stack.operator)
    said = user_service_pb2.SyncClerkUserRequest(
        external_id=f"b-{person.user.id}", clerk_user_id=clerk_id, email=person.user.email, email_verified=True, full_name="x"
    )
    said.occurred_at.FromSeconds(1_700_000_000)
    await stack.users.SyncClerkUser(said, metadata=stack.operator)


def _get(stack: Stack, person: Person, org_id: str) -> Any:
    request = organization_service_pb2.GetOrganizationRequest(id=org_id)
    return stack.organizations.GetOrganization(request, metadata=at(person, org_id))


async def test_without_an_admin_it_ends_and_what_it_runs_is_closed(stack: Stack) -> None:
    made = await team(stack, "developer", "viewer")
    developer = made.people["developer"]
    live = await stack.live(Person(developer.user, made.at(developer)))
    await gone(stack, made.user("owner"))
    await stack.until(live.id, deployment_pb2.STATE_CLOSED)
    assert (await refusal(_get(stack, developer, made.id))).code is Code.NOT_FOUND
    (row,) = [row for row in await audit_of(stack, made.id) if row["after"] and "deleted" in row["after"]]
    assert row["resource_id"] == made.id and row["method"].endswith("DeleteUser")
    # Its owner is still its owner, should both come back.
    owner = made.people["owner"]
    await stack.users.UndeleteUser(user_service_pb2.UndeleteUserRequest(id=owner.user.id), metadata=stack.operator)
    request = organization_service_pb2.UndeleteOrganizationRequest(id=made.id)
    await stack.organizations.UndeleteOrganization(request, metadata=owner.metadata)
    assert sorted((await made.roles()).values()) == [ROLE_VIEWER, 2, ROLE_OWNER]


async def test_a_member_who_is_deleted_is_no_member(stack: Stack) -> None:
    made = await team(stack, "admin", "viewer")
    await gone(stack, made.user("viewer"))
    await gone(stack, made.user("admin"))
    assert await made.roles() == {made.user("owner"): ROLE_OWNER}
    left = [row["after"]["left"] for row in await audit_of(stack, made.id) if row["after"] and "left" in row["after"]]
    assert left == [made.user("viewer"), made.user("admin")]
    # Of nobody does the log of the personal organization lack the deletion itself.
    personal = await audit_of(stack, made.people["admin"].org_id)
    assert [row["method"].rpartition("/")[2] for row in personal][-1] == "DeleteUser"


async def test_a_second_try_writes_no_row_twice() -> None:
    """A unit of work that clashes is done again: what it said of other organizations before that counts for nothing."""

    class Unwritten(Call):
        async def _write_along(self, session: Any) -> None:
            written.append([note.org_id for note in self.trail.elsewhere])

    written: list[list[str]] = []
    tries = 0

    class Db:
        async def run(self, work: Any, tenant: str) -> Any:
            await work(None)
            return await work(None)

    async def work(session: Any) -> None:
        nonlocal tries
        tries += 1
        call.audit_elsewhere(f"org_{tries}", "x")

    call = Unwritten(SimpleNamespace(db=Db()), None, {}, None)  # type: ignore[arg-type]
    await call.run(work, "org_0")
    assert written == [["org_1"], ["org_2"]]
