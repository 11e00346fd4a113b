"""Table of the model endpoint's calls that are under way."""

from datetime import datetime
from decimal import Decimal

from sqlalchemy import BigInteger, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from services.deployment_svc.base import Base
from services.kit.columns import ExactDecimal, Identifier, Tenant, Timestamps, UtcDateTime, identifier


class ModelCall(Tenant, Timestamps, Base):
    """An open call and what it holds of the month's credit. Becomes one usage event of the same id, and is gone then."""

    __tablename__ = "model_calls"
    __table_args__ = (Index("ix_model_calls__org_id", "org_id"), Index("ix_model_calls__expires_at", "expires_at"))

    id: Mapped[str] = identifier("call")
    user_id: Mapped[str | None] = mapped_column(Identifier("usr"))
    api_key_id: Mapped[str | None] = mapped_column(String(40))
    deployment_id: Mapped[str | None] = mapped_column(Identifier("dep"))
    provider: Mapped[str] = mapped_column(String(64))
    model: Mapped[str] = mapped_column(String(128))
    tokens_in_estimate: Mapped[int] = mapped_column(BigInteger)
    max_tokens: Mapped[int] = mapped_column(BigInteger)
    cost_estimate: Mapped[Decimal] = mapped_column(ExactDecimal)
    currency: Mapped[str] = mapped_column(String(3))
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
