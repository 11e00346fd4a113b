"""The sandbox's checkout page, on which no money moves. Served only while the sandbox is enabled."""

import re
import time
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import jinja2
import orjson
from google.rpc import code_pb2
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from clawplane.deployment.v1 import sandbox_service_pb2, sandbox_service_pb2_grpc, sandbox_session_pb2
from gateway import sandbox_events
from gateway.errors import ApiError, code_of, from_rpc, not_found
from gateway.money import price
from gateway.origin import origin_of, refuse_strangers
from gateway.sandbox_events import ACTIONS, status_word
from gateway.settings import GatewaySettings
from gateway.webhooks.receiver import ServiceMetadata

HERE = Path(__file__).parent
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    # With "no-referrer" browsers send "Origin: null" with our own forms, which looks like somebody else's.
    "Referrer-Policy": "same-origin",
}
_SESSION_ID = re.compile(r"cs_sandbox_[0-9a-zA-Z]{16,64}\Z", re.ASCII)


class Sandbox:
    """``/sandbox/checkout/{session_id}``: the order, and what a customer or time can do to it."""

    def __init__(self, settings: GatewaySettings, channel: grpc.aio.Channel, service_metadata: ServiceMetadata) -> None:
        self._stub = sandbox_service_pb2_grpc.SandboxServiceStub(channel)
        self._service_metadata = service_metadata
        self._timeout_s = settings.call_timeout_s
        self._key = settings.sandbox_webhook_secret.get_secret_value().encode()
        self._webhook_url = settings.own_base_url() + "/webhooks/stripe"
        self._origin = origin_of(settings.public_url)
        loader = jinja2.FileSystemLoader(HERE / "templates")
        self._pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)

    def routes(self) -> list[BaseRoute]:
        """The page and its actions."""
        return [
            Route("/sandbox/checkout/{session_id:segment}", self.page, methods=["GET"]),
            Route("/sandbox/checkout/{session_id:segment}/{action:segment}", self.act, methods=["POST"]),
        ]

    async def page(self, http: Request) -> Response:
        """The page; as JSON {"status"} for callers that accept JSON."""
        try:
            request = sandbox_service_pb2.GetSandboxSessionRequest(id=_session_id(http))
            session = await self._stub.GetSandboxSession(request, metadata=self._metadata(http), timeout=self._timeout_s)
        except (ApiError, grpc.aio.AioRpcError) as error:
            return self._failed(http, error)
        if wants_json(http):
            return _json({"status": status_word(session)})
        return self._render("sandbox.html", 200, **view(session), delayed=http.query_params.get("webhook") == "delayed")

    async def act(self, http: Request) -> Response:
        """Does it, sends the webhook, and leads back to the page; as JSON {"status", "webhook"} for callers that accept JSON."""
        try:
            refuse_strangers(http, self._origin)
            action = ACTIONS.get(http.path_params["action"])
            if action is None:
                raise not_found()
            request = sandbox_service_pb2.ActOnSandboxSessionRequest(id=_session_id(http), action=action.action)
            session = await self._stub.ActOnSandboxSession(request, metadata=self._metadata(http), timeout=self._timeout_s)
        except (ApiError, grpc.aio.AioRpcError) as error:
            if _is_refused(error) and not wants_json(http):
                return RedirectResponse(f"/sandbox/checkout/{_session_id(http)}", 303, PAGE_HEADERS)
            return self._failed(http, error)
        event = sandbox_events.build(session, action, int(time.time()))
        delivered = await sandbox_events.deliver(self._webhook_url, event, self._key)
        if wants_json(http):
            return _json({"status": status_word(session), "webhook": "delivered" if delivered else "delayed"})
        return RedirectResponse(f"/sandbox/checkout/{session.id}" + ("" if delivered else "?webhook=delayed"), 303, PAGE_HEADERS)

    def _metadata(self, http: Request) -> tuple[tuple[str, str], ...]:
        return (*self._service_metadata(), ("x-request-id", http.scope["state"]["request_id"]))

    def _failed(self, http: Request, error: ApiError | grpc.aio.AioRpcError) -> Response:
        answer = error if isinstance(error, ApiError) else from_rpc(error)
        if wants_json(http):
            raise answer
        known = answer.http_status in (403, 404)
        return self._render("error.html", answer.http_status, known=known, request_id=http.scope["state"]["request_id"])

    def _render(self, template: str, http_status: int, **values: object) -> Response:
        return Response(self._pages.get_template(template).render(values), http_status, PAGE_HEADERS, "text/html")


def wants_json(http: Request) -> bool:
    """Whether the caller is a tool."""
    accept = http.headers.get("accept", "")
    return "application/json" in accept and "text/html" not in accept


def view(session: sandbox_session_pb2.SandboxSession) -> dict[str, object]:
    """What the page shows of a session."""
    url = session.success_url
    return {
        "session": session,
        "status": "refunded" if session.refunded_minor else status_word(session),
        "price": price(session.amount_minor, session.currency),
        "refused": bool(session.payment_intent_id),
        "expires_at": session.expires_at.ToDatetime(UTC) if session.HasField("expires_at") else None,
        "now": datetime.now(UTC),
        # Anything else, such as javascript:, would run on our page.
        "success_url": url if urlsplit(url).scheme in ("http", "https") else "",
    }


def _session_id(http: Request) -> str:
    session_id: str = http.path_params["session_id"]
    if not _SESSION_ID.match(session_id):
        raise not_found("There is no such checkout.")
    return session_id


def _is_refused(error: Exception) -> bool:
    """Whether the session is past the action, which its page tells best."""
    return isinstance(error, grpc.aio.AioRpcError) and code_of(error) == code_pb2.FAILED_PRECONDITION


def _json(body: dict[str, str]) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")
