"""Table of usage that is held before it happens."""

from datetime import datetime
from decimal import Decimal

from sqlalchemy import BigInteger, Boolean, Index, String, text
from sqlalchemy.orm import Mapped, mapped_column

from services.deployment_svc.base import Base
from services.kit.columns import ExactDecimal, Identifier, Tenant, Timestamps, UtcDateTime, identifier

_HELD, _ABANDONED = text("NOT settled"), text("settles_itself AND NOT settled")


class UsageReservation(Tenant, Timestamps, Base):
    """What a call holds of every limit until its usage is written down as an event of the same id. Gone then, unless more was used than
    held or it came late: such rows stay for a while to be seen; and released ones, so that releasing again is no error."""

    __tablename__ = "usage_reservations"
    __table_args__ = (
        Index("ix_usage_reservations__held", "org_id", "expires_at", postgresql_where=_HELD, sqlite_where=_HELD),
        Index("ix_usage_reservations__org_id_id", "org_id", "id"),
        Index("ix_usage_reservations__expires_at", "expires_at"),
        Index("ix_usage_reservations__abandoned", "expires_at", "org_id", postgresql_where=_ABANDONED, sqlite_where=_ABANDONED),
    )

    id: Mapped[str] = identifier("call")
    user_id: Mapped[str | None] = mapped_column(Identifier("usr"))
    api_key_id: Mapped[str | None] = mapped_column(String(40))
    deployment_id: Mapped[str | None] = mapped_column(Identifier("dep"))
    provider: Mapped[str] = mapped_column(String(64))
    model: Mapped[str] = mapped_column(String(128))
    tokens_in: Mapped[int] = mapped_column(BigInteger)
    """At most; likewise ``tokens_out``."""
    tokens_out: Mapped[int] = mapped_column(BigInteger)
    cost_held: Mapped[Decimal] = mapped_column(ExactDecimal)
    currency: Mapped[str] = mapped_column(String(3))
    settles_itself: Mapped[bool] = mapped_column(Boolean)
    """Whether what was held is written down when nobody has settled in time (the model endpoint's calls), or else given back."""
    settled: Mapped[bool] = mapped_column(Boolean)
    """Whether it holds nothing any more: its usage is written down, or it was ``released``."""
    released: Mapped[bool] = mapped_column(Boolean)
    settled_late: Mapped[bool] = mapped_column(Boolean)
    tokens_overrun: Mapped[int] = mapped_column(BigInteger)
    cost_overrun: Mapped[Decimal] = mapped_column(ExactDecimal)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
