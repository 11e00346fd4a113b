"""Table of the subscriptions at payment providers."""

from datetime import datetime

from sqlalchemy import Boolean, ForeignKey, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from services.kit.columns import Identifier, Timestamps, UtcDateTime, identifier
from services.user_svc.base import Base
from services.user_svc.organizations.models import SUBSCRIPTION_STATUS


class Subscription(Timestamps, Base):
    """A subscription as its provider told of it last. ``org_id`` is unset while its customer is nobody's."""

    __tablename__ = "subscriptions"
    __table_args__ = (UniqueConstraint("provider", "external_id"), SUBSCRIPTION_STATUS.check("status"))

    id: Mapped[str] = identifier("sub")
    org_id: Mapped[str | None] = mapped_column(Identifier("org"), ForeignKey("organizations.id", ondelete="CASCADE"), index=True)
    provider: Mapped[str] = mapped_column(String(16))
    external_id: Mapped[str] = mapped_column(String(255))
    customer_id: Mapped[str] = mapped_column(String(255), index=True)
    product_id: Mapped[str] = mapped_column(String(255))
    tier: Mapped[str] = mapped_column(String(32), default="")
    status: Mapped[int] = mapped_column(SUBSCRIPTION_STATUS)
    cancel_at_period_end: Mapped[bool] = mapped_column(Boolean, default=False)
    current_period_end: Mapped[datetime | None] = mapped_column(UtcDateTime)
    changed_at: Mapped[datetime] = mapped_column(UtcDateTime)
    """When the provider last changed it; older events change nothing."""
