"""Table of the sandbox's checkout sessions."""

from datetime import datetime

from sqlalchemy import BigInteger, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from clawplane.deployment.v1.sandbox_session_pb2 import SandboxSessionStatus
from services.deployment_svc.base import Base
from services.kit.columns import Identifier, ProtoEnum, Timestamps, UtcDateTime

SANDBOX_STATUS = ProtoEnum(SandboxSessionStatus)


class SandboxSession(Timestamps, Base):
    """What Stripe would keep of a checkout session, kept by the sandbox."""

    __tablename__ = "sandbox_sessions"
    __table_args__ = (SANDBOX_STATUS.check("status"),)

    id: Mapped[str] = mapped_column(String(100), primary_key=True)
    idempotency_key: Mapped[str] = mapped_column(String(255), unique=True)
    deployment_id: Mapped[str] = mapped_column(Identifier("dep"), index=True)
    user_id: Mapped[str] = mapped_column(Identifier("usr"))
    status: Mapped[int] = mapped_column(SANDBOX_STATUS)
    description: Mapped[str] = mapped_column(String(200))
    amount_minor: Mapped[int] = mapped_column(BigInteger)
    currency: Mapped[str] = mapped_column(String(3))
    payment_intent_id: Mapped[str | None] = mapped_column(String(100), unique=True)
    refunded_minor: Mapped[int] = mapped_column(BigInteger, default=0)
    success_url: Mapped[str] = mapped_column(Text, default="")
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
