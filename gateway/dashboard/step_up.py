"""Proving once more that it is you, before what must not be done with a browser that was left open."""

from google.rpc import code_pb2
from starlette.responses import RedirectResponse, Response

from clawplane.user.v1 import sign_in_service_pb2
from gateway.dashboard.door import blame, keep
from gateway.dashboard.render import HEADERS, link, render
from gateway.dashboard.sign_in import wanted
from gateway.dashboard.visit import Visit
from gateway.errors import ApiError


class StepUp:
    """``mailbox``: mail goes to a page instead of to people."""

    def __init__(self, *, mailbox: bool) -> None:
        self._mailbox = mailbox

    def lead(self, visit: Visit) -> Response:
        """To the proof, and afterwards back to the form."""
        return RedirectResponse(link("/dashboard/step-up", next=visit.here), 303, HEADERS)

    async def show(self, visit: Visit, status: int = 200) -> Response:
        """A code by mail, or the password."""
        sent = visit.query.get("sent") == "1" or "code" in visit.form
        return render("step_up.html", visit, status, next=wanted(visit), sent=sent, mailbox=self._mailbox)

    async def send(self, visit: Visit) -> Response:
        """Mails a code to the visitor's own address."""
        try:
            await visit.call(visit.services.sign_in.RequestStepUp, sign_in_service_pb2.RequestStepUpRequest())
        except ApiError as error:
            return await self.show(visit, blame(visit, error))
        return RedirectResponse(link("/dashboard/step-up", next=wanted(visit), sent=1), 303, HEADERS)

    async def check(self, visit: Visit) -> Response:
        """Takes the proof, and gives the browser the fresh session that replaces the old one."""
        request = sign_in_service_pb2.StepUpRequest()
        if "code" in visit.form:
            request.code = visit.form["code"]
        else:
            request.password = visit.secret("password")
        try:
            answer = await visit.call(visit.services.sign_in.StepUp, request)
        except ApiError as error:
            if error.status.code == code_pb2.INVALID_ARGUMENT:
                visit.problem = "Type in the code, or the password."
                return await self.show(visit, 400)
            return await self.show(visit, blame(visit, error))
        return keep(visit, answer, wanted(visit))
