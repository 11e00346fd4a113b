"""Table of the one-time links."""

from datetime import datetime

from sqlalchemy import ForeignKey, LargeBinary
from sqlalchemy.orm import Mapped, mapped_column

from services.kit.columns import Identifier, Timestamps, UtcDateTime, identifier
from services.user_svc.base import Base


class SignInLink(Timestamps, Base):
    """A one-time link: only a hash of its token."""

    __tablename__ = "sign_in_links"

    id: Mapped[str] = identifier("sil")
    user_id: Mapped[str] = mapped_column(Identifier("usr"), ForeignKey("users.id", ondelete="CASCADE"), index=True)
    digest: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
