"""request_id: the work is done once, whoever asks how often, and a secret answer is kept sealed and not for long."""

import asyncio
import uuid
from datetime import timedelta
from typing import Any

import grpc
import pytest
import sqlalchemy as sa

from services.kit import ids
from services.kit.call import Call
from services.kit.columns import now
from services.kit.db import ALL
from services.kit.errors import InvalidState
from services.kit.idempotency import forgetter
from services.kit.purge import purge
from tests.kit.echo import Answer, Echo, IdempotencyKey, Note, SecretAnswer, fields_of, refused

Code = grpc.StatusCode


async def notes(echo: Echo, name: str) -> int:
    """How often the work was done."""
    async with echo.kit.db.read(ALL) as session:
        return await session.scalar(sa.select(sa.func.count()).select_from(Note).where(Note.name.startswith(name))) or 0


async def keys(echo: Echo) -> list[IdempotencyKey]:
    """What is stored, latest first."""
    async with echo.kit.db.read(ALL) as session:
        return list(await session.scalars(sa.select(IdempotencyKey).order_by(IdempotencyKey.created_at.desc())))


def works(echo: Echo, pause_s: float = 0) -> str:
    """The RPC Write adds a row, takes its time, and answers with the row's id; the rows' common name."""
    name = uuid.uuid4().hex

    async def write(request: Any, call: Call) -> Any:
        async with call.transaction() as session:
            row = Note(name=f"{name}-{uuid.uuid4().hex}")
            session.add(row)
            await session.flush()
            call.audit(row.id)
        await asyncio.sleep(pause_s)
        return Answer(text=row.id)

    echo.service.on["Write"] = write
    return name


async def test_the_same_call_again_gets_the_same_answer(echo: Echo) -> None:
    name, who, request_id = works(echo), echo.person(), str(uuid.uuid4())
    first = await echo.call("Write", "x", who, request_id=request_id)
    assert await echo.call("Write", "x", who, request_id=request_id) == first
    assert await notes(echo, name) == 1
    error = await refused(echo.call("Write", "other", who, request_id=request_id))
    assert error.code() is Code.INVALID_ARGUMENT and fields_of(error) == ["request_id"]
    # Another caller's id is another id; so is none at all.
    others = [await echo.call("Write", "x", echo.person(), request_id=request_id)] + [await echo.call("Write", "x", who) for _ in range(2)]
    assert len({answer.text for answer in [first, *others]}) == 4


async def test_twenty_at_once_do_the_work_once(echo: Echo) -> None:
    name, who, request_id = works(echo, 0.2), echo.person(), str(uuid.uuid4())
    answers = await asyncio.gather(*(_answer(echo, who, request_id) for _ in range(20)))
    assert len({answer.text for answer in answers}) == 1 and await notes(echo, name) == 1


async def _answer(echo: Echo, who: Any, request_id: str) -> Any:
    return await echo.call("Write", "x", who, request_id=request_id)


async def test_what_failed_may_be_tried_again(echo: Echo) -> None:
    name, who, request_id = works(echo), echo.person(), str(uuid.uuid4())
    good, tries = echo.service.on["Write"], 0

    async def fails_first(request: Any, call: Call) -> Any:
        nonlocal tries
        tries += 1
        answer = await good(request, call)
        if tries == 1:
            raise InvalidState("not yet")
        return answer

    echo.service.on["Write"] = fails_first
    assert (await refused(echo.call("Write", "x", who, request_id=request_id))).code() is Code.FAILED_PRECONDITION
    await echo.call("Write", "x", who, request_id=request_id)
    assert tries == 2 and await notes(echo, name) == 2


async def test_a_lost_answer_is_told_and_the_work_not_repeated(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a crash between the change and the answer: the claim is there, the answer is not."""
    monkeypatch.setattr("services.kit.idempotency._WAIT_S", 0.2)
    name, who, request_id = works(echo), echo.person(), str(uuid.uuid4())
    made = await echo.call("Write", "x", who, request_id=request_id)
    async with echo.kit.db.transaction(ALL) as session:
        await session.execute(sa.update(IdempotencyKey).where(IdempotencyKey.resource_id == made.text).values(answer=None))
    error = await refused(echo.call("Write", "x", who, request_id=request_id))
    assert error.code() is Code.ABORTED and made.text in (error.details() or "") and await notes(echo, name) == 1


async def test_a_secret_answer_is_sealed_and_kept_ten_minutes(echo: Echo) -> None:
    async def mint(request: Any, call: Call) -> Any:
        async with call.transaction() as session:
            session.add(Note(name=uuid.uuid4().hex))
        return SecretAnswer(text="a key", secret=f"PLANTED-{ids.new('agnt')}")

    echo.service.on["Mint"] = mint
    who, request_id = echo.person(), str(uuid.uuid4())
    first = await echo.call("Mint", "x", who, request_id=request_id)
    row = (await keys(echo))[0]
    assert row.answer is None and row.answer_sealed and "PLANTED" not in row.answer_sealed
    assert timedelta(hours=23) < row.expires_at - now() <= timedelta(hours=24)
    assert await echo.call("Mint", "x", who, request_id=request_id) == first
    assert (await echo.call("Mint", "x", who, request_id=str(uuid.uuid4()))).secret != first.secret
    forget = forgetter(echo.kit.db, IdempotencyKey).tick
    await forget()
    assert await echo.call("Mint", "x", who, request_id=request_id) == first
    # After ten minutes the secret is gone, also before the loop comes by, but what was done is not done again.
    async with echo.kit.db.transaction(ALL) as session:
        await session.execute(sa.update(IdempotencyKey).values(created_at=now() - timedelta(minutes=10, seconds=1)))
    for _ in range(2):
        error = await refused(echo.call("Mint", "x", who, request_id=request_id))
        assert error.code() is Code.FAILED_PRECONDITION and "secret" in (error.details() or "")
        await forget()
        assert not [one for one in await keys(echo) if one.answer_sealed]


async def end(echo: Echo, row: IdempotencyKey) -> None:
    """Lets the time of a stored answer be over."""
    async with echo.kit.db.transaction(ALL) as session:
        await session.execute(
            sa.update(IdempotencyKey).where(IdempotencyKey.key == row.key).values(expires_at=now() - timedelta(seconds=1))
        )


async def test_what_has_ended_counts_no_more_before_it_is_purged(echo: Echo) -> None:
    name, who, request_id = works(echo), echo.person(), str(uuid.uuid4())
    first = await echo.call("Write", "x", who, request_id=request_id)
    await end(echo, (await keys(echo))[0])
    second = await echo.call("Write", "y", who, request_id=request_id)
    assert second != first and await notes(echo, name) == 2
    assert await echo.call("Write", "y", who, request_id=request_id) == second


async def test_what_has_ended_is_purged(echo: Echo) -> None:
    name, who = works(echo), echo.person()
    ended, kept = str(uuid.uuid4()), str(uuid.uuid4())
    for request_id in (ended, kept):
        await echo.call("Write", "x", who, request_id=request_id)
    row = (await keys(echo))[1]
    await end(echo, row)
    await purge(echo.kit.db, {IdempotencyKey: timedelta(hours=1)})
    assert row.key in {one.key for one in await keys(echo)}
    await purge(echo.kit.db, {IdempotencyKey: timedelta(0)})
    assert row.key not in {one.key for one in await keys(echo)}
    # The work may be done anew then.
    await echo.call("Write", "x", who, request_id=ended)
    await echo.call("Write", "x", who, request_id=kept)
    assert await notes(echo, name) == 3
