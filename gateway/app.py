"""The gateway: its routes and its middleware."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import grpc
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from gateway import health, httprule
from gateway.client import Forwarder
from gateway.dashboard.app import Dashboard
from gateway.errors import ApiError, internal, invalid, method_not_allowed, not_found, render
from gateway.middleware import BodyLimit, Observe, SecurityHeaders
from gateway.models import sandbox as simulated_model
from gateway.models.endpoint import Endpoint
from gateway.openapi import page as openapi
from gateway.sandbox import Sandbox
from gateway.settings import GatewaySettings
from gateway.transcode import build_routes
from gateway.webhooks.receiver import ClerkReceiver, PolarReceiver, StripeReceiver

_BATCH_BYTES = 4 * 1024 * 1024
"""A batch of usage has up to 5,000 events."""
USER, DEPLOYMENT = "clawplane.user.v1", "clawplane.deployment.v1"


def create_app(
    settings: GatewaySettings,
    channels: Mapping[str, grpc.aio.Channel],
    service_metadata: Callable[[], Sequence[tuple[str, str]]],
    ready: Callable[[], Awaitable[bool]] | None = None,
) -> Starlette:
    """The ASGI application.

    `channels` by proto package; `service_metadata` makes the gateway's own credential for webhooks and sandbox, as metadata, anew
    for each call; `ready` is asked by ``/readyz`` beside the services.
    """
    models = Endpoint(
        settings.upstreams(), channels[DEPLOYMENT], service_metadata, settings.call_timeout_s, settings.model_upstream_timeout_s
    )
    routes: list[BaseRoute] = [
        # First, since routes are tried in order, and this one is the busiest.
        *models.routes(),
        Route("/healthz", health.healthz),
        Route("/readyz", health.Readiness(channels, ready).readyz),
        Route("/metrics", health.metrics),
        *openapi.routes(),
        Mount("/static", StaticFiles(directory=Path(__file__).parent / "static")),
        *build_routes(httprule.services(channels), channels, settings.call_timeout_s),
    ]
    dashboard = Dashboard(settings, channels, service_metadata)
    routes.extend(dashboard.routes())
    # Without any secret nothing could be verified, so the address does not exist.
    if settings.stripe_webhook_secrets or settings.sandbox_enabled:
        stripe = StripeReceiver(settings, channels[DEPLOYMENT], service_metadata)
        routes.append(Route("/webhooks/stripe", stripe.receive, methods=["POST"]))
    if settings.polar_webhook_secrets:
        polar = PolarReceiver(settings, channels[DEPLOYMENT], channels[USER], service_metadata)
        routes.append(Route("/webhooks/polar", polar.receive, methods=["POST"]))
    if settings.clerk_webhook_secrets:
        clerk = ClerkReceiver(settings, channels[USER], service_metadata)
        routes.append(Route("/webhooks/clerk", clerk.receive, methods=["POST"]))
    if settings.sandbox_enabled:
        routes.extend(Sandbox(settings, channels[DEPLOYMENT], service_metadata).routes())
        routes.extend(simulated_model.routes())
    # An exact list; credentials are headers that a page sets itself, never cookies.
    cors = Middleware(
        CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
        allow_headers=["authorization", "content-type", "clawplane-org", "x-request-id", "last-event-id"],
        expose_headers=["x-request-id", "retry-after"], max_age=600,
    )  # fmt: skip
    limits = {"/webhooks/": settings.webhook_max_bytes, "/v1/usage:batch": max(_BATCH_BYTES, settings.max_body_bytes)}
    middleware = [
        *([cors] if settings.cors_origins else []),
        Middleware(SecurityHeaders, https=settings.public_url.startswith("https://")),
        Middleware(Observe, template=_templates(routes)),
        Middleware(BodyLimit, default_bytes=settings.max_body_bytes, by_prefix=limits),
    ]
    app = Starlette(routes=routes, middleware=middleware, exception_handlers={ApiError: _api_error, HTTPException: _http_error})
    app.router.redirect_slashes = False
    # Set when the process stops: open streams end then.
    app.state.stopping = asyncio.Event()
    app.state.forward = Forwarder(service_metadata)
    app.state.models = models
    app.state.dashboard = dashboard
    return app


def _templates(routes: Sequence[BaseRoute]) -> Callable[[object], str]:
    """From an endpoint to the template of its route, for logs and metrics."""
    known: dict[object, str] = {}
    for route in routes:
        if isinstance(route, Route):
            known[route.endpoint] = getattr(route.endpoint, "template", route.path.replace(":segment", ""))
        elif isinstance(route, Mount):
            known[route.app] = route.path
    return lambda endpoint: known.get(endpoint, "unmatched")


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return render(error)


async def _http_error(http: Request, error: Exception) -> Response:
    """Starlette's own errors in our form."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return render(not_found())
    if error.status_code == 405:
        return render(method_not_allowed((error.headers or {}).get("Allow", "GET").split(", ")))
    if error.status_code < 500:
        return render(invalid([("request", "cannot be understood")], error.status_code))
    return render(internal(http.scope["state"]["request_id"]))
