"""Stops, restarts and crashes of processes under load: no call fails, no stream has a gap, nothing is left behind."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import pytest_asyncio

from clawplane.deployment.v1 import deployment_pb2
from clawplane.deployment.v1 import deployment_service_pb2 as rpc
from services.kit import clients
from tests.conftest import Databases
from tests.harness import TRANSPORT, Metadata, clean_env, eventually
from tests.processes import ROOT, Client, Processes, market_env
from tests.simulators.market import MarketSimulator

WORKERS, CALLERS = 2, 8
# Several processes share a server; a file has one.
on_a_server = pytest.mark.parametrize("databases", ["postgres"], indirect=True)


class Load:
    """Callers that read and write without a pause, as internal services do: with the kit's channel and its retries."""

    def __init__(self, ports: list[int], person: Metadata, deployment_id: str, callers: int = CALLERS) -> None:
        target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)
        self.channels = [clients.channel(target) for _ in range(callers)]
        self.person, self.deployment_id = person, deployment_id
        self.done, self.failures = 0, list[str]()
        self._stop = asyncio.Event()
        self._tasks = [asyncio.create_task(self._call(n)) for n in range(callers)]

    async def _call(self, number: int) -> None:
        path = "/clawplane.deployment.v1.DeploymentService/"
        get: Any = self.channels[number].unary_unary(
            f"{path}GetDeployment", rpc.GetDeploymentRequest.SerializeToString, deployment_pb2.Deployment.FromString
        )
        update: Any = self.channels[number].unary_unary(
            f"{path}UpdateDeployment", rpc.UpdateDeploymentRequest.SerializeToString, deployment_pb2.Deployment.FromString
        )
        while not self._stop.is_set():
            try:
                await get(rpc.GetDeploymentRequest(id=self.deployment_id), metadata=self.person, timeout=10)
                if number == 0:
                    wish = deployment_pb2.Deployment(id=self.deployment_id, display_name=f"name {self.done}")
                    await update(rpc.UpdateDeploymentRequest(deployment=wish), metadata=self.person, timeout=10)
                self.done += 1
            except grpc.aio.AioRpcError as error:
                self.failures.append(f"{error.code().name}: {error.details()}")

    async def stop(self) -> None:
        """Lets the calls in hand finish."""
        self._stop.set()
        await asyncio.gather(*self._tasks)
        for channel in self.channels:
            await channel.close()


@pytest_asyncio.fixture
async def processes(databases: Databases, market: MarketSimulator, tmp_path: Path) -> AsyncIterator[Processes]:
    """A user service, and a deployment service of two workers."""
    started = Processes(databases, tmp_path, workers=WORKERS, **market_env(market.url), CLAWPLANE_POOL_SIZE="3", CLAWPLANE_MAX_OVERFLOW="2")
    try:
        await started.ready()
        # The port answers as soon as the first of them serves.
        await both_there(started.running[1], set())
        yield started
    finally:
        started.stop()


def workers_of(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """The living workers of a supervisor."""

    def lives(child: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):
            return child.status() != psutil.STATUS_ZOMBIE and "services.cli" in child.cmdline()
        return False

    return list(filter(lives, psutil.Process(process.pid).children()))


def serves(worker: psutil.Process) -> bool:
    """Whether a worker has bound its port."""
    with suppress(psutil.NoSuchProcess):
        return any(one.status == psutil.CONN_LISTEN for one in worker.net_connections("tcp"))
    return False


async def both_there(process: "subprocess.Popen[bytes]", old: set[int], within_s: float = 40) -> None:
    """Waits until all workers are others than the old ones, and serve."""

    async def check() -> bool:
        now = {worker.pid for worker in workers_of(process) if serves(worker)}
        return len(now) == WORKERS and not now & old

    await eventually(check, within_s)


@on_a_server
async def test_workers_run_on_the_transport_that_was_asked_for_and_share_the_rates(processes: Processes) -> None:
    async def loaded() -> bool:
        maps = [worker.memory_maps() for worker in workers_of(processes.running[1])]
        of_each = [any(f"/{library}." in mapped.path for mapped in one) for one in maps]
        return len(of_each) == WORKERS and all(of_each)

    # Each counts its half of the rates, which is told once.
    assert {worker.environ()["CLAWPLANE_WORKER_COUNT"] for worker in workers_of(processes.running[1])} == {str(WORKERS)}
    assert (processes.folder / "deployment-1.log").read_text().count("limits.divided") == 1
    library = {"grpcio": "cygrpc", "native": "pygrpc_native/_native"}[TRANSPORT]
    assert await eventually(loaded, 40)


@on_a_server
async def test_a_rolling_restart_fails_no_call(processes: Processes) -> None:
    person = await processes.person()
    async with Client(processes) as client:
        d = await client.order(person)
        old = {worker.pid for worker in workers_of(processes.running[1])}
        load = Load([processes.ports[1]], person, d.id)
        await asyncio.sleep(1)
        processes.running[1].send_signal(signal.SIGHUP)
        await both_there(processes.running[1], old)
        await asyncio.sleep(0.5)
        await load.stop()
    assert load.failures == [] and load.done > 100, (load.done, load.failures[:3])


@on_a_server
async def test_a_crashed_worker_is_started_again(processes: Processes) -> None:
    person = await processes.person()
    victim = workers_of(processes.running[1])[0]
    victim.kill()
    await both_there(processes.running[1], {victim.pid}, 30)
    async with Client(processes) as client:
        assert (await client.order(person)).state == deployment_pb2.STATE_PENDING


@on_a_server
async def test_workers_end_with_their_supervisor(processes: Processes) -> None:
    left = workers_of(processes.running[1])
    processes.running[1].kill()
    processes.running[1].wait()
    gone, alive = await asyncio.to_thread(psutil.wait_procs, left, 10)
    assert len(gone) == WORKERS and not alive
    processes.running[1] = processes.start(1)
    await processes.ready()


@on_a_server
async def test_workers_that_start_end_with_their_supervisor_too(processes: Processes) -> None:
    """Killed while a worker starts: it must not go on to serve with nobody to stop it."""
    supervisor = processes.running[1]
    await asyncio.to_thread(workers_of(supervisor)[0].kill)

    async def starting() -> list[psutil.Process]:
        now = workers_of(supervisor)
        return sorted(now, key=serves) if len(now) == WORKERS and not all(map(serves, now)) else []

    left = await eventually(starting, 20)
    young = left[0]
    supervisor.kill()
    supervisor.wait()

    def comes_to_serve() -> bool:
        deadline = time.monotonic() + 20
        with suppress(psutil.NoSuchProcess):
            while young.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
                if serves(young):
                    return True
                time.sleep(0.002)
        return False

    assert not await asyncio.to_thread(comes_to_serve)
    gone, alive = await asyncio.to_thread(psutil.wait_procs, left, 10)
    assert len(gone) == WORKERS and not alive
    processes.running[1] = processes.start(1)
    await processes.ready()


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_a_stop_under_load_ends_watches_and_fails_no_call(databases: Databases, market: MarketSimulator, tmp_path: Path) -> None:
    """Two deployment services: one is told to stop while calls and watches are open; the other takes over."""
    processes = Processes(databases, tmp_path, deployments=2, **market_env(market.url))
    try:
        await processes.ready()
        person = await processes.person()
        async with Client(processes, 1) as first, Client(processes, 2) as second:
            d = await first.order(person)
            watches = [first.deployments.WatchDeployment(rpc.WatchDeploymentRequest(id=d.id), metadata=person) for _ in range(20)]
            for watch in watches:
                await watch.read()
            load = Load(processes.ports[1:], person, d.id, 4)
            await asyncio.sleep(0.5)
            started = time.monotonic()
            processes.running[1].send_signal(signal.SIGTERM)
            status = await asyncio.to_thread(processes.running[1].wait, 20)
            took = time.monotonic() - started
            assert status == 0 and took < 2, took
            await asyncio.sleep(0.3)
            await load.stop()
            assert load.failures == [] and load.done > 50, (load.done, load.failures[:3])
            for watch in watches:
                with pytest.raises(grpc.aio.AioRpcError) as ended:
                    await watch.read()
                assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
            print(f"stopped in {took:.2f} s with {len(watches)} watches open, under {load.done} calls")
            # What happens meanwhile is seen by whoever resumes at the other one.
            await second.pay(d)
            await second.until(d.id, deployment_pb2.STATE_ACTIVE)
            request = rpc.ListDeploymentEventsRequest(deployment_id=d.id)
            events = (await second.deployments.ListDeploymentEvents(request, metadata=person)).events
            resume = rpc.WatchDeploymentRequest(id=d.id, after_event_id=events[1].id)
            resumed = second.deployments.WatchDeployment(resume, metadata=person)
            await resumed.read()
            assert [(await resumed.read()).event.id for _ in events[2:]] == [event.id for event in events[2:]]
        processes.running[1] = processes.start(1)
        await processes.ready()
    finally:
        processes.stop()


@on_a_server
async def test_too_many_workers_for_the_server_are_refused(databases: Databases, tmp_path: Path) -> None:
    urls = databases.make()
    env = clean_env() | {
        "CLAWPLANE_USER_DATABASE_URL": urls["user_svc"], "CLAWPLANE_DATA_DIR": str(tmp_path), "CLAWPLANE_POOL_SIZE": "50",
    }  # fmt: skip
    command = [sys.executable, "-m", "services.cli", "serve", "user", "--port", "1", "--workers", "4"]
    done = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "4 workers may open 260 connections" in done.stderr.replace("\n", " ")
