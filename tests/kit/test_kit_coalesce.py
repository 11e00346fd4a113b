"""Concurrent calls share work, nobody waits for ever, and nobody gets what was read before he asked."""

import asyncio
from collections.abc import Mapping

import pytest

from services.kit.coalesce import Batcher, Loader, Room
from services.kit.errors import Exhausted


class Table:
    """Rows that count how often they are asked for."""

    def __init__(self) -> None:
        self.rows = {f"k{number}": number for number in range(100)}
        self.queries: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def fetch(self, keys: list[str]) -> Mapping[str, int]:
        """One query: what is there when it starts."""
        self.queries.append(keys)
        found = {key: self.rows[key] for key in keys if key in self.rows}
        await self.gate.wait()
        return found


async def under_way(table: Table, load: Loader[int]) -> asyncio.Task[int | None]:
    """A get whose query has begun, and ends when the gate opens."""
    table.gate.clear()
    get = asyncio.create_task(load("k1"))
    while not table.queries:
        await asyncio.sleep(0)
    return get


async def test_many_gets_are_few_queries_and_one_is_one() -> None:
    table = Table()
    load: Loader[int] = Loader(table.fetch)
    assert await load("k7") == 7 and await load("none") is None and len(table.queries) == 2
    table.queries.clear()
    asked = [f"k{number % 120}" for number in range(240)]
    assert await asyncio.gather(*(load(key) for key in asked)) == [table.rows.get(key) for key in asked]
    assert len(table.queries) <= 3 and all(len(keys) == len(set(keys)) for keys in table.queries)


async def test_nobody_gets_what_was_read_before_he_asked() -> None:
    table = Table()
    load: Loader[int] = Loader(table.fetch)
    early = await under_way(table, load)
    table.rows["k1"] = 1000
    late = asyncio.create_task(load("k1"))
    await asyncio.sleep(0.02)
    table.gate.set()
    assert (await early, await late) == (1, 1000)


async def test_what_hangs_holds_up_nobody_who_comes_later() -> None:
    table = Table()
    load: Loader[int] = Loader(table.fetch)
    hangs = await under_way(table, load)
    closed, table.gate = table.gate, asyncio.Event()
    table.gate.set()
    async with asyncio.timeout(5):
        assert await load("k2") == 2 and not hangs.done()
    closed.set()
    assert await hangs == 1


async def test_of_whoever_leaves_nothing_waits() -> None:
    """A table that is stuck while callers come and give up: what waits must not grow."""
    table = Table()
    load: Loader[int] = Loader(table.fetch)
    table.gate.clear()
    async with asyncio.timeout(10):
        for number in range(50):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await load(f"k{number}")
    assert not load._waiting
    table.gate.set()
    assert await load("k7") == 7


async def test_room_is_held_until_the_work_has_ended() -> None:
    room, gate, tasks = Room(10, "rows"), asyncio.Event(), list[asyncio.Task[object]]()

    async def caller() -> None:
        with room.taken(8, tasks):
            tasks.extend(asyncio.create_task(gate.wait()) for _ in range(3))
            await asyncio.wait(tasks)

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(caller(), 0.02)
    assert room.held == 8
    with pytest.raises(Exhausted), room.taken(3, ()):
        pass
    gate.set()
    await asyncio.sleep(0.01)
    assert room.held == 0


async def test_nobody_waits_for_ever() -> None:
    """Callers who come in the very step in which the last query ended."""
    table = Table()
    load: Loader[int] = Loader(table.fetch)

    async def caller(start: int) -> None:
        for number in range(200):
            assert await load(f"k{(start + number) % 100}") == (start + number) % 100

    async with asyncio.timeout(20):
        await asyncio.gather(*(caller(start) for start in range(32)))
    assert len(table.queries) < 32 * 200 / 4


async def test_who_leaves_disturbs_nobody_and_an_error_reaches_all() -> None:
    table = Table()
    load: Loader[int] = Loader(table.fetch)
    table.gate.clear()
    callers = [asyncio.create_task(load(f"k{number}")) for number in range(3)]
    await asyncio.sleep(0.02)
    callers[1].cancel()
    table.gate.set()
    assert await asyncio.gather(callers[0], callers[2]) == [0, 2]

    async def broken(keys: list[str]) -> Mapping[str, int]:
        raise ConnectionError("gone")

    failing: Loader[int] = Loader(broken)
    assert [type(error) for error in await asyncio.gather(failing("a"), failing("b"), return_exceptions=True)] == [ConnectionError] * 2


async def test_a_poison_row_fails_alone() -> None:
    commits: list[list[int]] = []

    async def write(rows: list[int]) -> list[int]:
        if 13 in rows:
            raise ValueError("13")
        commits.append(rows)
        return [row * 2 for row in rows]

    batcher: Batcher[int, int] = Batcher(write)
    answers = await asyncio.gather(*(batcher(row) for row in range(40)), return_exceptions=True)
    assert [answer for row, answer in enumerate(answers) if row != 13] == [row * 2 for row in range(40) if row != 13]
    assert isinstance(answers[13], ValueError)
    assert sorted(row for rows in commits for row in rows) == [row for row in range(40) if row != 13]
    with pytest.raises(ValueError, match="13"):
        await batcher(13)
