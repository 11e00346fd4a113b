"""Pages: nothing lost, nothing doubled, and tokens that hold for their own query alone."""

import base64
import random
import secrets
from typing import Any

import pytest
import sqlalchemy as sa

from clawplane.errors.v1.errors_pb2 import ErrorReason
from services.kit import ids
from services.kit.db import Database
from services.kit.errors import InvalidArgument
from services.kit.paging import page
from tests.kit.echo import Note, Request


async def fill(db: Database, org_id: str, count: int) -> list[str]:
    """Rows of an organization, oldest first."""
    async with db.transaction(org_id) as session:
        rows = [Note(id=ids.new("agnt"), name=secrets.token_hex(8)) for _ in range(count)]
        session.add_all(rows)
    return [row.id for row in rows]


async def take(db: Database, org_id: str, request: Any, **more: Any) -> tuple[list[str], str]:
    """One page."""
    async with db.read(org_id) as session:
        rows, token = await page(session, sa.select(Note), Note.id, request, **more)
    return [row.id for row in rows], token


@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize("size", [1, 3, 10, 11])
async def test_every_row_once(db: Database, size: int, descending: bool) -> None:
    org_id = ids.new("org")
    known = await fill(db, org_id, 10)
    seen: list[str] = []
    token, pages = "", 0
    while pages == 0 or token:
        some, token = await take(db, org_id, Request(page_size=size, page_token=token), descending=descending)
        assert len(some) <= size
        seen, pages = seen + some, pages + 1
    assert seen == sorted(known, reverse=descending) and pages == -(-10 // size)


async def test_rows_that_stay_are_seen_once_while_others_come_and_go(db: Database) -> None:
    org_id, dice = ids.new("org"), random.Random(7)
    stay = await fill(db, org_id, 30)
    gone = await fill(db, org_id, 15)
    stay += await fill(db, org_id, 30)
    seen: list[str] = []
    token, first = "", True
    while first or token:
        some, token = await take(db, org_id, Request(page_size=4, page_token=token))
        seen, first = seen + some, False
        await fill(db, org_id, 2)
        async with db.transaction(org_id) as session:
            # The row that the token names may go, too.
            victims = {gone.pop(dice.randrange(len(gone)))} if gone else set()
            victims |= {some[-1]} & set(gone)
            await session.execute(sa.delete(Note).where(Note.id.in_(victims)))
    assert len(seen) == len(set(seen))
    assert [one for one in seen if one in set(stay)] == sorted(stay, reverse=True)


async def test_the_size_has_a_default_and_a_cap(db: Database) -> None:
    org_id = ids.new("org")
    await fill(db, org_id, 260)
    for asked, got in ((0, 50), (250, 250), (251, 250), (2**31 - 1, 250)):
        some, token = await take(db, org_id, Request(page_size=asked))
        assert len(some) == got and token
    # The size is no part of the query: it may change from page to page.
    some, token = await take(db, org_id, Request(page_size=5))
    more, _ = await take(db, org_id, Request(page_size=7, page_token=token))
    assert len(set(some + more)) == 12


async def test_a_token_holds_for_its_query_alone(db: Database) -> None:
    org_id = ids.new("org")
    await fill(db, org_id, 3)
    _, token = await take(db, org_id, Request(page_size=1, text="a"))
    raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    wrong = [
        (org_id, Request(page_size=1, text="b", page_token=token)),
        (ids.new("org"), Request(page_size=1, text="a", page_token=token)),
        *(
            (org_id, Request(page_size=1, text="a", page_token=bad))
            for bad in [
                token[:-2], token + "AAAA", "x", "=", "💥", "AAAA" * 10, "\u202e", token.swapcase(), base64.urlsafe_b64encode(raw[4:]).decode(),
                *(base64.urlsafe_b64encode(raw[:n] + bytes([raw[n] ^ 1]) + raw[n + 1 :]).decode().rstrip("=") for n in range(len(raw))),
            ]
        ),
    ]  # fmt: skip
    for who, request in wrong:
        with pytest.raises(InvalidArgument) as failure:
            await take(db, who, request)
        assert failure.value.violations[0][0] == "page_token"
        assert failure.value.reason == ErrorReason.ERROR_REASON_INVALID_PAGE_TOKEN
    assert len((await take(db, org_id, Request(page_size=5, text="a", page_token=token)))[0]) == 2
