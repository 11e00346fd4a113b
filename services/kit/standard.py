"""The standard reads, one line each in a feature. One that grows a rule is written out there instead."""

from collections.abc import Callable
from typing import Any, TypeVar

from google.protobuf.message import Message
from sqlalchemy import Select
from sqlalchemy.orm import InstrumentedAttribute

from services.kit.call import Call
from services.kit.errors import NotFound
from services.kit.paging import page

Row = TypeVar("Row")
Answer = TypeVar("Answer", bound=Message)


async def get(call: Call, model: type[Row], key: Any, what: str) -> Row:
    """The caller's row with this key; NotFound naming ``what`` otherwise."""
    async with call.read() as session:
        row: Row | None = await session.get(model, key)
    if row is None:
        raise NotFound(what)
    return row


async def list_page(
    call: Call, request: Message, answer: type[Answer], statement: Select[Row],
    key: InstrumentedAttribute[Any] | tuple[InstrumentedAttribute[Any], ...],
    to_message: Callable[[Row], Message], *, descending: bool = True,
) -> Answer:  # fmt: skip
    """One page, as the standard response: its only repeated field holds the rows, ``next_page_token`` the token."""
    async with call.read() as session:
        rows, token = await page(session, statement, key, request, descending=descending)
    (items,) = [field.name for field in answer.DESCRIPTOR.fields if field.is_repeated]
    return answer(**{items: [to_message(row) for row in rows]}, next_page_token=token)
