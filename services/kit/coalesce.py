"""Concurrent calls of one kind become one piece of work: one query for many gets, one commit for many rows."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Generic, TypeVar

from services.kit.errors import Exhausted

T = TypeVar("T")
R = TypeVar("R")
Work = Callable[[list[T]], Awaitable[Sequence[R | Exception]]]
"""The answers to some items, in their order; an exception stands for a failed one."""
Fetch = Callable[[list[str]], Awaitable[Mapping[str, R]]]
"""The rows with these keys, by key; those that do not exist are left out."""

_MOST = 500
_LINGER_S, _LINGERS = 0.001, 6
_MANY, _FADING = 8, 0.99


class Room:
    """A bound on what waits in this process: whoever would go beyond it is sent away for a moment, before anything is lost or grows."""

    def __init__(self, most: int, what: str) -> None:
        self.most, self.what = most, what
        self.held = 0

    def enter(self, count: int) -> None:
        """Takes room for so many, until they ``leave``; Exhausted when there is none. Somebody alone is always let in."""
        if self.held and self.held + count > self.most:
            raise Exhausted(f"{self.held} {self.what} wait to be written, {self.most} may: send the same again", retry_after_s=0.5)
        self.held += count

    def leave(self, count: int) -> None:
        """Gives their room back."""
        self.held -= count

    @contextmanager
    def taken(self, count: int, tasks: Sequence[asyncio.Task[Any]]) -> Iterator[None]:
        """Holds room for so many while the block runs, and after it until those of its tasks have ended that are still under way then."""
        self.enter(count)
        try:
            yield
        finally:
            left = [task for task in tasks if not task.done()]
            if left:
                asyncio.gather(*left, return_exceptions=True).add_done_callback(lambda _: self.leave(count))
            else:
                self.leave(count)


class Coalescer(Generic[T, R]):
    """``await coalescer(item)``: the answer. A lone caller is served at once; those who come while work is under way share the next piece
    of it, which starts after they came: nobody is given what was read before he asked."""

    def __init__(self, work: Work[T, R], most: int = _MOST, flights: int = 2) -> None:
        """``most`` items share one piece of work, and so many pieces are under way at a time."""
        self._work, self._most, self._most_flights = work, most, flights
        self._waiting: dict[asyncio.Future[R], T] = {}
        self._flights: set[asyncio.Task[None]] = set()
        self._flying = 0
        self._asked = 0
        self._peak = 0.0

    async def __call__(self, item: T) -> R:
        """The answer; raises what the work raised."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting[future] = item
        if self._flying < self._most_flights:
            self._flying += 1
            flight = asyncio.create_task(self._fly())
            self._flights.add(flight)
            flight.add_done_callback(self._flights.discard)
        self._asked += 1
        self._peak = max(self._peak, self._asked)
        try:
            return await future
        finally:
            self._asked -= 1
            # Of whoever has left nothing stays: where work is slow, it would pile up unseen.
            self._waiting.pop(future, None)

    async def _fly(self) -> None:
        batch: dict[asyncio.Future[R], T] = {}
        try:
            while self._waiting:
                if self._asked > 1:
                    await self._linger()
                batch = dict(islice(self._waiting.items(), self._most))
                for future in batch:
                    del self._waiting[future]
                if batch:
                    await self._serve(batch)
        except asyncio.CancelledError:
            for future in batch:
                future.cancel()
            raise
        finally:
            # In the same step that found nobody waiting: who comes now must start a flight of his own.
            self._flying -= 1

    async def _linger(self) -> None:
        """While more keep coming, but not for long: gRPC hands calls over one at a time, and each would find nobody to share with."""
        self._peak *= _FADING
        for _ in range(_LINGERS):
            seen = self._asked
            # As many as ever lately: nobody is left to wait for. A few are no sign of that.
            if seen >= max(self._peak, _MANY):
                return
            await asyncio.sleep(_LINGER_S)
            if self._asked == seen:
                return

    async def _serve(self, batch: Mapping["asyncio.Future[R]", T]) -> None:
        try:
            answers = await self._work(list(batch.values()))
        except Exception as error:
            answers = [error] * len(batch)
        for future, answer in zip(batch, answers, strict=True):
            # Whose caller has left is done already.
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)


class Loader(Coalescer[str, R | None]):
    """Hot reads: ``await loader(key)`` is the row, or None. It knows no tenant: whoever gets a row checks whose it is (``Call.sees``)."""

    def __init__(self, fetch: Fetch[R]) -> None:
        async def load(keys: list[str]) -> list[R | None]:
            rows = await fetch(list(dict.fromkeys(keys)))
            return [rows.get(key) for key in keys]

        super().__init__(load)


class Batcher(Coalescer[T, R]):
    """Group commit: ``await batcher(row)`` returns after the commit that holds the row. A row that fails does so alone."""

    def __init__(self, write: Callable[[list[T]], Awaitable[Sequence[R | Exception]]], most: int = _MOST) -> None:
        async def apart(items: list[T]) -> list[R | Exception]:
            try:
                return list(await write(items))
            except Exception as error:
                if len(items) == 1:
                    return [error]
            half = len(items) // 2
            return [*await apart(items[:half]), *await apart(items[half:])]

        # While one commits, the next one fills: a second beside it would make both smaller, and a commit costs more than its rows.
        super().__init__(apart, most, flights=1)
