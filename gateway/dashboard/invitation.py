"""The page that an invitation's mail leads to: who invites whom into what, and two buttons."""

from google.rpc import code_pb2
from starlette.responses import RedirectResponse, Response

from clawplane.user.v1 import invitation_service_pb2
from gateway.dashboard.cookies import ORG
from gateway.dashboard.organization import CHOICE_S, PAGE
from gateway.dashboard.render import HEADERS, link, render
from gateway.dashboard.visit import Visit
from gateway.errors import ApiError

_MOST = 200
_NONE = (code_pb2.NOT_FOUND, code_pb2.INVALID_ARGUMENT)


async def show(visit: Visit, token: str = "") -> Response:
    """The invitation, or that there is none for this visitor: which of the possible reasons it is would tell too much."""
    token = token or visit.query.get("token", "")[:_MOST]
    try:
        request = invitation_service_pb2.LookupInvitationRequest(token=token)
        found = await visit.call(visit.services.invitations.LookupInvitation, request)
    except ApiError as error:
        if error.status.code not in _NONE:
            raise
        return render("invitation.html", visit, 404, page="", invitation=None, token=token)
    return render("invitation.html", visit, page="", invitation=found, token=token)


async def answer(visit: Visit) -> Response:
    """Accepts and goes on in the organization, or declines."""
    token, invitations, pb = visit.form.get("token", "")[:_MOST], visit.services.invitations, invitation_service_pb2
    try:
        if visit.form.get("act") != "accept":
            await visit.call(invitations.DeclineInvitation, pb.DeclineInvitationRequest(token=token))
            return RedirectResponse(link("/dashboard", done="declined"), 303, HEADERS)
        organization = await visit.call(invitations.AcceptInvitation, pb.AcceptInvitationRequest(token=token))
    except ApiError as error:
        if error.status.code == code_pb2.ALREADY_EXISTS:
            visit.problem = error.status.message
        elif error.status.code not in _NONE:
            raise
        return await show(visit, token)
    response = RedirectResponse(link(PAGE, done="accepted"), 303, HEADERS)
    visit.jar.put(response, ORG, organization.id, CHOICE_S)
    return response
