"""The way in and out: a code from the mail, a password, a one-time link; each becomes a session in a cookie."""

from typing import Any
from urllib.parse import quote, unquote

from google.rpc import code_pb2
from starlette.responses import RedirectResponse, Response

from clawplane.user.v1 import oauth_service_pb2, sign_in_link_service_pb2, sign_in_service_pb2
from gateway.dashboard.cookies import ADDRESS, ORG, SESSION, SHORT_S
from gateway.dashboard.door import blame, end_session, let_in
from gateway.dashboard.render import HEADERS, link, render
from gateway.dashboard.visit import HOME, Visit, own_path
from gateway.errors import ApiError

_MOST = 200
_MOST_ADDRESS = 254


class SignIn:
    """``mailbox``: mail goes to a page instead of to people. ``links``: one-time links are made here."""

    def __init__(self, *, mailbox: bool, links: bool) -> None:
        self._ways = {"mailbox": mailbox, "links": links}

    async def show(self, visit: Visit, status: int = 200, **said: Any) -> Response:
        """The page; with a link's token, a button that redeems it: whatever opens links to look at them would use them up."""
        token = visit.query.get("token", "")[:_MOST]
        if visit.token and not token and not visit.query.get("next") and status == 200:
            return RedirectResponse(HOME, 303)
        values = {"token": token, "used": False, "email": visit.form.get("email", "")} | said
        return render("sign_in.html", visit, status, **values, **self._ways, providers=await self._providers(visit), next=wanted(visit))

    async def _providers(self, visit: Visit) -> list[oauth_service_pb2.OAuthProvider]:
        """Who else may say who somebody is; a page without them is better than none."""
        try:
            found = await visit.call(visit.services.oauth.ListOAuthProviders, oauth_service_pb2.ListOAuthProvidersRequest())
        except ApiError:
            return []
        return list(found.providers)

    async def enter(self, visit: Visit) -> Response:
        """Redeems a link, or mails a code and leads to where it is typed in."""
        if "token" in visit.form:
            return await self._redeem(visit)
        email = visit.form.get("email", "")
        try:
            await call_as_nobody(visit, visit.services.sign_in.RequestCode, sign_in_service_pb2.RequestCodeRequest(email=email))
        except ApiError as error:
            return await self.show(visit, blame(visit, error))
        return to_code(visit, "/dashboard/sign-in/code", email)

    async def _redeem(self, visit: Visit) -> Response:
        request = sign_in_link_service_pb2.RedeemSignInLinkRequest(token=visit.form["token"][:_MOST])
        try:
            answer = await call_as_nobody(visit, visit.services.sign_in_links.RedeemSignInLink, request)
        except ApiError as error:
            if error.status.code not in (code_pb2.NOT_FOUND, code_pb2.INVALID_ARGUMENT):
                raise
            return await self.show(visit, 404, used=True)
        return await let_in(visit, answer, wanted(visit))

    async def show_code(self, visit: Visit, status: int = 200) -> Response:
        """Where the code is typed in; the address that it went to is kept."""
        email = address(visit)
        if not email:
            return RedirectResponse(link("/dashboard/sign-in", next=visit.query.get("next", "")), 303, HEADERS)
        return render("sign_in_code.html", visit, status, email=email, next=wanted(visit), **self._ways)

    async def check_code(self, visit: Visit) -> Response:
        """Signs in with the code."""
        request = sign_in_service_pb2.SignInWithCodeRequest(email=address(visit), code=visit.form.get("code", ""))
        try:
            answer = await call_as_nobody(visit, visit.services.sign_in.SignInWithCode, request)
        except ApiError as error:
            return await self.show_code(visit, blame(visit, error))
        return await let_in(visit, answer, wanted(visit))

    async def show_password(self, visit: Visit, status: int = 200) -> Response:
        """Address and password."""
        email = visit.form.get("email", "") or address(visit)
        return render("sign_in_password.html", visit, status, email=email, next=wanted(visit), **self._ways)

    async def check_password(self, visit: Visit) -> Response:
        """Signs in with the password."""
        request = sign_in_service_pb2.SignInRequest(email=visit.form.get("email", ""), password=visit.secret("password"))
        try:
            answer = await call_as_nobody(visit, visit.services.sign_in.SignIn, request)
        except ApiError as error:
            return await self.show_password(visit, blame(visit, error))
        return await let_in(visit, answer, wanted(visit))

    async def leave(self, visit: Visit) -> Response:
        """Ends the session, here and everywhere."""
        await end_session(visit)
        response = RedirectResponse("/dashboard/sign-in?done=signed-out", 303, HEADERS)
        visit.jar.drop(response, SESSION, ORG)
        return response


async def call_as_nobody(visit: Visit, rpc: Any, request: Any) -> Any:
    """A call before anybody is known; what the browser still has of an old session would only be refused."""
    kept, visit.token = visit.token, ""
    try:
        return await visit.call(rpc, request)
    finally:
        visit.token = kept


def wanted(visit: Visit) -> str:
    """Where to go on afterwards: a page of our own."""
    return own_path(visit.form.get("next") or visit.query.get("next", ""))


def address(visit: Visit) -> str:
    """Where this browser had a code sent to; empty when it had none sent."""
    text = unquote(visit.jar.get(visit.http, ADDRESS))
    return text if len(text) <= _MOST_ADDRESS and text.isprintable() else ""


def to_code(visit: Visit, page: str, email: str) -> Response:
    """To the page that asks for the code. It knows the address by a cookie: whoever looks into the mail and comes back finds it there."""
    then = wanted(visit)
    response = RedirectResponse(link(page, next="" if then == HOME else then), 303, HEADERS)
    visit.jar.put(response, ADDRESS, quote(email, safe="@+"), SHORT_S)
    return response
