"""Rates that all processes count together, on a real Redis that is also killed."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from prometheus_client import REGISTRY

from services.kit.limits import Limiter
from services.kit.settings import KitSettings
from tests.harness import clean_env, free_port
from tests.kit.echo import refused, running

pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed: apt-get install redis-server")
ROOT = Path(__file__).resolve().parent.parent
SECRET = "PLANTED-password"


class Redis:
    """A server that keeps nothing on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"redis://:{SECRET}@127.0.0.1:{self.port}/1"
        self.start()

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        options = {"port": self.port, "bind": "127.0.0.1", "save": "", "appendonly": "no", "dir": self.folder, "requirepass": SECRET}
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(["redis-server", *arguments], stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while "PONG" not in self.ask("PING"):
            assert time.monotonic() < deadline, (self.folder / "redis.log").read_text()
            time.sleep(0.02)

    def ask(self, *words: str) -> str:
        """What redis-cli says."""
        command = ["redis-cli", "-p", str(self.port), "-n", "1", "--no-auth-warning", "-a", SECRET, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout

    def stop(self) -> None:
        """Kills it."""
        self.process.kill()
        self.process.wait()

    def settings(self, **more: Any) -> KitSettings:
        """Settings with this Redis. Tests are slow at times; how soon a count is given up is another test's matter."""
        return KitSettings(**{"redis_url": self.url, "redis_timeout_s": 10, **more})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """A running Redis."""
    made = Redis(tmp_path_factory.mktemp("redis"))
    yield made
    made.stop()


@pytest.fixture
def redis(server: Redis) -> Redis:
    """The running Redis, empty."""
    if server.process.poll() is not None:
        server.start()
    server.ask("FLUSHALL")
    return server


@contextlib.asynccontextmanager
async def limiter(settings: KitSettings, service: str = "test") -> Any:
    """A limiter that is closed at the end."""
    made = Limiter(settings, service)
    try:
        yield made
    finally:
        await made.close()


def uncounted(service: str) -> float:
    """Calls let in uncounted so far."""
    return REGISTRY.get_sample_value("clawplane_rate_limits_uncounted_total", {"service": service}) or 0.0


async def test_300_checks_at_once_let_in_exactly_as_many_as_the_rate(redis: Redis) -> None:
    async with limiter(redis.settings()) as made:
        waits = await asyncio.gather(*(made.hit("usr_1", "100/minute") for _ in range(300)))
        assert waits.count(0) == 100 and all(0 < wait <= 60 for wait in waits if wait)
        assert await made.hit("usr_2", "100/minute") == 0 and await made.hit("usr_1", "101/hour") == 0
        assert uncounted("test") == 0
    async with limiter(redis.settings(), "other") as made:
        assert await made.hit("usr_1", "100/minute") == 0
    keys = redis.ask("KEYS", "*").split()
    # One key for each count, which ends by itself, under our name, and nobody's name in it.
    assert len(keys) == 4 and all("clawplane" in key and "usr_" not in key for key in keys)
    assert all(0 < int(redis.ask("PTTL", key)) <= 7_200_000 for key in keys)


async def test_the_wait_is_what_it_takes(redis: Redis) -> None:
    async with limiter(redis.settings()) as made:
        assert [await made.hit("a", "3/second") for _ in range(3)] == [0, 0, 0]
        wait_s = await made.hit("a", "3/second")
        assert 0 < wait_s <= 1
        await asyncio.sleep(wait_s + 0.05)
        assert await made.hit("a", "3/second") == 0


CHILD = """
import asyncio, sys
from services.kit.limits import Limiter
from services.kit.settings import KitSettings

async def main():
    made = Limiter(KitSettings(), "shared")
    await made.hit("warm", "1000/hour")
    print("ready", flush=True)
    sys.stdin.readline()
    waits = await asyncio.gather(*(made.hit("usr_1", "50/hour") for _ in range(40)))
    print(waits.count(0), flush=True)

asyncio.run(main())
"""


async def test_two_processes_share_one_rate(redis: Redis) -> None:
    # They are workers of one service too: with Redis nothing is divided.
    env = clean_env() | {"CLAWPLANE_REDIS_URL": redis.url, "CLAWPLANE_REDIS_TIMEOUT_S": "10", "CLAWPLANE_WORKER_COUNT": "2"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([sys.executable, "-c", CHILD], cwd=ROOT, env=env, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    try:
        for child in children:
            assert (await asyncio.to_thread(child.stdout.readline)).strip() == "ready"
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
        counts = [int(await asyncio.to_thread(child.stdout.readline)) for child in children]
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert sum(counts) == 50 and max(counts) <= 40


async def test_calls_go_on_when_redis_is_killed_and_count_again_when_it_is_back(redis: Redis, tmp_path: Path) -> None:
    async with running(tmp_path, f"sqlite+aiosqlite:///{tmp_path / 'echo.db'}", redis_url=redis.url, redis_timeout_s=0.5, rate_limit="3/hour") as echo:
        who = echo.person()
        for _ in range(3):
            await echo.call("Read", metadata=who)
        assert "the limit is 3/hour" in str((await refused(echo.call("Read", metadata=who))).details())
        before = uncounted("echo")
        with structlog.testing.capture_logs() as logs:
            redis.stop()
            started = time.monotonic()
            while time.monotonic() - started < 2.5:
                await asyncio.gather(*(echo.call("Read", metadata=who) for _ in range(10)))
            assert uncounted("echo") >= before + 30
        said = [line for line in logs if line["event"] == "limits.uncounted"]
        assert len(said) == 1 and SECRET not in str(logs), said
        redis.start()
        deadline = time.monotonic() + 20
        counted = 0
        # What it knew is gone with it; from now on it counts again.
        while "the limit is" not in str(await _outcome(echo.call("Read", metadata=who))):
            counted += 1
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        assert counted >= 3


async def _outcome(call: Any) -> Any:
    try:
        return await call
    except Exception as error:
        return error


async def test_a_redis_that_hangs_holds_nobody_up(redis: Redis) -> None:
    async with limiter(redis.settings(redis_timeout_s=0.1), "hanging") as made:
        await made.hit("a", "1/hour")
        os.kill(redis.process.pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            assert await asyncio.gather(*(made.hit("a", "1/hour") for _ in range(300))) == [0] * 300
            took = time.monotonic() - started
            # The first ones have waited, and for a second nobody tries.
            started = time.monotonic()
            assert [await made.hit("a", "1/hour") for _ in range(100)] == [0] * 100
            assert took < 2 and time.monotonic() - started < 0.2, took
        finally:
            os.kill(redis.process.pid, signal.SIGCONT)
        assert uncounted("hanging") == 400
        await asyncio.sleep(1.1)
        deadline = time.monotonic() + 10
        while not await made.hit("a", "1/hour"):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)


@pytest.mark.parametrize("url", ["http://127.0.0.1", f"127.0.0.1:6379/{SECRET}", "redis://127.0.0.1:port"])
def test_what_is_no_redis_stops_the_start(url: str) -> None:
    with pytest.raises(ValueError, match=r"REDIS_URL|[Pp]ort") as refusal:
        Limiter(KitSettings(redis_url=url), "test")  # type: ignore[arg-type]
    assert SECRET not in str(refusal.value)
