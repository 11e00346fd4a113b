"""Webhook events that were taken in, each once."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, String, UniqueConstraint
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, declared_attr, mapped_column

from services.kit.columns import Timestamps, UtcDateTime, identifier
from services.kit.db import insert_for


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


async def take_in(session: AsyncSession, model: type[WebhookEventRow], **values: Any) -> str | None:
    """Inserts an event and returns its id, or None when it was taken in before."""
    insert = insert_for(session)
    statement = insert(model).values(**values).on_conflict_do_nothing(index_elements=["source", "external_id"]).returning(model.id)
    return (await session.execute(statement)).scalar_one_or_none()
