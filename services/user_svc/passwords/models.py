"""Table of the passwords."""

from datetime import datetime

from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from services.kit.columns import Identifier, Timestamps, UtcDateTime
from services.user_svc.base import Base


class Password(Timestamps, Base):
    """A user's password: only its hash, in a table that no message shows."""

    __tablename__ = "passwords"

    user_id: Mapped[str] = mapped_column(Identifier("usr"), ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    hash: Mapped[str] = mapped_column(String(255))
    changed_at: Mapped[datetime] = mapped_column(UtcDateTime)
