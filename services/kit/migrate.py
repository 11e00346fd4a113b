"""Migrations of a service at start-up, safe when several processes start at once."""

import asyncio
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, MetaData, text

import migrations
from services.kit.db import Database

_ROOT = Path(next(iter(migrations.__path__)))
_LOCK = 7_241_116_051
# Alembic keeps its state in module globals: never two histories at once in one process.
_one_at_a_time = asyncio.Lock()


def config(connection: Connection, service: str, metadata: MetaData | None = None) -> Config:
    """Alembic's settings for one service; there is no ini file."""
    result = Config()
    result.set_main_option("script_location", str(_ROOT))
    result.set_main_option("path_separator", "os")
    result.set_main_option("version_locations", str(_ROOT / service / "versions"))
    result.attributes.update(connection=connection, service=service, metadata=metadata)
    return result


async def migrate(db: Database, service: str, revision: str = "head") -> None:
    """Brings the database to a revision ("head", "base" or an id). Others wait for the lock and then find nothing to do."""
    async with _one_at_a_time:
        if db.is_sqlite and db.url.database and db.url.database != ":memory:":
            Path(db.url.database).parent.mkdir(parents=True, exist_ok=True)

        def run(connection: Connection) -> None:
            how: Any = command.downgrade if revision == "base" else command.upgrade
            how(config(connection, service), revision)

        # On SQLite, BEGIN IMMEDIATE is the lock (db.py).
        async with db.writing.begin() as connection:
            if not db.is_sqlite:
                await connection.execute(text("SET LOCAL statement_timeout = 0"))
                await connection.execute(text("SET LOCAL lock_timeout = 0"))
                await connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
            await connection.run_sync(run)
