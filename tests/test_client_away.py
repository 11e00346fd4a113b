"""The client while the service is away, slow or overrun: every event is somewhere, and arrives once."""

import asyncio
import contextlib
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest

from clawplane_client import BufferFull, Closed, NotDelivered, Rejection, SpoolFull, UsageError, UsageRecorder
from tests.client_rig import QUICK, USE, Door, faulty, key_of, ledger, recorder, until
from tests.harness import Person, Stack, free_port

pytestmark = pytest.mark.any_engine
both = pytest.mark.parametrize("kind", ["sync", "aio"])
S = grpc.StatusCode


@both
@pytest.mark.parametrize("spools", [True, False])
async def test_away_and_back_on_the_same_port(stack: Stack, person: Person, kind: str, spools: bool, tmp_path: Path) -> None:
    spool = tmp_path if spools else None
    async with Door(stack.target) as door, recorder(kind, door.target, await key_of(stack, person), spool_dir=spool) as it:
        made = []
        for turn in range(3):
            made += [await it.record() for _ in range(20)]
            await door.shut()
            made += [await it.record() for _ in range(20)]
            await until(lambda turn=turn: it.stats.failures > turn)  # type: ignore[misc]
            if spools:
                await until(lambda: not it.stats.buffered)
            await door.open()
        assert await it.flush()
        assert it.stats.accepted == 120 == len(set(made)) and it.stats.rejected == 0
    assert await ledger(stack, person) == Counter(made)
    assert not list(tmp_path.glob("*.usage"))


@both
async def test_the_same_event_is_sent_again_whatever_the_service_says(kind: str, tmp_path: Path) -> None:
    async with faulty() as (service, target), recorder(kind, target, "token", spool_dir=tmp_path / "spool") as it:
        service.faults.extend(
            (code, 0.0) for code in (S.UNAVAILABLE, S.ABORTED, S.RESOURCE_EXHAUSTED, S.DEADLINE_EXCEEDED, S.INTERNAL, S.UNKNOWN)
        )
        made = [await it.record(metadata={"number": str(number)}) for number in range(5)]
        assert await it.flush()
        assert it.stats.failures == 6 and it.stats.accepted == 5
    assert service.stored == set(made)
    # Byte for byte: id and time were made once.
    assert {event_id: len(versions) for event_id, versions in service.raw.items()} == dict.fromkeys(made, 1)


@both
async def test_the_pause_that_the_service_asks_for_is_kept(kind: str) -> None:
    async with faulty() as (service, target), recorder(kind, target, "token") as it:
        service.faults.append((S.RESOURCE_EXHAUSTED, 0.6))
        await it.record()
        await until(lambda: service.calls)
        # Not even who is in a hurry comes back before.
        assert await it.flush()
        (first, _), (second, _) = service.calls
        assert 0.6 <= second - first < 2


@both
async def test_a_service_that_never_answers_is_given_up(kind: str) -> None:
    """A port that takes connections and says nothing."""

    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with recorder(kind, target, "token", call_timeout_s=0.2) as it:
        started = time.monotonic()
        for _ in range(10):
            await it.record()
        # Recording waits for nobody.
        assert time.monotonic() - started < 0.2
        await until(lambda: it.stats.failures)
        started = time.monotonic()
        with pytest.raises(NotDelivered):
            await it.close(0.3)
        assert time.monotonic() - started < 2
    server.close()


@both
async def test_the_buffer_is_bounded_and_says_so(kind: str) -> None:
    port = free_port()
    async with recorder(kind, f"127.0.0.1:{port}", "token", buffer_events=10, full_timeout_s=0.1) as it:
        made = [await it.record() for _ in range(10)]
        started = time.monotonic()
        with pytest.raises(BufferFull, match="10 usage events wait"):
            await it.record()
        assert 0.1 <= time.monotonic() - started < 1
        assert (it.stats.recorded, it.stats.buffered) == (10, 10)
        # What was taken is handed back at the end, all of it.
        with pytest.raises(NotDelivered) as lost:
            await it.close(0.1)
        assert [event.id for event in lost.value.events] == made
        with pytest.raises(Closed):
            await it.record()
        await it.close()


@both
async def test_whoever_waits_for_room_goes_on_when_there_is_some(stack: Stack, person: Person, kind: str) -> None:
    key = await key_of(stack, person)
    async with Door(stack.target) as door, recorder(kind, door.target, key, buffer_events=10, full_timeout_s=10) as it:
        await door.shut()
        made = [await it.record() for _ in range(10)]
        waiting = [asyncio.create_task(it.record()) for _ in range(15)]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in waiting)
        await door.open()
        made += await asyncio.gather(*waiting)
        assert await it.flush()
    assert await ledger(stack, person) == Counter(made)


@both
async def test_a_full_buffer_goes_to_the_spool_and_a_full_spool_is_told(kind: str, tmp_path: Path) -> None:
    port, errors = free_port(), list[UsageError]()
    options: dict[str, Any] = {"spool_dir": tmp_path, "buffer_events": 10, "full_timeout_s": 0.1, "spool_max_bytes": 8000}
    made = []
    async with recorder(kind, f"127.0.0.1:{port}", "token", flush_interval_s=60, on_error=errors.append, **options) as it:
        with pytest.raises(SpoolFull, match="8000 bytes"):
            for _ in range(1000):
                made.append(await it.record())
        assert 40 < len(made) < 100 and it.stats.spooled + it.stats.buffered == len(made)
        await until(lambda: errors)
        with pytest.raises(NotDelivered) as lost:
            await it.close(0.1)
        assert it.stats.spooled + len(lost.value.events) == len(made)
    async with faulty() as (service, target), recorder(kind, target, "token", **options) as later:
        assert await later.flush()
        assert service.stored | {event.id for event in lost.value.events} == set(made)
        assert not any("1000" in str(error) for error in errors) and {type(error) for error in errors} == {SpoolFull}


@both
async def test_what_one_program_leaves_another_sends(stack: Stack, person: Person, kind: str, tmp_path: Path) -> None:
    made = []
    for _ in range(3):
        async with recorder(kind, f"127.0.0.1:{free_port()}", "token", spool_dir=tmp_path) as it:
            made += [await it.record() for _ in range(30)]
            await it.close()
            assert it.stats.spooled == 30
    key = await key_of(stack, person)
    # Several at once, and with events of their own: each file has one who sends it.
    async with recorder(kind, stack.target, key, spool_dir=tmp_path) as one, recorder(kind, stack.target, key, spool_dir=tmp_path) as two:
        made += [await it.record() for it in (one, two) for _ in range(10)]
        assert await one.flush() and await two.flush()
        assert one.stats.accepted + two.stats.accepted == 110 and one.stats.duplicates == two.stats.duplicates == 0
    assert await ledger(stack, person) == Counter(made)


@both
@pytest.mark.parametrize("spools", [True, False])
async def test_a_flush_outlives_a_failure(kind: str, spools: bool, tmp_path: Path) -> None:
    """However long events may wait for others: what was tried already does not wait again."""
    spool = tmp_path if spools else None
    async with faulty() as (service, target), recorder(kind, target, "token", spool_dir=spool, flush_interval_s=60) as it:
        service.faults.extend([(S.UNAVAILABLE, 0.0), (S.ABORTED, 0.0)])
        await it.record()
        assert await it.flush(5) and it.stats.accepted == 1


async def test_whoever_records_while_it_closes_knows_what_became_of_it(tmp_path: Path) -> None:
    for spool in (None, tmp_path):
        async with faulty() as (service, target):
            made, it = list[str](), UsageRecorder(target, "token", **QUICK, spool_dir=spool, flush_events=20)

            def record(it: UsageRecorder = it, made: list[str] = made) -> None:
                with contextlib.suppress(Closed):
                    while True:
                        made.append(it.record(**USE))

            threads = [asyncio.create_task(asyncio.to_thread(record)) for _ in range(4)]
            await until(lambda made=made: len(made) > 200)  # type: ignore[misc]
            lost: list[str] = []
            try:
                await asyncio.to_thread(it.close, 0.02)
            except NotDelivered as error:
                lost = [event.id for event in error.events]
            await asyncio.gather(*threads)
            assert it.stats.recorded == len(made)
            async with recorder("aio", target, "token", spool_dir=spool) as later:
                assert await later.flush()
            assert service.stored | set(lost) == set(made)


async def test_a_message_that_is_too_long_is_sent_in_parts() -> None:
    told: list[Rejection] = []
    async with faulty(max_bytes=2000) as (service, target), recorder("aio", target, "token", on_rejected=told.append) as it:
        made = [await it.record(metadata={"text": "x" * (100 if number else 5000)}) for number in range(6)]
        assert await it.flush()
        assert service.stored == set(made[1:]) and [one.event.id for one in told] == made[:1]


@both
async def test_the_end_does_not_wait_for_a_pause(kind: str, tmp_path: Path) -> None:
    """Closing tries once more at once, and what then is left goes to the spool without delay."""
    async with recorder(kind, f"127.0.0.1:{free_port()}", "token", spool_dir=tmp_path, backoff_s=60, backoff_max_s=60) as it:
        await it.record()
        await until(lambda: it.stats.failures)
        await it.record()
        started = time.monotonic()
        await it.close()
        assert time.monotonic() - started < 2 and it.stats.spooled == 2 and it.stats.buffered == 0
