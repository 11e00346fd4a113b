"""``clawplane usage check``: what events add up to is recounted on both engines, what is wrong is named, and mended."""

import asyncio
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import sqlalchemy as sa

from clawplane.deployment.v1 import usage_event_pb2 as pb
from clawplane.deployment.v1 import usage_service_pb2 as rpc
from services.deployment_svc.settings import DeploymentSettings
from services.deployment_svc.usage import check
from services.deployment_svc.usage.models import UsageCounter, UsageEvent, UsageRollup
from services.deployment_svc.usage.retention import forget, kept_from
from services.deployment_svc.usage.rows import month_of
from services.kit import ids
from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.partitions import ensure
from tests.conftest import Databases
from tests.harness import Person, Stack, clean_env, running
from tests.processes import ROOT


async def used(stack: Stack, person: Person, count: int = 40) -> None:
    """Usage of the last days, in no order."""
    at = datetime.now(UTC)
    events = []
    for number in range(count):
        provider, model = [("anthropic", "claude-opus-4.5"), ("openai", "gpt-3.2"), ("nobody", "new")][number % 3]
        one = pb.UsageEvent(
            id=f"check-{number}", provider=provider, model=model, tokens_in=100 + number, tokens_out=number, latency_ms=number * 997,
            occurred_at=at - timedelta(hours=7 * number), status=number % 4,
        )  # fmt: skip
        events.append(one)
    answer = await stack.usage.BatchRecordUsage(rpc.BatchRecordUsageRequest(events=events), metadata=person.metadata)
    assert answer.accepted == count


async def found(stack: Stack, person: Person, *, repair: bool = False) -> list[str]:
    """What is wrong with somebody's sums."""
    db = Database(stack.urls["deployment_svc"], DeploymentSettings(), "test")
    try:
        months = [month for org_id, month in await check.months(db, 400) if org_id == person.org_id]
        return [str(one) for month in months async for one in check.check(db, person.org_id, month, repair=repair)]
    finally:
        await db.close()


async def change(stack: Stack, statement: sa.Executable) -> None:
    """As somebody with SQL."""
    db = Database(stack.urls["deployment_svc"], DeploymentSettings(), "test")
    async with db.transaction(ALL) as session:
        await session.execute(statement, execution_options={"synchronize_session": False})
    await db.close()


async def test_whatever_is_wrong_is_named_and_mended(stack: Stack, person: Person) -> None:
    await used(stack, person)
    assert await found(stack, person) == []
    mine = UsageRollup.org_id == person.org_id
    this_month = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    wrongs: list[tuple[sa.Executable, str]] = [
        (sa.update(UsageRollup).where(mine, UsageRollup.dim_2 == "gpt-3.2").values(tokens_in=UsageRollup.tokens_in + 1), "tokens_in is"),
        (sa.update(UsageRollup).where(mine, UsageRollup.kind == "caller").values(cost=Decimal("12.5")), "cost is 12.5"),
        (sa.update(UsageRollup).where(mine, UsageRollup.kind == "workload").values(latency_03=7), "latency_03 is 7"),
        (sa.delete(UsageRollup).where(mine, UsageRollup.kind == "model", UsageRollup.dim_1 == "anthropic"), "is missing"),
        (sa.update(UsageRollup).where(mine, UsageRollup.dim_1 == "nobody").values(dim_3="image"), "was made by no event"),
        (sa.update(UsageCounter).where(UsageCounter.org_id == person.org_id, UsageCounter.period == "month").values(tokens=1), "tokens is 1"),
        (sa.delete(UsageCounter).where(UsageCounter.org_id == person.org_id, UsageCounter.starts_at == this_month), "is missing"),
    ]
    for statement, said in wrongs:
        await change(stack, statement)
        problems = await found(stack, person)
        assert problems and any(said in one for one in problems), (said, problems)
        assert await found(stack, person, repair=True) == problems
        assert await found(stack, person) == [], said


async def test_a_check_beside_ingestion_sees_one_moment(stack: Stack, person: Person) -> None:
    async def report() -> None:
        for _ in range(15):
            events = [pb.UsageEvent(id=str(ids.uuid7()), provider="openai", model="gpt-3.2", tokens_in=n) for n in range(40)]
            await stack.usage.BatchRecordUsage(rpc.BatchRecordUsageRequest(events=events), metadata=person.metadata)

    reporting = asyncio.gather(report(), report())
    while not reporting.done():
        assert await found(stack, person) == []
        assert await found(stack, person, repair=True) == []
    await reporting
    assert await found(stack, person) == []


async def test_the_command(stack: Stack, person: Person) -> None:
    await used(stack, person, 5)
    env = clean_env() | {"CLAWPLANE_DEPLOYMENT_DATABASE_URL": stack.urls["deployment_svc"], "CLAWPLANE_DATA_DIR": str(stack.data_dir)}

    def command(*more: str) -> "subprocess.CompletedProcess[str]":
        words = [sys.executable, "-m", "services.cli", "usage", "check", "--org", person.org_id, *more]
        return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60)

    await change(stack, sa.update(UsageRollup).where(UsageRollup.org_id == person.org_id, UsageRollup.dim_1 == "openai").values(events=9))
    wrong = await asyncio.to_thread(command)
    assert wrong.returncode == 1 and "usage_rollups" in wrong.stdout and "gpt-3.2" in wrong.stdout and "events is 9" in wrong.stdout, wrong
    mended = await asyncio.to_thread(command, "--repair")
    assert mended.returncode == 0 and "mended" in mended.stdout, mended
    done = await asyncio.to_thread(command)
    assert (done.returncode, done.stdout.strip()) == (0, "all agree"), done


async def test_the_command_makes_no_database(tmp_path: Path) -> None:
    nothing = {name: value for name, value in os.environ.items() if not name.startswith("CLAWPLANE_")}
    words = [sys.executable, "-m", "services.cli", "usage", "check", "--data-dir", str(tmp_path / "nowhere")]
    missing = await asyncio.to_thread(subprocess.run, words, cwd=ROOT, env=nothing, capture_output=True, text=True, check=False)
    assert missing.returncode and "there is no database" in missing.stderr and not (tmp_path / "nowhere").exists()


async def test_sums_without_their_events_are_right_once_these_are_over(databases: Databases, tmp_path: Path) -> None:
    """What retention keeps, no repair may take away; also where there is no event at all any more."""
    async with running(tmp_path, databases.make()) as stack:
        person = await stack.person()
        await used(stack, person, 1)
        await change(stack, sa.update(UsageRollup).values(starts_at=now() - timedelta(days=90)))
        await change(stack, sa.delete(UsageEvent))
        db = Database(stack.urls["deployment_svc"], DeploymentSettings(), "test")
        try:
            assert await check.months(db, 40) == []
            assert await check.months(db, 4000) == [(person.org_id, month_of(now() - timedelta(days=90)))]
        finally:
            await db.close()


async def test_events_are_forgotten_by_the_month_and_their_sums_stay(stack: Stack, person: Person) -> None:
    await used(stack, person, 3)
    db = Database(stack.urls["deployment_svc"], DeploymentSettings(), "test")
    try:
        old = kept_from(100) - timedelta(days=40)
        at = datetime(old.year, old.month, 15, tzinfo=UTC)
        if not db.is_sqlite:
            # A month whose partition was made then, and one that fell into the default partition.
            async with db.transaction(ALL) as session:
                name = f"usage_events_{at:%Y_%m}"
                end = (at + timedelta(days=32)).replace(day=1)
                await session.execute(
                    sa.text(f"CREATE TABLE {name} PARTITION OF usage_events FOR VALUES FROM ('{at:%Y-%m-01}') TO ('{end:%Y-%m-%d}')")
                )
        for when in (at, at - timedelta(days=60)):
            async with db.transaction(ALL) as session:
                values = {
                    "org_id": person.org_id, "id": "old", "month": month_of(when), "occurred_at": when, "provider": "openai", "model": "gpt-3.2",
                    "type": 1, "status": 1, "currency": "usd", "operation_id": "", "attempt": 0, "metadata_": {}, "latency_ms": 0,
                } | dict.fromkeys(("tokens_in", "tokens_out", "tokens_cached", "tokens_reasoning", "tokens_total"), 1)  # fmt: skip
                await session.execute(sa.insert(UsageEvent).values(**values))
        while await forget(db, 100):
            pass
        async with db.read(ALL) as session:
            left = (await session.scalars(sa.select(UsageEvent.id).where(UsageEvent.org_id == person.org_id))).all()
            sums = await session.scalar(sa.select(sa.func.sum(UsageRollup.events)).where(UsageRollup.org_id == person.org_id))
        assert sorted(left) == ["check-0", "check-1", "check-2"] and sums == 9
        # The months around today are there as before.
        await ensure(db, {"usage_events": "month"})
        assert await found(stack, person) == []
        assert now()
    finally:
        await db.close()


def test_what_is_forgotten_cannot_come_again() -> None:
    with pytest.raises(ValueError, match="CLAWPLANE_USAGE_RETENTION_DAYS"):
        DeploymentSettings(usage_late_days=35, usage_retention_days=65)
