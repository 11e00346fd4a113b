"""The audit log's seals: whatever is done to the log behind the services' backs is found, and writers wait for nobody."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from services.kit import ids
from services.kit.audit_chain import Chain, stored
from services.kit.audit_sealer import Sealer
from services.kit.audit_verify import Problem, read_log
from services.kit.db import ALL
from services.user_svc.base import AuditEvent, AuditHead
from tests.audit import KEY, Trial, trial_on
from tests.conftest import Databases

ROWS = 6


@pytest.fixture(scope="module")
def url(databases: Databases) -> str:
    """One database for all of these tests; each has an organization of its own."""
    return databases.make()["user_svc"]


@pytest_asyncio.fixture
async def trial(url: str) -> AsyncIterator[Trial]:
    """A log with some sealed rows."""
    async with trial_on(url, lock_timeout_s=1) as made:
        await made.write(ROWS)
        await made.seal()
        yield made


def ids_of(rows: list[Any]) -> list[str]:
    """The ids of rows."""
    return [row.id for row in rows]


def found(problems: list[Problem]) -> list[tuple[str, str]]:
    """(kind, row)."""
    return [(problem.kind, problem.row_id) for problem in problems]


async def test_rows_are_sealed_in_the_order_of_sealing(trial: Trial) -> None:
    late = ids.new("aud")
    await trial.write(2)
    told = await trial.seal()
    assert [(line["event"], line["count"]) for line in told] == [("audit.sealed", ROWS + 2)]
    rows = await trial.rows()
    assert [row.seal_number for row in rows] == list(range(1, ROWS + 3)) and told[0]["head"] == rows[-1].seal.hex()
    # One whose transaction took so long that others, with later ids, were sealed before it.
    assert late < rows[-1].id
    await trial.write()
    await trial.sql("UPDATE audit_events SET id = :late WHERE org_id = :org AND seal_number IS NULL", late=ids.to_uuid(late, "aud").hex)
    row = next(row for row in await trial.rows() if row.id == late)
    await resign(trial, row)
    await trial.seal()
    assert (await trial.rows())[-1].id == late and await trial.problems() == []


async def resign(trial: Trial, row: Any) -> None:
    """What a writer would have written for a row as it now is."""
    values = {column.key: getattr(row, column.key) for column in AuditEvent.__table__.columns}
    written = trial.log.chain.written(stored(AuditEvent.__table__, values))  # type: ignore[arg-type]
    await trial.sql("UPDATE audit_events SET written = :written WHERE org_id = :org AND seal_number IS NULL", written=written)


async def test_an_idle_log_is_quiet_and_intact(trial: Trial) -> None:
    assert await trial.seal() == [] and await trial.problems() == []
    # Each hash is one of this service under this key: nobody else's key makes it.
    for other in (Chain(bytes(32), "user_svc"), Chain(KEY, "deployment_svc")):
        assert {kind for kind, _ in found(await trial.problems(chain=other))} == {"edited", "head"}


SET = "UPDATE audit_events SET {} WHERE org_id = :org AND seal_number = 3"


@pytest.mark.parametrize(
    "change",
    [
        "subject = 'usr_somebody'", "method = '/x.Y/Other'", "resource_id = ''", "request_id = 'r2'", "ip = '10.0.0.1'", "credential = 'key'",
        "credential_id = ''", "outcome = 'read'", "before = NULL", "after = '{\"name\":\"three\"}'",
        "after = '{\"name\": \"two\"}'", "project_id = '0199f0c0000070008000000000000001'",
        "created_at = '2020-01-01 00:00:00.000000'", "written = NULL",
    ],
)  # fmt: skip
async def test_an_edited_row_is_named(trial: Trial, change: str) -> None:
    row = await trial.number(3)
    await trial.sql(SET.format(change))
    assert found(await trial.problems()) == [("edited", row.id)]


async def test_a_seal_that_was_changed_is_found_at_its_row(trial: Trial) -> None:
    third, fourth = await trial.number(3), await trial.number(4)
    await trial.sql("UPDATE audit_events SET seal = :seal WHERE org_id = :org AND seal_number = 3", seal=bytes(32))
    assert found(await trial.problems()) == [("misplaced", third.id), ("misplaced", fourth.id)]


async def test_removed_rows_are_counted(trial: Trial) -> None:
    await trial.sql("DELETE FROM audit_events WHERE org_id = :org AND seal_number IN (2, 3)")
    (problem,) = await trial.problems()
    assert problem.kind == "removed" and "numbers 2 to 3 are missing" in problem.what
    await trial.sql("DELETE FROM audit_events WHERE org_id = :org AND seal_number = 1")
    assert "numbers 1 to 3 are missing" in str((await trial.problems())[0])


async def test_swapped_rows_are_both_named(trial: Trial) -> None:
    second, fifth = await trial.number(2), await trial.number(5)
    for to, seal, one in ((5, fifth.seal, second), (2, second.seal, fifth)):
        await trial.sql("UPDATE audit_events SET seal_number = :to, seal = :seal WHERE id = :id AND org_id = :org", to=to, seal=seal, id=one_id(one))
    assert found(await trial.problems()) == [("misplaced", fifth.id), ("misplaced", second.id)]
    await trial.sql("UPDATE audit_events SET seal_number = 5 WHERE org_id = :org AND seal_number = 2")
    kinds = [kind for kind, _ in found(await trial.problems())]
    assert "removed" in kinds and "misplaced" in kinds


def one_id(row: Any) -> str:
    """A row's id as a database has it."""
    return ids.to_uuid(row.id, "aud").hex


async def test_a_cut_tail_is_found_by_the_head_and_the_restored_head_by_the_log(trial: Trial) -> None:
    async with trial.db.read(ALL) as session:
        old = await session.get_one(AuditHead, trial.org_id)
    await trial.write(2)
    told = await trial.seal()
    logged = {trial.org_id[4:]: {told[0]["count"]: bytes.fromhex(told[0]["head"])}}
    assert await trial.problems(logged) == []
    await trial.sql(f"DELETE FROM audit_events WHERE org_id = :org AND seal_number > {ROWS}")
    (cut,) = await trial.problems()
    assert cut.kind == "cut" and f"numbers {ROWS + 1} to {ROWS + 2} are missing" in cut.what
    # Whoever keeps old heads can put one back; only what the log has told says that there was more.
    put = "UPDATE audit_heads SET count = :count, head = :head, mac = :mac, sealed_at = {} WHERE org_id = :org"
    at = f"'{old.sealed_at:%Y-%m-%d %H:%M:%S.%f}'" if trial.db.is_sqlite else f"'{old.sealed_at.isoformat()}'"
    await trial.sql(put.format(at), count=old.count, head=old.head, mac=old.mac)
    assert await trial.problems() == []
    (problem,) = await trial.problems(logged)
    assert problem.kind == "log" and f"tells of {ROWS + 2}" in problem.what
    # The chain grows again over the place of what was cut away.
    await trial.write(3)
    await trial.seal()
    assert [problem.kind for problem in await trial.problems(logged)] == ["log"]


async def test_everything_of_an_organization_gone_is_known_to_head_and_log(trial: Trial) -> None:
    logged = {trial.org_id[4:]: {ROWS: (await trial.number(ROWS)).seal}}
    await trial.sql("DELETE FROM audit_events WHERE org_id = :org")
    assert [problem.kind for problem in await trial.problems()] == ["cut"]
    await trial.sql("DELETE FROM audit_heads WHERE org_id = :org")
    assert await trial.problems() == []
    assert [problem.kind for problem in await trial.problems(logged)] == ["log"]


async def test_a_head_without_its_key_is_refused_and_nothing_is_sealed_over_it(trial: Trial) -> None:
    row = await trial.number(ROWS)
    await trial.sql(f"DELETE FROM audit_events WHERE org_id = :org AND seal_number = {ROWS}")
    await trial.sql("UPDATE audit_heads SET count = count - 1 WHERE org_id = :org")
    await trial.write()
    assert [line["event"] for line in await trial.seal()] == ["audit.head_broken"]
    assert await trial.seal() == []
    assert [problem.kind for problem in await trial.problems()] == ["head"] and row.id not in ids_of(await trial.rows())
    # Others are sealed as before.
    other = replace(trial, org_id=ids.new("org"))
    await other.write()
    await other.seal()
    assert [row.seal_number for row in await other.rows()] == [1] and await other.problems() == []
    await trial.sql("DELETE FROM audit_heads WHERE org_id = :org")
    assert "head" in [problem.kind for problem in await trial.problems()]


async def test_a_chain_that_was_computed_anew_without_the_key_is_found(trial: Trial) -> None:
    third = await trial.number(3)
    await trial.sql(SET.format("method = '/x.Y/Other'"))
    chain, previous = Chain(bytes(32), "user_svc"), (await trial.number(2)).seal
    for row in (await trial.rows())[2:]:
        values = {column.key: getattr(row, column.key) for column in type(row).__table__.columns}
        seal = chain.seal(previous, row.seal_number, values)
        await trial.sql("UPDATE audit_events SET seal = :seal WHERE id = :id AND org_id = :org", seal=seal, id=one_id(row))
        previous = seal
    await trial.sql("UPDATE audit_heads SET head = :head WHERE org_id = :org", head=previous)
    kinds = found(await trial.problems())
    assert kinds[0] == ("edited", third.id) and [kind for kind, _ in kinds[1:]] == ["misplaced"] * (ROWS - 3) + ["head"]


COPY = (
    "INSERT INTO audit_events (org_id, id, created_at, subject, method, resource_id, request_id, written) "
    "SELECT org_id, :id, created_at, 'operator', method, resource_id, request_id, {} FROM audit_events WHERE org_id = :org AND seal_number = 1"
)


@pytest.mark.parametrize("written", ["NULL", "written"])
async def test_a_row_that_no_service_wrote_is_named_sealed_or_not(trial: Trial, written: str) -> None:
    forged = ids.new("aud")
    await trial.sql(COPY.format(written), id=ids.to_uuid(forged, "aud").hex)
    assert found(await trial.problems()) == [("foreign", forged)]
    await trial.seal()
    assert found(await trial.problems()) == [("foreign", forged)]


async def test_a_row_that_nobody_seals_is_told_after_a_minute(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    await trial.write()
    assert await trial.problems() == []
    monkeypatch.setattr("services.kit.audit_verify.WAIT_S", -1)
    (waiting,) = [row for row in await trial.rows() if row.seal_number is None]
    assert found(await trial.problems()) == [("unsealed", waiting.id)]
    # Whoever takes a seal away makes the row wait again.
    await trial.seal()
    row = await trial.number(ROWS + 1)
    await trial.sql(f"UPDATE audit_events SET seal_number = NULL, seal = NULL WHERE org_id = :org AND seal_number = {ROWS + 1}")
    assert sorted(found(await trial.problems())) == [("cut", ""), ("unsealed", row.id)]


async def test_what_was_there_before_seals_is_taken_over_once(databases: Databases) -> None:
    async with trial_on(databases.make()["user_svc"]) as trial:
        await trial.write(2)
        await trial.sql("UPDATE audit_events SET written = NULL WHERE org_id = :org")
        await trial.sealer.adopt()
        await trial.seal()
        assert await trial.problems() == []
        await trial.sql(COPY.format("NULL"), id=ids.uuid7().hex)
        await trial.sealer.adopt()
        await trial.seal()
        assert [problem.kind for problem in await trial.problems()] == ["foreign"]


async def test_a_sealer_that_dies_leaves_nothing_half_sealed(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    await trial.write(4)

    async def dies(*_: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(Sealer, "_keep", dies)
        with pytest.raises(ZeroDivisionError):
            await trial.sealer.tick()
    assert [row.seal for row in await trial.rows() if row.seal_number is None] == [None] * 4
    await trial.seal()
    assert [row.seal_number for row in await trial.rows()] == list(range(1, ROWS + 5)) and await trial.problems() == []


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_writers_do_not_wait_for_the_sealer_nor_it_for_them(trial: Trial) -> None:
    """SQLite has one writer at a time, whatever it writes."""
    await trial.write(3)
    async with trial.db.transaction(ALL) as sealing, trial.db.transaction(ALL) as writing:
        # Each has written and holds what it locks; neither has committed. A lock would end in an error after a second.
        await trial.write_in(writing)
        await trial.sealer._batch(sealing)
        await trial.write(2)
        await trial.write_in(writing)
    await trial.seal()
    assert [row.seal_number for row in await trial.rows()] == list(range(1, ROWS + 8)) and await trial.problems() == []


async def test_fifty_writers_and_two_sealers_at_once(trial: Trial) -> None:
    async with trial_on(str(trial.db.url.render_as_string(hide_password=False))) as other:
        done = asyncio.Event()

        async def sealing(sealer: Sealer) -> None:
            while not done.is_set():
                await sealer.tick()
                await asyncio.sleep(0.002)

        sealers = [asyncio.create_task(sealing(one.sealer)) for one in (trial, other)]
        await asyncio.gather(*((trial, other)[n % 2].write(2, trial.org_id) for n in range(50)))
        done.set()
        await asyncio.gather(*sealers)
    await trial.seal()
    assert [row.seal_number for row in await trial.rows()] == list(range(1, ROWS + 101)) and await trial.problems() == []


def test_heads_are_read_from_whatever_the_log_looks_like() -> None:
    line = {"event": "audit.sealed", "service": "user_svc", "org": "org_" + "a" * 32, "count": 7, "head": "ab" * 32}
    lines = [
        json.dumps(line), f"user-1  | {json.dumps(line | {'count': 8})}\n", json.dumps(line | {"service": "deployment_svc"}), "audit.sealed {",
        "audit.sealed", '{"event": "audit.sealed"}', json.dumps(line | {"head": "no"}), json.dumps(line | {"count": "x"}), "",
        json.dumps(line | {"event": "audit.sealed.not"}), json.dumps(line | {"org": 3}),
    ]  # fmt: skip
    assert read_log(lines, "user_svc") == {"a" * 32: {7: b"\xab" * 32, 8: b"\xab" * 32}}
