"""What an empty price book is filled with."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from services.deployment_svc.prices import price_file, rules
from services.deployment_svc.prices.models import Price
from services.deployment_svc.prices.price_file import PriceFileError
from services.deployment_svc.prices.repository import Prices, changed, load
from services.kit.db import ALL

_BUNDLED = Path(__file__).with_name("prices.yaml")
FROM_THE_START = datetime(2000, 1, 1, tzinfo=UTC)
"""From when the first prices count, unless the file says otherwise: they are of events of any time."""


async def fill(prices: Prices, path: str = "") -> None:
    """Fills a book that has never held a price from a file, and reads it in any case; ValueError for a file that cannot be taken."""
    currency = prices.book.currency
    async with prices.db.read(ALL) as session:
        first = await _is_empty(session)
    new = await asyncio.to_thread(_prices_of, Path(path or _BUNDLED), currency) if first else []
    async with prices.db.transaction(ALL) as session:
        if new:
            await changed(session, currency)
            # Of processes that start together, one does it.
            if await _is_empty(session):
                session.add_all(new)
                await session.flush()
        prices.book = await load(session, currency)


async def _is_empty(session: AsyncSession) -> bool:
    return await session.scalar(select(Price.id).limit(1)) is None


def _prices_of(file: Path, currency: str) -> list[Price]:
    try:
        return rules.plan(price_file.read(file.read_text(encoding="utf-8")), (), currency, FROM_THE_START).new
    except (PriceFileError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the price file {file} cannot be taken: {error}") from None
