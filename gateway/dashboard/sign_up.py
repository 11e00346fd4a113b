"""An account with a password, and another password for whoever has forgotten it."""

from starlette.responses import RedirectResponse, Response

from clawplane.user.v1 import sign_in_service_pb2
from gateway.dashboard.cookies import SHORT_S, SIGN_UP
from gateway.dashboard.door import blame, let_in
from gateway.dashboard.render import HEADERS, link, render
from gateway.dashboard.sign_in import address, call_as_nobody, to_code, wanted
from gateway.dashboard.visit import HOME, Visit
from gateway.errors import ApiError


class SignUp:
    """``mailbox``: mail goes to a page instead of to people."""

    def __init__(self, *, mailbox: bool) -> None:
        self._mailbox = mailbox

    async def show(self, visit: Visit, status: int = 200) -> Response:
        """Asks for address, name and password."""
        given = {"email": "", "full_name": ""} | visit.form
        return render("sign_up.html", visit, status, given=given, next=wanted(visit), mailbox=self._mailbox)

    async def begin(self, visit: Visit) -> Response:
        """Has a code mailed; there is no account before it has come back."""
        email = visit.form.get("email", "")
        request = sign_in_service_pb2.SignUpRequest(
            email=email, password=visit.secret("password"), full_name=visit.form.get("full_name", "")
        )
        try:
            answer = await call_as_nobody(visit, visit.services.sign_in.SignUp, request)
        except ApiError as error:
            return await self.show(visit, blame(visit, error))
        response = to_code(visit, "/dashboard/sign-up/code", email)
        visit.jar.put(response, SIGN_UP, answer.sign_up_token, SHORT_S)
        return response

    async def show_code(self, visit: Visit, status: int = 200) -> Response:
        """Where the code is typed in."""
        email = address(visit)
        if not email or not visit.jar.get(visit.http, SIGN_UP):
            return RedirectResponse(link("/dashboard/sign-up", next=visit.query.get("next", "")), 303, HEADERS)
        return render("sign_up_code.html", visit, status, email=email, next=wanted(visit), mailbox=self._mailbox)

    async def finish(self, visit: Visit) -> Response:
        """Makes the account, and signs in."""
        request = sign_in_service_pb2.VerifyEmailRequest(
            email=address(visit), code=visit.form.get("code", ""), sign_up_token=visit.jar.get(visit.http, SIGN_UP)
        )
        try:
            answer = await call_as_nobody(visit, visit.services.sign_in.VerifyEmail, request)
        except ApiError as error:
            return await self.show_code(visit, blame(visit, error))
        return await let_in(visit, answer, wanted(visit))

    async def show_reset(self, visit: Visit, status: int = 200) -> Response:
        """Asks for the address of whoever has forgotten the password, or never had one."""
        email = visit.form.get("email", "") or visit.query.get("email", "")[:254] or address(visit)
        return render("reset.html", visit, status, email=email, next=wanted(visit), mailbox=self._mailbox)

    async def begin_reset(self, visit: Visit) -> Response:
        """Has a code mailed."""
        email = visit.form.get("email", "")
        request = sign_in_service_pb2.RequestPasswordResetRequest(email=email)
        try:
            await call_as_nobody(visit, visit.services.sign_in.RequestPasswordReset, request)
        except ApiError as error:
            return await self.show_reset(visit, blame(visit, error))
        return to_code(visit, "/dashboard/reset/code", email)

    async def show_reset_code(self, visit: Visit, status: int = 200) -> Response:
        """Where the code and the new password are typed in."""
        email = address(visit)
        if not email:
            return RedirectResponse(link("/dashboard/reset", next=visit.query.get("next", "")), 303, HEADERS)
        given = {"code": visit.form.get("code", "")}
        return render("reset_code.html", visit, status, email=email, given=given, next=wanted(visit), mailbox=self._mailbox)

    async def finish_reset(self, visit: Visit) -> Response:
        """Sets the password. Every session of the account has ended then: the new password is the way in."""
        request = sign_in_service_pb2.ResetPasswordRequest(
            email=address(visit), code=visit.form.get("code", ""), password=visit.secret("password")
        )
        try:
            await call_as_nobody(visit, visit.services.sign_in.ResetPassword, request)
        except ApiError as error:
            return await self.show_reset_code(visit, blame(visit, error))
        then = wanted(visit)
        page = link("/dashboard/sign-in/password", next="" if then == HOME else then, done="password-set")
        response = RedirectResponse(page, 303, HEADERS)
        visit.jar.drop(response, SIGN_UP)
        return response

