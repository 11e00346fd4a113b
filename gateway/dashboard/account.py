"""The visitor's own account: profile, password, sessions, and its end."""

import re
from typing import Any

from google.rpc import code_pb2
from starlette.responses import RedirectResponse, Response

from clawplane.user.v1 import session_service_pb2, sign_in_service_pb2, user_pb2, user_service_pb2
from gateway.dashboard.cookies import ADDRESS, ORG, SESSION, SIGN_UP
from gateway.dashboard.door import WRONG
from gateway.dashboard.render import HEADERS, render
from gateway.dashboard.sign_in import to_code
from gateway.dashboard.visit import Visit, reason
from gateway.errors import ApiError, not_found

PAGE = "/dashboard/account"
FIELDS = ("full_name", "username", "bio", "location", "website_url", "github_username", "avatar_url")
"""What people may change of themselves here."""
_SESSIONS = 10
_BROWSERS = (("Edg", "Edge"), ("OPR", "Opera"), ("Firefox", "Firefox"), ("Chrome", "Chrome"), ("Safari", "Safari"))
_SYSTEMS = (
    ("iPhone", "iPhone"), ("iPad", "iPad"), ("Android", "Android"), ("Windows", "Windows"), ("Mac OS X", "macOS"), ("CrOS", "ChromeOS"),
    ("Linux", "Linux"),
)  # fmt: skip


async def show(visit: Visit, status: int = 200) -> Response:
    """Everything on one page."""
    listing = session_service_pb2.ListSessionsRequest(page_size=_SESSIONS, page_token=visit.query.get("page_token", ""))
    user, found = await visit.calls(
        visit.call(visit.services.users.GetUser, user_service_pb2.GetUserRequest(id=visit.who.user_id)),
        visit.call(visit.services.sessions.ListSessions, listing),
    )
    given = {name: getattr(user, name) for name in FIELDS} | {name: visit.form[name] for name in FIELDS if name in visit.form}
    return render(
        "account.html", visit, status, page="account", user=user, given=given, sessions=found.sessions, next_page=found.next_page_token,
        device=device,
    )  # fmt: skip


def device(agent: str) -> str:
    """What a browser calls itself, in two words: "Firefox on Linux"; what is no browser, in its own first word."""
    browser = next((name for mark, name in _BROWSERS if f"{mark}/" in agent), "")
    system = next((name for mark, name in _SYSTEMS if mark in agent), "")
    if browser:
        return f"{browser} on {system}" if system else browser
    return re.split(r"[/ ]", agent, maxsplit=1)[0][:40] or "Unknown device"


async def back(visit: Visit) -> Response:
    """To the page, from the address that a form was sent to."""
    return RedirectResponse(PAGE, 303, HEADERS)


async def change(visit: Visit) -> Response:
    """Another profile; refused when it was changed elsewhere meanwhile."""
    user = user_pb2.User(id=visit.who.user_id, etag=visit.form.get("etag", ""))
    for name in FIELDS:
        setattr(user, name, visit.form.get(name, "")[:2100])
    request = user_service_pb2.UpdateUserRequest(user=user)
    request.update_mask.paths.extend(FIELDS)
    return await _done(visit, visit.services.users.UpdateUser, request, "saved")


async def change_password(visit: Visit) -> Response:
    """Another password; every other session ends."""
    request = sign_in_service_pb2.ChangePasswordRequest(
        old_password=visit.secret("old_password"), new_password=visit.secret("new_password")
    )
    return await _done(visit, visit.services.sign_in.ChangePassword, request, "password-changed")


async def set_password(visit: Visit) -> Response:
    """For whoever has none, or has forgotten it: a code by mail, and the page that takes it."""
    request = sign_in_service_pb2.RequestPasswordResetRequest(email=visit.who.email)
    try:
        await visit.call(visit.services.sign_in.RequestPasswordReset, request)
    except ApiError as error:
        visit.blame(error)
        return await show(visit, error.http_status)
    return to_code(visit, "/dashboard/reset/code", visit.who.email)


async def end_sessions(visit: Visit) -> Response:
    """Ends one session, the others, or all."""
    which, sessions, pb = visit.form.get("which", ""), visit.services.sessions, session_service_pb2
    if which == "others":
        return await _done(visit, sessions.RevokeOtherSessions, pb.RevokeOtherSessionsRequest(), "sessions-ended")
    if which == "all":
        return _forget(visit, await _done(visit, sessions.RevokeAllSessions, pb.RevokeAllSessionsRequest(), "signed-out"))
    return await _done(visit, sessions.RevokeSession, pb.RevokeSessionRequest(id=which), "session-ended")


async def delete(visit: Visit) -> Response:
    """Deletes the account, once its address was typed."""
    if visit.form.get("email", "").lower() != visit.who.email.lower():
        visit.problems["confirm"] = "This is not the address of your account."
        return await show(visit, 400)
    answer = await _done(visit, visit.services.users.DeleteSelf, user_service_pb2.DeleteSelfRequest(), "account-deleted")
    return _forget(visit, answer)


async def _done(visit: Visit, rpc: Any, request: Any, what: str) -> Response:
    try:
        await visit.call(rpc, request)
    except ApiError as error:
        _blame(visit, error)
        return await show(visit, error.http_status)
    gone = what in ("signed-out", "account-deleted")
    return RedirectResponse(f"{'/dashboard/sign-in' if gone else PAGE}?done={what}", 303, HEADERS)


def _blame(visit: Visit, error: ApiError) -> None:
    """Puts an error onto the page, by the names that the form's fields have; raises what is not about the form."""
    if reason(error) == "SIGN_IN_FAILED":
        visit.problems = {"old_password": WRONG}
        return
    if error.status.code in (code_pb2.UNAUTHENTICATED, code_pb2.PERMISSION_DENIED) or error.http_status >= 500:
        raise error
    if error.status.code == code_pb2.NOT_FOUND:
        raise not_found("There is no such session.")
    visit.blame(error)
    visit.problems = {name.removeprefix("user."): text for name, text in visit.problems.items()}
    # What has no field of its own stands at the head of the page.
    if not visit.problems.keys() <= {*FIELDS, "old_password", "new_password"}:
        visit.problem = "; ".join(visit.problems.values())


def _forget(visit: Visit, response: Response) -> Response:
    """Whoever is out here needs no token any more."""
    if response.status_code == 303:
        visit.jar.drop(response, SESSION, ORG, ADDRESS, SIGN_UP)
    return response
