"""Making one-time codes, trying them, and using them up."""

import hmac
from datetime import timedelta

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession

from services.kit import ids
from services.kit.columns import now
from services.kit.db import alone
from services.kit.secrets import SecretBox
from services.user_svc.codes import rules
from services.user_svc.codes.models import OneTimeCode, Purpose

LIFETIME = timedelta(minutes=10)
TRIES = 3


async def make(
    session: AsyncSession, box: SecretBox, purpose: Purpose, address: str, *, bound_to: str = "", details: str = ""
) -> str:
    """A new code for an address, beside those that it has. ``bound_to``: a text that has to come along with it; ``details``: what it
    completes, sealed."""
    row = OneTimeCode(id=ids.new("otc"), purpose=purpose, subject=_subject(box, purpose, address), expires_at=now() + LIFETIME)
    code = rules.new_code()
    row.digest = _digest(box, row, code, bound_to)
    row.details_sealed = box.seal(details, place(row)) if details else None
    session.add(row)
    await session.flush()
    return code


async def attempt(
    session: AsyncSession, box: SecretBox, purpose: Purpose, address: str, code: str, *, bound_to: str = ""
) -> str | None:
    """Counts a guess against every code that the address has for this purpose; the id of the one that it is, or None. The transaction must
    commit whatever comes out, or a guess would cost nothing."""
    subject, at = _subject(box, purpose, address), now()
    # One at a time for each address: two would lock the rows in another order each.
    await alone(session, f"codes {subject.hex()}")
    statement = (
        update(OneTimeCode)
        .where(OneTimeCode.subject == subject, OneTimeCode.purpose == purpose, OneTimeCode.used_at.is_(None))
        .where(OneTimeCode.expires_at > at, OneTimeCode.attempts < TRIES)
        .values(attempts=OneTimeCode.attempts + 1)
        .returning(OneTimeCode)
        .execution_options(synchronize_session=False)
    )
    found = None
    for row in (await session.scalars(statement)).all():
        # All are compared, the same way: how long it takes tells nothing.
        if hmac.compare_digest(_digest(box, row, rules.normal(code), bound_to), row.digest):
            found = row.id
    return found


async def use(session: AsyncSession, box: SecretBox, purpose: Purpose, address: str, code_id: str) -> OneTimeCode | None:
    """Uses a code up, and with it all others of the same address and purpose; None when somebody else was faster."""
    subject, at = _subject(box, purpose, address), now()
    await alone(session, f"codes {subject.hex()}")
    statement = (
        update(OneTimeCode)
        .where(OneTimeCode.subject == subject, OneTimeCode.purpose == purpose, OneTimeCode.used_at.is_(None))
        .values(used_at=at)
        .returning(OneTimeCode)
        .execution_options(synchronize_session=False)
    )
    ended = (await session.scalars(statement)).all()
    return next((row for row in ended if row.id == code_id and row.expires_at > at), None)


def details_of(box: SecretBox, row: OneTimeCode) -> str:
    """What a code completes."""
    return box.open(row.details_sealed, place(row)) if row.details_sealed else ""


def _subject(box: SecretBox, purpose: Purpose, address: str) -> bytes:
    return box.digest("one_time_codes/subject", purpose, address)


def _digest(box: SecretBox, row: OneTimeCode, code: str, bound_to: str) -> bytes:
    return box.digest("one_time_codes/digest", row.id, row.purpose, code, bound_to)


def place(row: OneTimeCode) -> str:
    """What the details are bound to."""
    return f"one_time_codes/details/{row.id}"
