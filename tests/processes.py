"""The services as processes of their own, for tests that kill them."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc

from clawplane.deployment.v1 import (
    deployment_pb2,
    deployment_service_pb2,
    deployment_service_pb2_grpc,
    payment_pb2,
    payment_service_pb2,
    payment_service_pb2_grpc,
    sandbox_service_pb2,
    sandbox_service_pb2_grpc,
)
from clawplane.user.v1 import user_pb2, user_service_pb2, user_service_pb2_grpc
from services.kit import devkeys
from services.kit.settings import KitSettings
from services.kit.tokens import TokenSigner
from tests.conftest import Databases
from tests.harness import FAST, TELEGRAM, Metadata, clean_env, eventually, free_port

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]


class Processes:
    """User services and any number of deployment services on the same databases."""

    def __init__(self, databases: Databases, folder: Path, deployments: int = 1, workers: int = 1, users: int = 1, **env: str) -> None:
        self.keys = devkeys.load_or_make(folder)
        self.folder, self.workers, self.deployments = folder, workers, deployments
        self.ports = [free_port() for _ in range(users + deployments)]
        urls = databases.make()
        fast = {f"CLAWPLANE_{name.upper()}": str(value) for name, value in FAST.items()}
        self.env = clean_env() | fast | {
            "CLAWPLANE_DATA_DIR": str(folder), "CLAWPLANE_USER_DATABASE_URL": urls["user_svc"],
            "CLAWPLANE_DEPLOYMENT_DATABASE_URL": urls["deployment_svc"], "CLAWPLANE_LOG_LEVEL": "warning",
            "CLAWPLANE_USER_TARGET": f"127.0.0.1:{self.ports[0]}",
            # Several of these, and the stacks of other tests, share one small server.
            "CLAWPLANE_MAX_OVERFLOW": "5",
        } | env  # fmt: skip
        self.running = [self.start(number) for number in range(len(self.ports))]
        self.operator: Metadata = (("authorization", f"Bearer {self.keys['operator_token']}"),)

    def part(self, number: int) -> str:
        """Which service a process is: number 0 is a user service, then come the deployment services, then further user services."""
        return "deployment" if 1 <= number <= self.deployments else "user"

    def start(self, number: int) -> "subprocess.Popen[bytes]":
        """Starts one."""
        part = self.part(number)
        with (self.folder / f"{part}-{number}.log").open("ab") as log:
            more = ["--workers", str(self.workers)] if part == "deployment" and self.workers > 1 else []
            return subprocess.Popen(
                [sys.executable, "-m", "services.cli", "serve", part, "--port", str(self.ports[number]), *more],
                cwd=ROOT, env=self.env, stdout=log, stderr=log,
            )  # fmt: skip

    async def ready(self) -> None:
        """Waits until each answers."""
        for port in self.ports:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
                await asyncio.wait_for(channel.channel_ready(), 60)

    async def kill_and_restart(self, number: int = 1) -> None:
        """kill -9, and the same again."""
        self.running[number].kill()
        self.running[number].wait()
        self.running[number] = self.start(number)
        await self.ready()

    def stop(self) -> None:
        """SIGTERM; each must end in order."""
        for process in self.running:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(20) for process in self.running] == [0] * len(self.running)

    def signer(self) -> TokenSigner:
        """Signs as the command line does."""
        return TokenSigner(KitSettings(**devkeys.settings_for(self.keys, "cli")))  # type: ignore[arg-type]

    async def person(self) -> Metadata:
        """The credential of a new user."""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.ports[0]}", options=OPTIONS) as channel:
            wish = user_service_pb2.CreateUserRequest(user=user_pb2.User(email=f"{os.urandom(6).hex()}@example.com"))
            user = await user_service_pb2_grpc.UserServiceStub(channel).CreateUser(wish, metadata=self.operator)
        return (("authorization", f"Bearer {self.signer().sign(['*'], user=user.id, lifetime_s=900)}"),)


class Client:
    """Calls one deployment service."""

    def __init__(self, processes: Processes, number: int = 1) -> None:
        self.operator = processes.operator
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{processes.ports[number]}", options=OPTIONS)
        self.deployments = deployment_service_pb2_grpc.DeploymentServiceStub(self.channel)
        self.payments = payment_service_pb2_grpc.PaymentServiceStub(self.channel)
        self.sandbox = sandbox_service_pb2_grpc.SandboxServiceStub(self.channel)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def order(self, person: Metadata, token: str = TELEGRAM, **more: Any) -> deployment_pb2.Deployment:
        """Orders a Telegram bot."""
        request = deployment_service_pb2.CreateDeploymentRequest(
            model="claude-opus-4.5", channel=deployment_pb2.CHANNEL_TELEGRAM, channel_token=token, **more
        )
        return await self.deployments.CreateDeployment(request, metadata=person, timeout=30)

    async def pay(self, d: deployment_pb2.Deployment) -> None:
        """Pays at the sandbox, and tells of it as a webhook would."""
        act = sandbox_service_pb2.ActOnSandboxSessionRequest(id=d.stripe_session_id, action=sandbox_service_pb2.SANDBOX_ACTION_PAY)
        session = await self.sandbox.ActOnSandboxSession(act, metadata=self.operator)
        event = payment_pb2.PaymentEvent(
            provider="sandbox", external_id=f"evt_{os.urandom(8).hex()}", type="checkout.session.completed", paid=True,
            kind=payment_pb2.PAYMENT_EVENT_KIND_COMPLETED, session_id=session.id, payment_id=session.payment_intent_id,
            deployment_id=d.id, amount_minor=session.amount_minor, currency=session.currency,
        )  # fmt: skip
        event.occurred_at.GetCurrentTime()
        await self.payments.ApplyPaymentEvent(payment_service_pb2.ApplyPaymentEventRequest(event=event), metadata=self.operator)

    async def get(self, deployment_id: str) -> deployment_pb2.Deployment:
        """As operators see it."""
        request = deployment_service_pb2.GetDeploymentRequest(id=deployment_id)
        return await self.deployments.GetDeployment(request, metadata=self.operator, wait_for_ready=True, timeout=20)

    async def until(self, deployment_id: str, state: int, timeout_s: float = 30) -> deployment_pb2.Deployment:
        """The deployment once it is in a state."""

        async def check() -> Any:
            d = await self.get(deployment_id)
            return d if d.state == state else None

        try:
            return await eventually(check, timeout_s)
        except AssertionError:
            raise AssertionError(f"never {state}: {await self.get(deployment_id)}") from None


def market_env(url: str) -> dict[str, str]:
    """The settings that put a process on the counting market."""
    return {"CLAWPLANE_DRIVER": "tests.simulators.market:MarketDriver", "CLAWPLANE_DRIVER_OPTIONS": json.dumps({"url": url})}
