"""Tables of payment pages and payments."""

from datetime import datetime

from sqlalchemy import BigInteger, Boolean, CheckConstraint, ForeignKey, Index, Integer, String, Text, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from clawplane.deployment.v1.payment_pb2 import PaymentStatus
from services.deployment_svc.base import Base
from services.kit.columns import Identifier, Leased, ProtoEnum, Tenant, Timestamps, UtcDateTime, identifier

PAYMENT_STATUS = ProtoEnum(PaymentStatus)

CREATING, OPEN, COMPLETE, EXPIRED = "creating", "open", "complete", "expired"
_UNDECIDED = text("status IN ('creating', 'open')")


class PaymentSession(Tenant, Timestamps, Leased, Base):
    """A payment page at a provider. Rows stay, so that every page of a deployment is found whenever its payment comes.

    ``due_at`` is when the provider is asked about it next.
    """

    __tablename__ = "payment_sessions"
    __table_args__ = (
        UniqueConstraint("provider", "external_id"),
        UniqueConstraint("deployment_id", "link_number"),
        Index(
            "ux_payment_sessions__open", "deployment_id", unique=True,
            postgresql_where=_UNDECIDED, sqlite_where=_UNDECIDED,
        ),
        Index("ix_payment_sessions__due_at", "due_at"),
        CheckConstraint("status IN ('creating', 'open', 'complete', 'expired')", name="status"),
    )  # fmt: skip

    id: Mapped[str] = identifier("pses")
    deployment_id: Mapped[str] = mapped_column(Identifier("dep"), ForeignKey("deployments.id", ondelete="CASCADE"))
    provider: Mapped[str] = mapped_column(String(16))
    external_id: Mapped[str | None] = mapped_column(String(255))
    link_number: Mapped[int] = mapped_column(Integer)
    status: Mapped[str] = mapped_column(String(16))
    amount_minor: Mapped[int] = mapped_column(BigInteger)
    currency: Mapped[str] = mapped_column(String(3))
    url: Mapped[str] = mapped_column(Text, default="")
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class Payment(Tenant, Timestamps, Leased, Base):
    """One payment. ``due_at`` is when the provider is asked about refunds and disputes next."""

    __tablename__ = "payments"
    __table_args__ = (
        UniqueConstraint("provider", "external_id"),
        Index("ix_payments__deployment_id", "deployment_id"),
        Index("ix_payments__due_at", "due_at"),
        Index("ix_payments__attention", "org_id", "refund_due", "payment_mismatch"),
        PAYMENT_STATUS.check("status"),
        CheckConstraint("amount_minor >= 0 AND refunded_minor >= 0", name="amounts"),
    )

    id: Mapped[str] = identifier("pay")
    deployment_id: Mapped[str] = mapped_column(Identifier("dep"), ForeignKey("deployments.id", ondelete="CASCADE"))
    provider: Mapped[str] = mapped_column(String(16))
    external_id: Mapped[str] = mapped_column(String(255))
    session_id: Mapped[str] = mapped_column(String(255), default="")
    status: Mapped[int] = mapped_column(PAYMENT_STATUS)
    amount_minor: Mapped[int] = mapped_column(BigInteger)
    currency: Mapped[str] = mapped_column(String(3))
    livemode: Mapped[bool] = mapped_column(Boolean)
    refunded_minor: Mapped[int] = mapped_column(BigInteger, default=0)
    disputed: Mapped[bool] = mapped_column(Boolean, default=False)
    refund_due: Mapped[bool] = mapped_column(Boolean, default=False)
    payment_mismatch: Mapped[bool] = mapped_column(Boolean, default=False)
    attention: Mapped[str] = mapped_column(Text, default="")
    last_event_at: Mapped[datetime] = mapped_column(UtcDateTime)
