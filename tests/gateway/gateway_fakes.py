"""Small real servicers behind a real gRPC server, and a real HTTP server in front of it."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
import httpx
import uvicorn
from gateway_echo import echo_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from clawplane.deployment.v1 import (
    deployment_pb2,
    deployment_service_pb2_grpc,
    payment_service_pb2,
    payment_service_pb2_grpc,
    sandbox_service_pb2_grpc,
    sandbox_session_pb2,
)
from clawplane.user.v1 import user_pb2, user_service_pb2_grpc
from gateway.app import create_app
from gateway.settings import GatewaySettings

STRIPE_SECRET = "whsec_first_0123456789"
STRIPE_SECRET_2 = "whsec_second_0123456789"
POLAR_SECRET = "polar_whs_0123456789abcdef"
SANDBOX_SECRET = "whsec_sandbox_0123456789"
SERVICE_TOKEN = "Bearer service-token-of-the-gateway"
SESSION_ID = "cs_sandbox_0123456789abcdefABCDEF"
DEPLOYMENT_ID = "dep_" + "0" * 32


class Platform:
    """What the servicers saw, and what they are told to do."""

    def __init__(self) -> None:
        self.metadata: list[dict[str, Any]] = []
        self.deadlines: list[float] = []
        self.events: list[Any] = []
        self.ignored: list[Any] = []
        self.fail: list[grpc.StatusCode] = []
        self.session = sandbox_session_pb2.SandboxSession(
            id=SESSION_ID,
            status=sandbox_session_pb2.SANDBOX_SESSION_STATUS_OPEN,
            deployment_id=DEPLOYMENT_ID,
            description="<b>Bot</b> deployment",
            amount_minor=2900,
            currency="usd",
            success_url="https://example.test/done",
        )
        self.session.expires_at.FromJsonString("2030-01-31T12:00:00Z")

    async def see(self, context: grpc.aio.ServicerContext) -> None:
        """Notes the metadata; fails when told so."""
        self.metadata.append(dict(context.invocation_metadata() or ()))
        self.deadlines.append(context.time_remaining())
        if self.fail:
            await context.abort(self.fail.pop(0), "told to fail")


class Deployments(deployment_service_pb2_grpc.DeploymentServiceServicer):
    def __init__(self, platform: Platform) -> None:
        self.platform = platform

    async def GetDeployment(self, request: Any, context: Any) -> Any:
        await self.platform.see(context)
        if request.id == "boom":
            raise RuntimeError("a secret of the service")
        if request.id == "details":
            status = status_pb2.Status(code=8, message="too many calls")
            status.details.add().Pack(error_details_pb2.ErrorInfo(reason="RATE_LIMITED", domain="clawplane"))
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(1500)
            status.details.add().Pack(retry)
            unknown = status.details.add()
            unknown.type_url, unknown.value = "type.googleapis.com/nobody.Knows", b"x"
            await context.abort_with_status(rpc_status.to_status(status))
        if request.id == "slow":
            await asyncio.sleep(5)
        return deployment_pb2.Deployment(id=request.id, price_minor=2900, state=deployment_pb2.STATE_ACTIVE)

    async def RetryDeployment(self, request: Any, context: Any) -> Any:
        await self.platform.see(context)
        return deployment_pb2.Deployment(id=request.id, error_message="retried")

    async def CreateDeployment(self, request: Any, context: Any) -> Any:
        await self.platform.see(context)
        return deployment_pb2.Deployment(id=DEPLOYMENT_ID, model=request.model, channel=request.channel)


class Users(user_service_pb2_grpc.UserServiceServicer):
    def __init__(self, platform: Platform) -> None:
        self.platform = platform

    async def LookupUser(self, request: Any, context: Any) -> Any:
        await self.platform.see(context)
        return user_pb2.User(email=request.email, username=request.username)

    async def CreateUser(self, request: Any, context: Any) -> Any:
        await self.platform.see(context)
        return user_pb2.User(email=request.user.email, email_verified=request.email_verified, username=request.identity.subject)


class Payments(payment_service_pb2_grpc.PaymentServiceServicer):
    def __init__(self, platform: Platform) -> None:
        self.platform = platform

    async def ApplyPaymentEvent(self, request: Any, context: Any) -> Any:
        await self.platform.see(context)
        self.platform.events.append(request.event)
        return payment_service_pb2.ApplyPaymentEventResponse(outcome="applied")

    async def IgnoreWebhookEvent(self, request: Any, context: Any) -> Any:
        await self.platform.see(context)
        self.platform.ignored.append(request)
        return payment_service_pb2.IgnoreWebhookEventResponse()


class SandboxSessions(sandbox_service_pb2_grpc.SandboxServiceServicer):
    def __init__(self, platform: Platform) -> None:
        self.platform = platform

    async def GetSandboxSession(self, request: Any, context: Any) -> Any:
        if request.id != SESSION_ID:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such session")
        return self.platform.session

    async def ActOnSandboxSession(self, request: Any, context: Any) -> Any:
        self.platform.metadata.append(dict(context.invocation_metadata()))
        session = self.platform.session
        wanted = 2 if request.action == 4 else 1
        if request.id != SESSION_ID or session.status != wanted:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the session is past that")
        if request.action in (1, 2):
            session.payment_intent_id = "pi_sandbox_0123456789abcdef"
        if request.action == 4:
            session.refunded_minor = session.amount_minor
        session.status = {1: 2, 2: 1, 3: 3, 4: 2}[request.action]  # type: ignore[assignment]
        return session


async def echo(request: Any, context: grpc.aio.ServicerContext) -> Any:
    """Answers with the request."""
    return request


class Stack:
    """A running gateway: `client` for HTTP, `platform` for what arrived behind it."""

    def __init__(self, client: httpx.AsyncClient, platform: Platform, settings: GatewaySettings, health_servicer: Any) -> None:
        self.client = client
        self.platform = platform
        self.settings = settings
        self.health = health_servicer

    async def set_health(self, status: "health_pb2.HealthCheckResponse.ServingStatus.ValueType") -> None:
        await self.health.set("", status)


@contextlib.asynccontextmanager
async def serve_http(app: Any, sock: socket.socket) -> AsyncIterator[None]:
    """uvicorn on a bound socket, within this event loop."""
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    task = asyncio.create_task(server.serve(sockets=[sock]))
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield
    finally:
        server.should_exit = True
        await task


@contextlib.asynccontextmanager
async def running(platform: Platform, **overrides: Any) -> AsyncIterator[Stack]:
    """Everything started; `overrides` are settings."""
    server = grpc.aio.server()
    deployment_service_pb2_grpc.add_DeploymentServiceServicer_to_server(Deployments(platform), server)
    user_service_pb2_grpc.add_UserServiceServicer_to_server(Users(platform), server)
    payment_service_pb2_grpc.add_PaymentServiceServicer_to_server(Payments(platform), server)
    sandbox_service_pb2_grpc.add_SandboxServiceServicer_to_server(SandboxSessions(platform), server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    await health_servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    serialize = (echo_pb2.Request.FromString, echo_pb2.Request.SerializeToString)
    service = echo_pb2.DESCRIPTOR.services_by_name["EchoService"]
    handlers = {rpc.name: grpc.unary_unary_rpc_method_handler(echo, *serialize) for rpc in service.methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    # asyncio turns Nagle's delay off only on sockets that name their protocol; with it each answer takes 40 ms.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        values: Mapping[str, Any] = {
            "http_port": port,
            "public_url": f"http://127.0.0.1:{port}",
            "stripe_webhook_secrets": [STRIPE_SECRET, STRIPE_SECRET_2],
            "polar_webhook_secrets": [POLAR_SECRET],
            "sandbox_enabled": True,
            "sandbox_webhook_secret": SANDBOX_SECRET,
            **overrides,
        }
        settings = GatewaySettings(**values)
        async with grpc.aio.insecure_channel(target) as channel:
            channels = dict.fromkeys(("clawplane.user.v1", "clawplane.deployment.v1", "gateway_echo"), channel)
            app = create_app(settings, channels, lambda: [("authorization", SERVICE_TOKEN)])
            url = f"http://127.0.0.1:{port}"
            async with serve_http(app, sock), httpx.AsyncClient(base_url=url, trust_env=False, timeout=20) as client:
                yield Stack(client, platform, settings, health_servicer)
    await server.stop(0)
