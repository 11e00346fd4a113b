"""Runs services in this process: any of user, deployment and gateway, with the keys of the embedded default where none are given."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import prometheus_client
import structlog
import uvicorn

from clawplane.user.v1 import sign_in_link_service_pb2, sign_in_link_service_pb2_grpc
from services.deployment_svc.settings import DeploymentSettings
from services.kit import clients, devkeys, workers
from services.kit.db import Database, check_connections
from services.kit.migrate import migrate
from services.kit.server import App, Server
from services.kit.settings import KitSettings
from services.kit.tokens import TokenSigner
from services.user_svc.settings import UserSettings

if TYPE_CHECKING:
    from gateway.settings import GatewaySettings

log = structlog.get_logger()
S = TypeVar("S", bound=KitSettings)

GATEWAY_PERMISSIONS = (
    "calls.forward", "mailbox.list", "models.settle", "payments.apply", "sandbox.use", "subscriptions.apply", "users.sync",
    "webhooks.ignore",
)  # fmt: skip
"""What the gateway's own token may do: say for whom it calls, webhooks, sandbox and mailbox, what model calls have used, nothing else."""
_ISSUERS = {"UserSettings": "user_svc", "DeploymentSettings": "deployment_svc", "GatewaySettings": "gateway"}


class StartError(Exception):
    """The process cannot start; the text says what to change."""


def load_settings(kind: type[S], data_dir: Path | None = None, **given: Any) -> S:
    """Settings from the environment; ``given`` wins. In development, keys that nobody gave are made once and kept in the data directory."""
    where: dict[str, Any] = {"data_dir": data_dir} if data_dir else {}
    base = KitSettings(**where)
    if base.environment == "development":
        made = devkeys.settings_for(devkeys.load_or_make(base.data_dir), _ISSUERS.get(kind.__name__, "cli"))
        made |= {"sandbox_enabled": True} | _ring(base, made)
        defaults: dict[str, Any] = {name: value for name, value in made.items() if f"CLAWPLANE_{name.upper()}" not in os.environ}
    else:
        defaults = {"service_name": _ISSUERS.get(kind.__name__, "cli")} if "CLAWPLANE_SERVICE_NAME" not in os.environ else {}
    return kind(**(defaults | {"data_dir": base.data_dir} | given))


def _ring(base: KitSettings, made: dict[str, object]) -> dict[str, object]:
    """The embedded default's ring is a file, first made of its own key; whoever gives keys has a ring of them."""
    if base.encryption_key.get_secret_value() or base.encryption_keys:
        del made["encryption_keys"], made["encryption_key_id"]
        return {}
    return {"key_ring": base.data_dir / devkeys.RING}


async def migrate_all(user: UserSettings | None, deployment: DeploymentSettings | None) -> None:
    """Brings the databases of the given services up to date, one after the other."""
    for settings, name in ((user, "user_svc"), (deployment, "deployment_svc")):
        if settings is not None:
            db = Database(settings.database_url, settings, name)
            try:
                await db.connect()
                await migrate(db, name)
            finally:
                await db.close()


class _Uvicorn(uvicorn.Server):
    """uvicorn that leaves the signals to us: services and gateway stop in one order."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Stack:
    """What runs in this process."""

    def __init__(self) -> None:
        self.grpc: Server | None = None
        self._http: _Uvicorn | None = None
        self._http_task: asyncio.Task[None] | None = None
        self._app: Any = None
        self._channels: list[Any] = []

    async def start_grpc(self, apps: Sequence[App], host: str, port: int) -> None:
        """Opens the gRPC port for the apps."""
        try:
            self.grpc = Server(apps, host, port)
        except RuntimeError as error:
            raise StartError(f"cannot listen on {host}:{port} (gRPC): is something else running there? ({error})") from None
        await self.grpc.start()

    async def start_gateway(self, settings: "GatewaySettings") -> None:
        """Opens the HTTP port."""
        from gateway.app import create_app

        self._channels = [clients.channel(settings.user_target), clients.channel(settings.deployment_target)]
        channels = {"clawplane.user.v1": self._channels[0], "clawplane.deployment.v1": self._channels[1]}
        app = self._app = create_app(settings, channels, clients.ServiceCredential(TokenSigner(settings), GATEWAY_PERMISSIONS))
        config = uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, lifespan="off", timeout_graceful_shutdown=5,
            # Longer than load balancers and clients keep theirs, so that none of them sends into a connection that is being closed.
            loop="none", ws="none", timeout_keep_alive=75,
            proxy_headers=bool(settings.trusted_proxies), forwarded_allow_ips=list(settings.trusted_proxies),
        )  # fmt: skip
        self._http = _Uvicorn(config)
        self._http_task = asyncio.create_task(self._http.serve(sockets=[listen(settings.http_host, settings.http_port)]))
        while not self._http.started:
            if self._http_task.done():
                await self._http_task
                raise StartError("the gateway did not start")
            await asyncio.sleep(0.01)
        log.info("gateway.started", port=settings.http_port)

    async def stop(self) -> None:
        """The door first, then what is behind it."""
        if self._http and self._http_task:
            self._app.state.stopping.set()
            self._http.should_exit = True
            await self._http_task
            await self._app.state.models.close()
            await self._app.state.dashboard.close()
        for channel in self._channels:
            await channel.close()
        if self.grpc:
            await self.grpc.drain()


def listen(host: str, port: int) -> socket.socket:
    """A bound TCP socket; StartError when the port is taken."""
    # With the protocol named, asyncio turns Nagle's algorithm off; without it every answer waits 40 ms.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if workers.number() is not None:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        raise StartError(f"cannot listen on {host}:{port} (HTTP): {error.strerror}; choose another with --http-port") from None
    return bound


def stop_event() -> asyncio.Event:
    """Set by SIGTERM or SIGINT from now on. Asked for first, so that a stop during the start is an orderly one too."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


async def up(host: str, grpc_port: int, http_port: int, data_dir: Path | None, announce: Any) -> None:
    """Both services and the gateway in this process, until it is told to stop; then the local bots are stopped too."""
    from gateway.settings import GatewaySettings, is_loopback
    from services.deployment_svc.app import create_app as create_deployment
    from services.deployment_svc.markets.local import LocalDriver
    from services.user_svc.app import create_app as create_user

    stop = stop_event()
    target, url = f"{host}:{grpc_port}", f"http://{host}:{http_port}"
    public = {"public_url": url} if "CLAWPLANE_PUBLIC_URL" not in os.environ else {}
    user = load_settings(UserSettings, data_dir, sign_in_links=KitSettings().environment == "development", **public)
    deployment = load_settings(DeploymentSettings, data_dir, user_target=target, bind_host=host, **public)
    gateway = load_settings(
        GatewaySettings, data_dir, user_target=target, deployment_target=target, http_host=host, http_port=http_port, **public,
        sandbox_enabled=deployment.sandbox_enabled, sign_in_links=user.sign_in_links,
        mailbox_enabled=user.mail_mode == "console" and is_loopback(host),
    )  # fmt: skip
    listen(host, http_port).close()
    await migrate_all(user, deployment)
    stack = Stack()
    await stack.start_grpc([create_user(user), create_deployment(deployment)], host, grpc_port)
    await stack.start_gateway(gateway)
    note = deployment.data_dir / "up.json"
    note.write_text(json.dumps({"pid": os.getpid(), "grpc": target, "http": url}))
    announce(target, url, await sign_in_url(target, url, user.data_dir) if user.sign_in_links else "")
    try:
        await stop.wait()
    finally:
        note.unlink(missing_ok=True)
        await stack.stop()
        if deployment.driver == "local":
            local = LocalDriver(deployment.data_dir / "local", url)
            await local.stop_all()
            await local.shutdown()


async def sign_in_url(target: str, url: str, data_dir: Path) -> str:
    """A new one-time link to the dashboard of an embedded default."""
    signer = TokenSigner(load_settings(KitSettings, data_dir))
    credential = clients.ServiceCredential(signer, ["sign_in_links.create"], lifetime_s=60)
    async with clients.channel(target) as channel:
        stub = sign_in_link_service_pb2_grpc.SignInLinkServiceStub(channel)
        made = await stub.CreateSignInLink(sign_in_link_service_pb2.CreateSignInLinkRequest(), metadata=credential(), timeout=5)
    return f"{url}/dashboard/sign-in?token={made.token}"


async def serve_many(part: str, host: str, port: int, count: int) -> int:
    """Several processes of one service on one port; the exit status."""
    kind: dict[str, type[KitSettings]] = {"user": UserSettings, "deployment": DeploymentSettings}
    if part in kind:
        settings = load_settings(kind[part])
        await migrate_all(*((settings, None) if part == "user" else (None, settings)))
        await check_connections(settings.database_url, settings, count)  # type: ignore[attr-defined]
        if not settings.redis_url.get_secret_value():
            log.warning("limits.divided", workers=count, hint="each counts its share; with CLAWPLANE_REDIS_URL all count together")
    command = [sys.executable, "-m", "services.cli", "serve", part, "--host", host, "--port", str(port)]
    return await workers.Supervisor(command, count).run()


async def serve(part: str, host: str, port: int) -> None:
    """One service alone, as in production."""
    stop, stack = stop_event(), Stack()
    lifeline, base = workers.Lifeline(stop.set), KitSettings()
    if base.metrics_port:
        # Each worker counts for itself: their ports follow each other.
        prometheus_client.start_http_server(base.metrics_port + (workers.number() or 0), addr=host)
    # Each process loads its own part alone: the others would cost it half a second and tens of megabytes.
    if part == "user":
        from services.user_svc.app import create_app as create_user

        user = load_settings(UserSettings)
        await migrate_all(user, None)
        await check_connections(user.database_url, user, 1)
        await stack.start_grpc([create_user(user)], host, port)
    elif part == "deployment":
        from services.deployment_svc.app import create_app as create_deployment

        deployment = load_settings(DeploymentSettings, bind_host=host)
        await migrate_all(None, deployment)
        await check_connections(deployment.database_url, deployment, 1)
        await stack.start_grpc([create_deployment(deployment)], host, port)
    else:
        from gateway.settings import GatewaySettings

        await stack.start_gateway(load_settings(GatewaySettings, http_host=host, http_port=port))
    lifeline.ready()
    try:
        await stop.wait()
    finally:
        await stack.stop()
