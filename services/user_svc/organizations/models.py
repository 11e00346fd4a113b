"""Tables of organizations and their members."""

from datetime import datetime

from sqlalchemy import Boolean, ForeignKey, Index, String, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from clawplane.user.v1.organization_pb2 import Role
from clawplane.user.v1.user_pb2 import SubscriptionStatus
from services.kit.columns import Identifier, ProtoEnum, Timestamps, UtcDateTime, Versioned, identifier
from services.user_svc.base import Base

ROLE, SUBSCRIPTION_STATUS = ProtoEnum(Role), ProtoEnum(SubscriptionStatus)


class Organization(Versioned, Base):
    """The tenant."""

    __tablename__ = "organizations"
    __table_args__ = (SUBSCRIPTION_STATUS.check("subscription_status", unspecified=True),)

    id: Mapped[str] = identifier("org")
    name: Mapped[str] = mapped_column(String(200))
    is_personal: Mapped[bool] = mapped_column(Boolean, default=False)
    tier: Mapped[str] = mapped_column(String(32))
    subscription_status: Mapped[int] = mapped_column(SUBSCRIPTION_STATUS, default=0)
    deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class Membership(Timestamps, Base):
    """A user's role in an organization. Exactly one owner: at most one by the index, at least one by the code."""

    __tablename__ = "memberships"
    __table_args__ = (
        UniqueConstraint("org_id", "user_id"),
        Index(
            "ux_memberships__owner",
            "org_id",
            unique=True,
            postgresql_where=text("role = 'owner'"),
            sqlite_where=text("role = 'owner'"),
        ),
        ROLE.check("role"),
    )

    id: Mapped[str] = identifier("mem")
    org_id: Mapped[str] = mapped_column(Identifier("org"), ForeignKey("organizations.id", ondelete="CASCADE"))
    user_id: Mapped[str] = mapped_column(Identifier("usr"), ForeignKey("users.id", ondelete="CASCADE"), index=True)
    role: Mapped[int] = mapped_column(ROLE)
