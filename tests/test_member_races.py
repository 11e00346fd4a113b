"""Fifty at once, from two processes: an ownership passes once, an invitation is answered once, and there is always one owner."""

import asyncio
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from typing import Any, cast

import grpc
import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from clawplane.user.v1 import (
    invitation_service_pb2,
    invitation_service_pb2_grpc,
    mailbox_service_pb2_grpc,
    member_service_pb2,
    member_service_pb2_grpc,
    organization_service_pb2_grpc,
    user_pb2,
    user_service_pb2,
    user_service_pb2_grpc,
)
from clawplane.user.v1.organization_pb2 import ROLE_ADMIN, ROLE_OWNER
from services.user_svc.organizations.models import Membership, Organization
from services.user_svc.users.models import User
from tests.conftest import Databases
from tests.harness import Metadata, Person, Stack
from tests.processes import OPTIONS, Processes
from tests.teams import Code, Refusal, Team, invite, refusal, team

CALLS = 50
CLEAR = {Code.OK, Code.NOT_FOUND, Code.PERMISSION_DENIED, Code.FAILED_PRECONDITION, Code.UNAUTHENTICATED, Code.RESOURCE_EXHAUSTED}
"""What whoever comes too late may be told; never a defect, and not that he should try again."""


class Side:
    """One of the processes, in the words of tests/teams.py."""

    def __init__(self, processes: Processes, number: int) -> None:
        self.processes, self.operator = processes, processes.operator
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{processes.ports[number]}", options=OPTIONS)
        self.users = user_service_pb2_grpc.UserServiceStub(self.channel)
        self.organizations = organization_service_pb2_grpc.OrganizationServiceStub(self.channel)
        self.members = member_service_pb2_grpc.MemberServiceStub(self.channel)
        self.invitations = invitation_service_pb2_grpc.InvitationServiceStub(self.channel)
        self.mailbox = mailbox_service_pb2_grpc.MailboxServiceStub(self.channel)

    async def person(self) -> Person:
        """A new user."""
        wish = user_service_pb2.CreateUserRequest(user=user_pb2.User(email=f"{os.urandom(6).hex()}@example.com"))
        user = await self.users.CreateUser(wish, metadata=self.operator)
        token = self.processes.signer().sign(["*"], user=user.id, lifetime_s=900)
        return Person(user, (("authorization", f"Bearer {token}"),))

    def transfer(self, who: Metadata, user_id: str) -> Any:
        """The call that makes another one the owner."""
        return self.members.TransferOwnership(member_service_pb2.TransferOwnershipRequest(user_id=user_id), metadata=who)


Sides = tuple[Side, Side]


@pytest_asyncio.fixture(scope="module")
async def sides(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Sides]:
    """Two user services on one database."""
    processes = Processes(databases, tmp_path_factory.mktemp("races"), deployments=0, users=2)
    try:
        await processes.ready()
        both = (Side(processes, 0), Side(processes, 1))
        yield both
        for side in both:
            await side.channel.close()
    finally:
        processes.stop()


async def crew(sides: Sides, *names: str) -> Team:
    """A team, made on one side."""
    return await team(cast("Stack", sides[0]), *names)


async def at_once(calls: list[Awaitable[Any]]) -> Counter[grpc.StatusCode]:
    """How often each code was the answer."""
    told: list[Refusal] = await asyncio.gather(*(refusal(call) for call in calls))
    codes = Counter(each.code for each in told)
    assert set(codes) <= CLEAR, codes
    return codes


async def owners(sides: Sides, org_id: str) -> list[tuple[str, bool]]:
    """(user, whether he can act, or the organization is deleted) of each owner, as the database has it."""
    engine = create_async_engine(sides[0].processes.env["CLAWPLANE_USER_DATABASE_URL"])
    async with engine.connect() as connection:
        statement = (
            sa.select(Membership.user_id, (User.is_active & User.deleted_at.is_(None)) | Organization.deleted_at.is_not(None))
            .join(User, User.id == Membership.user_id)
            .join(Organization, Organization.id == Membership.org_id)
            .where(Membership.org_id == org_id, Membership.role == ROLE_OWNER)
        )
        found = [(user_id, bool(acts)) for user_id, acts in await connection.execute(statement)]
    await engine.dispose()
    return found


pytestmark = pytest.mark.parametrize("databases", ["postgres"], indirect=True)


async def test_an_ownership_passes_once(sides: Sides) -> None:
    made = await crew(sides, "viewer", "developer", "admin", "admin2")
    heirs = [made.user(name) for name in made.people if name != "owner"]
    codes = await at_once([sides[n % 2].transfer(made.at("owner"), heirs[n % len(heirs)]) for n in range(CALLS)])
    assert codes[Code.OK] == 1, codes
    ((owner, _),) = await owners(sides, made.id)
    assert owner in heirs
    made.people["before"] = made.people["owner"]
    made.people["owner"] = next(person for person in made.people.values() if person.user.id == owner)
    assert (await made.roles())[made.user("before")] == ROLE_ADMIN


async def test_an_invitation_is_answered_once(sides: Sides) -> None:
    made = await crew(sides)
    guest = await sides[1].person()
    _, token = await invite(cast("Stack", sides[0]), made.at("owner"), guest.user.email)
    request = invitation_service_pb2.AcceptInvitationRequest(token=token)
    codes = await at_once([sides[n % 2].invitations.AcceptInvitation(request, metadata=guest.metadata) for n in range(CALLS)])
    assert codes == {Code.OK: 1, Code.NOT_FOUND: CALLS - 1}
    assert len(await made.roles()) == 2


async def test_accepted_or_declined_but_not_both(sides: Sides) -> None:
    made = await crew(sides)
    guest = await sides[1].person()
    _, token = await invite(cast("Stack", sides[0]), made.at("owner"), guest.user.email)
    accept, decline = (kind(token=token) for kind in (invitation_service_pb2.AcceptInvitationRequest, invitation_service_pb2.DeclineInvitationRequest))
    calls: list[Awaitable[Any]] = []
    for n in range(CALLS):
        service = sides[n % 2].invitations
        accepts = n % 4 < 2
        calls.append(
            service.AcceptInvitation(accept, metadata=guest.metadata) if accepts else service.DeclineInvitation(decline, metadata=guest.metadata)
        )
    codes = await at_once(calls)
    assert codes == {Code.OK: 1, Code.NOT_FOUND: CALLS - 1}


@pytest.mark.parametrize("seed", [1, 2])
async def test_whoever_goes_comes_or_hands_over_one_owner_is_left(sides: Sides, seed: int) -> None:
    chance = random.Random(seed)
    made = await crew(sides, *(f"admin{n}" for n in range(8)))
    names = list(made.people)
    calls: list[Awaitable[Any]] = []
    for n in range(CALLS):
        side = sides[n % 2]
        who, whom = chance.sample(names, 2)
        act = chance.choice(["transfer", "transfer", "leave", "remove", "delete", "lower"])
        if act == "transfer":
            calls.append(side.transfer(made.at("owner" if n < CALLS // 2 else who), made.user(whom)))
        elif act == "leave":
            calls.append(side.members.LeaveOrganization(member_service_pb2.LeaveOrganizationRequest(), metadata=made.at(who)))
        elif act == "remove":
            request = member_service_pb2.RemoveMemberRequest(user_id=made.user(whom))
            calls.append(side.members.RemoveMember(request, metadata=made.at(who)))
        elif act == "lower":
            lower = member_service_pb2.UpdateMemberRequest(user_id=made.user(whom), role=ROLE_ADMIN)
            calls.append(side.members.UpdateMember(lower, metadata=made.at(who)))
        elif n % 5 == 0:
            calls.append(side.users.DeleteUser(user_service_pb2.DeleteUserRequest(id=made.user(who)), metadata=side.operator))
    await at_once(calls)
    assert [acts for _, acts in await owners(sides, made.id)] == [True]
