"""Reads and writes of the price book."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import BigInteger, ColumnElement, Subquery, and_, cast, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from services.deployment_svc.prices.book import Line, PriceBook, charged
from services.deployment_svc.prices.models import Price, PriceBookVersion
from services.deployment_svc.prices.rules import Key
from services.deployment_svc.usage.models import UsageRollup
from services.kit.columns import now
from services.kit.db import ALL, Database, alone, insert_for

RULES = "rules of the ledger"
"""Usage is written together under this name, prices and quotas are changed alone: whoever has changed one knows that what is written from
then on goes by it, and that everything before is there to be seen."""


class Prices:
    """The price book as this process remembers it. Whoever writes usage says by which version it was priced (usage/repository.py), so
    that no event is stored at a price that no longer counts."""

    def __init__(self, db: Database, currency: str) -> None:
        self.db = db
        self.book = PriceBook(currency)

    async def reload(self) -> None:
        """Reads the book anew; one consistent version of it."""
        async with self.db.transaction(ALL) as session:
            self.book = await load(session, self.book.currency)


async def load(session: AsyncSession, currency: str) -> PriceBook:
    """The book. Its version is read first and again after: another one in between means that both are read again."""
    while True:
        version = await version_of(session, currency)
        rows = (await session.scalars(select(Price).where(Price.currency == currency))).all()
        if await version_of(session, currency) == version:
            return PriceBook.of(currency, version, [line_of(row) for row in rows])


async def version_of(session: AsyncSession, currency: str) -> int:
    """Which version of the book is in force; holds until the end of a transaction that is ``together`` under RULES, or ``alone``."""
    return await session.scalar(select(PriceBookVersion.version).where(PriceBookVersion.currency == currency)) or 0


async def changed(session: AsyncSession, currency: str) -> None:
    """Must be called first in each transaction that changes a price: until it ends no usage is written."""
    await alone(session, RULES)
    at = now()
    known = await session.execute(
        update(PriceBookVersion).where(PriceBookVersion.currency == currency).values(version=PriceBookVersion.version + 1, updated_at=at)
    )
    if not known.rowcount:  # type: ignore[attr-defined]
        first = insert_for(session)(PriceBookVersion).values(currency=currency, version=1, created_at=at, updated_at=at)
        await session.execute(
            first.on_conflict_do_update(index_elements=["currency"], set_={"version": PriceBookVersion.version + 1, "updated_at": at})
        )


async def of_key(session: AsyncSession, key: Key) -> Sequence[Price]:
    """The prices that follow each other for the same models and context length."""
    provider, model, above = key
    same = (Price.provider == provider, Price.model == model, Price.above_tokens_in == above)
    return (await session.scalars(select(Price).where(*same))).all()


def counting_at(at: datetime) -> ColumnElement[bool]:
    """What holds for the prices that count at a time."""
    return and_(Price.effective_from <= at, or_(Price.effective_to.is_(None), Price.effective_to > at))


def unpriced(since: datetime) -> Subquery:
    """The models that were used without a price since then, with how many events and tokens."""
    events, tokens = (cast(func.sum(column), BigInteger) for column in (UsageRollup.unpriced_events, UsageRollup.tokens_total))
    return (
        select(
            UsageRollup.dim_1.label("provider"), UsageRollup.dim_2.label("model"), events.label("events"), tokens.label("tokens_total")
        )
        .where(UsageRollup.kind == "model", UsageRollup.unpriced_events > 0, UsageRollup.starts_at >= since)
        .group_by(UsageRollup.dim_1, UsageRollup.dim_2)
        .subquery()
    )  # fmt: skip


def line_of(row: Price) -> Line:
    """A row as the book keeps it."""
    kinds = (row.tokens_in, row.tokens_out, row.tokens_cached, row.tokens_reasoning)
    amounts = [charged(price, row.markup) for price in kinds]
    return Line(row.id, row.provider, row.model, row.above_tokens_in, row.effective_from, row.effective_to, *amounts)
