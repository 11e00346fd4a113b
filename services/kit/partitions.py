"""Monthly partitions on PostgreSQL; SQLite has one table and needs none."""

import re
from collections.abc import Mapping
from datetime import date

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from services.kit.columns import now
from services.kit.db import ALL, Database, alone
from services.kit.loops import Loop

_AHEAD, _BEHIND = 2, 2
"""Months that always have a partition: rows for any other fall into the default one and are still found."""

# Not to_regclass, which answers from a cache that misses what others made since this transaction began.
_THERE = text("SELECT EXISTS (SELECT 1 FROM pg_class WHERE relname = :name AND pg_table_is_visible(oid))")


_PARTITIONS = text(
    "SELECT c.relname FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid JOIN pg_class p ON p.oid = inhparent "
    "WHERE p.relname = :table AND pg_table_is_visible(p.oid)"
)


def months(today: date) -> list[date]:
    """First days of the months that need a partition."""
    number = today.year * 12 + today.month - 1
    return [date((number + shift) // 12, (number + shift) % 12 + 1, 1) for shift in range(-_BEHIND, _AHEAD + 1)]


def _bounds(first: date) -> tuple[str, str]:
    """Where a month begins and ends, whatever the time zone of the database."""
    after = date(first.year + first.month // 12, first.month % 12 + 1, 1)
    return f"{first.isoformat()} 00:00:00+00", f"{after.isoformat()} 00:00:00+00"


async def drop(db: Database, table: str, column: str, before: date) -> list[str]:
    """Drops the partitions of months before one, and deletes such rows of the default one: names of what was dropped.

    Whoever reads or writes the table waits only for the moment of the drop."""
    dropped = []
    async with db.transaction(ALL) as session:
        names = sorted(await session.scalars(_PARTITIONS, {"table": table}))
    for name in names:
        month = name.removeprefix(f"{table}_")
        if not re.fullmatch(r"\d{4}_\d{2}", month) or date.fromisoformat(f"{month.replace('_', '-')}-01") >= before:
            continue
        async with db.transaction(ALL) as session:
            await session.execute(text("SET LOCAL lock_timeout = '5s'"))
            await session.execute(text(f"DROP TABLE IF EXISTS {name}"))
        dropped.append(name)
    async with db.transaction(ALL) as session:
        await session.execute(text(f"DELETE FROM {table}_default WHERE {column} < :before"), {"before": before})  # noqa: S608
    return dropped


async def ensure(db: Database, tables: Mapping[str, str]) -> None:
    """Makes the partitions of the months around today, given the tables and the column that each is partitioned by.

    Safe to call at any time and from several processes. Rows of such a month that fell into the default partition move over."""
    if db.is_sqlite:
        return
    for table, column in tables.items():
        for first in months(now().date()):
            name = f"{table}_{first:%Y_%m}"
            async with db.transaction(ALL) as session:
                if await session.scalar(_THERE, {"name": name}):
                    continue
                await alone(session, f"partitions of {table}")
                if not await session.scalar(_THERE, {"name": name}):
                    await _make(session, table, column, name, first)


async def _make(session: AsyncSession, table: str, column: str, name: str, first: date) -> None:
    begins, ends = _bounds(first)
    moved = f"DELETE FROM {table}_default WHERE {column} >= '{begins}' AND {column} < '{ends}' RETURNING *"  # noqa: S608 - our own words
    for statement in (
        # Whoever writes waits here and finds the new partition; one who was already on the way to the default one would fail.
        "SET LOCAL lock_timeout = '5s'",
        f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE",
        f"CREATE TABLE {name} (LIKE {table} INCLUDING ALL)",
        f"WITH moved AS ({moved}) INSERT INTO {name} SELECT * FROM moved",  # noqa: S608
        f"ALTER TABLE {table} ATTACH PARTITION {name} FOR VALUES FROM ('{begins}') TO ('{ends}')",
    ):
        await session.execute(text(statement))


def keeper(db: Database, tables: Mapping[str, str]) -> Loop:
    """The loop that makes the months to come."""

    async def tick() -> bool:
        await ensure(db, tables)
        return False

    return Loop("partitions", tick, 6 * 3600)
