"""Tables of the providers that have made offers, and of what came of them."""

from datetime import datetime

from sqlalchemy import BigInteger, Boolean, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from clawplane.deployment.v1.provider_pb2 import OutcomeKind
from services.deployment_svc.base import Base
from services.kit.columns import Identifier, ProtoEnum, Timestamps, UtcDateTime, identifier

KIND = ProtoEnum(OutcomeKind)


class Provider(Timestamps, Base):
    """A provider that has made an offer, with counts since it was first seen."""

    __tablename__ = "providers"

    address: Mapped[str] = mapped_column(String(128), primary_key=True)
    offers: Mapped[int] = mapped_column(BigInteger, default=0)
    leases: Mapped[int] = mapped_column(BigInteger, default=0)
    readies: Mapped[int] = mapped_column(BigInteger, default=0)
    losses: Mapped[int] = mapped_column(BigInteger, default=0)
    failures: Mapped[int] = mapped_column(BigInteger, default=0)
    last_offer_at: Mapped[datetime | None] = mapped_column(UtcDateTime, index=True)
    last_ready_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    last_failure_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    last_failure: Mapped[str] = mapped_column(Text, default="")


class ProviderOutcome(Timestamps, Base):
    """What came of an offer that was taken; the evidence of the rule."""

    __tablename__ = "provider_outcomes"
    __table_args__ = (
        Index("ix_provider_outcomes__provider_address_created_at", "provider_address", "created_at"),
        Index("ix_provider_outcomes__expires_at", "expires_at"),
        KIND.check("kind"),
    )

    id: Mapped[str] = identifier("pout")
    provider_address: Mapped[str] = mapped_column(String(128))
    deployment_id: Mapped[str] = mapped_column(Identifier("dep"))
    kind: Mapped[int] = mapped_column(KIND)
    is_good: Mapped[bool] = mapped_column(Boolean)
    reason: Mapped[str] = mapped_column(Text, default="")
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
