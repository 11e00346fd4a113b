"""The client's files: whatever is done to them, never an event that was not written, and never one that is dropped unseen."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clawplane.deployment.v1.usage_event_pb2 import UsageEvent
from clawplane.deployment.v1.usage_service_pb2 import BatchRecordUsageResponse
from clawplane_client.errors import SpoolDamaged, SpoolFailed, SpoolFull, UsageError
from clawplane_client.events import make_event
from clawplane_client.frames import MAX_EVENT_BYTES, frame, scan
from clawplane_client.outbox import Limits, Outbox
from clawplane_client.patience import Patience
from clawplane_client.spool import SEGMENT_BYTES, Spool

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
EVENTS = st.lists(
    st.builds(
        lambda number, texts: make_event({"provider": "p", "model": "m", "tokens_in": number, "metadata": texts})[1],
        st.integers(0, 2**62), st.dictionaries(TEXT, TEXT, max_size=3),
    ), max_size=6,
)  # fmt: skip
DAMAGE = st.lists(
    st.tuples(st.sampled_from(["cut", "flip", "drop", "put", "zero", "twice"]), st.floats(0, 1), st.binary(max_size=12)), max_size=4
)


def event(number: int = 0, **more: Any) -> bytes:
    """A serialized event."""
    return make_event({"provider": "p", "model": "m", "tokens_in": number, **more})[1]


def harm(data: bytes, damage: list[tuple[str, float, bytes]]) -> bytes:
    """The bytes after what may happen to a file."""
    for how, where, other in damage:
        at = int(where * len(data))
        changed = {
            "cut": data[:at], "flip": data[:at] + bytes(byte ^ 0x10 for byte in data[at : at + 1]) + data[at + 1 :],
            "drop": data[:at] + data[at + len(other) :], "put": data[:at] + other + data[at:],
            "zero": data[:at] + bytes(len(data) - at), "twice": data + data[at:],
        }  # fmt: skip
        data = changed[how]
    return data


@settings(max_examples=150, deadline=None)
@given(EVENTS, DAMAGE)
@example([event(1), event(2)], [("zero", 0.6, b"")])
@example([event(1)], [("put", 1.0, bytes(24))])
@example([event(1), event(2)], [("put", 0.0, b"\xff\x00\xc1\x01\xff\xff\xff\xff")])
def test_harmed_bytes_yield_only_what_was_written(events: list[bytes], damage: list[tuple[str, float, bytes]]) -> None:
    whole = frame(events)
    harmed = harm(whole, damage)
    found = scan(harmed)
    assert set(found.events) <= set(events)
    if harmed == whole:
        assert found.events == events and not found.torn and not found.damaged


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
@example(bytes(64))
@example(b"\xff\x00\xc1\x01" + bytes(8))
def test_any_bytes_are_no_events(data: bytes) -> None:
    assert scan(data).events == []


@settings(max_examples=60, deadline=None)
@given(EVENTS.filter(bool), st.floats(0, 1))
def test_a_torn_end_costs_the_last_event_alone(events: list[bytes], where: float) -> None:
    before = frame(events[:-1])
    data = frame(events)
    data = data[: len(before) + int(where * (len(data) - len(before) - 1))]
    found = scan(data)
    assert found.events == events[:-1] and not found.damaged and found.torn == (len(data) > len(before))


def test_what_follows_damage_is_found_again() -> None:
    events = [event(number, metadata={"text": "ÿ" * 9}) for number in range(1, 30)]
    data = bytearray(frame(events))
    at = len(frame(events[:10])) + 20
    data[at] ^= 1
    found = scan(bytes(data))
    assert found.events == events[:10] + events[11:] and found.damaged


def drained(spool: Spool) -> list[bytes]:
    """All that can be taken out of a spool, oldest first."""
    found = []
    while leftover := spool.oldest():
        found += leftover.events
        spool.done(leftover)
    return found


def test_oldest_first_and_gone_only_when_done(tmp_path: Path) -> None:
    writer = Spool(tmp_path, 10**9)
    events = [event(number) for number in range(12)]
    for number in range(0, 12, 2):
        writer.append(events[number : number + 2])
        if number % 4:
            writer.seal()
    reader = Spool(tmp_path, 10**9)
    first = reader.oldest()
    assert first is not None and first.events == events[:4]
    # Not done: the next in line finds it again.
    reader.release(first)
    assert drained(Spool(tmp_path, 10**9)) == events
    assert not list(tmp_path.glob("*.usage"))


def test_folder_and_files_are_the_owners_alone(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a" / "spool", 10**9)
    spool.append([event()])
    for path in (spool.folder, *spool.folder.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_one_drains_at_a_time_and_nobody_takes_a_file_that_is_written(tmp_path: Path) -> None:
    writer, one, two = (Spool(tmp_path, 10**9) for _ in range(3))
    first = event(1)
    writer.append([first])
    assert one.oldest() is None and not one.busy
    writer.seal()
    writer.append([event(2)])
    leftover = one.oldest()
    assert leftover is not None and leftover.events == [first]
    assert two.oldest() is None and two.busy
    one.done(leftover)
    assert one.oldest() is None
    assert two.oldest() is None and not two.busy
    writer.append([event(3)])
    writer.seal()
    assert len(drained(two)) == 2


def test_a_file_taken_away_between_making_and_locking_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool, thief = Spool(tmp_path, 10**9), Spool(tmp_path, 10**9)
    real, stolen = os.open, list[Path]()

    def steal(path: Any, flags: int, *more: Any) -> int:
        opened = real(path, flags, *more)
        if flags & os.O_EXCL and not stolen:
            stolen.append(path)
            assert thief.oldest() is None
        return opened

    monkeypatch.setattr(os, "open", steal)
    spool.append([event(7)])
    spool.seal()
    assert stolen and not stolen[0].exists()
    assert len(drained(thief)) == 1


def test_a_cleared_folder_takes_new_events(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", 10**9)
    spool.append([event(1)])
    for path in spool.folder.iterdir():
        path.unlink()
    spool.folder.rmdir()
    spool.append([event(2)])
    assert len(drained(spool)) == 1


def test_full_is_told_and_holds_what_it_has(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1000)
    taken = 0
    with pytest.raises(SpoolFull, match="1000 bytes"):
        for taken in range(100):
            spool.append([event(taken)])
    assert 5 < taken < 100 and spool.size_bytes() <= 1000
    assert len(drained(spool)) == taken
    spool.append([event()])


def test_a_disk_that_refuses_keeps_nothing_of_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path, 10**9)
    spool.append([event(1)])
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, bytes(data)[:70]) if len(data) > 70 else fail())

    def fail() -> int:
        raise OSError(28, "No space left on device")

    with pytest.raises(SpoolFailed, match="No space left"):
        spool.append([event(2), event(3)])
    monkeypatch.undo()
    spool.append([event(4)])
    assert len(drained(spool)) == 2


def test_long_files_are_followed_by_the_next(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 10**9)
    long = event(metadata={"text": "x" * (MAX_EVENT_BYTES - 1000)})
    for _ in range(3 * SEGMENT_BYTES // len(long)):
        spool.append([long])
    sizes = [path.stat().st_size for path in tmp_path.glob("*.usage")]
    assert 3 <= len(sizes) <= 5 and max(sizes) <= SEGMENT_BYTES


def test_a_damaged_file_is_sent_as_far_as_it_is_whole_and_kept_beside(tmp_path: Path) -> None:
    spool, told = Spool(tmp_path, 10**9), list[UsageError]()
    spool.tell = told.append
    spool.append([event(number) for number in range(5)])
    spool.seal()
    path = next(tmp_path.glob("*.usage"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    assert len(drained(spool)) == 4
    assert [type(error) for error in told] == [SpoolDamaged]
    assert not path.exists() and path.with_suffix(".damaged").read_bytes() == data


def test_what_is_new_does_not_wait_for_the_whole_backlog(tmp_path: Path) -> None:
    """Else it would be in memory alone, and lost with the program, for as long as a backlog drains."""
    spool = Spool(tmp_path, 10**9)
    for number in range(3):
        spool.append([UsageEvent(id=f"left-{number}").SerializeToString()])
        spool.seal()
    spool.release()
    outbox = Outbox(Limits(1, 0, 100, 100), Patience(1, 1, 1), Spool(tmp_path, 10**9))
    sent = []
    for number in range(6):
        if number % 2 == 0:
            outbox.add(UsageEvent(id=f"new-{number}").SerializeToString())
        batch = outbox.next()
        assert batch is not None
        sent.append(UsageEvent.FromString(batch[0]).id)
        outbox.answered(BatchRecordUsageResponse(accepted=1))
    assert sent == ["new-0", "left-0", "new-2", "left-1", "new-4", "left-2"] and outbox.next() is None and outbox.idle
