"""Fixtures of the kit's tests: a database with two tables, and a service with one RPC of each kind."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from services.kit.db import Database
from services.kit.settings import KitSettings
from tests.conftest import Databases
from tests.kit.echo import Echo, make_tables, running


@pytest.fixture(scope="session")
def kit_url(databases: Databases) -> str:
    """URL of a database for the kit's tests."""
    return databases.make()["user_svc"]


@pytest_asyncio.fixture
async def db(kit_url: str) -> AsyncIterator[Database]:
    """The database, with the tests' tables."""
    made = Database(kit_url, KitSettings(), "kit_test")
    await make_tables(made)
    yield made
    await made.close()


@pytest_asyncio.fixture
async def echo(kit_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Echo]:
    """The running service."""
    async with running(tmp_path_factory.getbasetemp() / "echo", kit_url) as started:
        yield started
