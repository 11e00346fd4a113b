"""Tables of the API keys and of their texts."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, Boolean, ForeignKey, Index, Integer, LargeBinary, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from clawplane.user.v1.api_key_pb2 import ApiKeyEnvironment
from services.kit.columns import Identifier, ProtoEnum, Tenant, Timestamps, UtcDateTime, Versioned, identifier
from services.user_svc.base import Base

ENVIRONMENT = ProtoEnum(ApiKeyEnvironment)


class ApiKey(Versioned, Tenant, Base):
    """A key of a program, or of a bot when it has a deployment. Its texts are rows of their own."""

    __tablename__ = "api_keys"
    __table_args__ = (Index("ix_api_keys__org_id_id", "org_id", "id"), ENVIRONMENT.check("environment"))

    id: Mapped[str] = identifier("key")
    org_id: Mapped[str] = mapped_column(Identifier("org"), ForeignKey("organizations.id", ondelete="CASCADE"), sort_order=-20)
    user_id: Mapped[str] = mapped_column(Identifier("usr"), ForeignKey("users.id", ondelete="CASCADE"), index=True)
    deployment_id: Mapped[str | None] = mapped_column(Identifier("dep"), index=True)
    name: Mapped[str] = mapped_column(String(255))
    environment: Mapped[int] = mapped_column(ENVIRONMENT)
    permissions: Mapped[list[str]] = mapped_column(JSON)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    rate: Mapped[str] = mapped_column(String(32), default="")
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", JSON, default=dict)
    is_active: Mapped[bool] = mapped_column(Boolean, default=True)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoke_reason: Mapped[str] = mapped_column(String(500), default="")
    last_used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class ApiKeySecret(Tenant, Timestamps, Base):
    """One text of a key: only a keyed hash of it. ``expires_at`` is the end of its grace once there is a newer one."""

    __tablename__ = "api_key_secrets"
    __table_args__ = (UniqueConstraint("key_id", "number"),)

    id: Mapped[str] = identifier("ksec")
    key_id: Mapped[str] = mapped_column(Identifier("key"), ForeignKey("api_keys.id", ondelete="CASCADE"))
    number: Mapped[int] = mapped_column(Integer)
    digest: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    digest_key_id: Mapped[str] = mapped_column(String(64), default="")
    """Which key the hash was made with; empty for the one of CLAWPLANE_HMAC_KEY."""
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime, index=True)
