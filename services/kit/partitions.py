"""Monthly partitions on PostgreSQL; SQLite has one table and needs none."""

from collections.abc import Sequence
from datetime import date

from sqlalchemy import text

from services.kit.columns import now
from services.kit.db import Database

_AHEAD, _BEHIND = 2, 2
"""Months that always have a partition: rows for any other fall into the default one and are still found."""


def months(today: date) -> list[date]:
    """First days of the months that need a partition."""
    number = today.year * 12 + today.month - 1
    return [date((number + shift) // 12, (number + shift) % 12 + 1, 1) for shift in range(-_BEHIND, _AHEAD + 1)]


def partition_ddl(table: str, first: date) -> str:
    """The statement that makes one month's partition."""
    after = date(first.year + first.month // 12, first.month % 12 + 1, 1)
    return (
        f"CREATE TABLE IF NOT EXISTS {table}_{first:%Y_%m} PARTITION OF {table} "
        f"FOR VALUES FROM ('{first.isoformat()}') TO ('{after.isoformat()}')"
    )


async def ensure(db: Database, tables: Sequence[str]) -> None:
    """Makes the partitions of the months around today. Safe to call at any time and from several processes."""
    if db.is_sqlite:
        return
    for table in tables:
        for first in months(now().date()):
            # Looked for first: CREATE ... IF NOT EXISTS takes a lock on the parent even when there is nothing to do.
            async with db.writing.begin() as connection:
                known = await connection.scalar(text("SELECT to_regclass(:name)"), {"name": f"{table}_{first:%Y_%m}"})
                if known is None:
                    await connection.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 11))"), {"name": table})
                    await connection.execute(text(partition_ddl(table, first)))
