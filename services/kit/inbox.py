"""Webhook events that were taken in, each once."""

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import JSON, Select, String, UniqueConstraint
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, declared_attr, mapped_column

from services.kit.columns import Timestamps, UtcDateTime, identifier, now
from services.kit.db import insert_for
from services.kit.errors import InvalidState, NotFound


class WebhookEventRow(Timestamps):
    """Mixin of each service's ``webhook_events``."""

    id: Mapped[str] = identifier("whe")
    source: Mapped[str] = mapped_column(String(32))
    external_id: Mapped[str] = mapped_column(String(255))
    type: Mapped[str] = mapped_column(String(100))
    status: Mapped[str] = mapped_column(String(16))
    """"applied" or "ignored"."""
    reason: Mapped[str] = mapped_column(String(500), default="")
    """What the event did, or why it was ignored."""
    payload: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    """The neutral change, for replay; unset for ignored events."""
    occurred_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    @declared_attr.directive
    def __table_args__(cls) -> tuple[Any, ...]:
        return (UniqueConstraint("source", "external_id"),)


R = TypeVar("R", bound=WebhookEventRow)


async def take_in(session: AsyncSession, model: type[WebhookEventRow], **values: Any) -> str | None:
    """Inserts an event and returns its id, or None when it was taken in before."""
    insert = insert_for(session)
    statement = insert(model).values(**values).on_conflict_do_nothing(index_elements=["source", "external_id"]).returning(model.id)
    return (await session.execute(statement)).scalar_one_or_none()


def filtered(statement: Select[R], model: type[R], request: Any) -> Select[R]:
    """The events that a list asks for by source and status."""
    for name in ("source", "status"):
        if value := getattr(request, name):
            statement = statement.where(getattr(model, name) == value)
    return statement


async def replay(session: AsyncSession, model: type[R], event_id: str, apply: Callable[[R], Awaitable[tuple[str, str]]]) -> R:
    """Applies a stored event again. ``apply(row)`` gives what became of it: ("applied" or "ignored", what it did or why not)."""
    row = await session.get(model, event_id, with_for_update=True)
    if row is None:
        raise NotFound("webhook event")
    if row.payload is None:
        raise InvalidState(f"an event of the kind {row.type} is handled by nobody: nothing of it was kept")
    row.status, row.reason = await apply(row)
    row.updated_at = now()
    return row
