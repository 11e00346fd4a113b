"""The organization that the visitor acts in: its members, who is invited, its name and its end; and choosing another."""

import uuid
from typing import Any

from google.rpc import code_pb2
from starlette.responses import RedirectResponse, Response

from clawplane.user.v1 import (
    invitation_service_pb2,
    member_service_pb2,
    organization_pb2,
    organization_service_pb2,
)
from gateway.dashboard.cookies import ORG
from gateway.dashboard.render import HEADERS, link, render
from gateway.dashboard.visit import HOME, Visit, info, own_path
from gateway.errors import ApiError, not_found

PAGE = "/dashboard/organization"
CHOICE_S = 365 * 86400
"""How long a browser keeps the choice of an organization."""
ROLES: dict[str, organization_pb2.Role.ValueType] = {
    "viewer": organization_pb2.ROLE_VIEWER, "developer": organization_pb2.ROLE_DEVELOPER, "admin": organization_pb2.ROLE_ADMIN,
}  # fmt: skip
TERMS = {"1": "a day", "7": "a week", "30": "30 days"}
_SHOWN = 50
_FIELDS = {"email", "role", "organization.name"}
"""What has a place of its own on the page for what is wrong with it."""
_DAY_S = 86400


async def show(visit: Visit, status: int = 200) -> Response:
    """Members, invitations, name."""
    members = member_service_pb2.ListMembersRequest(page_size=_SHOWN, page_token=visit.query.get("page_token", ""))
    found, organization, invited = await visit.calls(
        visit.call(visit.services.members.ListMembers, members),
        visit.call(visit.services.organizations.GetOrganization, organization_service_pb2.GetOrganizationRequest(id=visit.who.org_id)),
        _invitations(visit),
    )
    given = {"email": "", "role": "developer", "days": "7"} | visit.form
    return render(
        "organization.html", visit, status, page="organization", organization=organization, members=found.members,
        next_page=found.next_page_token, invitations=invited.invitations, roles=_givable(visit), terms=TERMS, given=given,
    )  # fmt: skip


async def _invitations(visit: Visit) -> invitation_service_pb2.ListInvitationsResponse:
    if not visit.may("invitations.list"):
        return invitation_service_pb2.ListInvitationsResponse()
    ended = visit.query.get("invitations") == "all"
    request = invitation_service_pb2.ListInvitationsRequest(page_size=_SHOWN, show_ended=ended)
    answer: invitation_service_pb2.ListInvitationsResponse = await visit.call(visit.services.invitations.ListInvitations, request)
    return answer


def _givable(visit: Visit) -> dict[str, int]:
    """The roles that the visitor may give: none above the own one."""
    return {name: role for name, role in ROLES.items() if role <= visit.who.role}


def _role(visit: Visit) -> organization_pb2.Role.ValueType:
    return ROLES.get(visit.form.get("role", ""), organization_pb2.ROLE_UNSPECIFIED)


async def back(visit: Visit) -> Response:
    """To the page, from the address that a form was sent to."""
    return RedirectResponse(PAGE, 303, HEADERS)


async def change_member(visit: Visit) -> Response:
    """Another role, out, or the new owner."""
    user_id, members, pb = visit.form.get("user_id", ""), visit.services.members, member_service_pb2
    known: dict[str, tuple[Any, Any]] = {
        "role": (members.UpdateMember, pb.UpdateMemberRequest(user_id=user_id, role=_role(visit))),
        "remove": (members.RemoveMember, pb.RemoveMemberRequest(user_id=user_id)),
        "transfer": (members.TransferOwnership, pb.TransferOwnershipRequest(user_id=user_id)),
    }
    act = visit.form.get("act", "")
    if act not in known:
        raise not_found()
    return await _done(visit, *known[act], f"member-{act}")


async def invite(visit: Visit) -> Response:
    """Invites an address; the mail brings the token there, and nowhere else."""
    request = invitation_service_pb2.CreateInvitationRequest(
        email=visit.form.get("email", ""), role=_role(visit)
    )
    if visit.form.get("days") in TERMS:
        request.expires_in.seconds = int(visit.form["days"]) * _DAY_S
    return await _done(visit, visit.services.invitations.CreateInvitation, request, "invited")


async def change_invitation(visit: Visit) -> Response:
    """Sends an invitation again, or takes it back."""
    wanted, invitations, pb = visit.form.get("id", ""), visit.services.invitations, invitation_service_pb2
    known: dict[str, tuple[Any, Any]] = {
        "resend": (invitations.ResendInvitation, pb.ResendInvitationRequest(id=wanted)),
        "revoke": (invitations.RevokeInvitation, pb.RevokeInvitationRequest(id=wanted)),
    }
    act = visit.form.get("act", "")
    if act not in known:
        raise not_found()
    return await _done(visit, *known[act], f"invitation-{act}")


async def rename(visit: Visit) -> Response:
    """Another name."""
    organization = organization_pb2.Organization(
        id=visit.who.org_id, name=visit.form.get("name", "")[:201], etag=visit.form.get("etag", "")
    )
    request = organization_service_pb2.UpdateOrganizationRequest(organization=organization)
    request.update_mask.paths.append("name")
    return await _done(visit, visit.services.organizations.UpdateOrganization, request, "saved")


async def leave(visit: Visit) -> Response:
    """Takes the visitor out; he goes on in his personal one."""
    response = await _done(visit, visit.services.members.LeaveOrganization, member_service_pb2.LeaveOrganizationRequest(), "left", HOME)
    return _forget_choice(visit, response)


async def delete(visit: Visit) -> Response:
    """Deletes the organization, once its name was typed."""
    if visit.form.get("name", "") != visit.organization.name:
        visit.problems["confirm"] = "This is not its name."
        return await show(visit, 400)
    request = organization_service_pb2.DeleteOrganizationRequest(id=visit.who.org_id)
    response = await _done(visit, visit.services.organizations.DeleteOrganization, request, "organization-deleted", HOME)
    return _forget_choice(visit, response)


def _forget_choice(visit: Visit, response: Response) -> Response:
    if response.status_code == 303:
        visit.jar.drop(response, ORG)
    return response


async def _done(visit: Visit, rpc: Any, request: Any, what: str, then: str = PAGE) -> Response:
    try:
        await visit.call(rpc, request)
    except ApiError as error:
        _raise_if_of_the_visitor(error)
        visit.blame(error)
        if "invitation_id" in info(error).metadata:
            visit.problems = {"email": "An invitation to this address is open: send that one again, below."}
        if not visit.problems.keys() <= _FIELDS:
            visit.problem = "; ".join(visit.problems.values())
        return await show(visit, error.http_status)
    return RedirectResponse(link(then, done=what), 303, HEADERS)


def _raise_if_of_the_visitor(error: ApiError) -> None:
    """What is not wrong with the form but with who sends it is no matter of this page."""
    if error.status.code in (code_pb2.UNAUTHENTICATED, code_pb2.PERMISSION_DENIED) or error.http_status >= 500:
        raise error


async def switch(visit: Visit) -> Response:
    """Acts in another organization from now on. The services decide with every call whether it is one of the visitor's."""
    response = RedirectResponse(own_path(visit.form.get("next", "")), 303, HEADERS)
    chosen = visit.form.get("org", "")
    if chosen not in {each.id for each in visit.organizations}:
        raise not_found("There is no such organization, or you are not a member of it.")
    visit.jar.put(response, ORG, chosen, CHOICE_S)
    return response


async def new(visit: Visit, status: int = 200) -> Response:
    """The form for another organization, and those that can be brought back."""
    listing = organization_service_pb2.ListOrganizationsRequest(page_size=250, show_deleted=True)
    found = await visit.call(visit.services.organizations.ListOrganizations, listing)
    deleted = [each for each in found.organizations if each.HasField("deleted_at") and not each.is_personal]
    return render(
        "organization_new.html", visit, status, page="", given={"name": ""} | visit.form, request_id=uuid.uuid4(), deleted=deleted
    )


async def create(visit: Visit) -> Response:
    """Makes it, and acts in it."""
    request = organization_service_pb2.CreateOrganizationRequest(
        organization=organization_pb2.Organization(name=visit.form.get("name", "")[:201]), request_id=visit.form.get("request_id", "")
    )
    return await _made(visit, visit.services.organizations.CreateOrganization, request, "organization-created")


async def undelete(visit: Visit) -> Response:
    """Brings a deleted one back, and acts in it."""
    request = organization_service_pb2.UndeleteOrganizationRequest(id=visit.form.get("id", ""))
    return await _made(visit, visit.services.organizations.UndeleteOrganization, request, "organization-back")


async def _made(visit: Visit, rpc: Any, request: Any, what: str) -> Response:
    try:
        made = await visit.call(rpc, request)
    except ApiError as error:
        _raise_if_of_the_visitor(error)
        visit.blame(error)
        visit.problems = {name.removeprefix("organization."): text for name, text in visit.problems.items()}
        visit.problem = visit.problem or visit.problems.get("id", "")
        return await new(visit, error.http_status)
    response = RedirectResponse(link(PAGE, done=what), 303, HEADERS)
    visit.jar.put(response, ORG, made.id, CHOICE_S)
    return response

