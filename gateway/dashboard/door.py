"""What happens whenever somebody has come in, whatever the way."""

from typing import Any

from google.rpc import code_pb2
from starlette.responses import RedirectResponse, Response

from clawplane.user.v1 import session_service_pb2
from gateway.dashboard.cookies import ADDRESS, BINDING, ORG, SESSION, SIGN_UP
from gateway.dashboard.render import HEADERS
from gateway.dashboard.visit import Visit, reason
from gateway.errors import ApiError
from services.kit import auth, ids, keys

_REFUSED = (code_pb2.UNAUTHENTICATED, code_pb2.PERMISSION_DENIED)
WRONG = "That did not work. Either it is wrong, or it was tried too often: wait a while, or sign in another way."
"""What is said of every failed proof: which of the two it was, and whether there is an account, is nobody's business."""


async def let_in(visit: Visit, signed_in: Any, then: str) -> Response:
    """Keeps the token of a new session, and ends the one that this browser had: a session serves one sign-in."""
    await end_session(visit)
    response = keep(visit, signed_in, then)
    # The organization was perhaps somebody else's choice.
    visit.jar.drop(response, ADDRESS, BINDING, SIGN_UP, ORG)
    return response


def keep(visit: Visit, signed_in: Any, then: str) -> Response:
    """To a page, with the token of a session in a cookie that lives as long."""
    lifetime_s = signed_in.session.expires_at.seconds - signed_in.session.created_at.seconds
    response = RedirectResponse(then, 303, HEADERS)
    visit.jar.put(response, SESSION, signed_in.token, lifetime_s)
    return response


async def end_session(visit: Visit) -> None:
    """Ends the session of this browser, everywhere; one that has ended already is no matter."""
    key = keys.parse(visit.token, auth.SESSION, ids.PREFIXES["Session"])
    # Whichever organization was chosen: it may be gone, and the session must end nevertheless.
    visit.org = ""
    if key is not None:
        try:
            await visit.call(visit.services.sessions.RevokeSession, session_service_pb2.RevokeSessionRequest(id=key.id))
        except ApiError as error:
            if error.status.code not in (code_pb2.UNAUTHENTICATED, code_pb2.NOT_FOUND):
                raise


def blame(visit: Visit, error: ApiError) -> int:
    """Puts what is wrong with a proof, or with what was typed, onto the page; the page's status. Raises what is neither."""
    if error.status.code in _REFUSED and reason(error) == "SIGN_IN_FAILED":
        visit.problem = WRONG
        return 400
    if reason(error) == "DEPENDENCY_UNAVAILABLE":
        visit.problem = error.status.message
        return error.http_status
    if error.status.code not in (code_pb2.INVALID_ARGUMENT, code_pb2.RESOURCE_EXHAUSTED, code_pb2.FAILED_PRECONDITION):
        raise error
    visit.blame(error)
    return error.http_status
