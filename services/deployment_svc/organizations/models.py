"""How far this service has followed the user service's changes."""

from sqlalchemy import BigInteger, String
from sqlalchemy.orm import Mapped, mapped_column

from services.deployment_svc.base import Base
from services.kit.columns import Timestamps


class FeedCursor(Timestamps, Base):
    """Number of the last change whose consequences are written down here."""

    __tablename__ = "feed_cursors"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger)
