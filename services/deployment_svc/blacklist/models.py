"""Table of the providers that get no deployments."""

from datetime import datetime

from sqlalchemy import JSON, Boolean, Index, Integer, String, false
from sqlalchemy.orm import Mapped, mapped_column

from services.deployment_svc.base import Base
from services.kit.columns import Timestamps, UtcDateTime


class BlacklistEntry(Timestamps, Base):
    """Excludes a provider until ``expires_at``; unset means for good. The rule's outlive their end: they remember strikes."""

    __tablename__ = "provider_blacklist"
    __table_args__ = (Index("ix_provider_blacklist__created_at", "created_at"),)

    provider_address: Mapped[str] = mapped_column(String(128), primary_key=True)
    reason: Mapped[str] = mapped_column(String(500), default="Provider blacklisted")
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    by_rule: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    on_probation: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    """Set by the rule until the provider has brought a bot up again."""
    strikes: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    evidence: Mapped[list[str]] = mapped_column(JSON, default=list, server_default="[]")
