"""Tables of limits."""

from datetime import datetime
from decimal import Decimal

from sqlalchemy import BigInteger, Boolean, CheckConstraint, Index, Integer, String, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from clawplane.deployment.v1.quota_pb2 import QuotaPeriod, QuotaScope, QuotaUnit
from services.deployment_svc.base import Base
from services.kit.columns import ExactDecimal, ProtoEnum, Tenant, Timestamps, UtcDateTime, identifier

_SUSPENDS = text("suspends")
SCOPE, PERIOD, UNIT = ProtoEnum(QuotaScope), ProtoEnum(QuotaPeriod), ProtoEnum(QuotaUnit)


class Quota(Tenant, Timestamps, Base):
    """A limit that an operator has set."""

    __tablename__ = "quotas"
    __table_args__ = (
        UniqueConstraint("org_id", "scope", "subject", "period", "unit"),
        Index("ix_quotas__suspends", "org_id", postgresql_where=_SUSPENDS, sqlite_where=_SUSPENDS),
        SCOPE.check("scope"), PERIOD.check("period"), UNIT.check("unit"),
        CheckConstraint("CASE unit WHEN 'tokens' THEN amount_tokens ELSE amount_cost END IS NOT NULL", name="amount"),
    )  # fmt: skip

    id: Mapped[str] = identifier("quo")
    scope: Mapped[int] = mapped_column(SCOPE)
    subject: Mapped[str] = mapped_column(String(40))
    """The user, API key or deployment; empty: each one, or the organization itself."""
    period: Mapped[int] = mapped_column(PERIOD)
    unit: Mapped[int] = mapped_column(UNIT)
    amount_tokens: Mapped[int | None] = mapped_column(BigInteger)
    amount_cost: Mapped[Decimal | None] = mapped_column(ExactDecimal)
    soft: Mapped[bool] = mapped_column(Boolean)
    suspends: Mapped[bool] = mapped_column(Boolean)


class QuotaNotice(Tenant, Timestamps, Base):
    """That a part of a limit was used up in a period; noticed once."""

    __tablename__ = "quota_notices"
    __table_args__ = (
        UniqueConstraint("org_id", "scope", "subject", "period", "unit", "period_start", "percent"),
        Index("ix_quota_notices__org_id_id", "org_id", "id"),
        SCOPE.check("scope"), PERIOD.check("period"), UNIT.check("unit"),
    )  # fmt: skip

    id: Mapped[str] = identifier("qnt")
    scope: Mapped[int] = mapped_column(SCOPE)
    subject: Mapped[str] = mapped_column(String(40))
    period: Mapped[int] = mapped_column(PERIOD)
    unit: Mapped[int] = mapped_column(UNIT)
    period_start: Mapped[datetime] = mapped_column(UtcDateTime)
    percent: Mapped[int] = mapped_column(Integer)
    amount: Mapped[str] = mapped_column(String(40))
    used: Mapped[str] = mapped_column(String(40))
