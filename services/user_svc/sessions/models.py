"""Table of the signed-in browsers."""

from datetime import datetime

from sqlalchemy import ForeignKey, LargeBinary, String
from sqlalchemy.orm import Mapped, mapped_column

from services.kit.columns import Identifier, Timestamps, UtcDateTime, identifier
from services.user_svc.base import Base


class Session(Timestamps, Base):
    """A signed-in browser: only a hash of its token."""

    __tablename__ = "sessions"

    id: Mapped[str] = identifier("ses")
    user_id: Mapped[str] = mapped_column(Identifier("usr"), ForeignKey("users.id", ondelete="CASCADE"), index=True)
    digest: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    ip: Mapped[str] = mapped_column(String(45), default="")
    device: Mapped[str] = mapped_column(String(200), default="")
    last_seen_at: Mapped[datetime] = mapped_column(UtcDateTime)
    fresh_at: Mapped[datetime] = mapped_column(UtcDateTime)
    """When the user last proved who it is."""
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
