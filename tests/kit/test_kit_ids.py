"""Identifiers, keys and secrets: what they look like, and what they refuse."""

import asyncio
import base64
import os
import threading
import time
import uuid
from datetime import UTC, datetime

import pytest

from services.kit import ids, keys, vault
from services.kit.db import ALL, Database
from services.kit.keyring import Ring
from services.kit.secrets import SecretBox, SecretError
from services.kit.settings import KitSettings
from tests.kit.echo import Canary

PLACE = "deployments/channel_token/dep_1"


def test_ids_grow_and_never_repeat() -> None:
    made: list[list[uuid.UUID]] = []

    def make() -> None:
        made.append([ids.uuid7() for _ in range(5000)])

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({one for some in made for one in some}) == 40_000
    for some in made:
        assert some == sorted(some) and [one.hex for one in some] == sorted(one.hex for one in some)
    assert all(one.version == 7 and one.variant == uuid.RFC_4122 for one in made[0])


def test_an_id_holds_its_time() -> None:
    before = time.time()
    at = ids.uuid7_time(ids.uuid7())
    # Ids of a burst run ahead of the clock, by less than a millisecond for every four thousand.
    assert at is not None and before - 0.002 <= at.timestamp() <= time.time() + 0.05
    assert ids.uuid7_time(uuid.uuid4()) is None
    assert ids.uuid7_time(uuid.UUID(int=(1_700_000_000_123 << 80) | (7 << 76) | (2 << 62))) == datetime.fromtimestamp(1_700_000_000.123, UTC)


GOOD = "dep_0199f0c0a1b27c3d8e4f5a6b7c8d9e0f"


@pytest.mark.parametrize(
    "text",
    ["", "dep", "dep_", GOOD[4:], f"usr_{GOOD[4:]}", f"{GOOD}0", GOOD[:-1], GOOD.upper(), f"dep_{GOOD[4:].upper()}", f"dep_{'g' * 32}",
     f"dep_{'0_' * 16}", f"dep_ {GOOD[5:]}", f"dep_+{GOOD[5:]}", f"dep_{{{GOOD[6:]}}}", f"dep_{'٣' * 32}", f"dep_{uuid.UUID(int=7)}"],
)  # fmt: skip
def test_an_id_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="dep_"):
        ids.to_uuid(text, "dep")


def test_prefixes_are_told_apart() -> None:
    assert len(set(ids.PREFIXES.values())) == len(ids.PREFIXES)
    assert ids.to_uuid(GOOD, "dep").hex == GOOD[4:]


def box(key: bytes | None = None, hmac_key: bytes = b"h" * 32, **ring: bytes) -> SecretBox:
    """A box with one key "k1", or with the given ring whose last key is current."""
    keys_ = ring or {"k1": key or b"1" * 32}
    return SecretBox(Ring.of(keys_, list(keys_)[-1]), {"": hmac_key})


def test_a_secret_comes_back_only_at_its_place_and_with_its_key() -> None:
    sealed = box().seal("geheim 🔑", PLACE)
    assert "geheim" not in sealed and sealed != box().seal("geheim 🔑", PLACE)
    assert box().open(sealed, PLACE) == "geheim 🔑"
    for wrong, place in ((box(), "deployments/channel_token/dep_2"), (box(b"2" * 32), PLACE), (box(k2=b"1" * 32), PLACE)):
        with pytest.raises(SecretError) as failure:
            wrong.open(sealed, place)
        assert "geheim" not in str(failure.value)


def test_every_altered_character_and_every_cut_is_seen() -> None:
    one = box()
    sealed = one.seal("x", PLACE)
    for index, char in enumerate(sealed):
        for other in {"A", "B", "_", ".", chr(ord(char) ^ 1)} - {char}:
            with pytest.raises(SecretError):
                one.open(sealed[:index] + other + sealed[index + 1 :], PLACE)
    for cut in range(len(sealed)):
        with pytest.raises(SecretError):
            one.open(sealed[:cut], PLACE)
    for longer in (f"{sealed}A", f"{sealed}.", f"{sealed}.more", f"{sealed}=", f" {sealed}"):
        with pytest.raises(SecretError):
            one.open(longer, PLACE)


def test_a_shorter_tag_is_no_tag() -> None:
    one = box()
    version, key_id, wrapped, body = one.seal("", PLACE).split(".")
    raw = base64.urlsafe_b64decode(body + "==")
    assert len(raw) == 12 + 16
    for size in (0, 4, 12, 15):
        short = base64.urlsafe_b64encode(raw[: 12 + size]).decode().rstrip("=")
        with pytest.raises(SecretError):
            one.open(".".join([version, key_id, wrapped, short]), PLACE)


def test_rewrapping_changes_the_key_and_nothing_else() -> None:
    old, both = box(), box(k1=b"1" * 32, k2=b"2" * 32)
    sealed = old.seal("x", PLACE)
    moved = both.rewrap(sealed, PLACE)
    assert moved.split(".")[1] == "k2" and moved.split(".")[3] == sealed.split(".")[3]
    assert box(k2=b"2" * 32).open(moved, PLACE) == both.open(sealed, PLACE) == "x"
    assert both.rewrap(moved, PLACE) == moved
    with pytest.raises(SecretError):
        both.rewrap(sealed, "elsewhere")


def test_digests_keep_their_parts_and_purposes_apart() -> None:
    one = box()
    same = one.digest("wish", "ab", "c")
    assert len(same) == 32 and same == box().digest("wish", "ab", "c")
    others = [
        one.digest("wish", "a", "bc"), one.digest("wish", "abc"), one.digest("wish", "ab", "c", ""), one.digest("key", "ab", "c"),
        box(hmac_key=b"i" * 32).digest("wish", "ab", "c"),
    ]  # fmt: skip
    assert len({same, *others}) == 6


def test_a_box_shows_nothing_and_refuses_a_bad_ring() -> None:
    assert "1111" not in repr(box()) and str(b"h" * 32) not in repr(vars(box())["ring"])
    with pytest.raises(ValueError, match="CLAWPLANE_ENCRYPTION_KEYS"):
        Ring.of({"k1": b"1" * 32}, "k2")
    with pytest.raises(ValueError, match="dot"):
        Ring.of({"k.1": b"1" * 32}, "k.1")


def test_keys_have_a_form_and_a_checksum() -> None:
    key = keys.mint("claw", "live", "ckey")
    assert keys.parse(key.text, "claw", "ckey") == key
    assert key.text.split("_")[3] not in repr(key) and key.text not in repr(key)
    assert key.id.startswith("ckey_") and key.id[5:] == key.text.split("_")[2]
    for index, char in enumerate(key.text):
        assert keys.parse(key.text[:index] + ("x" if char != "x" else "y") + key.text[index + 1 :], "claw", "ckey") is None
    swapped = key.text[:45] + key.text[46] + key.text[45] + key.text[47:]
    assert swapped == key.text or keys.parse(swapped, "claw", "ckey") is None
    for text in ("", "claw_", key.text.upper(), key.text + "0", key.text[:-1], f" {key.text}", key.text.replace("live", "prod"), "claw_live_💥_x_y"):
        assert keys.parse(text, "claw", "ckey") is None
    assert keys.parse(key.text, "sk", "ckey") is None
    assert key.matches(box(), key.digest(box())) and not key.matches(box(hmac_key=b"i" * 32), key.digest(box()))
    assert len({keys.mint("claw", "live", "ckey").text for _ in range(1000)}) == 1000


async def test_a_wrong_key_is_told_at_start(db: Database) -> None:
    first, second = os.urandom(32), os.urandom(32)
    # Several processes start at once on a new database.
    await asyncio.gather(*(vault.check_keys(db, box(first), Canary) for _ in range(4)))
    await vault.check_keys(db, box(first), Canary)
    for wrong in (box(second), box(first, hmac_key=b"i" * 32), box(k2=second), box(k1=second, k2=first)):
        with pytest.raises(SecretError, match="'k1'|HMAC key ''"):
            await vault.check_keys(db, wrong, Canary)
    # A rotation: the new key beside the old one.
    await vault.check_keys(db, box(k1=first, k2=second), Canary)
    async with db.read(ALL) as session:
        assert {(await session.get_one(Canary, name)).key_id for name in ("k1", "k2")} == {"k1", "k2"}
    with pytest.raises(SecretError, match="'k2'"):
        await vault.check_keys(db, box(k2=first, k1=first), Canary)


def test_a_bad_key_is_told_by_its_setting() -> None:
    good = base64.b64encode(b"1" * 32).decode()
    for bad in ("PLANTED", "", base64.b64encode(b"PLANTED").decode(), "PLANTED💥"):
        for name, given in (
            ("HMAC_KEY", {"hmac_key": bad, "encryption_keys": {"k1": good}}), ("ENCRYPTION_KEYS", {"hmac_key": good, "encryption_keys": {"k1": bad}}),
        ):  # fmt: skip
            settings = KitSettings(encryption_key_id="k1", **given)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match=f"CLAWPLANE_{name} ") as failure:
                vault.open_box(settings)
            assert "PLANTED" not in str(failure.value) and (not bad or bad not in repr(settings))
