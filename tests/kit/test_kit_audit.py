"""Rows of the audit log: one for each call that did something or showed a secret, in the transaction that did it."""

import uuid
from typing import Any

import grpc
import pytest
import sqlalchemy as sa

from clawplane.audit.v1.audit_event_pb2 import AuditOutcome
from services.kit import ids
from services.kit.audit import Log
from services.kit.audit_chain import stored
from services.kit.call import Call
from services.kit.db import ALL
from services.kit.errors import InvalidState
from tests.kit.echo import Answer, AuditEvent, Echo, Note, SecretAnswer, refused

Code = grpc.StatusCode


async def rows(echo: Echo, request_id: str) -> list[AuditEvent]:
    """The audit rows of a call, in the order in which they were made."""
    async with echo.kit.db.read(ALL) as session:
        return list(await session.scalars(sa.select(AuditEvent).where(AuditEvent.request_id == request_id).order_by(AuditEvent.id)))


def named(echo: Echo) -> tuple[str, Any]:
    """A request id, and the metadata of somebody who calls with it."""
    request_id = uuid.uuid4().hex
    return request_id, (*echo.person(), ("x-request-id", request_id))


async def test_a_read_that_shows_a_secret_is_written_down_before_its_answer_leaves(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    async def show(request: Any, call: Call) -> Any:
        async with call.read() as session:
            await session.execute(sa.select(Note.id))
        call.audit(request.text)
        return SecretAnswer(secret="PLANTED")

    echo.service.on["Show"] = show
    request_id, who = named(echo)
    assert (await echo.call("Show", "thing", who)).secret == "PLANTED"
    (row,) = await rows(echo, request_id)
    assert (row.resource_id, row.outcome, row.ip, row.org_id) == ("thing", AuditOutcome.AUDIT_OUTCOME_READ, "127.0.0.1", echo.org_id)
    assert row.credential == "user" and "PLANTED" not in repr(vars(row))

    async def fails(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Log, "write", fails)
    error = await refused(echo.call("Show", "thing", who))
    assert error.code() is Code.INTERNAL and "PLANTED" not in str(error)


async def test_a_change_that_had_nothing_to_do_leaves_a_row_too_and_a_refused_one_none(echo: Echo) -> None:
    request_id, who = named(echo)
    await echo.call("Write", "x", who)
    (row,) = await rows(echo, request_id)
    assert row.outcome == AuditOutcome.AUDIT_OUTCOME_DONE and row.seal is None
    assert row.written == echo.kit.audit.chain.written(stored(AuditEvent.__table__, {c.key: getattr(row, c.key) for c in AuditEvent.__table__.c}))  # type: ignore[union-attr,arg-type]
    request_id, who = named(echo)

    async def no(request: Any, call: Call) -> Any:
        call.audit("x")
        call.audit_elsewhere(ids.new("org"), "x")
        raise InvalidState("no")

    echo.service.on["Write"] = no
    assert (await refused(echo.call("Write", "x", who))).code() is Code.FAILED_PRECONDITION
    assert await rows(echo, request_id) == []


async def test_an_answer_that_is_given_again_is_written_down_as_that(echo: Echo) -> None:
    async def mint(request: Any, call: Call) -> Any:
        async with call.transaction() as session:
            row = Note(name=uuid.uuid4().hex)
            session.add(row)
            await session.flush()
            call.audit(row.id)
        return SecretAnswer(text=row.id, secret="PLANTED")

    echo.service.on["Mint"] = mint
    request_id, who = named(echo)
    key = str(uuid.uuid4())
    first, again = [await echo.call("Mint", "x", who, request_id=key) for _ in range(2)]
    assert first == again
    done, repeated = await rows(echo, request_id)
    assert (done.outcome, repeated.outcome) == (AuditOutcome.AUDIT_OUTCOME_DONE, AuditOutcome.AUDIT_OUTCOME_REPEATED)
    assert done.resource_id == repeated.resource_id == first.text


async def test_other_organizations_get_rows_of_their_own_with_the_change_or_not_at_all(echo: Echo) -> None:
    others = [ids.new("org") for _ in range(2)]
    tries = 0

    async def write(request: Any, call: Call) -> Any:
        async def work(session: Any) -> None:
            nonlocal tries
            tries += 1
            session.add(Note(name=f"{request.text}-{tries}"))
            call.audit("own", after={"name": request.text})
            for org_id in others:
                call.audit_elsewhere(org_id, "theirs", after={"try": tries})
            await session.flush()
            if tries == 1 and request.text == "clashes":
                raise sa.exc.OperationalError("", {}, _Clash())

        await call.run(work)
        async with call.transaction() as session:
            session.add(Note(name=uuid.uuid4().hex))
            call.audit_elsewhere(others[0], "later")
        return Answer()

    echo.service.on["Write"] = write
    request_id, who = named(echo)
    await echo.call("Write", "clashes", who)
    found = await rows(echo, request_id)
    assert tries == 2
    assert [(row.org_id, row.resource_id, row.after) for row in found] == [
        (echo.org_id, "own", {"name": "clashes"}), (others[0], "theirs", {"try": 2}), (others[1], "theirs", {"try": 2}), (others[0], "later", None),
    ]  # fmt: skip
    assert len({row.subject for row in found}) == 1


class _Clash(Exception):
    """What a driver's error of a clash looks like."""

    sqlstate = "40001"
