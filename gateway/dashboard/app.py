"""The dashboard's table of contents, and what happens around every page."""

import time
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import quote

import grpc
import structlog
from google.rpc import code_pb2
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from clawplane.user.v1 import access_service_pb2
from gateway import errors
from gateway.dashboard import chat, deployments, home, providers, sign_in, usage, users, webhooks
from gateway.dashboard.render import render
from gateway.dashboard.visit import Services, Visit
from gateway.errors import ApiError, internal, not_found
from gateway.origin import origin_of, refuse_strangers
from gateway.settings import GatewaySettings

log = structlog.get_logger("gateway.dashboard")
Page = Callable[[Visit], Awaitable[Response]]


class Dashboard:
    """The pages; each calls the services with its visitor's own credential."""

    def __init__(self, settings: GatewaySettings, channels: Mapping[str, grpc.aio.Channel]) -> None:
        self._services = Services(channels, settings.call_timeout_s)
        self._origin = origin_of(settings.public_url)
        self._door = sign_in.Door(secure=settings.public_url.startswith("https://"))
        self._chat = chat.Chat(allow_local=settings.sandbox_enabled)

    def routes(self) -> list[BaseRoute]:
        """Every page and form."""
        return [
            Route("/", self._to_home),
            self._get("", home.home),
            self._get("/sign-in", self._door.show, visitors=False),
            self._post("/sign-in", self._door.enter, visitors=False),
            self._post("/sign-out", self._door.leave),
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
            self._get("/providers", providers.index),
            self._get("/providers/outcomes", providers.outcomes),
            self._post("/providers/exclude", providers.exclude),
            self._post("/providers/admit", providers.admit),
            self._get("/webhooks", webhooks.index),
            self._post("/webhooks/replay", webhooks.replay),
            self._get("/users", users.index),
            self._post("/users/change", users.change),
            self._get("/{path:path}", self._nothing),
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
                return await watch(Visit(http, self._services, self._door.token(http)))
            except ApiError as error:
                return errors.render(error)

        return Route(f"/dashboard{path}", answer, methods=["GET"])

    def _around(self, page: Page, visitors: bool) -> Callable[[Request], Awaitable[Response]]:
        """A form's origin, then the visitor, then the form's own proof, then the page."""

        async def answer(http: Request) -> Response:
            started = time.perf_counter()
            visit = Visit(http, self._services, self._door.token(http))
            try:
                if http.method == "POST":
                    refuse_strangers(http, self._origin)
                    await visit.read_form()
                if visitors:
                    if not visit.token:
                        return self._sign_in(http)
                    if http.method == "POST":
                        visit.check_csrf()
                    visit.who = await visit.call(self._services.access.WhoAmI, access_service_pb2.WhoAmIRequest())
                response = await page(visit)
            except ApiError as error:
                if error.status.code == code_pb2.UNAUTHENTICATED:
                    return self._door.forget(self._sign_in(http))
                response = render("error.html", visit, error.http_status, error=error)
            except Exception:
                # A person gets a page, whatever happened.
                request_id = http.scope["state"]["request_id"]
                log.exception("page_failed", request_id=request_id)
                response = render("error.html", visit, 500, error=internal(request_id))
            response.headers["Server-Timing"] = f"page;dur={(time.perf_counter() - started) * 1000:.1f}"
            return response

        return answer

    def _sign_in(self, http: Request) -> Response:
        """To the sign-in page, and back to where the visitor wanted to go."""
        wanted = http.url.path + (f"?{http.url.query}" if http.url.query else "")
        back = f"?next={quote(wanted)}" if http.method == "GET" else ""
        return RedirectResponse(f"/dashboard/sign-in{back}", 303)
