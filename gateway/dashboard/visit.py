"""One request of a visitor: who it is, what the form said, and the services as seen with the visitor's own credential."""

import asyncio
import hashlib
import hmac
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import grpc
from google.rpc import code_pb2, error_details_pb2
from starlette.requests import Request

from clawplane.errors.v1 import errors_pb2
from clawplane.user.v1 import access_service_pb2, organization_pb2, organization_service_pb2, session_service_pb2
from gateway.dashboard.cookies import Jar
from gateway.dashboard.services import Services
from gateway.errors import ApiError, from_rpc, make_status

Metadata = tuple[tuple[str, str], ...]
HOME = "/dashboard"
_MOST_ORGANIZATIONS = 250
_FRESH_ENOUGH_S = 120
"""A form that asks for a fresh sign-in is not shown to whoever would not have the time to fill it in."""


class OrganizationGone(Exception):
    """The organization that the visitor had chosen is no longer one of his."""


@dataclass
class Visit:
    """A request, and whose it is."""

    http: Request
    services: Services
    jar: Jar
    public_url: str
    """The gateway's address as browsers see it."""
    token: str = ""
    """Of the visitor's session; empty when there is none."""
    org: str = ""
    """The organization that the visitor has chosen; empty means the personal one."""
    who: access_service_pb2.Access = field(default_factory=access_service_pb2.Access)
    organizations: Sequence[organization_pb2.Organization] = ()
    """Those of the visitor, by name, the personal one first."""
    form: dict[str, str] = field(default_factory=dict)
    """What was sent by POST; of a name that comes several times, the last."""
    repeated: dict[str, list[str]] = field(default_factory=dict)
    """The same, with all values."""
    problem: str = ""
    """What went wrong with what was sent, for the head of the page."""
    problems: dict[str, str] = field(default_factory=dict)
    """The same by field."""

    @property
    def metadata(self) -> Metadata:
        """The visitor's credential, the organization, and the request's id."""
        own = (("authorization", f"Bearer {self.token}"),) if self.token else ()
        chosen = (("clawplane-org", self.org),) if self.token and self.org else ()
        return (*own, *chosen, ("x-request-id", self.http.scope["state"]["request_id"]), *self.http.app.state.forward(self.http))

    @property
    def csrf(self) -> str:
        """What a form of this visitor must send along: nobody can make it who does not know the session's token."""
        return hmac.new(self.token.encode(), b"csrf", hashlib.sha256).hexdigest()

    @property
    def query(self) -> Mapping[str, str]:
        """The query of the address."""
        return self.http.query_params

    @property
    def organization(self) -> organization_pb2.Organization:
        """The one that the visitor acts in."""
        return next((each for each in self.organizations if each.id == self.who.org_id), organization_pb2.Organization(id=self.who.org_id))

    @property
    def here(self) -> str:
        """The page that is asked for, or that holds the form that was sent."""
        if self.http.method != "POST":
            return self.http.url.path + (f"?{self.http.url.query}" if self.http.url.query else "")
        # Browsers send it with our own forms. It leads a visitor back and decides nothing.
        parts = urlsplit(self.http.headers.get("referer", ""))
        return own_path(parts.path + (f"?{parts.query}" if parts.query else ""))

    def may(self, permission: str) -> bool:
        """Whether the visitor's role has a permission; pages offer nothing that it has not."""
        return permission in self.who.permissions

    def need(self, permission: str) -> None:
        """PERMISSION_DENIED, as the call of a form would be, before the form is filled in."""
        if not self.may(permission):
            message = f"The permission {permission} is missing: your role in this organization does not have it."
            raise ApiError(make_status(code_pb2.PERMISSION_DENIED, message, errors_pb2.ERROR_REASON_PERMISSION_DENIED))

    def secret(self, name: str) -> str:
        """A field of the form as it was typed: spaces at the ends of a password belong to it."""
        return self.repeated.get(name, [""])[-1]

    async def call(self, rpc: Any, request: Any) -> Any:
        """An RPC with the visitor's credential; ApiError when it fails."""
        try:
            return await rpc(request, metadata=self.metadata, timeout=self.services.timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from None

    async def calls(self, *pending: Awaitable[Any]) -> Any:
        """Several at once; the first failure is raised."""
        return await asyncio.gather(*pending)

    async def identify(self) -> None:
        """Finds out who it is, and which organizations there are to choose from. OrganizationGone when the chosen one is none of these."""
        listing = organization_service_pb2.ListOrganizationsRequest(page_size=_MOST_ORGANIZATIONS)
        try:
            self.who, found = await self.calls(
                self.call(self.services.access.WhoAmI, access_service_pb2.WhoAmIRequest()),
                self.call(self.services.organizations.ListOrganizations, listing),
            )
        except ApiError as error:
            if error.status.code == code_pb2.NOT_FOUND and self.org:
                raise OrganizationGone from None
            raise
        self.organizations = sorted(found.organizations, key=lambda each: (not each.is_personal, each.name.lower(), each.id))

    async def read_form(self) -> None:
        """Reads what was posted."""
        try:
            pairs = parse_qsl((await self.http.body()).decode(), keep_blank_values=True, max_num_fields=200)
        except ValueError:
            pairs = []
        for name, value in pairs:
            self.repeated.setdefault(name, []).append(value)
        self.form = {name: values[-1].strip() for name, values in self.repeated.items()}

    def check_csrf(self) -> None:
        """PERMISSION_DENIED for a form that is not this visitor's."""
        if not hmac.compare_digest(self.form.get("csrf", "").encode(), self.csrf.encode()):
            message = "This form is of another visit. Open the page again and repeat what you did."
            raise ApiError(make_status(code_pb2.PERMISSION_DENIED, message, errors_pb2.ERROR_REASON_PERMISSION_DENIED))

    def check_organization(self) -> None:
        """ABORTED for a form that was filled in for another organization: in a second window, it may have been switched since."""
        if self.form.get("for_org", self.who.org_id) != self.who.org_id:
            message = "This form was opened in another organization than the one that you act in now. Nothing was done."
            raise ApiError(make_status(code_pb2.ABORTED, message, errors_pb2.ERROR_REASON_CONFLICT))

    async def ask_fresh(self) -> None:
        """PERMISSION_DENIED with the reason STEP_UP_REQUIRED, before a form is filled in whose call would be refused for it."""
        request = session_service_pb2.ListSessionsRequest(page_size=250)
        found = await self.call(self.services.sessions.ListSessions, request)
        for session in found.sessions:
            if session.is_current and session.fresh_until.seconds < time.time() + _FRESH_ENOUGH_S:
                raise ApiError(make_status(code_pb2.PERMISSION_DENIED, "Prove that it is you.", errors_pb2.ERROR_REASON_STEP_UP_REQUIRED))

    def blame(self, error: ApiError) -> None:
        """Puts an error's words where the form shows them."""
        self.problems = violations(error)
        self.problem = "" if self.problems else error.status.message


def violations(error: ApiError) -> dict[str, str]:
    """The fields that an error names, by name."""
    found: dict[str, str] = {}
    bad = error_details_pb2.BadRequest()
    for detail in error.status.details:
        if detail.Is(bad.DESCRIPTOR) and detail.Unpack(bad):
            found |= {item.field: item.description for item in bad.field_violations}
    return found


def info(error: ApiError) -> error_details_pb2.ErrorInfo:
    """What an error says for programs: the reason and its metadata; empty where it says nothing."""
    found = error_details_pb2.ErrorInfo()
    for detail in error.status.details:
        if detail.Is(found.DESCRIPTOR) and detail.Unpack(found):
            break
    return found


def reason(error: ApiError) -> str:
    """The reason that an error gives, without "ERROR_REASON_"; empty where it gives none."""
    return str(info(error).reason)


def own_path(path: str) -> str:
    """Where to go on: a page of the dashboard, and of nobody else."""
    is_own = path.startswith(HOME) and path[10:11] in ("", "/", "?") and "//" not in path and "\\" not in path
    return path if is_own and path.isprintable() else HOME
