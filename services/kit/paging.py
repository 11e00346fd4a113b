"""Pages by keyset: no offset, nothing skipped or doubled while rows come and go."""

import base64
import hashlib
from collections.abc import Sequence
from datetime import date, datetime
from typing import Any, TypeAlias, TypeVar

import orjson
from google.protobuf.message import Message
from sqlalchemy import ColumnElement, Date, Integer, Select, literal, tuple_
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from clawplane.errors.v1.errors_pb2 import ErrorReason
from services.kit.columns import Identifier, UtcDateTime
from services.kit.errors import InvalidArgument
from services.kit.ids import to_uuid

DEFAULT_SIZE = 50
MAX_SIZE = 250
_OVER = 2**63
R = TypeVar("R")
Key: TypeAlias = InstrumentedAttribute[Any] | ColumnElement[Any]


async def page(
    session: AsyncSession,
    statement: Select[R],
    key: Key | tuple[Key, ...],
    request: Message,
    *,
    descending: bool = True,
) -> tuple[Sequence[R], str]:
    """One page of rows ordered by ``key`` (unique; a time-ordered id, or several columns), and the token of the next page or "".

    ``request`` has ``page_size`` and ``page_token``; all its other fields are the query that a token belongs to.
    """
    size = min(request.page_size or DEFAULT_SIZE, MAX_SIZE)  # type: ignore[attr-defined]
    cursor = Cursor(request, session.info["tenant"], key, "page_token", descending=descending)
    rows = list((await session.scalars(cursor.after(statement, request.page_token).limit(size + 1))).all())  # type: ignore[attr-defined]
    if len(rows) <= size:
        return rows, ""
    rows = rows[:size]
    return rows, cursor.token(rows[-1])


class Cursor:
    """Where a reader of rows in the order of a unique key stands, as a text that belongs to his query."""

    def __init__(
        self, request: Message, tenant: str, key: Key | tuple[Key, ...], field: str,
        *, descending: bool = True,
    ) -> None:  # fmt: skip
        """``field`` of the request carries the text; the query is all the rest but ``page_size``."""
        self.keys = key if isinstance(key, tuple) else (key,)
        self.field, self.descending = field, descending
        self._query = _query(request, tenant, field)

    def after(self, statement: Select[R], token: str) -> Select[R]:
        """The rows that come after a token, in order; all for an empty one. InvalidArgument for one of another query."""
        if token:
            last = tuple_(*(literal(value, column.type) for column, value in zip(self.keys, self.last(token), strict=True)))
            statement = statement.where(tuple_(*self.keys) < last if self.descending else tuple_(*self.keys) > last)
        return statement.order_by(*(column.desc() if self.descending else column.asc() for column in self.keys))

    def last(self, token: str) -> list[Any]:
        """The key that a token stands for. InvalidArgument for one of another query."""
        return _last_key(token, self._query, self.keys, self.field)

    def token(self, row: Any) -> str:
        """The text for whoever has read up to this row."""
        return _token(self._query, [getattr(row, str(column.key)) for column in self.keys])


def _query(request: Message, tenant: str, field: str) -> bytes:
    copy = type(request)()
    copy.CopyFrom(request)
    for name in (field, "page_size"):
        if name in copy.DESCRIPTOR.fields_by_name:
            copy.ClearField(name)
    text = copy.DESCRIPTOR.full_name.encode() + b"\0" + tenant.encode() + b"\0" + copy.SerializeToString(deterministic=True)
    return hashlib.sha256(text).digest()[:12]


def _token(query: bytes, last: Any) -> str:
    body = query + orjson.dumps(last)
    return base64.urlsafe_b64encode(hashlib.sha256(body).digest()[:4] + body).decode().rstrip("=")


def _last_key(token: str, query: bytes, keys: Sequence[Key], field: str) -> list[Any]:
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        check, body = raw[:4], raw[4:]
        if hashlib.sha256(body).digest()[:4] != check or body[:12] != query:
            raise ValueError
        return [_value(column, text) for column, text in zip(keys, orjson.loads(body[12:]), strict=True)]
    except (ValueError, TypeError):
        raise _bad_token(field) from None


def _value(column: Key, text: Any) -> Any:
    """What stands in a token for a column; ValueError when it cannot be one of the column's."""
    if isinstance(column.type, Integer):
        if type(text) is not int or abs(text) >= _OVER:
            raise ValueError
        return text
    if not isinstance(text, str):
        raise ValueError
    if isinstance(column.type, Date):
        return date.fromisoformat(text)
    if isinstance(column.type, Identifier):
        to_uuid(text, column.type.prefix)
        return text
    return datetime.fromisoformat(text) if isinstance(column.type, UtcDateTime) else text


def _bad_token(field: str) -> InvalidArgument:
    return InvalidArgument(
        field, "belongs to another query or was altered; start again without one",
        reason=ErrorReason.ERROR_REASON_INVALID_PAGE_TOKEN,
    )  # fmt: skip
