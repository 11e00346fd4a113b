"""Invitations: by mail alone, to one address, once; dead when sent again, revoked, too late, or from someone who may no longer."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import create_async_engine

from clawplane.user.v1 import invitation_pb2, member_service_pb2, organization_service_pb2, user_service_pb2
from clawplane.user.v1 import invitation_service_pb2 as rpc
from clawplane.user.v1.organization_pb2 import ROLE_ADMIN, ROLE_DEVELOPER, ROLE_OWNER, ROLE_VIEWER
from services.kit import ids, keys
from services.kit.columns import now
from services.user_svc.base import Base
from services.user_svc.invitations.models import Invitation
from services.user_svc.invitations.rules import shown
from tests.harness import Metadata, Person, Stack
from tests.teams import Code, Team, accept, create, invite, mailed_token, mails, refusal, team
from tests.test_members import remove, transfer, update

OPEN, EXPIRED = invitation_pb2.INVITATION_STATE_OPEN, invitation_pb2.INVITATION_STATE_EXPIRED


def look_up(stack: Stack, person: Person, token: str) -> Any:
    """The call of the page that asks whether to accept."""
    return stack.invitations.LookupInvitation(rpc.LookupInvitationRequest(token=token), metadata=person.metadata)


def decline(stack: Stack, person: Person, token: str) -> Any:
    """The call that declines."""
    return stack.invitations.DeclineInvitation(rpc.DeclineInvitationRequest(token=token), metadata=person.metadata)


async def dead(stack: Stack, person: Person, token: str) -> None:
    """A token that holds no more gives the same answer to everything, and the same as one that never was."""
    never = keys.mint("invt", "test", "inv").text
    for call in (look_up, accept, decline):
        told, nothing = [await refusal(call(stack, person, text)) for text in (token, never)]
        assert told == nothing and told.code is Code.NOT_FOUND


async def listed(made: Team, who: str = "owner", **more: Any) -> list[invitation_pb2.Invitation]:
    """The invitations that the organization shows."""
    answer = await made.stack.invitations.ListInvitations(rpc.ListInvitationsRequest(**more), metadata=made.at(who))
    return list(answer.invitations)


async def set_in(stack: Stack, invitation_id: str, **values: Any) -> None:
    """Changes an invitation behind everybody's back."""
    engine = create_async_engine(stack.urls["user_svc"])
    async with engine.begin() as connection:
        await connection.execute(sa.update(Invitation).where(Invitation.id == invitation_id).values(**values))
    await engine.dispose()


async def test_asked_shown_and_accepted_once(stack: Stack) -> None:
    made, guest = await team(stack, "admin"), await stack.person()
    invitation, token = await invite(stack, made.at("admin"), guest.user.email.upper(), ROLE_DEVELOPER)
    assert (invitation.email, invitation.role, invitation.state) == (guest.user.email, ROLE_DEVELOPER, OPEN)
    assert (invitation.org_id, invitation.organization_name, invitation.invited_by) == (made.id, "Team", made.user("admin"))
    days = (invitation.expires_at.ToDatetime() - invitation.created_at.ToDatetime()).total_seconds() / 86400
    assert days == pytest.approx(7, abs=0.01)
    (text,) = await mails(stack, guest.user.email)
    assert f"{stack.url}/dashboard/invitation?token={token}" in text and "as developer" in text
    assert await look_up(stack, guest, token) == invitation
    before = await stack.users.GetUser(user_service_pb2.GetUserRequest(id=guest.user.id), metadata=guest.metadata)
    joined = await accept(stack, guest, token)
    assert (joined.id, joined.my_role) == (made.id, ROLE_DEVELOPER)
    after = await stack.users.GetUser(user_service_pb2.GetUserRequest(id=guest.user.id), metadata=guest.metadata)
    assert (before.email_verified, after.email_verified) == (False, True)
    assert (await made.roles())[guest.user.id] == ROLE_DEVELOPER
    await dead(stack, guest, token)
    assert await listed(made) == []
    ended = {row.email: row.state for row in await listed(made, show_ended=True)}
    assert ended[guest.user.email] == invitation_pb2.INVITATION_STATE_ACCEPTED


async def test_the_token_is_in_the_mail_and_nowhere_else(stack: Stack) -> None:
    made = await team(stack)
    invitation, token = await invite(stack, made.at("owner"), "somebody@example.com")
    again = await stack.invitations.ResendInvitation(rpc.ResendInvitationRequest(id=invitation.id), metadata=made.at("owner"))
    secret = token.split("_")[3]
    for answer in (invitation, again, *await listed(made)):
        assert secret not in str(answer) and "token" not in answer.DESCRIPTOR.fields_by_name
    assert secret not in await kept(stack)


async def kept(stack: Stack) -> str:
    """Everything in the user service's tables, but for the mail that is on its way."""
    engine = create_async_engine(stack.urls["user_svc"])
    async with engine.connect() as connection:
        tables = [table for table in Base.metadata.sorted_tables if table.name != "mail_messages"]
        found = [str((await connection.execute(sa.select(table))).all()) for table in tables]
    await engine.dispose()
    return "\n".join(found)


async def test_only_whoever_has_the_address(stack: Stack) -> None:
    made, guest, thief = await team(stack), await stack.person(), await stack.person()
    _, token = await invite(stack, made.at("owner"), guest.user.email)
    await dead(stack, thief, token)
    await dead(stack, made.people["owner"], token)
    assert (await refusal(look_up(stack, guest, token[:-1] + ("0" if token[-1] != "0" else "1")))).code is Code.NOT_FOUND
    await accept(stack, guest, token)


async def test_sent_again_only_the_new_token_counts(stack: Stack) -> None:
    made, guest = await team(stack, "admin"), await stack.person()
    invitation, first = await invite(stack, made.at("owner"), guest.user.email, expires_in=Duration(seconds=3600))
    twice = await refusal(invite(stack, made.at("owner"), f" {guest.user.email.upper()}".strip()))
    assert (twice.code, twice["invitation_id"]) == (Code.ALREADY_EXISTS, invitation.id)
    again = await stack.invitations.ResendInvitation(rpc.ResendInvitationRequest(id=invitation.id), metadata=made.at("admin"))
    assert (again.id, again.invited_by) == (invitation.id, made.user("admin"))
    second = await mailed_token(stack, guest.user.email)
    assert first != second
    await dead(stack, guest, first)
    await accept(stack, guest, second)
    answered = await refusal(stack.invitations.ResendInvitation(rpc.ResendInvitationRequest(id=invitation.id), metadata=made.at("admin")))
    assert (answered.code, answered["state"]) == (Code.FAILED_PRECONDITION, "accepted")
    member = await refusal(invite(stack, made.at("owner"), guest.user.email))
    assert member.code is Code.ALREADY_EXISTS and not member["invitation_id"]


async def test_revoked_declined_and_too_late(stack: Stack) -> None:
    made, guest = await team(stack), await stack.person()
    invitation, token = await invite(stack, made.at("owner"), guest.user.email)
    revoke = rpc.RevokeInvitationRequest(id=invitation.id)
    first = await stack.invitations.RevokeInvitation(revoke, metadata=made.at("owner"))
    assert first == await stack.invitations.RevokeInvitation(revoke, metadata=made.at("owner"))
    await dead(stack, guest, token)

    invitation, token = await invite(stack, made.at("owner"), guest.user.email)
    declined = await decline(stack, guest, token)
    assert declined.state == invitation_pb2.INVITATION_STATE_DECLINED and declined.HasField("ended_at")
    await dead(stack, guest, token)
    revoke = rpc.RevokeInvitationRequest(id=invitation.id)
    assert (await refusal(stack.invitations.RevokeInvitation(revoke, metadata=made.at("owner")))).code is Code.FAILED_PRECONDITION

    invitation, token = await invite(stack, made.at("owner"), guest.user.email)
    await set_in(stack, invitation.id, expires_at=now() - timedelta(seconds=1))
    await dead(stack, guest, token)
    assert await listed(made) == [] and next(row.state for row in await listed(made, show_ended=True)) == EXPIRED
    # One that has expired stands in nobody's way: not of a new one, and not of itself.
    newer, _ = await invite(stack, made.at("owner"), guest.user.email)
    stale = stack.invitations.ResendInvitation(rpc.ResendInvitationRequest(id=invitation.id), metadata=made.at("owner"))
    assert (await refusal(stale))["invitation_id"] == newer.id
    await set_in(stack, newer.id, sent_at=now() - timedelta(days=1), expires_at=now() - timedelta(seconds=1))
    await stack.invitations.ResendInvitation(rpc.ResendInvitationRequest(id=newer.id), metadata=made.at("owner"))
    await accept(stack, guest, await mailed_token(stack, guest.user.email))


async def test_nobody_gives_what_he_does_not_have(stack: Stack) -> None:
    made = await team(stack, "viewer", "developer", "admin")
    for low in ("viewer", "developer"):
        assert (await refusal(invite(stack, made.at(low), "a@example.com")))["permission"] == "invitations.create"
    for by in ("admin", "owner"):
        assert (await refusal(invite(stack, made.at(by), "a@example.com", ROLE_OWNER))).code is Code.INVALID_ARGUMENT
        await invite(stack, made.at(by), f"{by}@example.com", ROLE_ADMIN)
    for seconds in (0, 59, 31 * 86400):
        late = invite(stack, made.at("owner"), "b@example.com", expires_in=Duration(seconds=seconds))
        assert (await refusal(late)).code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("way", ["removed", "lowered", "switched off", "deleted", "the organization deleted"])
async def test_an_invitation_is_worth_no_more_than_who_invites(stack: Stack, way: str) -> None:
    made, guest = await team(stack, "admin"), await stack.person()
    _, token = await invite(stack, made.at("admin"), guest.user.email, ROLE_VIEWER)
    await look_up(stack, guest, token)
    if way == "removed":
        await remove(made, "owner", "admin")
    elif way == "lowered":
        await update(made, "owner", "admin", ROLE_DEVELOPER)
    elif way == "switched off":
        off = user_service_pb2.UpdateUserAccountRequest(id=made.user("admin"), is_active=False)
        await stack.users.UpdateUserAccount(off, metadata=stack.operator)
    elif way == "deleted":
        await stack.users.DeleteUser(user_service_pb2.DeleteUserRequest(id=made.user("admin")), metadata=stack.operator)
    else:
        request = organization_service_pb2.DeleteOrganizationRequest(id=made.id)
        await stack.organizations.DeleteOrganization(request, metadata=made.at("owner"))
    await dead(stack, guest, token)


async def test_who_handed_over_still_invites(stack: Stack) -> None:
    made, guest = await team(stack, "viewer"), await stack.person()
    _, token = await invite(stack, made.at("owner"), guest.user.email, ROLE_ADMIN)
    await transfer(made, "owner", "viewer")
    await accept(stack, guest, token)


async def test_an_admin_of_one_organization_answers_for_no_other(stack: Stack) -> None:
    """An invitation's id of another organization is found nowhere, whichever the caller owns."""
    made, thief = await team(stack), await team(stack)
    invitation, _ = await invite(stack, made.at("owner"), "c@example.com")
    who: list[Metadata] = [thief.at("owner"), thief.people["owner"].metadata]
    for metadata in who:
        resend = stack.invitations.ResendInvitation(rpc.ResendInvitationRequest(id=invitation.id), metadata=metadata)
        revoke = stack.invitations.RevokeInvitation(rpc.RevokeInvitationRequest(id=invitation.id), metadata=metadata)
        assert [(await refusal(call)).code for call in (resend, revoke)] == [Code.NOT_FOUND, Code.NOT_FOUND]
    assert [row.id for row in await listed(made)] == [invitation.id] and await listed(thief) == []


async def test_twenty_ask_the_same_address_at_once(stack: Stack) -> None:
    made = await team(stack)
    email = "popular@example.com"
    request = rpc.CreateInvitationRequest(email=email, role=ROLE_VIEWER)
    told = await asyncio.gather(*(refusal(stack.invitations.CreateInvitation(request, metadata=made.at("owner"))) for _ in range(20)))
    assert sorted(each.code.name for each in told) == ["ALREADY_EXISTS"] * 19 + ["OK"]
    assert len(await listed(made)) == 1


async def test_a_member_already_is_told_so(stack: Stack) -> None:
    """The address moved to a member after the invitation was sent."""
    made, guest = await team(stack), await stack.person()
    invitation, token = await invite(stack, made.at("owner"), "old@example.com")
    second, _ = await invite(stack, made.at("owner"), guest.user.email)
    await accept(stack, guest, await mailed_token(stack, guest.user.email))
    assert second.id != invitation.id
    await set_in(stack, invitation.id, email=guest.user.email)
    assert (await refusal(accept(stack, guest, token))).code is Code.ALREADY_EXISTS
    members = await stack.members.ListMembers(member_service_pb2.ListMembersRequest(), metadata=made.at("owner"))
    assert len(members.members) == 2


async def test_mail_shows_names_and_no_links_of_others(stack: Stack, person: Person) -> None:
    organization = await create(stack, person, "Win at http://evil.example/now " + "x" * 100)
    made = Team(stack, organization, {"owner": person})
    email = f"victim-{ids.uuid7().hex}@example.com"
    await invite(stack, made.at("owner"), email)
    (text,) = await mails(stack, email)
    assert "evil.example" not in text and text.count("://") == 1 and "x" * 60 not in text


@given(st.text())
def test_a_shown_name_is_one_short_line(name: str) -> None:
    line = shown(name)
    assert "\n" not in line and "\r" not in line and "://" not in line and len(line) <= 2 * 60
