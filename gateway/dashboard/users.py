"""For operators: the users, their tier, and whether they may sign in."""

from google.rpc import code_pb2
from starlette.responses import RedirectResponse, Response

from clawplane.user.v1 import user_service_pb2
from gateway.dashboard.render import HEADERS, render
from gateway.dashboard.visit import Visit
from gateway.errors import ApiError

_PAGE_SIZE = 25


async def index(visit: Visit, status: int = 200) -> Response:
    """The users, newest first."""
    request = user_service_pb2.ListUsersRequest(
        prefix=visit.query.get("prefix", "")[:254], tier=visit.query.get("tier", "")[:32], page_size=_PAGE_SIZE,
        page_token=visit.query.get("page_token", ""), show_deleted=visit.query.get("deleted") == "1",
    )  # fmt: skip
    found = await visit.call(visit.services.users.ListUsers, request)
    return render(
        "users.html", visit, status, page="users", users=found.users, next_page=found.next_page_token,
        tiers=sorted({user.tier for user in found.users}),
        filtered=any(visit.query.get(name) for name in ("prefix", "tier", "deleted")),
    )  # fmt: skip


async def change(visit: Visit) -> Response:
    """Another tier, or switched off or on."""
    request = user_service_pb2.UpdateUserAccountRequest(id=visit.form.get("id", ""))
    if visit.form.get("tier"):
        request.tier = visit.form["tier"]
    if visit.form.get("active") in ("0", "1"):
        request.is_active = visit.form["active"] == "1"
    try:
        await visit.call(visit.services.users.UpdateUserAccount, request)
    except ApiError as error:
        if error.status.code not in (code_pb2.INVALID_ARGUMENT, code_pb2.FAILED_PRECONDITION, code_pb2.NOT_FOUND):
            raise
        visit.problem = error.status.message
        return await index(visit, error.http_status)
    return RedirectResponse("/dashboard/users?done=saved", 303, HEADERS)
