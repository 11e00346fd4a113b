"""Monthly partitions: made while others write, and nothing is left in the default one or lost."""

import asyncio
import secrets
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from services.kit import ids
from services.kit.db import ALL, Database
from services.kit.migrate import migrate
from services.kit.partitions import ensure, months
from services.kit.settings import KitSettings
from services.user_svc.app import PARTITIONED
from services.user_svc.base import AuditEvent
from tests.conftest import Databases


def row(text: str) -> AuditEvent:
    """Something that was done."""
    return AuditEvent(id=ids.new("aud"), org_id=ids.new("org"), subject="operator", method=text)


async def test_rows_move_from_the_default_partition_while_others_write(databases: Databases) -> None:
    db = Database(databases.make()["user_svc"], KitSettings(), f"partitions{secrets.token_hex(2)}")
    try:
        await migrate(db, "user_svc")
        async with db.transaction(ALL) as session:
            session.add_all([row("before") for _ in range(20)])

        async def write(number: int) -> None:
            for _ in range(10):
                async with db.transaction(ALL) as session:
                    session.add(row(f"beside-{number}"))

        await asyncio.gather(*(write(n) for n in range(4)), *(ensure(db, PARTITIONED) for _ in range(4)))
        await ensure(db, PARTITIONED)
        async with db.transaction(ALL) as session:
            assert await session.scalar(sa.select(sa.func.count()).select_from(AuditEvent)) == 60
            if not db.is_sqlite:
                by_part = "SELECT tableoid::regclass::text FROM audit_events GROUP BY 1"
                assert set(await session.scalars(sa.text(by_part))) == {f"audit_events_{datetime.now(UTC):%Y_%m}"}
                inherited = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'audit_events'::regclass"
                assert await session.scalar(sa.text(inherited)) == 6
    finally:
        await db.close()


@pytest.mark.parametrize(
    ("today", "first", "last"),
    [("2026-01-31", "2025-11-01", "2026-03-01"), ("2026-12-01", "2026-10-01", "2027-02-01"), ("2026-06-15", "2026-04-01", "2026-08-01")],
)
def test_the_months_around_a_day(today: str, first: str, last: str) -> None:
    around = [month.isoformat() for month in months(datetime.fromisoformat(today).date())]
    assert (around[0], around[-1], len(around)) == (first, last, 5) and around == sorted(around)
