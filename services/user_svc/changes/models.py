"""Table of what other services must learn."""

from sqlalchemy import BigInteger, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from clawplane.user.v1.change_service_pb2 import ChangeKind
from services.kit.columns import Identifier, ProtoEnum, Timestamps
from services.user_svc.base import Base

CHANGE_KIND = ProtoEnum(ChangeKind)


class Change(Timestamps, Base):
    """One change. ``seq`` order is commit order (repository.py)."""

    __tablename__ = "changes"
    __table_args__ = (CHANGE_KIND.check("kind"), {"sqlite_autoincrement": True})

    # SQLite numbers by itself only what it calls INTEGER PRIMARY KEY; AUTOINCREMENT keeps it from reusing a purged number.
    seq: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True)
    kind: Mapped[int] = mapped_column(CHANGE_KIND)
    org_id: Mapped[str] = mapped_column(Identifier("org"))
    subject: Mapped[str] = mapped_column(String(100))
