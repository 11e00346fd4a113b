"""Table of the one-time codes."""

from datetime import datetime
from enum import StrEnum

from sqlalchemy import CheckConstraint, Index, Integer, LargeBinary, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from services.kit.columns import Timestamps, UtcDateTime, identifier
from services.user_svc.base import Base


class Purpose(StrEnum):
    """What a code is for; it is worth nothing for anything else."""

    SIGN_IN = "sign_in"
    VERIFY_EMAIL = "verify_email"
    STEP_UP = "step_up"
    RESET_PASSWORD = "reset_password"


class OneTimeCode(Timestamps, Base):
    """A code that was mailed: only keyed hashes of it and of the address, so that the table alone signs nobody in."""

    __tablename__ = "one_time_codes"
    __table_args__ = (
        CheckConstraint(f"purpose IN ({', '.join(repr(str(each)) for each in Purpose)})", name="purpose"),
        Index("ix_one_time_codes__subject_purpose", "subject", "purpose"),
    )

    id: Mapped[str] = identifier("otc")
    purpose: Mapped[str] = mapped_column(String(32))
    subject: Mapped[bytes] = mapped_column(LargeBinary(32))
    """Of the address."""
    digest: Mapped[bytes] = mapped_column(LargeBinary(32))
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    details_sealed: Mapped[str | None] = mapped_column(Text)
    """What the code completes, where it completes something."""
    used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
