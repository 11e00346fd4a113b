"""Organizations with members of every role, made as people make them: invited by mail, and accepted."""

import re
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2

from clawplane.user.v1 import (
    invitation_pb2,
    invitation_service_pb2,
    mailbox_service_pb2,
    member_service_pb2,
    organization_pb2,
    organization_service_pb2,
)
from clawplane.user.v1.organization_pb2 import ROLE_ADMIN, ROLE_DEVELOPER, ROLE_OWNER, ROLE_VIEWER
from tests.harness import Metadata, Person, Stack
from tests.kit.echo import detail

Code = grpc.StatusCode
ROLES = {"viewer": ROLE_VIEWER, "developer": ROLE_DEVELOPER, "admin": ROLE_ADMIN, "owner": ROLE_OWNER}


@dataclass
class Team:
    """An organization, and its people by the name of their role ("admin", "admin2", ...)."""

    stack: Stack
    organization: organization_pb2.Organization
    people: dict[str, Person] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The organization's id."""
        return self.organization.id

    def at(self, who: "str | Person") -> Metadata:
        """Somebody's credential, acting in the organization."""
        person = self.people[who] if isinstance(who, str) else who
        return at(person, self.id)

    def user(self, who: str) -> str:
        """Somebody's user id."""
        return str(self.people[who].user.id)

    async def add(self, name: str, person: Person | None = None) -> Person:
        """Invites a person by mail as the owner, and accepts as that person; the role is the name without its number."""
        person = person or await self.stack.person()
        _, token = await invite(self.stack, self.at("owner"), person.user.email, ROLES[name.rstrip("0123456789")])
        await accept(self.stack, person, token)
        self.people[name] = person
        return person

    async def roles(self) -> dict[str, int]:
        """User id -> role, as the owner sees it, or whoever is asked to look."""
        listed = await self.stack.members.ListMembers(member_service_pb2.ListMembersRequest(page_size=250), metadata=self.at("owner"))
        return {member.user_id: member.role for member in listed.members}


def at(person: Person, org_id: str) -> Metadata:
    """A person's credential, acting in an organization."""
    return (*person.metadata, ("clawplane-org", org_id))


async def create(stack: Stack, person: Person, name: str = "Team", **more: Any) -> organization_pb2.Organization:
    """A new organization of a person."""
    request = organization_service_pb2.CreateOrganizationRequest(organization={"name": name}, **more)
    return await stack.organizations.CreateOrganization(request, metadata=person.metadata)


async def team(stack: Stack, *names: str) -> Team:
    """A new organization with an owner and these members."""
    owner = await stack.person()
    made = Team(stack, await create(stack, owner), {"owner": owner})
    for name in names:
        await made.add(name)
    return made


async def invite(stack: Stack, by: Metadata, email: str, role: int = ROLE_VIEWER, **more: Any) -> tuple[invitation_pb2.Invitation, str]:
    """An invitation, and the token that its mail carries."""
    request = invitation_service_pb2.CreateInvitationRequest(email=email, role=role, **more)  # type: ignore[arg-type]
    made = await stack.invitations.CreateInvitation(request, metadata=by)
    return made, await mailed_token(stack, made.email)


async def accept(stack: Stack, person: Person, token: str) -> organization_pb2.Organization:
    """Accepts an invitation."""
    return await stack.invitations.AcceptInvitation(invitation_service_pb2.AcceptInvitationRequest(token=token), metadata=person.metadata)


async def mails(stack: Stack, address: str) -> list[str]:
    """The texts of the mails to an address, the newest first."""
    listed = await stack.mailbox.ListMailMessages(mailbox_service_pb2.ListMailMessagesRequest(to_address=address), metadata=stack.operator)
    return [message.text for message in listed.mail_messages]


async def mailed_token(stack: Stack, address: str) -> str:
    """The token in the newest mail to an address."""
    found = re.search(r"token=(invt_\w+)", (await mails(stack, address))[0])
    assert found
    return found.group(1)


@dataclass(frozen=True)
class Refusal:
    """How a call was refused; code OK when it was not."""

    code: grpc.StatusCode
    reason: str = ""
    metadata: tuple[tuple[str, str], ...] = ()

    def __getitem__(self, name: str) -> str:
        return dict(self.metadata).get(name, "")


async def refusal(call: Awaitable[Any]) -> Refusal:
    """What a call is refused with."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        info = detail(error, error_details_pb2.ErrorInfo)
        return Refusal(error.code(), info.reason, tuple(sorted(info.metadata.items())))
    return Refusal(Code.OK)
