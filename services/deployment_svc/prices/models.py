"""Tables of the price book."""

from datetime import datetime
from decimal import Decimal

from sqlalchemy import BigInteger, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from services.deployment_svc.base import Base
from services.kit.columns import ExactDecimal, Timestamps, UtcDateTime, identifier


class Price(Timestamps, Base):
    """What a million tokens cost, for the models that a pattern names, from a time on. Never changed but for its end."""

    __tablename__ = "prices"
    __table_args__ = (UniqueConstraint("provider", "model", "above_tokens_in", "effective_from"),)

    id: Mapped[str] = identifier("prc")
    provider: Mapped[str] = mapped_column(String(64))
    model: Mapped[str] = mapped_column(String(128))
    above_tokens_in: Mapped[int] = mapped_column(BigInteger)
    effective_from: Mapped[datetime] = mapped_column(UtcDateTime)
    effective_to: Mapped[datetime | None] = mapped_column(UtcDateTime)
    currency: Mapped[str] = mapped_column(String(3))
    tokens_in: Mapped[Decimal] = mapped_column(ExactDecimal)
    tokens_out: Mapped[Decimal] = mapped_column(ExactDecimal)
    tokens_cached: Mapped[Decimal] = mapped_column(ExactDecimal)
    tokens_reasoning: Mapped[Decimal] = mapped_column(ExactDecimal)
    markup: Mapped[Decimal] = mapped_column(ExactDecimal)


class PriceBookVersion(Timestamps, Base):
    """Counts the changes of the price book, so that a process that remembers it knows when to read it again."""

    __tablename__ = "price_book_versions"

    currency: Mapped[str] = mapped_column(String(3), primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger)
