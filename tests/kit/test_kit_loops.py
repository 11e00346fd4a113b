"""Loops: rows claimed by one worker at a time, leases, wake-ups, pauses and an orderly stop."""

import asyncio
import itertools
import secrets
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import sqlalchemy as sa
import structlog

from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.loops import Loop, claim, held
from tests.kit.echo import Note

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import asyncio, sys
from services.kit.db import Database
from services.kit.loops import claim
from services.kit.settings import KitSettings
from tests.kit.echo import Note

async def main(url, tag):
    db = Database(url, KitSettings(), "worker")
    while rows := await claim(db, Note, limit=3, lease_s=60, where=[Note.hidden == tag]):
        assert len(rows) <= 3, len(rows)
        print(*(row.id for row in rows), sep="\\n")
    await db.close()

asyncio.run(main(*sys.argv[1:]))
"""


async def due(db: Database, count: int, tag: str, seconds: float = -1) -> list[str]:
    """Rows that are due."""
    async with db.transaction("org_" + "1" * 32) as session:
        rows = [Note(name=secrets.token_hex(8), hidden=tag, due_at=now() + timedelta(seconds=seconds)) for _ in range(count)]
        session.add_all(rows)
    return [row.id for row in rows]


async def test_two_workers_never_hold_the_same_row(db: Database, kit_url: str) -> None:
    tag = secrets.token_hex(8)
    rows = await due(db, 60, tag)
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, kit_url, tag], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]

    async def here() -> list[str]:
        mine: list[str] = []
        while some := await claim(db, Note, limit=3, lease_s=60, where=[Note.hidden == tag]):
            assert len(some) <= 3
            mine += [row.id for row in some]
            await asyncio.sleep(0.02)
        return mine

    # Real processes need a second to begin; meanwhile these take their share slowly.
    taken = [one for some in await asyncio.gather(here(), here(), here()) for one in some]
    for worker in workers:
        out, said = await asyncio.to_thread(worker.communicate, timeout=30)
        assert worker.returncode == 0, said
        taken += out.split()
    assert sorted(taken) == sorted(rows)


async def test_a_lease_that_ran_out_is_taken_over(db: Database) -> None:
    tag = secrets.token_hex(8)
    (row_id,) = await due(db, 1, tag)
    mine = [Note.hidden == tag]
    (first,) = await claim(db, Note, limit=5, lease_s=0.2, where=mine)
    assert first.id == row_id and first.lease_token and await claim(db, Note, limit=5, lease_s=1, where=mine) == []
    await asyncio.sleep(0.3)
    (second,) = await claim(db, Note, limit=5, lease_s=1, where=mine)
    assert second.id == row_id and second.lease_token != first.lease_token
    # Being worked on is no change that an owner sees.
    assert second.updated_at == first.updated_at and second.version == 1
    async with held(db, first, 0.3):
        await asyncio.sleep(0.3)
    async with db.read(ALL) as session:
        seen = await session.get_one(Note, row_id)
    assert (seen.lease_token, seen.lease_until) == (second.lease_token, second.lease_until), "the first one renewed what is not his"


async def test_a_tick_with_nothing_to_do_writes_nothing(db: Database) -> None:
    tag = secrets.token_hex(8)
    await due(db, 1, tag, seconds=60)
    asked: list[str] = []
    sa.event.listen(db.engine.sync_engine, "before_cursor_execute", lambda *said: asked.append(said[2]))
    assert await claim(db, Note, limit=5, lease_s=60, where=[Note.hidden == tag]) == []
    assert [one for one in asked if "LIMIT" in one] and not [one for one in asked if "UPDATE" in one]
    await due(db, 1, tag)
    assert len(await claim(db, Note, limit=5, lease_s=60, where=[Note.hidden == tag])) == 1
    assert [one for one in asked if "UPDATE" in one]


async def test_what_is_not_due_waits_and_the_longest_due_comes_first(db: Database) -> None:
    tag = secrets.token_hex(8)
    await due(db, 1, tag, seconds=60)
    late, later = await due(db, 1, tag, seconds=-5), await due(db, 1, tag, seconds=-50)
    got = [(await claim(db, Note, limit=1, lease_s=60, where=[Note.hidden == tag]))[0].id for _ in range(2)]
    assert got == later + late
    assert await claim(db, Note, limit=1, lease_s=60, where=[Note.hidden == tag]) == []


async def test_a_row_stays_held_while_the_work_lasts_even_if_a_beat_fails(db: Database) -> None:
    tag = secrets.token_hex(8)
    await due(db, 1, tag)
    (row,) = await claim(db, Note, limit=1, lease_s=0.6, where=[Note.hidden == tag])
    async with held(db, row, 0.6):
        with structlog.testing.capture_logs() as logs:
            async with db.writing.begin() as connection:
                await connection.run_sync(lambda c: c.execute(sa.text("ALTER TABLE notes RENAME TO moved")))
            await asyncio.sleep(0.3)
            async with db.writing.begin() as connection:
                await connection.run_sync(lambda c: c.execute(sa.text("ALTER TABLE moved RENAME TO notes")))
        assert "lease.not_renewed" in {line["event"] for line in logs}
        await asyncio.sleep(0.8)
        assert await claim(db, Note, limit=1, lease_s=1, where=[Note.hidden == tag]) == []
    await asyncio.sleep(0.7)
    assert len(await claim(db, Note, limit=1, lease_s=1, where=[Note.hidden == tag])) == 1


async def test_a_loop_runs_on_while_there_is_more_and_wakes_when_told() -> None:
    left, ran = [True, True, False], asyncio.Event()
    times = 0

    async def tick() -> bool:
        nonlocal times
        times += 1
        if not left:
            ran.set()
            return False
        return left.pop(0)

    loop = Loop("test", tick, 60)
    loop.start()
    await asyncio.sleep(0.05)
    assert times == 3
    loop.wake()
    await asyncio.wait_for(ran.wait(), 1)
    await loop.stop()
    assert times == 4


async def test_a_failing_loop_waits_longer_and_lives() -> None:
    at: list[float] = []

    async def tick() -> bool:
        at.append(time.monotonic())
        if len(at) < 5:
            raise ZeroDivisionError("PLANTED")
        return False

    loop = Loop("test", tick, 0.02)
    with structlog.testing.capture_logs() as logs:
        loop.start()
        while len(at) < 6:
            await asyncio.sleep(0.02)
        await loop.stop()
    pauses = [later - earlier for earlier, later in itertools.pairwise(at)]
    assert pauses[3] > 2 * pauses[0] and pauses[4] < pauses[3]
    assert [line["failures"] for line in logs if line["event"] == "loop.failed"] == [1, 2, 3, 4]


async def test_a_loop_that_failed_for_a_day_lives() -> None:
    times = 0

    async def tick() -> bool:
        nonlocal times
        times += 1
        raise ZeroDivisionError

    loop = Loop("test", tick, 0.001)
    with structlog.testing.capture_logs():
        loop.start()
        async with asyncio.timeout(10):
            while times < 2000:
                loop.wake()
                await asyncio.sleep(0)
        await loop.stop()


async def test_stopping_lets_the_step_in_hand_finish() -> None:
    begun, done = asyncio.Event(), False

    async def tick() -> bool:
        nonlocal done
        begun.set()
        await asyncio.sleep(0.2)
        done = True
        return True

    loop = Loop("test", tick, 60)
    loop.start()
    await begun.wait()
    await loop.stop()
    assert done
    await Loop("never started", tick, 1).stop()
