"""``request_id``: the same call, made again, gets the stored answer instead of doing the work again (AIP-155).

The key is claimed in the transaction that carries the change, so that work is never done twice, whatever dies in between; the answer is
added to it afterwards. An answer that holds a secret is kept for minutes only, its claim as long as any: the work is not done again.
"""

import asyncio
import base64
import hashlib
import time
from datetime import datetime, timedelta
from typing import Any

from google.protobuf.message import Message
from sqlalchemy import Index, LargeBinary, String, Text, delete, text, update
from sqlalchemy.orm import Mapped, declared_attr, mapped_column

from services.kit.call import Call
from services.kit.columns import Timestamps, UtcDateTime, now
from services.kit.db import ALL, Database
from services.kit.errors import Conflict, InvalidArgument, InvalidState
from services.kit.loops import Loop

FIELD = "request_id"
_KEPT, _SECRET_KEPT = timedelta(hours=24), timedelta(minutes=10)
_WAIT_S, _POLL_S = 5.0, 0.05
_SEALED = text("answer_sealed IS NOT NULL")


class IdempotencyKeyRow(Timestamps):
    """Mixin of each service's ``idempotency_keys``."""

    key: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    """Hash of caller, organization, method and request id."""
    request: Mapped[bytes] = mapped_column(LargeBinary(32))
    """Hash of the request."""
    resource_id: Mapped[str] = mapped_column(String(100), default="")
    answer: Mapped[bytes | None] = mapped_column(LargeBinary)
    answer_sealed: Mapped[str | None] = mapped_column(Text)
    """An answer that holds a secret."""
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)

    @declared_attr.directive
    def __table_args__(cls) -> tuple[Any, ...]:
        return (Index("ix_idempotency_keys__sealed", "created_at", postgresql_where=_SEALED, sqlite_where=_SEALED),)


async def once(call: Call, request: Message, handler: Any) -> Message:
    """The answer of the call, from the handler or from the call before it."""
    key, body = _key(call, request), hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
    known = await _find(call, key)
    if known is not None and known.expires_at > now():
        return await _repeat(call, known, body)
    if known is not None:
        # Its time is over, and the purge has not come by yet.
        await _forget(call, key)
    call.claim = lambda resource_id: call.kit.answers(key=key, request=body, resource_id=resource_id, expires_at=now() + _KEPT)
    try:
        answer: Message = await handler(request, call)
    except Exception:
        if call.claimed:
            # It was not done after all: the next try must not be told that it was.
            await _forget(call, key)
            raise
        known = await _find(call, key)
        if known is None:
            raise
        # Another call with this id was faster, and ours failed on its claim.
        return await _repeat(call, known, body)
    if call.claimed:
        async with call.kit.db.transaction(ALL) as session:
            await session.execute(update(call.kit.answers).where(call.kit.answers.key == key).values(**_stored(call, key, answer)))
    return answer


def _key(call: Call, request: Any) -> bytes:
    parts = (call.caller.subject, call.caller.org_id, call.plan.method, getattr(request, FIELD))
    return hashlib.sha256("\0".join(parts).encode()).digest()


async def _find(call: Call, key: bytes) -> Any:
    async with call.kit.db.read(ALL) as session:
        return await session.get(call.kit.answers, key)


async def _forget(call: Call, key: bytes) -> None:
    async with call.kit.db.transaction(ALL) as session:
        await session.execute(delete(call.kit.answers).where(call.kit.answers.key == key))


async def _repeat(call: Call, row: Any, body: bytes) -> Message:
    """The stored answer. A call that is still being answered is waited for."""
    call.repeats, call.claim = True, None
    call.audit(row.resource_id)
    if row.request != body:
        raise InvalidArgument(FIELD, "was used before for another request")
    if call.plan.answer_is_secret and row.created_at + _SECRET_KEPT <= now():
        what = f": it was about {row.resource_id}" if row.resource_id else ""
        raise InvalidState(f"the call with this request_id was done, and its answer held a secret that is kept no more{what}", state="done")
    deadline = time.monotonic() + _WAIT_S
    while row.answer is None and row.answer_sealed is None:
        if time.monotonic() > deadline:
            what = f": look at {row.resource_id}" if row.resource_id else ""
            raise Conflict(f"the call with this request_id was done, but its answer was lost{what}", retry_after_s=60)
        await asyncio.sleep(_POLL_S)
        row = await _find(call, row.key)
        if row is None:
            raise Conflict("the call with this request_id failed meanwhile; try again", retry_after_s=0.1)
    raw = row.answer if row.answer is not None else base64.b64decode(_box(call).open(row.answer_sealed, place(row.key)))
    return call.plan.answer.FromString(raw)  # type: ignore[no-any-return]


def _stored(call: Call, key: bytes, answer: Message) -> dict[str, Any]:
    raw = answer.SerializeToString()
    if not call.plan.answer_is_secret:
        return {"answer": raw}
    return {"answer_sealed": _box(call).seal(base64.b64encode(raw).decode(), place(key))}


def place(key: bytes) -> str:
    """What a sealed answer is bound to."""
    return f"idempotency_keys/answer/{key.hex()}"


def _box(call: Call) -> Any:
    assert call.kit.box is not None  # or the RPC would not have been registered
    return call.kit.box


def forgetter(db: Database, model: Any, every_s: float = 30) -> Loop:
    """The loop that takes secrets out of stored answers once they are kept no more; the claims stay."""

    async def tick() -> bool:
        old = (model.answer_sealed.is_not(None), model.created_at < now() - _SECRET_KEPT)
        async with db.transaction(ALL) as session:
            await session.execute(update(model).where(*old).values(answer_sealed=None).execution_options(synchronize_session=False))
        return False

    return Loop("forget-secrets", tick, every_s)
