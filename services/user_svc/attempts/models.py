"""Table of counted attempts."""

from datetime import datetime

from sqlalchemy import Integer, LargeBinary, String
from sqlalchemy.orm import Mapped, mapped_column

from services.kit.columns import Timestamps, UtcDateTime
from services.user_svc.base import Base


class Attempt(Timestamps, Base):
    """How often something was tried of late. The subject is a keyed hash: nobody reads from here who tried to sign in."""

    __tablename__ = "attempts"

    kind: Mapped[str] = mapped_column(String(32), primary_key=True)
    subject: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    count: Mapped[int] = mapped_column(Integer)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    """When counting begins anew."""
