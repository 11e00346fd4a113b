"""Table of the keys with which bots called before the user service had them."""

from datetime import datetime

from sqlalchemy import ForeignKey, LargeBinary
from sqlalchemy.orm import Mapped, mapped_column

from services.deployment_svc.base import Base
from services.kit.columns import Identifier, Tenant, Timestamps, UtcDateTime, identifier


class ClawKey(Tenant, Timestamps, Base):
    """The key of a bot that was started before bots got API keys: only a keyed hash of it. No more are made."""

    __tablename__ = "claw_keys"

    id: Mapped[str] = identifier("ckey")
    deployment_id: Mapped[str] = mapped_column(Identifier("dep"), ForeignKey("deployments.id", ondelete="CASCADE"), index=True)
    user_id: Mapped[str] = mapped_column(Identifier("usr"))
    digest: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
