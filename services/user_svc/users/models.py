"""Tables of users and how they sign in."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, Boolean, ForeignKey, Index, String, Text, UniqueConstraint, false, func, text
from sqlalchemy.orm import Mapped, mapped_column

from services.kit.columns import Identifier, Timestamps, UtcDateTime, Versioned, identifier
from services.user_svc.base import Base


class User(Versioned, Base):
    """One person."""

    __tablename__ = "users"

    id: Mapped[str] = identifier("usr")
    personal_org_id: Mapped[str] = mapped_column(Identifier("org"), ForeignKey("organizations.id"), unique=True)
    email: Mapped[str] = mapped_column(String(254))
    email_verified_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    username: Mapped[str] = mapped_column(String(50), unique=True)
    full_name: Mapped[str] = mapped_column(String(200), default="")
    avatar_url: Mapped[str] = mapped_column(String(2048), default="")
    bio: Mapped[str] = mapped_column(Text, default="")
    location: Mapped[str] = mapped_column(String(200), default="")
    website_url: Mapped[str] = mapped_column(String(2048), default="")
    github_username: Mapped[str] = mapped_column(String(39), default="", index=True)
    clerk_user_id: Mapped[str | None] = mapped_column(String(255), unique=True)
    polar_customer_id: Mapped[str | None] = mapped_column(String(255), unique=True)
    stripe_customer_id: Mapped[str | None] = mapped_column(String(255), unique=True)
    is_active: Mapped[bool] = mapped_column(Boolean, default=True)
    is_operator: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    preferences: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    settings: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    last_login_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    clerk_event_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """Time of the newest event of Clerk that was applied; older ones change nothing."""

    polar_event_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """The same of Polar's events of customers."""

    # Unique among the living, without regard to case, whatever writes.
    __table_args__ = (
        Index(
            "ux_users__email", func.lower(email), unique=True,
            postgresql_where=text("deleted_at IS NULL"), sqlite_where=text("deleted_at IS NULL"),
        ),
        Index("ix_users__created_at", "created_at"),
    )  # fmt: skip


class Identity(Timestamps, Base):
    """One way in which a user signs in."""

    __tablename__ = "identities"
    __table_args__ = (UniqueConstraint("provider", "subject"),)

    id: Mapped[str] = identifier("idn")
    user_id: Mapped[str] = mapped_column(Identifier("usr"), ForeignKey("users.id", ondelete="CASCADE"), index=True)
    provider: Mapped[str] = mapped_column(String(32))
    subject: Mapped[str] = mapped_column(String(255))


class IdentityTombstone(Timestamps, Base):
    """An identity that its provider has deleted; nothing that comes late brings it back."""

    __tablename__ = "identity_tombstones"

    provider: Mapped[str] = mapped_column(String(32), primary_key=True)
    subject: Mapped[str] = mapped_column(String(255), primary_key=True)
    occurred_at: Mapped[datetime] = mapped_column(UtcDateTime)
