"""Signing in with an account elsewhere: the browser goes to the provider and comes back."""

import secrets

from google.rpc import code_pb2
from starlette.responses import RedirectResponse, Response

from clawplane.user.v1 import oauth_service_pb2
from gateway.dashboard.cookies import BINDING, SHORT_S
from gateway.dashboard.door import let_in
from gateway.dashboard.render import HEADERS
from gateway.dashboard.sign_in import SignIn, call_as_nobody, wanted
from gateway.dashboard.visit import Visit, own_path, reason
from gateway.errors import ApiError
from gateway.origin import refuse_strangers

_TRY_AGAIN = "That sign-in does not hold: it takes at most ten minutes, in one browser, and once. Begin again."
_NOT_VERIFIED = "The provider has not verified your e-mail address. Sign in with a code instead."
_NOT_GIVEN = "The provider did not let you in, or you stopped there. Nothing has happened here."
_AWAY = "The provider does not answer now. Try again in a moment, or sign in with a code."


class OAuth:
    """The way to a provider and back. Problems are said on the sign-in page."""

    def __init__(self, sign_in: SignIn, origin: str) -> None:
        self._sign_in, self._origin = sign_in, origin

    async def start(self, visit: Visit) -> Response:
        """To the provider. A link and no form, since a policy about where forms may lead counts for what they are redirected to as well;
        other sites' links to it are refused as their forms are."""
        refuse_strangers(visit.http, self._origin)
        binding = secrets.token_urlsafe(32)
        request = oauth_service_pb2.StartOAuthRequest(
            provider=visit.http.path_params["provider"], redirect_path=wanted(visit)[:2048], browser_token=binding
        )
        try:
            answer = await call_as_nobody(visit, visit.services.oauth.StartOAuth, request)
        except ApiError as error:
            return await self._problem(visit, error)
        response = RedirectResponse(answer.authorization_url, 303, HEADERS)
        visit.jar.put(response, BINDING, binding, SHORT_S)
        return response

    async def finish(self, visit: Visit) -> Response:
        """Back from the provider."""
        state, code, binding = visit.query.get("state", ""), visit.query.get("code", ""), visit.jar.get(visit.http, BINDING)
        if not state or not code or len(binding) < 32:
            visit.problem = _NOT_GIVEN if visit.query.get("error") else _TRY_AGAIN
            return await self._sign_in.show(visit, 400, token="")
        request = oauth_service_pb2.FinishOAuthRequest(state=state[:200], code=code[:4096], browser_token=binding)
        try:
            answer = await call_as_nobody(visit, visit.services.oauth.FinishOAuth, request)
        except ApiError as error:
            return await self._problem(visit, error)
        return await let_in(visit, answer, own_path(answer.redirect_path))

    async def _problem(self, visit: Visit, error: ApiError) -> Response:
        code = error.status.code
        if reason(error) == "EMAIL_NOT_VERIFIED":
            visit.problem = _NOT_VERIFIED
        elif code in (code_pb2.UNAVAILABLE, code_pb2.DEADLINE_EXCEEDED):
            visit.problem = _AWAY
        elif code in (code_pb2.UNAUTHENTICATED, code_pb2.INVALID_ARGUMENT):
            visit.problem = _TRY_AGAIN
        elif code == code_pb2.RESOURCE_EXHAUSTED:
            visit.problem = error.status.message
        else:
            raise error
        return await self._sign_in.show(visit, 400 if code == code_pb2.UNAUTHENTICATED else error.http_status, token="")
