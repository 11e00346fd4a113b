"""The ring: what is on it, the file that it lives in, what processes that follow it do, and what is declared to be under it."""

import asyncio
import base64
import importlib
import json
import os
import stat
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from services.kit import holders, keys, secrets, vault
from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.holders import Holder
from services.kit.keyring import CURRENT, NEXT, OLD, Ring, RingFile, RingKey
from services.kit.sealed import Sealed
from services.kit.secrets import SecretBox, SecretError
from services.kit.settings import KitSettings
from tests.conftest import Databases
from tests.kit.echo import Base
from tests.test_migrations import metadata_of

HMAC_KEY = b"h" * 32
GOOD = base64.b64encode(b"1" * 32).decode()


class Canary(vault.CanaryRow, Base):
    """Of the ring's tests."""

    __tablename__ = "ring_canaries"


class KeyHolder(holders.KeyHolderRow, Base):
    """Of the ring's tests."""

    __tablename__ = "ring_holders"


def ring(*ids: str, current: str = "") -> Ring:
    """Keys of these names."""
    return Ring.of({id_: id_.encode().ljust(32, b".") for id_ in ids}, current or ids[-1])


def box(*ids: str, current: str = "", **more: Any) -> SecretBox:
    """A box with keys of these names."""
    return SecretBox(ring(*ids, current=current), {"": HMAC_KEY}, **more)


@pytest.fixture
async def fresh(databases: Databases) -> Any:
    """A database that nobody has joined."""
    db = Database(databases.make()["user_svc"], KitSettings(), "ring_test")
    async with db.writing.begin() as connection:
        await connection.run_sync(lambda c: Base.metadata.create_all(c, [Canary.__table__, KeyHolder.__table__]))
    yield db
    await db.close()


def holder(db: Database, of: SecretBox) -> Holder:
    """A process with a box."""
    return Holder(db, of, KeyHolder, Canary)


def test_a_rotation_in_three_moves() -> None:
    first = ring("a")
    begun = first.with_next()
    assert [key.state for key in begun.keys] == [CURRENT, NEXT] and begun.rotating and begun.current.id == "a"
    assert begun.with_next() is begun and first.switched() is first
    switched = begun.switched()
    assert [key.state for key in switched.keys] == [OLD, CURRENT] and switched.with_next() is switched
    assert [key.version for key in switched.keys] == [1, 2] and switched.without_old().ids == [begun.ids[1]]
    assert replace(switched.without_old(), rotating=False).with_next().keys[-1].version == 3


@pytest.mark.parametrize(
    ("keys_", "words"),
    [
        ([], "exactly one current"), ([("a", 1, OLD)], "exactly one current"), ([("a", 1, CURRENT), ("b", 2, CURRENT)], "exactly one current"),
        ([("a", 1, CURRENT), ("a", 2, OLD)], "must differ"), ([("a", 2, CURRENT), ("b", 1, OLD)], "must grow"), ([("a.b", 1, CURRENT)], "no dot"),
        ([("hmac:", 1, CURRENT)], "no colon"), ([("", 1, CURRENT)], "must be made of"), ([("a", 1, "new"), ("b", 2, CURRENT)], "known state"),
        ([("a", 1, CURRENT), ("b", 2, NEXT), ("c", 3, NEXT)], "at most one next"),
    ],
)  # fmt: skip
def test_a_ring_that_cannot_be_used_is_refused(keys_: list[tuple[str, int, str]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Ring(tuple(RingKey(id_, version, state, "", b"1" * 32) for id_, version, state in keys_))
    with pytest.raises(ValueError, match="32 bytes"):
        Ring((RingKey("a", 1, CURRENT, "", b"short"),))
    with pytest.raises(ValueError, match="below the required version 2"):
        replace(ring("a"), minimum_version=2)


def test_the_file_is_whole_private_and_made_once(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "ring.json"
    made: list[Ring] = []
    threads = [threading.Thread(target=lambda: made.append(RingFile(path).load_or_make(lambda: ring("a").with_next()))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({tuple(one.ids) for one in made}) == 1 and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert RingFile(path, private=True).load() == made[0] and "a" * 8 not in repr(made[0])
    # What readers see is always a ring, whoever writes.
    stop = threading.Event()
    seen: list[Ring] = []

    def read() -> None:
        while not stop.is_set():
            seen.append(RingFile(path).load())

    reader = threading.Thread(target=read)
    reader.start()
    writers = [
        threading.Thread(target=lambda: RingFile(path).change(lambda old: replace(old.switched().with_next(), rotating=False))) for _ in range(16)
    ]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert seen and RingFile(path).load().keys[-1].version == 17
    assert sorted(os.listdir(path.parent)) == ["ring.json", "ring.json.lock"]


def test_production_refuses_a_file_that_others_may_read(tmp_path: Path) -> None:
    path = tmp_path / "ring.json"
    RingFile(path).load_or_make(lambda: ring("a"))
    for mode, fine in ((0o600, True), (0o400, True), (0o640, True), (0o644, False), (0o660, False), (0o602, False)):
        path.chmod(mode)
        given_ = {"key_ring": path, "hmac_key": GOOD}
        assert vault.open_box(KitSettings(**given_)).current == "a"  # type: ignore[arg-type]
        strict = KitSettings(environment="production", **given_)  # type: ignore[arg-type]
        if fine:
            assert vault.open_box(strict).current == "a"
        else:
            with pytest.raises(ValueError, match=f"chmod 600 {path}"):
                vault.open_box(strict)
    path.chmod(0o640)
    RingFile(path).change(Ring.with_next)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["keys", "minimum_version", "rotating", "id"]), inner, max_size=4),
)
KEY = st.fixed_dictionaries({
    "id": st.text(max_size=3) | JSON, "version": st.integers(-1, 3) | JSON, "state": st.sampled_from([CURRENT, NEXT, OLD]) | JSON,
    "made_at": st.just(""), "key": st.sampled_from([GOOD, GOOD[:-4], "💥"]) | JSON,
})  # fmt: skip
FILE = st.fixed_dictionaries({"keys": st.lists(KEY, max_size=3) | JSON, "minimum_version": st.integers(-1, 3) | JSON, "rotating": JSON})


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=40) | (JSON | FILE).map(lambda one: json.dumps(one).encode()))
def test_whatever_is_in_the_file_there_is_one_error(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / f"ring-{os.getpid()}.json"
    path.write_bytes(raw)
    try:
        assert RingFile(path).load().current.key
    except ValueError as error:
        assert str(path) in str(error) and GOOD not in str(error)


def test_a_box_follows_its_file(tmp_path: Path) -> None:
    file = RingFile(tmp_path / "ring.json")
    file.load_or_make(lambda: ring("a"))
    follower, other = (SecretBox(file.load(), {"": HMAC_KEY}, file=file) for _ in range(2))
    sealed = follower.seal("x", "place")
    new = file.change(Ring.with_next).ids[1]
    assert secrets.key_id_of(follower.seal("x", "place")) == "a"
    file.change(Ring.switched)
    # At once, with nobody telling it; and what the other one has sealed opens.
    fresh = follower.seal("y", "place")
    assert secrets.key_id_of(fresh) == new and other.open(fresh, "place") == "y"
    assert list(follower.blinds("wish", "x")) == [new, "a", ""]
    for broken in (b"", b"{}", b"PLANTED"):
        file.path.write_bytes(broken)
        assert follower.open(follower.seal("z", "place"), "place") == "z"
    file.path.unlink()
    assert follower.open(sealed, "place") == "x"


def test_a_forgotten_key_still_opens_what_was_read_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RingFile(tmp_path / "ring.json")
    file.load_or_make(lambda: ring("a"))
    follower = SecretBox(file.load(), {"": HMAC_KEY}, file=file)
    sealed = follower.seal("x", "place")
    file.change(lambda old: old.with_next().switched().without_old())
    follower.refresh()
    assert follower.open(sealed, "place") == "x" and "a" not in follower.ring.ids and "a" not in follower.blinds("wish", "x")
    monkeypatch.setattr(secrets, "_LINGER_S", 0.0)
    late = SecretBox(ring("a"), {"": HMAC_KEY}, file=file)
    late._stamp = None
    late.refresh()
    with pytest.raises(SecretError, match="no key with the id 'a'"):
        late.open(sealed, "place")


def test_blind_indexes_have_a_key_id_and_a_key_of_their_own() -> None:
    one, other = box("a", "b"), box("b", "a")
    mine, theirs = one.blinds("wish", "ab", "c"), other.blinds("wish", "ab", "c")
    assert mine == theirs and list(mine) == ["b", "a", ""] and list(theirs) == ["a", "b", ""]
    assert mine[""] == one.digest("wish", "ab", "c") and len({*mine.values(), *one.blinds("wish", "a", "bc").values()}) == 6
    assert mine["a"] == one.blind("wish", "ab", "c", key_id="a")
    with pytest.raises(SecretError, match="'z'"):
        one.blind("wish", "ab", key_id="z")


def test_hashes_stay_under_the_key_that_they_were_made_with() -> None:
    old = box("a")
    new = SecretBox(ring("a"), {"": HMAC_KEY, "h2": b"i" * 32}, "h2")
    key = keys.mint("claw", "live", "ckey")
    stored = key.digest(old)
    assert key.matches(new, stored, "") and not key.matches(new, stored) and key.matches(new, key.digest(new), "h2")
    assert new.digest("x") == new.digest("x", key_id="h2") != new.digest("x", key_id="") == old.digest("x")
    assert not key.matches(new, stored, "h3") and not new.knows_hmac_key("h3")
    with pytest.raises(SecretError, match="'h3'.*CLAWPLANE_HMAC_KEYS"):
        new.digest("x", key_id="h3")


def test_a_key_as_the_seeds_have_it() -> None:
    digits = os.urandom(32).hex()
    one = vault.open_box(KitSettings(encryption_key=digits, hmac_key=GOOD))  # type: ignore[arg-type]
    same = base64.b64encode(bytes.fromhex(digits)).decode()
    other = vault.open_box(KitSettings(encryption_keys={"k1": same}, encryption_key_id="k1", hmac_key=GOOD.encode().hex()[:64]))  # type: ignore[arg-type, dict-item]
    assert one.ring.ids == ["k1"] and other.open(one.seal("x", "place"), "place") == "x"
    for bad in (digits[:-1], digits + "0", digits[:-1] + "g", digits[:62]):
        with pytest.raises(ValueError, match="CLAWPLANE_ENCRYPTION_KEY must be") as failure:
            vault.open_box(KitSettings(encryption_key=bad, hmac_key=GOOD))  # type: ignore[arg-type]
        assert bad not in str(failure.value)
    with pytest.raises(ValueError, match="leave it out"):
        vault.open_box(KitSettings(encryption_key=digits, encryption_keys={"k1": same}, hmac_key=GOOD))  # type: ignore[arg-type, dict-item]
    with pytest.raises(ValueError, match="must not be among them"):
        vault.open_box(KitSettings(encryption_key=digits, hmac_key=GOOD, hmac_keys={"": GOOD}))  # type: ignore[arg-type, dict-item]


async def test_who_joins_must_hold_what_is_in_use(fresh: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "STALE_S", 2.0)
    first = holder(fresh, box("a"))
    await first.join()
    # Another one would seal with what the first cannot open.
    living = asyncio.create_task(beat(first))
    with pytest.raises(SecretError, match=f"'b', which process {os.getpid()} on .* cannot open"):
        await holder(fresh, box("a", "b")).join()
    living.cancel()
    await asyncio.gather(living, return_exceptions=True)
    # The first one is killed: nobody waits for it longer than a moment.
    second = holder(fresh, box("a", "b"))
    await asyncio.sleep(2)
    await second.join()
    with pytest.raises(SecretError, match="'b' is in use and not on the ring"):
        await holder(fresh, box("a")).join()
    # One that had only been away may not seal again before it has followed.
    assert first.box.seal("x", "place")
    first._told = None
    await first.tick()
    for act in (lambda: first.box.seal("x", "place"), lambda: first.box.blinds("wish", "x")):
        with pytest.raises(SecretError, match="'b' is in use"):
            act()
    await second.tick()
    monkeypatch.setattr(holders, "STALE_S", 60.0)
    async with fresh.read(ALL) as session:
        assert {one.current for one in await holders.live(session, KeyHolder)} == {"a", "b"}
    await first.leave()
    await second.leave()
    async with fresh.read(ALL) as session:
        assert not await holders.live(session, KeyHolder) and not (await session.scalars(sa.select(KeyHolder))).all()


async def beat(one: Holder) -> None:
    """A process that lives."""
    while True:
        one._told = None
        await one.tick()
        await asyncio.sleep(0.25)


async def test_hmac_keys_have_canaries_too(fresh: Database) -> None:
    await holder(fresh, box("a")).join()
    rotated = SecretBox(ring("a"), {"": HMAC_KEY, "h2": b"i" * 32}, "h2")
    await holder(fresh, rotated).join()
    for keys_, words in (({"h2": b"i" * 32}, "hashes under the HMAC key ''"), ({"": HMAC_KEY, "h2": b"j" * 32}, "another HMAC key 'h2'")):
        with pytest.raises(SecretError, match=words):
            await holder(fresh, SecretBox(ring("a"), keys_, "h2")).join()


async def test_canaries_of_before_still_tell(fresh: Database) -> None:
    """As they were planted when there was one HMAC key and no canary of it."""
    old = box("a")
    place = f"canary/a/hmac-{old.digest('canary', 'a').hex()}"
    async with fresh.transaction(ALL) as session:
        session.add(Canary(key_id="a", sealed=old.seal("clawplane", place), created_at=now(), updated_at=now()))
    with pytest.raises(SecretError, match="another key 'a' or another CLAWPLANE_HMAC_KEY"):
        await vault.check_keys(fresh, SecretBox(ring("a"), {"": b"i" * 32}), Canary)
    async with fresh.transaction(ALL) as session:
        await session.execute(sa.delete(Canary).where(Canary.key_id.startswith("hmac:")))
    await vault.check_keys(fresh, old, Canary)


CANARIES, PLAIN = {"secret_canaries.sealed"}, {
    "idempotency_keys.key", "idempotency_keys.request", "idempotency_keys.answer",
    "sessions.digest", "sign_in_links.digest", "claw_keys.digest", "invitations.digest", "oauth_states.digest", "oauth_states.browser",
    # Under the key of the audit log, which has no other.
    "audit_events.written", "audit_events.seal", "audit_heads.head", "audit_heads.mac",
    # Under the HMAC key, and gone within minutes: with another one, who has a code asks for a new one.
    "attempts.subject", "one_time_codes.subject", "one_time_codes.digest",
}  # fmt: skip
"""Bytes that are under no key of the ring."""


@pytest.mark.parametrize("service", ["user_svc", "deployment_svc"])
def test_whatever_is_sealed_is_declared(service: str) -> None:
    """A column that a rotation does not know of would be lost with the old key."""
    tables = metadata_of(service).tables.values()
    app = importlib.import_module(f"services.{service}.app")
    declared = {one.name for one in app.SEALED}
    named = {f"{table.name}.{column.name}" for table in tables for column in table.columns if column.name.endswith("sealed")}
    assert named - CANARIES == declared and all(isinstance(one, Sealed) for one in app.SEALED)
    known = {one.name for one in (*app.BLIND, *app.HASHED)}
    raw = {f"{table.name}.{column.name}" for table in tables for column in table.columns if isinstance(column.type, sa.LargeBinary)}
    assert raw - known <= PLAIN, "hashes under a key belong to BLIND or HASHED in app.py, plain ones to PLAIN here"
    keyed = {f"{table.name}.{column.name}" for table in tables for column in table.columns if column.name.endswith(("digest_key_id", "print_key_id"))}
    assert keyed == {f"{one.key_id.class_.__tablename__}.{one.key_id.key}" for one in (*app.BLIND, *app.HASHED)}
    # What seals must say so in the name of its column, or this test could not see it.
    for path in (Path(str(app.__file__)).parent).rglob("*.py"):
        for line in path.read_text().splitlines():
            assert "box.seal(" not in line or "_sealed" in line or path.name == "secrets.py", (path, line)
