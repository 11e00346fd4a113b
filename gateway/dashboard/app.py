"""The dashboard's table of contents, and what happens around every page."""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import grpc
import structlog
from google.rpc import code_pb2
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from gateway import errors
from gateway.dashboard import (
    account,
    api_keys,
    audit,
    chat,
    deployments,
    home,
    invitation,
    organization,
    prices,
    providers,
    usage,
    users,
    webhooks,
)
from gateway.dashboard.cookies import ORG, SESSION, Jar
from gateway.dashboard.mailbox import Mailbox
from gateway.dashboard.oauth import OAuth
from gateway.dashboard.render import link, render
from gateway.dashboard.services import Services
from gateway.dashboard.sign_in import SignIn
from gateway.dashboard.sign_up import SignUp
from gateway.dashboard.step_up import StepUp
from gateway.dashboard.visit import OrganizationGone, Visit, reason
from gateway.errors import ApiError, internal, not_found
from gateway.origin import origin_of, refuse_strangers
from gateway.settings import GatewaySettings

log = structlog.get_logger("gateway.dashboard")
Page = Callable[[Visit], Awaitable[Response]]


class Dashboard:
    """The pages; each calls the services with its visitor's own credential."""

    def __init__(
        self, settings: GatewaySettings, channels: Mapping[str, grpc.aio.Channel],
        service_metadata: Callable[[], Sequence[tuple[str, str]]],
    ) -> None:  # fmt: skip
        self._services = Services(channels, settings.call_timeout_s)
        self._public_url, self._origin = settings.public_url, origin_of(settings.public_url)
        self._jar = Jar(secure=settings.public_url.startswith("https://"))
        self._sign_in = SignIn(mailbox=settings.mailbox_enabled, links=settings.sign_in_links)
        self._sign_up = SignUp(mailbox=settings.mailbox_enabled)
        self._oauth = OAuth(self._sign_in, self._origin)
        self._step_up = StepUp(mailbox=settings.mailbox_enabled)
        self._mailbox = Mailbox(service_metadata) if settings.mailbox_enabled else None
        self._chat = chat.Chat(allow_local=settings.sandbox_enabled)

    def routes(self) -> list[BaseRoute]:
        """Every page and form."""
        return [Route("/", self._to_home), *self._ways_in(), *self._of_people(), *self._of_work(), self._get("/{path:path}", self._nothing)]

    def _ways_in(self) -> list[BaseRoute]:
        """For whoever is not signed in."""
        door, up, oauth = self._sign_in, self._sign_up, self._oauth
        forms: dict[str, tuple[Page, Page]] = {
            "/sign-in": (door.show, door.enter),
            "/sign-in/code": (door.show_code, door.check_code),
            "/sign-in/password": (door.show_password, door.check_password),
            "/sign-up": (up.show, up.begin),
            "/sign-up/code": (up.show_code, up.finish),
            "/reset": (up.show_reset, up.begin_reset),
            "/reset/code": (up.show_reset_code, up.finish_reset),
        }
        return [
            *(self._get(path, show, visitors=False) for path, (show, _) in forms.items()),
            *(self._post(path, take, visitors=False) for path, (_, take) in forms.items()),
            self._get("/sign-in/with/{provider:segment}", oauth.start, visitors=False),
            self._get("/oauth/callback", oauth.finish, visitors=False),
            *([self._get("/mailbox", self._mailbox.show, visitors=False)] if self._mailbox else []),
        ]

    def _of_people(self) -> list[BaseRoute]:
        """Accounts, organizations, keys."""
        return [
            self._post("/sign-out", self._sign_in.leave),
            self._get("/step-up", self._step_up.show),
            self._post("/step-up", self._step_up.check),
            self._post("/step-up/send", self._step_up.send),
            self._get("/account", account.show),
            self._post("/account", account.change),
            self._post("/account/password", account.change_password),
            self._post("/account/set-password", account.set_password),
            self._post("/account/sessions", account.end_sessions),
            self._post("/account/delete", account.delete),
            self._get("/account/{form:segment}", account.back),
            self._get("/organizations/new", organization.new),
            self._post("/organizations/new", organization.create),
            self._post("/organizations/undelete", organization.undelete),
            self._post("/organizations/switch", organization.switch),
            self._get("/organization", organization.show),
            self._post("/organization", organization.rename),
            self._post("/organization/member", organization.change_member),
            self._post("/organization/invite", organization.invite),
            self._post("/organization/invitation", organization.change_invitation),
            self._post("/organization/leave", organization.leave),
            self._post("/organization/delete", organization.delete),
            self._get("/organization/{form:segment}", organization.back),
            self._get("/organizations/{form:segment}", organization.back),
            self._get("/invitation", invitation.show),
            self._get("/invitations", invitation.show),
            self._post("/invitation", invitation.answer),
            self._get("/keys", api_keys.index),
            self._get("/keys/new", api_keys.new),
            self._post("/keys/new", api_keys.create),
            self._get("/keys/{id:segment}", api_keys.show),
            self._post("/keys/{id:segment}", api_keys.change),
            self._post("/keys/{id:segment}/{action:segment}", api_keys.act),
            self._get("/keys/{id:segment}/{action:segment}", api_keys.back),
            self._get("/audit", audit.index),
            self._get("/audit/export", audit.export),
        ]

    def _of_work(self) -> list[BaseRoute]:
        """What runs, what it costs, and the operators' pages."""
        return [
            self._get("", home.home),
            self._get("/deployments", deployments.index),
            self._get("/deployments/new", deployments.new),
            self._post("/deployments/new", deployments.create),
            self._get("/deployments/{id:segment}", deployments.show),
            self._events("/deployments/{id:segment}/stream", deployments.stream_one),
            self._post("/deployments/{id:segment}/chat", self._chat.say),
            self._post("/deployments/{id:segment}/change", deployments.change),
            self._post("/deployments/{id:segment}/{action:segment}", deployments.act),
            self._get("/deployments/{id:segment}/{action:segment}", deployments.back),
            self._events("/stream", deployments.stream_all),
            self._get("/usage", usage.page),
            self._get("/usage.csv", usage.csv_file),
            self._get("/usage/events", usage.events),
            self._get("/providers", providers.index),
            self._get("/providers/outcomes", providers.outcomes),
            self._post("/providers/exclude", providers.exclude),
            self._post("/providers/admit", providers.admit),
            self._get("/prices", prices.index),
            self._get("/prices/export", prices.export),
            self._post("/prices/new", prices.create),
            self._post("/prices/end", prices.end),
            self._post("/prices/import", prices.take_in),
            self._post("/prices/recost", prices.recost),
            self._get("/prices/{form:segment}", prices.back),
            self._get("/webhooks", webhooks.index),
            self._post("/webhooks/replay", webhooks.replay),
            self._get("/users", users.index),
            self._post("/users/change", users.change),
        ]

    async def close(self) -> None:
        """Closes the connections to bots."""
        await self._chat.close()

    async def _nothing(self, _: Visit) -> Response:
        raise not_found()

    async def _to_home(self, _: Request) -> Response:
        return RedirectResponse("/dashboard", 307)

    def _get(self, path: str, page: Page, *, visitors: bool = True) -> Route:
        return Route(f"/dashboard{path}", self._around(page, visitors), methods=["GET"])

    def _post(self, path: str, page: Page, *, visitors: bool = True) -> Route:
        return Route(f"/dashboard{path}", self._around(page, visitors), methods=["POST"])

    def _events(self, path: str, watch: Page) -> Route:
        """What a script follows is refused by a status: a page in its place would be taken for a broken stream."""

        async def answer(http: Request) -> Response:
            try:
                return await watch(self._visit(http))
            except ApiError as error:
                return errors.render(error)

        return Route(f"/dashboard{path}", answer, methods=["GET"])

    def _visit(self, http: Request) -> Visit:
        return Visit(http, self._services, self._jar, self._public_url, self._jar.get(http, SESSION), self._jar.get(http, ORG))

    def _around(self, page: Page, visitors: bool) -> Callable[[Request], Awaitable[Response]]:
        """A form's origin, the form's own proof, then the visitor, then the page."""

        async def answer(http: Request) -> Response:
            started = time.perf_counter()
            visit = self._visit(http)
            try:
                if http.method == "POST":
                    refuse_strangers(http, self._origin)
                    await visit.read_form()
                if visitors:
                    if not visit.token:
                        return self._lead_in(visit)
                    if http.method == "POST":
                        visit.check_csrf()
                    await visit.identify()
                    if http.method == "POST":
                        visit.check_organization()
                response = await page(visit)
            except OrganizationGone:
                response = self._to_personal()
            except ApiError as error:
                response = await self._refused(visit, error)
            except Exception:
                # A person gets a page, whatever happened.
                request_id = http.scope["state"]["request_id"]
                log.exception("page_failed", request_id=request_id)
                response = render("error.html", visit, 500, error=internal(request_id))
            response.headers["Server-Timing"] = f"page;dur={(time.perf_counter() - started) * 1000:.1f}"
            return response

        return answer

    async def _refused(self, visit: Visit, error: ApiError) -> Response:
        """Led to the sign-in or to the proof that it is he, or told why not."""
        if error.status.code == code_pb2.NOT_FOUND and visit.who.user_id and visit.org:
            try:
                # What is not there may be the organization, if the visitor was taken out of it a moment ago.
                await visit.identify()
            except (OrganizationGone, ApiError):
                return self._to_personal()
        if error.status.code == code_pb2.UNAUTHENTICATED:
            response = self._lead_in(visit)
            self._jar.drop(response, SESSION)
            return response
        if reason(error) == "STEP_UP_REQUIRED":
            return self._step_up.lead(visit)
        return render("error.html", visit, error.http_status, error=error)

    def _to_personal(self) -> Response:
        """Nothing is done in place of what was asked for: it was meant for the other organization."""
        response = RedirectResponse("/dashboard?done=organization-gone", 303)
        self._jar.drop(response, ORG)
        return response

    def _lead_in(self, visit: Visit) -> Response:
        """To the sign-in page, and back to where the visitor wanted to go."""
        back = visit.here if visit.http.method == "GET" else ""
        return RedirectResponse(link("/dashboard/sign-in", next=back), 303)
