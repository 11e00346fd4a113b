"""Real concurrency: one wish is one row and one page; a tier's limit holds; two processes agree."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest_asyncio

from clawplane.deployment.v1 import deployment_pb2, deployment_service_pb2, deployment_service_pb2_grpc
from services.kit import devkeys
from services.kit.auth import TokenSigner
from services.kit.settings import KitSettings
from tests.conftest import Databases
from tests.harness import TELEGRAM, Person, Stack, eventually, free_port

ROOT = Path(__file__).resolve().parent.parent
CALLS = 50


async def test_fifty_identical_orders_are_one_row_and_one_page(stack: Stack, person: Person) -> None:
    made = await asyncio.gather(*(stack.order(person) for _ in range(CALLS)))
    assert len({(d.id, d.payment_url, d.stripe_session_id) for d in made}) == 1
    listed = await stack.deployments.ListDeployments(deployment_service_pb2.ListDeploymentsRequest(), metadata=person.metadata)
    assert [d.id for d in listed.deployments] == [made[0].id]


async def test_fifty_different_orders_leave_what_the_tier_allows(stack: Stack, person: Person) -> None:
    results = await asyncio.gather(
        *(stack.order(person, f"1234567{n:02d}:" + "D" * 35) for n in range(CALLS)), return_exceptions=True
    )
    made = [result for result in results if isinstance(result, deployment_pb2.Deployment)]
    refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert (len(made), len(refused)) == (3, CALLS - 3)
    assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    listed = await stack.deployments.ListDeployments(deployment_service_pb2.ListDeploymentsRequest(), metadata=person.metadata)
    assert {d.id for d in listed.deployments} == {d.id for d in made}


class Processes:
    """Two deployment services and a user service, each a process, on the same databases."""

    def __init__(self, databases: Databases, folder: Path) -> None:
        self.keys = devkeys.load_or_make(folder)
        self.ports = [free_port() for _ in range(3)]
        urls = databases.make()
        clean = {name: value for name, value in os.environ.items() if not name.startswith("CLAWPLANE_")}
        env = clean | {
            "CLAWPLANE_DATA_DIR": str(folder), "CLAWPLANE_USER_DATABASE_URL": urls["user_svc"],
            "CLAWPLANE_DEPLOYMENT_DATABASE_URL": urls["deployment_svc"], "CLAWPLANE_LOG_LEVEL": "warning",
            "CLAWPLANE_USER_TARGET": f"127.0.0.1:{self.ports[0]}",
        }  # fmt: skip
        parts = ("user", "deployment", "deployment")
        self.running = [
            subprocess.Popen([sys.executable, "-m", "services.cli", "serve", part, "--port", str(port)], cwd=ROOT, env=env)
            for part, port in zip(parts, self.ports, strict=True)
        ]

    def stop(self) -> None:
        for process in self.running:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(20) for process in self.running] == [0, 0, 0]


@pytest_asyncio.fixture
async def processes(databases: Databases, tmp_path: Path) -> AsyncIterator[Processes]:
    """The processes; both deployment services migrate the same database at the same moment."""
    started = Processes(databases, tmp_path)
    try:
        for port in started.ports:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
                await asyncio.wait_for(channel.channel_ready(), 60)
        yield started
    finally:
        started.stop()


async def test_two_processes_agree_on_one_row_and_one_page(processes: Processes) -> None:
    from clawplane.user.v1 import user_pb2, user_service_pb2, user_service_pb2_grpc

    operator = (("authorization", f"Bearer {processes.keys['operator_token']}"),)
    options = [("grpc.enable_http_proxy", 0)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{processes.ports[0]}", options=options) as channel:
        wish = user_service_pb2.CreateUserRequest(user=user_pb2.User(email="ann@example.com"))
        user = await user_service_pb2_grpc.UserServiceStub(channel).CreateUser(wish, metadata=operator)
    signer = TokenSigner(KitSettings(**devkeys.settings_for(processes.keys, "cli")))  # type: ignore[arg-type]
    metadata = (("authorization", f"Bearer {signer.sign(['*'], user=user.id)}"),)
    channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) for port in processes.ports[1:]]
    stubs = [deployment_service_pb2_grpc.DeploymentServiceStub(channel) for channel in channels]
    request = deployment_service_pb2.CreateDeploymentRequest(
        model="claude-opus-4.5", channel=deployment_pb2.CHANNEL_TELEGRAM, channel_token=TELEGRAM
    )
    made = await asyncio.gather(*(stubs[n % 2].CreateDeployment(request, metadata=metadata, timeout=30) for n in range(CALLS)))
    assert len({(d.id, d.payment_url) for d in made}) == 1

    async def listed() -> list[str]:
        answer = await stubs[0].ListDeployments(deployment_service_pb2.ListDeploymentsRequest(), metadata=metadata)
        return [d.id for d in answer.deployments]

    assert await eventually(listed) == [made[0].id]
    for channel in channels:
        await channel.close()


