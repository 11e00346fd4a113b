"""Table of the mail that goes out."""

from datetime import datetime

from sqlalchemy import Integer, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from services.kit.columns import Leased, Timestamps, UtcDateTime, identifier
from services.user_svc.base import Base


class MailMessage(Leased, Timestamps, Base):
    """One mail. It is written in the transaction that it speaks of, and given out by a loop."""

    __tablename__ = "mail_messages"

    id: Mapped[str] = identifier("mail")
    to_address: Mapped[str] = mapped_column(String(254))
    subject: Mapped[str] = mapped_column(String(200))
    text_sealed: Mapped[str | None] = mapped_column(Text)
    """Sealed, since it holds codes and links; removed as soon as a mail server has it."""
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    problem: Mapped[str] = mapped_column(String(100), default="")
    """Why the last attempt failed, as the kind of the error and the server's number."""
    sent_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
