"""The way in and out: a one-time link for a session in a cookie."""

from google.rpc import code_pb2
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from clawplane.user.v1 import session_service_pb2, sign_in_link_service_pb2
from gateway.dashboard.render import HEADERS, render
from gateway.dashboard.visit import Visit
from gateway.errors import ApiError
from services.kit import auth, ids, keys

_MOST = 200


class Door:
    """Keeps the session's token in a cookie that no script reads and no other site sends along with a form."""

    def __init__(self, *, secure: bool) -> None:
        # A browser takes a cookie of this prefix from the host itself alone, and over TLS alone.
        self._name, self._secure = ("__Host-clawplane" if secure else "clawplane"), secure

    def token(self, http: Request) -> str:
        """The session's token; empty without one."""
        token = http.cookies.get(self._name, "")
        return token if len(token) <= _MOST and token.isascii() and token.isprintable() else ""

    async def show(self, visit: Visit) -> Response:
        """The page that a link leads to. A button redeems it: whatever opens links to look at them would use them up."""
        if visit.token and not visit.query.get("token") and not visit.query.get("next"):
            return RedirectResponse("/dashboard", 303)
        return render("sign_in.html", visit, token=visit.query.get("token", "")[:_MOST], next=_own(visit.query.get("next", "")), used=False)

    async def enter(self, visit: Visit) -> Response:
        """Redeems the link."""
        request = sign_in_link_service_pb2.RedeemSignInLinkRequest(token=visit.form.get("token", "")[:_MOST])
        visit.token = ""
        try:
            answer = await visit.call(visit.services.sign_in_links.RedeemSignInLink, request)
        except ApiError as error:
            if error.status.code not in (code_pb2.NOT_FOUND, code_pb2.INVALID_ARGUMENT):
                raise
            return render("sign_in.html", visit, 404, token="", next=_own(visit.form.get("next", "")), used=True)
        lifetime_s = answer.session.expires_at.seconds - answer.session.created_at.seconds
        response = RedirectResponse(_own(visit.form.get("next", "")), 303, HEADERS)
        response.set_cookie(
            self._name, answer.token, max_age=lifetime_s, path="/", secure=self._secure, httponly=True, samesite="lax"
        )
        return response

    async def leave(self, visit: Visit) -> Response:
        """Ends the session, here and everywhere."""
        key = keys.parse(visit.token, auth.SESSION, ids.PREFIXES["Session"])
        if key is not None:
            await visit.call(visit.services.sessions.RevokeSession, session_service_pb2.RevokeSessionRequest(id=key.id))
        return self.forget(RedirectResponse("/dashboard/sign-in?done=signed-out", 303, HEADERS))

    def forget(self, response: Response) -> Response:
        """Lets the browser forget the token."""
        response.delete_cookie(self._name, path="/", secure=self._secure, httponly=True, samesite="lax")
        return response


def _own(path: str) -> str:
    """Where to go on: a page of the dashboard, and of nobody else."""
    is_own = path.startswith("/dashboard") and path[10:11] in ("", "/", "?") and "//" not in path and "\\" not in path
    return path if is_own and path.isprintable() else "/dashboard"
