"""Transactions, tenants, clashes and the pool, on both engines."""

import asyncio
import json
import secrets
from typing import Any

import pytest
import sqlalchemy as sa
import structlog
from prometheus_client import REGISTRY
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm.exc import StaleDataError

from services.kit import errors, ids
from services.kit.db import ALL, Database, insert_for, statement_name
from services.kit.settings import KitSettings
from tests.kit.echo import Note

OURS, THEIRS = "org_" + "1" * 32, "org_" + "2" * 32


async def note(db: Database, org_id: str = OURS, **columns: Any) -> Note:
    """A new row."""
    async with db.transaction(org_id) as session:
        row = Note(name=columns.pop("name", secrets.token_hex(8)), **columns)
        session.add(row)
    return row


def metric(name: str, **labels: str) -> float:
    """The value of a metric now."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_another_organizations_rows_do_not_exist(db: Database) -> None:
    mine, theirs = await note(db), await note(db, THEIRS)
    async with db.transaction(OURS) as session:
        assert mine.org_id == OURS
        assert await session.get(Note, theirs.id) is None
        assert await session.get(Note, theirs.id, with_for_update=True) is None
        assert await session.scalar(sa.select(Note.id).where(Note.id == theirs.id)) is None
        assert await session.scalar(sa.select(sa.func.count(Note.id)).where(Note.id.in_([mine.id, theirs.id]))) == 1
        alias = sa.orm.aliased(Note)
        assert await session.scalar(sa.select(Note.id).join(alias, sa.true()).where(alias.id == theirs.id)) is None
        assert await session.scalar(sa.select(sa.exists(sa.select(Note.id).where(Note.id == theirs.id)))) is False
        for statement in (sa.update(Note).values(hidden="x"), sa.delete(Note)):
            done: Any = await session.execute(statement.where(Note.id == theirs.id))
            assert done.rowcount == 0
    async with db.transaction(ALL) as session:
        assert (await session.get_one(Note, theirs.id)).hidden == ""
        assert {row.id for row in await session.scalars(sa.select(Note))} >= {mine.id, theirs.id}


async def test_one_filter_never_becomes_anothers(db: Database) -> None:
    """Statements are compiled once and cached: the tenant must be a parameter of them."""
    mine, theirs = await note(db), await note(db, THEIRS)
    for tenant, wanted in ((OURS, {mine.id}), (THEIRS, {theirs.id}), (ALL, {mine.id, theirs.id}), (OURS, {mine.id})):
        async with db.read(tenant) as session:
            found = await session.scalars(sa.select(Note.id).where(Note.id.in_([mine.id, theirs.id])))
            assert set(found) == wanted


async def test_rows_of_another_organization_are_not_written(db: Database) -> None:
    with pytest.raises(RuntimeError, match="another organization"):
        await _write(db, Note(name="x", org_id=THEIRS))
    mine = await note(db)
    with pytest.raises(RuntimeError, match="another organization"):
        async with db.transaction(OURS) as session:
            (await session.get_one(Note, mine.id)).org_id = THEIRS
    with pytest.raises(RuntimeError, match="without a tenant"):
        async with db.transaction("") as session:
            pass


async def _write(db: Database, row: Note) -> None:
    async with db.transaction(OURS) as session:
        session.add(row)


async def test_nothing_stays_of_a_failed_transaction(db: Database) -> None:
    name = secrets.token_hex(8)
    with pytest.raises(ZeroDivisionError):
        async with db.transaction(OURS) as session:
            session.add(Note(name=name))
            await session.flush()
            raise ZeroDivisionError
    async with db.read(OURS) as session:
        assert await session.scalar(sa.select(Note).where(Note.name == name)) is None


async def test_a_session_for_reading_does_not_write(db: Database) -> None:
    row = await note(db)
    with pytest.raises(RuntimeError, match="reading"):
        async with db.read(OURS) as session:
            await session.execute(sa.update(Note).where(Note.id == row.id).values(hidden="x"))
    with pytest.raises(RuntimeError, match="reading"):
        async with db.read(OURS) as session:
            session.add(Note(name="y"))
            await session.scalars(sa.select(Note))
    with pytest.raises(RuntimeError, match="reading"):
        async with db.read(OURS) as session:
            (await session.get_one(Note, row.id)).hidden = "x"
            await session.flush()
    async with db.read(OURS) as session:
        assert (await session.get_one(Note, row.id)).hidden == ""


async def test_a_stale_write_fails(db: Database) -> None:
    row = await note(db)
    if db.is_sqlite:
        stale = row
    else:
        async with db.read(OURS) as session:
            stale = await session.get_one(Note, row.id)
    async with db.transaction(OURS) as session:
        (await session.get_one(Note, row.id)).hidden = "first"
    with pytest.raises(StaleDataError) as failure:
        async with db.transaction(OURS) as session:
            session.add(stale)
            stale.hidden = "second"
    assert isinstance(errors.from_exception(failure.value), errors.Conflict)


async def test_clashing_units_of_work_are_repeated(db: Database, kit_url: str) -> None:
    """Crossed updates deadlock on PostgreSQL; on SQLite a second process holds the only write lock for a while."""
    first, second = await note(db), await note(db)
    other = Database(kit_url, KitSettings(lock_timeout_s=0.05), "other")
    before = metric("clawplane_db_retries_total", database="other") + metric("clawplane_db_retries_total", database="kit_test")
    runs = 0
    met = asyncio.Barrier(2)

    async def cross(on: Database, a: Note, b: Note) -> None:
        async def work(session: AsyncSession) -> None:
            nonlocal runs
            runs += 1
            await session.execute(sa.update(Note).where(Note.id == a.id).values(hidden=Note.hidden + "x"))
            if on.is_sqlite:
                await asyncio.sleep(0.3)
            elif runs <= 2:
                await met.wait()
            await session.execute(sa.update(Note).where(Note.id == b.id).values(hidden=Note.hidden + "x"))

        await on.run(work, OURS)

    crossing = asyncio.create_task(cross(db, first, second))
    await asyncio.sleep(0.05)
    await asyncio.gather(crossing, cross(other, second, first))
    async with db.read(OURS) as session:
        assert [(await session.get_one(Note, row.id)).hidden for row in (first, second)] == ["xx", "xx"]
    after = metric("clawplane_db_retries_total", database="other") + metric("clawplane_db_retries_total", database="kit_test")
    assert after > before
    await other.close()


async def test_a_lasting_clash_is_told(db: Database, kit_url: str) -> None:
    row = await note(db)
    other = Database(kit_url, KitSettings(lock_timeout_s=0.05), "other")

    async def work(session: AsyncSession) -> None:
        await session.execute(sa.update(Note).where(Note.id == row.id).values(hidden="x"))

    async with db.transaction(OURS) as session:
        await work(session)
        with pytest.raises(sa.exc.DBAPIError) as failure:
            await other.run(work, OURS, tries=2)
    told = errors.from_exception(failure.value)
    assert isinstance(told, errors.Conflict) and told.retry_after_s
    await other.close()


async def test_a_unique_rule_is_told_by_its_field(db: Database) -> None:
    row = await note(db, name=secrets.token_hex(8), tag=secrets.token_hex(8))
    for columns, field in (({"name": row.name}, "name"), ({"tag": row.tag}, "tag"), ({"id": row.id}, "id")):
        with pytest.raises(sa.exc.IntegrityError) as failure:
            await note(db, **columns)
        told = errors.from_exception(failure.value)
        assert isinstance(told, errors.AlreadyExists) and told.violations == [(field, "is already taken")], columns
        status = str(errors.to_status(told, "r1"))
        for leak in (row.name, str(row.tag), "notes", "constraint", "INSERT"):
            assert leak not in status
    with pytest.raises(sa.exc.IntegrityError) as failure:
        await note(db, name=None)
    assert isinstance(errors.from_exception(failure.value), errors.Internal)


async def test_errors_of_the_driver_hold_no_parameters(db: Database) -> None:
    for broken in ("SELECT nonsense FROM nowhere WHERE x = :p",):
        with pytest.raises(sa.exc.DBAPIError) as failure:
            async with db.transaction(ALL) as session:
                await session.execute(sa.text(broken), {"p": "PLANTED"})
        assert "PLANTED" not in str(failure.value)
        told = errors.from_exception(failure.value)
        assert isinstance(told, errors.Internal) and "nowhere" not in str(errors.to_status(told, "r1"))


async def test_a_statement_that_takes_too_long_is_no_defect(db: Database, kit_url: str) -> None:
    if db.is_sqlite:
        return
    strict = Database(kit_url, KitSettings(statement_timeout_s=0.05), "strict")
    with pytest.raises(sa.exc.DBAPIError) as failure:
        async with strict.transaction(ALL) as session:
            await session.execute(sa.text("SELECT pg_sleep(1)"))
    assert isinstance(errors.from_exception(failure.value), errors.Unavailable)
    await strict.close()


async def test_the_pool_tells_who_waits_and_gives_up(db: Database, kit_url: str) -> None:
    before = metric("clawplane_db_pool_timeouts_total", database="small")
    small = Database(kit_url, KitSettings(pool_size=1, max_overflow=0, pool_timeout_s=0.3), "small")
    async with small.read(ALL):
        assert metric("clawplane_db_pool_in_use", database="small") == 1
        waiting = asyncio.ensure_future(_read(small))
        await asyncio.sleep(0.1)
        assert metric("clawplane_db_pool_waiting", database="small") == 1
        with pytest.raises(sa.exc.TimeoutError) as failure:
            await waiting
    assert isinstance(errors.from_exception(failure.value), errors.Unavailable)
    assert metric("clawplane_db_pool_timeouts_total", database="small") == before + 1
    assert metric("clawplane_db_pool_waiting", database="small") == metric("clawplane_db_pool_in_use", database="small") == 0
    await small.close()


async def _read(db: Database) -> None:
    async with db.read(ALL) as session:
        await session.scalars(sa.select(Note.id).limit(1))


async def test_slow_statements_are_logged_by_name(kit_url: str, db: Database) -> None:
    slow = Database(kit_url, KitSettings(slow_statement_ms=0), "slow")
    with structlog.testing.capture_logs() as logs:
        await note(slow, hidden="PLANTED")
        async with slow.read(OURS) as session:
            await session.scalars(sa.select(Note).where(Note.hidden == "PLANTED"))
    said = [line["statement"] for line in logs if line["event"] == "database.slow_statement"]
    assert {"INSERT notes", "SELECT notes"} <= set(said)
    assert "PLANTED" not in json.dumps(logs)
    await slow.close()


def test_names_of_statements() -> None:
    for statement, name in (
        ("SELECT a, b\nFROM notes WHERE x", "SELECT notes"), ("UPDATE notes SET x", "UPDATE notes"), ("DELETE FROM ONLY notes", "DELETE notes"),
        ('INSERT INTO "notes" VALUES', "INSERT notes"), ("BEGIN", "BEGIN"), ("", "?"), ("select 1", "SELECT"),
    ):  # fmt: skip
        assert statement_name(statement) == name


async def test_cancelled_work_gives_its_connection_back(db: Database) -> None:
    async def hold() -> None:
        async with db.transaction(OURS) as session:
            session.add(Note(name=secrets.token_hex(8), hidden="cancelled"))
            await session.flush()
            if db.is_sqlite:
                await asyncio.sleep(5)
            else:
                await session.execute(sa.text("SELECT pg_sleep(5)"))

    tasks = [asyncio.create_task(hold()) for _ in range(10)]
    await asyncio.sleep(0.2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert metric("clawplane_db_pool_in_use", database="kit_test") == 0
    async with db.transaction(OURS) as session:
        assert await session.scalar(sa.select(Note.id).where(Note.hidden == "cancelled")) is None
        await session.execute(insert_for(session)(Note).values(id=ids.new("agnt"), org_id=OURS, name=secrets.token_hex(8)))


async def test_a_database_that_does_not_answer_is_told(tmp_path: Any) -> None:
    for url in (f"sqlite+aiosqlite:///{tmp_path}/no/such/folder/x.db", "postgresql+asyncpg://u:PLANTED@127.0.0.1:1/x"):
        gone = Database(url, KitSettings(connect_tries=2), "gone")
        with structlog.testing.capture_logs() as logs, pytest.raises((sa.exc.DBAPIError, OSError)) as failure:
            await gone.connect()
        # On a busy machine a statement may be slow as well.
        assert [line["event"] for line in logs if line["event"] != "database.slow_statement"] == ["database.connect_failed"]
        assert "PLANTED" not in str(failure.value) + json.dumps(logs)
        await gone.close()
