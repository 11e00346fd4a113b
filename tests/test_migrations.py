"""Each history goes up, down and up again on both engines, with rows in the tables, and leads to exactly the models."""

import asyncio
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from services.kit.columns import now
from services.kit.db import Database
from services.kit.migrate import migrate
from services.kit.partitions import ensure
from services.kit.settings import KitSettings
from tests.conftest import Databases

ROOT = Path(__file__).resolve().parent.parent
SERVICES = ("user_svc", "deployment_svc")


def metadata_of(service: str) -> sa.MetaData:
    """The models' tables of a service."""
    for module in pkgutil.walk_packages([str(ROOT / "services" / service)], f"services.{service}."):
        if module.name.endswith(".models"):
            importlib.import_module(module.name)
    return importlib.import_module(f"services.{service}.base").Base.metadata  # type: ignore[no-any-return]


def sample(column: sa.Column[Any]) -> Any:
    """A value that the column's rules allow."""
    for constraint in column.table.constraints:
        if isinstance(constraint, sa.CheckConstraint) and str(constraint.sqltext).startswith(f"{column.name} IN"):
            return str(constraint.sqltext).split("'")[1]
    kind = column.type
    if isinstance(kind, sa.types.TypeDecorator):
        kind = kind.impl_instance if not isinstance(kind.impl, sa.types.Uuid) else kind.impl
    if isinstance(kind, sa.Uuid):
        return "0199f0c0000070008000000000000001"
    if isinstance(kind, sa.Boolean):
        return True
    if isinstance(kind, sa.DateTime):
        return now()
    if isinstance(kind, sa.Date):
        return now().date().replace(day=1)
    if isinstance(kind, sa.LargeBinary):
        return b"x" * 32
    if isinstance(kind, sa.Numeric | sa.Integer):
        return 1
    return {} if isinstance(kind, sa.JSON) else "x"


async def fill(db: Database, metadata: sa.MetaData) -> int:
    """One row in each table, parents first; returns how many tables have one."""
    plain = sa.MetaData()
    async with db.writing.begin() as connection:
        await connection.run_sync(lambda c: plain.reflect(c, only=lambda name, _: name in metadata.tables))
    filled = 0
    async with db.writing.begin() as connection:
        for table in metadata.sorted_tables:
            reflected = plain.tables[table.name]
            values = {}
            for column in table.columns:
                value = sample(column)
                if db.is_sqlite and isinstance(value, type(now())):
                    value = value.replace(tzinfo=None)
                values[column.name] = value
            await connection.execute(sa.insert(reflected).values({k: v for k, v in values.items() if k in reflected.columns}))
            filled += 1
    return filled


@pytest.mark.parametrize("service", SERVICES)
async def test_up_down_up_with_rows(databases: Databases, service: str) -> None:
    metadata = metadata_of(service)
    db = Database(databases.make()[service], KitSettings(), service)
    try:
        await migrate(db, service)
        await migrate(db, service)
        if not db.is_sqlite:
            await ensure(db, importlib.import_module(f"services.{service}.app").PARTITIONED)
        assert await fill(db, metadata) == len(metadata.tables)
        await migrate(db, service, "base")

        def names(connection: sa.Connection) -> set[str]:
            return {name for name in sa.inspect(connection).get_table_names() if not name.startswith("alembic_")}

        async with db.writing.begin() as connection:
            assert await connection.run_sync(names) == set()
        await migrate(db, service)

        def differences(connection: sa.Connection) -> list[Any]:
            def ours(item: Any, name: str | None, kind: str, reflected: bool, other: Any) -> bool:
                # Partitions are no tables of the models, and SQLite cannot reflect an index over an expression.
                if kind == "table" and reflected and other is None:
                    return "_default" not in str(name) and not str(name)[-7:-3].isdigit()
                return name != "ux_users__email"

            context = MigrationContext.configure(
                connection, opts={"include_object": ours, "version_table": f"alembic_version_{service}", "compare_type": not db.is_sqlite}
            )
            return list(compare_metadata(context, metadata))

        async with db.writing.begin() as connection:
            assert await connection.run_sync(differences) == []
    finally:
        await db.close()


@pytest.mark.parametrize("service", SERVICES)
async def test_four_processes_migrate_at_once(databases: Databases, service: str, tmp_path: Path) -> None:
    url = databases.make()[service]
    part = service.removesuffix("_svc")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CLAWPLANE_")}
    env = clean | {f"CLAWPLANE_{part.upper()}_DATABASE_URL": url, "CLAWPLANE_DATA_DIR": str(tmp_path)}
    racing = [
        subprocess.Popen([sys.executable, "-m", "services.cli", "migrate", part], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in racing:
        _, said = await asyncio.to_thread(process.communicate, timeout=60)
        assert process.returncode == 0, said
