"""Pages by keyset: no offset, nothing skipped or doubled while rows come and go."""

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import Any, TypeVar

import orjson
from google.protobuf.message import Message
from sqlalchemy import Select, literal, tuple_
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from clawplane.errors.v1.errors_pb2 import ErrorReason
from services.kit.columns import Identifier, UtcDateTime
from services.kit.errors import InvalidArgument
from services.kit.ids import to_uuid

DEFAULT_SIZE = 50
MAX_SIZE = 250
R = TypeVar("R")


async def page(
    session: AsyncSession,
    statement: Select[R],
    key: InstrumentedAttribute[Any] | tuple[InstrumentedAttribute[Any], ...],
    request: Message,
    *,
    descending: bool = True,
) -> tuple[Sequence[R], str]:
    """One page of rows ordered by ``key`` (unique; a time-ordered id, or several columns), and the token of the next page or "".

    ``request`` has ``page_size`` and ``page_token``; all its other fields are the query that a token belongs to.
    """
    size = min(request.page_size or DEFAULT_SIZE, MAX_SIZE)  # type: ignore[attr-defined]
    query = _query(request, session.info["tenant"])
    token: str = request.page_token  # type: ignore[attr-defined]
    keys = key if isinstance(key, tuple) else (key,)
    if token:
        last = tuple_(*(literal(value, column.type) for column, value in zip(keys, _last_key(token, query, keys), strict=True)))
        statement = statement.where(tuple_(*keys) < last if descending else tuple_(*keys) > last)
    order = [column.desc() if descending else column.asc() for column in keys]
    rows = list((await session.scalars(statement.order_by(*order).limit(size + 1))).all())
    if len(rows) <= size:
        return rows, ""
    rows = rows[:size]
    return rows, _token(query, [getattr(rows[-1], column.key) for column in keys])


def _query(request: Message, tenant: str) -> bytes:
    copy = type(request)()
    copy.CopyFrom(request)
    copy.ClearField("page_token")
    copy.ClearField("page_size")
    text = copy.DESCRIPTOR.full_name.encode() + b"\0" + tenant.encode() + b"\0" + copy.SerializeToString(deterministic=True)
    return hashlib.sha256(text).digest()[:12]


def _token(query: bytes, last: Any) -> str:
    body = query + orjson.dumps(last)
    return base64.urlsafe_b64encode(hashlib.sha256(body).digest()[:4] + body).decode().rstrip("=")


def _last_key(token: str, query: bytes, keys: Sequence[InstrumentedAttribute[Any]]) -> list[Any]:
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        check, body = raw[:4], raw[4:]
        if hashlib.sha256(body).digest()[:4] != check or body[:12] != query:
            raise ValueError
        return [_value(column, text) for column, text in zip(keys, orjson.loads(body[12:]), strict=True)]
    except (ValueError, TypeError):
        raise _bad_token() from None


def _value(column: InstrumentedAttribute[Any], text: Any) -> Any:
    """What stands in a token for a column; ValueError when it cannot be one of the column's."""
    if not isinstance(text, str):
        raise ValueError
    if isinstance(column.type, Identifier):
        to_uuid(text, column.type.prefix)
        return text
    return datetime.fromisoformat(text) if isinstance(column.type, UtcDateTime) else text


def _bad_token() -> InvalidArgument:
    return InvalidArgument(
        "page_token", "belongs to another query or was altered; start again without one",
        reason=ErrorReason.ERROR_REASON_INVALID_PAGE_TOKEN,
    )  # fmt: skip
