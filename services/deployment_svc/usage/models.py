"""Tables of the usage ledger."""

from datetime import date, datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, CheckConstraint, Date, Index, Integer, String, false
from sqlalchemy.orm import Mapped, mapped_column

from clawplane.deployment.v1.usage_event_pb2 import UsageStatus, UsageType
from services.deployment_svc.base import Base
from services.kit.columns import ExactDecimal, Identifier, ProtoEnum, Tenant, Timestamps, UtcDateTime, now

USAGE_TYPE, USAGE_STATUS = ProtoEnum(UsageType), ProtoEnum(UsageStatus)

NO_DEPLOYMENT = "dep_" + "0" * 32
"""Stands in roll-ups for usage without a deployment: a key column cannot be empty."""


class UsageEvent(Tenant, Base):
    """One use of a model, identified by (organization, the caller's id, month). Never changed. Partitioned by month on PostgreSQL."""

    __tablename__ = "usage_events"
    __table_args__ = (
        Index("ix_usage_events__id", "id"),
        Index("ix_usage_events__org_id_occurred_at", "org_id", "occurred_at"),
        Index("ix_usage_events__org_id_user_id_occurred_at", "org_id", "user_id", "occurred_at"),
        USAGE_TYPE.check("type"),
        USAGE_STATUS.check("status"),
        CheckConstraint("tokens_in >= 0 AND tokens_out >= 0 AND tokens_cached >= 0 AND tokens_reasoning >= 0", name="tokens"),
        {"postgresql_partition_by": "RANGE (month)"},
    )

    org_id: Mapped[str] = mapped_column(Identifier("org"), primary_key=True, sort_order=-20)
    id: Mapped[str] = mapped_column(String(100), primary_key=True)
    month: Mapped[date] = mapped_column(Date, primary_key=True)
    occurred_at: Mapped[datetime] = mapped_column(UtcDateTime)
    user_id: Mapped[str | None] = mapped_column(Identifier("usr"))
    api_key_id: Mapped[str | None] = mapped_column(String(40))
    deployment_id: Mapped[str | None] = mapped_column(Identifier("dep"))
    agent_id: Mapped[str | None] = mapped_column(Identifier("agnt"))
    thread_id: Mapped[str | None] = mapped_column(Identifier("thrd"))
    project_id: Mapped[str | None] = mapped_column(Identifier("prj"))
    provider: Mapped[str] = mapped_column(String(64))
    model: Mapped[str] = mapped_column(String(128))
    type: Mapped[int] = mapped_column(USAGE_TYPE)
    tokens_in: Mapped[int] = mapped_column(BigInteger)
    tokens_out: Mapped[int] = mapped_column(BigInteger)
    tokens_cached: Mapped[int] = mapped_column(BigInteger)
    tokens_reasoning: Mapped[int] = mapped_column(BigInteger)
    tokens_total: Mapped[int] = mapped_column(BigInteger)
    cost: Mapped[Decimal | None] = mapped_column(ExactDecimal)
    currency: Mapped[str] = mapped_column(String(3))
    latency_ms: Mapped[int] = mapped_column(BigInteger)
    status: Mapped[int] = mapped_column(USAGE_STATUS)
    operation_id: Mapped[str] = mapped_column(String(100))
    attempt: Mapped[int] = mapped_column(Integer)
    estimated: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    # "metadata" alone is SQLAlchemy's own name on a model.
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class UsageRollup(Tenant, Timestamps, Base):
    """Sums of a day (UTC), written in the transaction that writes the events."""

    __tablename__ = "usage_rollups"

    org_id: Mapped[str] = mapped_column(Identifier("org"), primary_key=True, sort_order=-20)
    day: Mapped[date] = mapped_column(Date, primary_key=True)
    provider: Mapped[str] = mapped_column(String(64), primary_key=True)
    model: Mapped[str] = mapped_column(String(128), primary_key=True)
    deployment_id: Mapped[str] = mapped_column(Identifier("dep"), primary_key=True)
    currency: Mapped[str] = mapped_column(String(3), primary_key=True)
    events: Mapped[int] = mapped_column(BigInteger)
    tokens_in: Mapped[int] = mapped_column(BigInteger)
    tokens_out: Mapped[int] = mapped_column(BigInteger)
    tokens_total: Mapped[int] = mapped_column(BigInteger)
    cost: Mapped[Decimal] = mapped_column(ExactDecimal)
    unpriced_events: Mapped[int] = mapped_column(BigInteger)
