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

LATENCY_MS = (10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240, 20480, 40960, 81920, 163840)
"""Where the buckets of latencies end: one below each, and one more above the last. Fixed, since sums of different buckets mean nothing."""


class UsageEvent(Tenant, Base):
    """One use of a model, identified by (organization, the caller's id, month); or a correction of one. Never changed but for its cost,
    when prices are put right. Partitioned by month on PostgreSQL."""

    __tablename__ = "usage_events"
    __table_args__ = (
        Index("ix_usage_events__id", "id"),
        Index("ix_usage_events__org_id_occurred_at", "org_id", "occurred_at"),
        Index("ix_usage_events__org_id_user_id_occurred_at", "org_id", "user_id", "occurred_at"),
        USAGE_TYPE.check("type"),
        USAGE_STATUS.check("status"),
        CheckConstraint(
            "adjusts <> '' OR (tokens_in >= 0 AND tokens_out >= 0 AND tokens_cached >= 0 AND tokens_reasoning >= 0)", name="tokens"
        ),
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
    stated_cost: Mapped[Decimal | None] = mapped_column(ExactDecimal)
    price_id: Mapped[str | None] = mapped_column(Identifier("prc"))
    currency: Mapped[str] = mapped_column(String(3))
    latency_ms: Mapped[int] = mapped_column(BigInteger)
    status: Mapped[int] = mapped_column(USAGE_STATUS)
    operation_id: Mapped[str] = mapped_column(String(100))
    attempt: Mapped[int] = mapped_column(Integer)
    estimated: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    adjusts: Mapped[str] = mapped_column(String(100), default="", server_default="")
    reason: Mapped[str] = mapped_column(String(500), default="", server_default="")
    # "metadata" alone is SQLAlchemy's own name on a model.
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class UsageRollup(Tenant, Timestamps, Base):
    """Sums of a quarter of an hour, written in the transaction that writes the events: each event counts once in each of three kinds."""

    __tablename__ = "usage_rollups"

    org_id: Mapped[str] = mapped_column(Identifier("org"), primary_key=True, sort_order=-20)
    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    """One of KINDS; says what ``dim_1`` to ``dim_3`` are."""
    starts_at: Mapped[datetime] = mapped_column(UtcDateTime, primary_key=True)
    dim_1: Mapped[str] = mapped_column(String(128), primary_key=True)
    dim_2: Mapped[str] = mapped_column(String(128), primary_key=True)
    dim_3: Mapped[str] = mapped_column(String(128), primary_key=True)
    currency: Mapped[str] = mapped_column(String(3), primary_key=True)
    events: Mapped[int] = mapped_column(BigInteger)
    errors: Mapped[int] = mapped_column(BigInteger)
    unpriced_events: Mapped[int] = mapped_column(BigInteger)
    tokens_in: Mapped[int] = mapped_column(BigInteger)
    tokens_out: Mapped[int] = mapped_column(BigInteger)
    tokens_cached: Mapped[int] = mapped_column(BigInteger)
    tokens_reasoning: Mapped[int] = mapped_column(BigInteger)
    tokens_total: Mapped[int] = mapped_column(BigInteger)
    cost: Mapped[Decimal] = mapped_column(ExactDecimal)


LATENCIES = tuple(f"latency_{number:02}" for number in range(len(LATENCY_MS) + 1))
"""Columns of a roll-up: how many events fell into each bucket of latency. Events that told none are in none."""
for _name in LATENCIES:
    setattr(UsageRollup, _name, mapped_column(BigInteger, nullable=False, sort_order=50))

KINDS: dict[str, tuple[str, str, str]] = {
    "model": ("provider", "model", "type"),
    "caller": ("user_id", "api_key_id", ""),
    "workload": ("deployment_id", "agent_id", "project_id"),
}
"""Kind of roll-up -> the columns of an event that its dimensions are; absent ones are empty texts."""
SUMS = (
    "events", "errors", "unpriced_events", "tokens_in", "tokens_out", "tokens_cached", "tokens_reasoning", "tokens_total", "cost",
    *LATENCIES,
)  # fmt: skip
"""Columns of a roll-up that add up."""


class UsageCounter(Tenant, Timestamps, Base):
    """What was used in one period, for a limit to be checked against; written in the transaction that writes the events.

    Every organization has those of its hours and months; others exist where a quota asks for them."""

    __tablename__ = "usage_counters"
    __table_args__ = (Index("ix_usage_counters__period_starts_at_org_id", "period", "starts_at", "org_id", "scope", "subject"),)

    org_id: Mapped[str] = mapped_column(Identifier("org"), primary_key=True, sort_order=-20)
    scope: Mapped[str] = mapped_column(String(16), primary_key=True)
    subject: Mapped[str] = mapped_column(String(40), primary_key=True)
    """The user, API key or deployment; empty for the organization."""
    period: Mapped[str] = mapped_column(String(8), primary_key=True)
    starts_at: Mapped[datetime] = mapped_column(UtcDateTime, primary_key=True)
    tokens: Mapped[int] = mapped_column(BigInteger)
    cost: Mapped[Decimal] = mapped_column(ExactDecimal)
