"""The ledger: the one way in for usage, whoever reports it. Many events become one commit, and none is stored at an old price."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from services.deployment_svc.prices.book import PriceBook
from services.deployment_svc.prices.repository import Prices
from services.deployment_svc.usage import repository
from services.deployment_svc.usage.repository import StaleBook
from services.deployment_svc.usage.rows import Row
from services.kit.coalesce import Batcher, Room
from services.kit.db import ALL, Database
from services.kit.errors import Unavailable

T = TypeVar("T")
Unit = Callable[[Callable[[AsyncSession], Awaitable[Any]]], Awaitable[Any]]
"""Runs some work as one transaction."""
Priced = tuple[Row, PriceBook]
"""A row, and the book that it was priced by."""
_TRIES = 10
CHUNK = 2500
"""Events of one statement; more do not make it faster, and others wait for its commit."""


class Ledger:
    """Writes usage in one process."""

    def __init__(self, db: Database, prices: Prices, most_waiting: int, *, batched: bool = True) -> None:
        """``most_waiting``: events that may wait to be written; whoever brings more is sent away for a moment. ``batched``: whether single
        events share commits."""
        self.db, self.prices = db, prices
        self.room = Room(most_waiting, "usage events")
        self._one: Callable[[Priced], Awaitable[bool]] = Batcher(self._write) if batched else self._alone
        self.touched: set[str] = set()
        """Organizations whose counters this process has moved, until the loop that watches limits takes them."""

    @property
    def book(self) -> PriceBook:
        """The prices as this process remembers them."""
        return self.prices.book

    async def run(self, work: Callable[[AsyncSession, PriceBook], Awaitable[T]], unit: Unit | None = None) -> T:
        """A unit of work that goes by the prices; repeated at the new ones when they change. ``unit``: a call's own, if it is one's."""
        run = unit or (lambda one: self.db.run(one, ALL))
        return await self._priced(lambda book: run(lambda session: work(session, book)))

    async def _priced(self, work: Callable[[PriceBook], Awaitable[T]]) -> T:
        for _ in range(_TRIES):
            try:
                return await work(self.prices.book)
            except StaleBook:
                await self.prices.reload()
        raise Unavailable("prices change too fast", 1)

    async def record(self, row: Row, book: PriceBook) -> bool:
        """Stores one event, priced by a book, in a commit with others; whether it was new. Returns only after the commit."""
        self.room.enter(1)
        try:
            return await self._one((row, book))
        finally:
            self.room.leave(1)

    async def store(self, rows: Sequence[Row], book: PriceBook) -> set[repository.Key]:
        """Stores events of which no two have the same key, in a commit of their own: the keys of the new ones. Up to CHUNK go well."""
        return await self._commit([(row, book) for row in rows]) if rows else set()

    async def _commit(self, items: Sequence[Priced]) -> set[repository.Key]:
        async def work(book: PriceBook) -> set[repository.Key]:
            # By a book that another has taken the place of since, while the event waited.
            rows = [row if priced.version == book.version else row.priced(book) for row, priced in items]
            return await repository.commit(self.db, rows, book)

        stored = await self._priced(work)
        self.touched.update(row.org_id for row, _ in items)
        return stored

    async def _alone(self, item: Priced) -> bool:
        return bool(await self._commit([item]))

    async def _write(self, items: list[Priced]) -> list[bool]:
        """Events of any organizations in one commit: which of them are new."""
        stored = await self._commit(items)
        new = []
        for row, _ in items:
            new.append(row.key in stored)
            # The same event twice in one commit: one of them was first.
            stored.discard(row.key)
        return new
