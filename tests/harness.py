"""Real services over real sockets, for tests: both engines, a fresh organization for each test."""

import asyncio
import base64
import contextlib
import itertools
import os
import random
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx

from clawplane.deployment.v1 import audit_service_pb2_grpc as deployment_audit_pb2_grpc
from clawplane.deployment.v1 import (
    blacklist_service_pb2_grpc,
    deployment_pb2,
    deployment_service_pb2,
    deployment_service_pb2_grpc,
    model_call_service_pb2_grpc,
    payment_service_pb2_grpc,
    price_service_pb2_grpc,
    provider_service_pb2_grpc,
    quota_service_pb2_grpc,
    sandbox_service_pb2_grpc,
    usage_reservation_service_pb2_grpc,
    usage_service_pb2_grpc,
)
from clawplane.user.v1 import (
    access_service_pb2_grpc,
    api_key_pb2,
    api_key_service_pb2,
    api_key_service_pb2_grpc,
    audit_service_pb2_grpc,
    claw_key_service_pb2,
    claw_key_service_pb2_grpc,
    entitlement_service_pb2_grpc,
    invitation_service_pb2_grpc,
    mailbox_service_pb2_grpc,
    member_service_pb2_grpc,
    oauth_service_pb2_grpc,
    organization_service_pb2_grpc,
    session_service_pb2_grpc,
    sign_in_link_service_pb2,
    sign_in_link_service_pb2_grpc,
    sign_in_service_pb2_grpc,
    user_pb2,
    user_service_pb2,
    user_service_pb2_grpc,
)
from gateway.settings import GatewaySettings
from services import embedded
from services.deployment_svc.app import create_app as create_deployment
from services.deployment_svc.settings import DeploymentSettings
from services.kit import devkeys, ids
from services.kit.settings import KitSettings
from services.kit.tokens import TokenSigner
from services.user_svc.app import create_app as create_user
from services.user_svc.settings import TIERS, Tier, UserSettings
from tests.simulators.market import NO_TLS

TELEGRAM = "123456789:" + "A" * 35
Metadata = tuple[tuple[str, str], ...]

UNLIMITED: dict[str, Any] = {
    "rate_limit": "1000000/minute", "public_rate_limit": "1000000/minute", "failed_rate_limit": "1000000/minute", "method_rates_factor": 1e6,
}  # fmt: skip
"""Tests come from one address, and more often than people."""

FAST: dict[str, Any] = UNLIMITED | {
    "poll_s": 0.1, "watch_s": 1, "backoff_s": 0.1, "backoff_max_s": 0.5, "lease_s": 2, "step_timeout_s": 2,
    "bid_timeout_s": 1, "ready_timeout_s": 3, "fail_after_s": 0.5, "payment_check_s": 300,
    # Tests share the market: what one of them does to a provider must not count in the next.
    "blacklist_failures": 1_000_000, "score_window_s": 0.001,
}  # fmt: skip
CHEAP_PASSWORDS: dict[str, Any] = {"password_memory_kib": 64, "password_time_cost": 1, "password_lanes": 1}
"""Hashes that take no time, and count nothing: what they protect are tests."""


TRANSPORT = os.environ.get("CLAWPLANE_TRANSPORT", "grpcio")
"""What the tests run on: `make native` sets it for services in this process, which read it as any does, and `clean_env` hands it on."""


_WORKER, _WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_LOWEST_PORT, _PORTS = 10_000, 20_000 // _WORKERS * _WORKERS
# Not where another run on the same machine may have begun.
_ports = itertools.count(random.randrange(_PORTS))


def clean_env() -> dict[str, str]:
    """The environment without anything of ours but the transport, for processes that tests start."""
    ours = {name for name in os.environ if name.startswith("CLAWPLANE_")}
    return {name: value for name, value in os.environ.items() if name not in ours} | {"CLAWPLANE_TRANSPORT": TRANSPORT}


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on, that no other worker of pytest is given, and this one not again soon.

    It lies below those that systems give to connections that go out: one of these would have it before the server that it is for.
    """
    while True:
        port = _LOWEST_PORT + (next(_ports) * _WORKERS + _WORKER) % _PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def random_key() -> str:
    """Base64 of 32 random bytes."""
    return base64.b64encode(os.urandom(32)).decode()


async def eventually(check: Callable[[], Awaitable[Any]], timeout_s: float = 15, every_s: float = 0.03) -> Any:
    """Repeats ``check``, ever less often, until it returns something true; AssertionError with its last answer when it never does."""
    deadline = time.monotonic() + timeout_s
    while True:
        last = await check()
        if last:
            return last
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s; the last answer was {last!r}")
        await asyncio.sleep(every_s)
        every_s = min(0.3, every_s * 1.2)


@dataclass
class Person:
    """A user of the stack, with an organization of his own."""

    user: user_pb2.User
    metadata: Metadata

    @property
    def org_id(self) -> str:
        return str(self.user.personal_org_id)


@dataclass
class Stack:
    """Both services behind one gRPC port, and the gateway, in this process."""

    keys: dict[str, str]
    data_dir: Path
    target: str
    url: str
    urls: dict[str, str]
    """Database URLs by service."""
    channel: grpc.aio.Channel
    stack: embedded.Stack = field(default_factory=embedded.Stack)

    def __post_init__(self) -> None:
        self.users = user_service_pb2_grpc.UserServiceStub(self.channel)
        self.audit = audit_service_pb2_grpc.AuditServiceStub(self.channel)
        self.deployment_audit = deployment_audit_pb2_grpc.AuditServiceStub(self.channel)
        self.access = access_service_pb2_grpc.AccessServiceStub(self.channel)
        self.sessions = session_service_pb2_grpc.SessionServiceStub(self.channel)
        self.sign_in_links = sign_in_link_service_pb2_grpc.SignInLinkServiceStub(self.channel)
        self.sign_in_service = sign_in_service_pb2_grpc.SignInServiceStub(self.channel)
        self.oauth = oauth_service_pb2_grpc.OAuthServiceStub(self.channel)
        self.mailbox = mailbox_service_pb2_grpc.MailboxServiceStub(self.channel)
        self.api_keys = api_key_service_pb2_grpc.ApiKeyServiceStub(self.channel)
        self.claw_keys = claw_key_service_pb2_grpc.ClawKeyServiceStub(self.channel)
        self.entitlements = entitlement_service_pb2_grpc.EntitlementServiceStub(self.channel)
        self.organizations = organization_service_pb2_grpc.OrganizationServiceStub(self.channel)
        self.members = member_service_pb2_grpc.MemberServiceStub(self.channel)
        self.invitations = invitation_service_pb2_grpc.InvitationServiceStub(self.channel)
        self.deployments = deployment_service_pb2_grpc.DeploymentServiceStub(self.channel)
        self.payments = payment_service_pb2_grpc.PaymentServiceStub(self.channel)
        self.blacklist = blacklist_service_pb2_grpc.BlacklistServiceStub(self.channel)
        self.model_calls = model_call_service_pb2_grpc.ModelCallServiceStub(self.channel)
        self.providers = provider_service_pb2_grpc.ProviderServiceStub(self.channel)
        self.usage = usage_service_pb2_grpc.UsageServiceStub(self.channel)
        self.prices = price_service_pb2_grpc.PriceServiceStub(self.channel)
        self.quotas = quota_service_pb2_grpc.QuotaServiceStub(self.channel)
        self.reservations = usage_reservation_service_pb2_grpc.UsageReservationServiceStub(self.channel)
        self.sandbox = sandbox_service_pb2_grpc.SandboxServiceStub(self.channel)
        self.operator: Metadata = (("authorization", f"Bearer {self.keys['operator_token']}"),)
        self.http = httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=20, verify=NO_TLS)

    def signer(self, issuer: str = "cli") -> TokenSigner:
        """Signs tokens as one of the stack's processes."""
        return TokenSigner(KitSettings(**devkeys.settings_for(self.keys, issuer)))  # type: ignore[arg-type]

    def token_for(self, user_id: str, permissions: list[str] | None = None, org: str = "") -> Metadata:
        """Metadata with a token that acts for a user."""
        return (("authorization", f"Bearer {self.signer().sign(permissions or ['*'], user=user_id, org=org)}"),)

    async def person(self, email: str = "") -> Person:
        """A new user."""
        wish = user_pb2.User(email=email or f"{secrets.token_hex(8)}@example.com", full_name="Test Person")
        user = await self.users.CreateUser(user_service_pb2.CreateUserRequest(user=wish), metadata=self.operator)
        return Person(user, self.token_for(user.id))

    async def key(self, person: Person, *permissions: str, **more: Any) -> api_key_service_pb2.CreateApiKeyResponse:
        """A new API key of a person."""
        wish = api_key_pb2.ApiKey(name="test", environment=api_key_pb2.API_KEY_ENVIRONMENT_TEST, permissions=permissions, **more)
        return await self.api_keys.CreateApiKey(api_key_service_pb2.CreateApiKeyRequest(api_key=wish), metadata=person.metadata)

    async def claw_key(self, d: deployment_pb2.Deployment) -> Metadata:
        """The credential of a new start of a deployment's bot."""
        request = claw_key_service_pb2.MintClawKeyRequest(key_id=ids.new("key"), deployment_id=d.id, org_id=d.org_id, user_id=d.user_id)
        made = await self.claw_keys.MintClawKey(request, metadata=self.operator)
        return (("authorization", f"Bearer {made.key}"),)

    async def link(self) -> str:
        """The token of a new one-time link."""
        made = await self.sign_in_links.CreateSignInLink(sign_in_link_service_pb2.CreateSignInLinkRequest(), metadata=self.operator)
        return str(made.token)

    async def sign_in(self) -> Person:
        """The operator of the embedded default, signed in."""
        redeem = sign_in_link_service_pb2.RedeemSignInLinkRequest(token=await self.link())
        answer = await self.sign_in_links.RedeemSignInLink(redeem)
        user = await self.users.GetUser(user_service_pb2.GetUserRequest(id=answer.session.user_id), metadata=self.operator)
        return Person(user, (("authorization", f"Bearer {answer.token}"),))

    async def order(self, person: Person, token: str = TELEGRAM, model: str = "claude-opus-4.5") -> deployment_pb2.Deployment:
        """Orders a Telegram bot."""
        request = deployment_service_pb2.CreateDeploymentRequest(
            model=model, channel=deployment_pb2.CHANNEL_TELEGRAM, channel_token=token
        )
        return await self.deployments.CreateDeployment(request, metadata=person.metadata, timeout=30)

    async def get(self, deployment_id: str) -> deployment_pb2.Deployment:
        """The deployment as operators see it."""
        request = deployment_service_pb2.GetDeploymentRequest(id=deployment_id)
        return await self.deployments.GetDeployment(request, metadata=self.operator)

    async def until(self, deployment_id: str, *states: int, timeout_s: float = 15) -> deployment_pb2.Deployment:
        """The deployment once it is in one of the states."""

        async def check() -> Any:
            d = await self.get(deployment_id)
            return d if d.state in states else None

        try:
            return await eventually(check, timeout_s)
        except AssertionError:
            raise AssertionError(f"not in {states} in time: {await self.get(deployment_id)}") from None

    async def sandbox_act(self, d: deployment_pb2.Deployment, action: str) -> httpx.Response:
        """Does on the sandbox's payment page what a customer would."""
        path = httpx.URL(d.payment_url).path if d.payment_url else f"/sandbox/checkout/{d.stripe_session_id}"
        return await self.http.post(f"{path}/{action}", headers={"accept": "application/json"})

    async def live(self, person: Person, token: str = TELEGRAM) -> deployment_pb2.Deployment:
        """A bot that was ordered, paid and is ACTIVE."""
        d = await self.order(person, token)
        assert (await self.sandbox_act(d, "pay")).status_code == 200
        return await self.until(d.id, deployment_pb2.STATE_ACTIVE)


@contextlib.asynccontextmanager
async def running(
    data_dir: Path, urls: dict[str, str] | None = None, *, deployment: dict[str, Any] | None = None,
    user: dict[str, Any] | None = None, gateway: dict[str, Any] | None = None, keys: dict[str, str] | None = None,
) -> AsyncIterator[Stack]:  # fmt: skip
    """A running stack on the given databases (SQLite files in ``data_dir`` when none are given)."""
    urls = urls or {}
    keys = keys or devkeys.load_or_make(data_dir)
    grpc_port, http_port = free_port(), free_port()
    target, url = f"127.0.0.1:{grpc_port}", f"http://127.0.0.1:{http_port}"
    tiers = TIERS | {"starter": Tier(price_minor=2900, monthly_tokens=0, monthly_credit_minor=1000, live_deployments=3)}
    # Workers of pytest share one server of a hundred connections.
    common: dict[str, Any] = {"data_dir": data_dir} | ({"max_overflow": 5} if urls.get("user_svc", "").startswith("postgres") else {}) | UNLIMITED

    def made(service: str, extra: dict[str, Any]) -> dict[str, Any]:
        return devkeys.settings_for(keys, service) | common | extra

    user_settings = UserSettings(
        **made("user_svc", {"user_database_url": urls.get("user_svc", ""), "tiers": tiers, "sign_in_links": True, "public_url": url, **CHEAP_PASSWORDS, **(user or {})})
    )
    deployment_settings = DeploymentSettings(
        **made(
            "deployment_svc",
            {**FAST, "deployment_database_url": urls.get("deployment_svc", ""), "user_target": target, "public_url": url, **(deployment or {})},
        )
    )
    gateway_settings = GatewaySettings(
        **made(
            "gateway",
            {
                "user_target": target, "deployment_target": target, "http_port": http_port, "public_url": url,
                "sandbox_enabled": deployment_settings.sandbox_enabled, "sign_in_links": user_settings.sign_in_links,
                "mailbox_enabled": user_settings.mail_mode == "console", **(gateway or {}),
            },
        )
    )  # fmt: skip
    await embedded.migrate_all(user_settings, deployment_settings)
    parts = embedded.Stack()
    await parts.start_grpc([create_user(user_settings), create_deployment(deployment_settings)], "127.0.0.1", grpc_port)
    await parts.start_gateway(gateway_settings)
    channel = grpc.aio.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)])
    stack = Stack(keys, data_dir, target, url, urls, channel, parts)
    try:
        yield stack
    finally:
        await stack.http.aclose()
        await channel.close()
        await parts.stop()
