"""Table of the keys with which bots call."""

from datetime import datetime

from sqlalchemy import ForeignKey, LargeBinary
from sqlalchemy.orm import Mapped, mapped_column

from services.deployment_svc.base import Base
from services.kit.columns import Identifier, Tenant, Timestamps, UtcDateTime, identifier


class ClawKey(Tenant, Timestamps, Base):
    """A bot's key: only a keyed hash of it."""

    __tablename__ = "claw_keys"

    id: Mapped[str] = identifier("ckey")
    deployment_id: Mapped[str] = mapped_column(Identifier("dep"), ForeignKey("deployments.id", ondelete="CASCADE"), index=True)
    user_id: Mapped[str] = mapped_column(Identifier("usr"))
    digest: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
