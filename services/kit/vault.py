"""A service's secret box, and the canaries that tell a wrong key before any secret is lost."""

import hmac
from typing import Any

from sqlalchemy import Boolean, String, false, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from services.kit.columns import Timestamps
from services.kit.db import ALL, Database, insert_for
from services.kit.keyring import Ring, RingFile
from services.kit.secrets import SecretBox, SecretError
from services.kit.settings import KitSettings, decode_key

_PLAIN = "clawplane"
HMAC = "hmac:"
"""Begins the canaries of HMAC keys; no key of a ring has a colon in its id."""


class CanaryRow(Timestamps):
    """Mixin of each service's ``secret_canaries``: for each key that is in use, a known text under it, or the hash of one."""

    key_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    sealed: Mapped[str] = mapped_column(String(512))
    retired: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    """Nothing is left under the key: nobody needs it, and nobody may use it again."""


def open_box(settings: KitSettings) -> SecretBox:
    """The box of the settings' keys; ValueError names the setting that is wrong. A ring file that is not there yet is made of the keys
    in the settings."""
    hmac_keys = {key_id: decode_key(key, "hmac_keys") for key_id, key in settings.hmac_keys.items()}
    if settings.hmac_key_id in hmac_keys:
        raise ValueError("CLAWPLANE_HMAC_KEYS holds earlier keys: CLAWPLANE_HMAC_KEY_ID, the id of the current one, must not be among them")
    hmac_keys[settings.hmac_key_id] = decode_key(settings.hmac_key, "hmac_key")
    file = ring_file(settings)
    ring = file.load_or_make(lambda: _given(settings)) if file else _given(settings)
    return SecretBox(ring, hmac_keys, settings.hmac_key_id, file)


def ring_file(settings: KitSettings) -> RingFile | None:
    """The file of the ring; None when the ring is in the environment."""
    return RingFile(settings.key_ring, private=settings.environment == "production") if settings.key_ring else None


def _given(settings: KitSettings) -> Ring:
    """The ring of CLAWPLANE_ENCRYPTION_KEYS, or of the one CLAWPLANE_ENCRYPTION_KEY."""
    if not settings.encryption_key.get_secret_value():
        keys = {key_id: decode_key(key, "encryption_keys") for key_id, key in settings.encryption_keys.items()}
        return Ring.of(keys, settings.encryption_key_id)
    if settings.encryption_keys:
        raise ValueError("CLAWPLANE_ENCRYPTION_KEY is a ring of one key: leave it out, or CLAWPLANE_ENCRYPTION_KEYS")
    key_id = settings.encryption_key_id or "k1"
    return Ring.of({key_id: decode_key(settings.encryption_key, "encryption_key")}, key_id)


async def check_keys(db: Database, box: SecretBox, model: Any) -> None:
    """As ``check``. Plants the canaries of new keys."""
    async with db.transaction(ALL) as session:
        # First: of several processes that start at once, one plants and the others compare with it.
        await plant(session, box, model, box.current)
        await check(session, box, model)


async def check(session: AsyncSession, box: SecretBox, model: Any) -> None:
    """SecretError when a key differs from the one that the database was written with, or is missing."""
    rows = (await session.scalars(select(model))).all()
    if why := next((why for row in rows if (why := missing(box, row))), ""):
        raise SecretError(why)
    for row in rows:
        if not row.retired and not _fits(box, row):
            name = "HMAC key" if row.key_id.startswith(HMAC) else "key"
            raise SecretError(
                f"the database was written with another {name} {row.key_id.removeprefix(HMAC)!r} or another CLAWPLANE_HMAC_KEY: "
                "give back the keys that it was made with"
            )


def missing(box: SecretBox, row: Any) -> str:
    """Why a box must not be used beside this canary, by ids alone; "" when it may."""
    if row.key_id.startswith(HMAC):
        key_id = row.key_id.removeprefix(HMAC)
        if row.retired or box.knows_hmac_key(key_id):
            return ""
        return f"the database has hashes under the HMAC key {key_id!r}: give it in CLAWPLANE_HMAC_KEYS"
    if row.retired and row.key_id == box.current:
        return f"the key {row.key_id!r} was retired, and this process would seal with it: give it the ring of the others"
    if not row.retired and row.key_id not in box.ring.ids:
        return (
            f"the key {row.key_id!r} is in use and not on the ring of this process: give it the ring of the others "
            "(CLAWPLANE_KEY_RING, or CLAWPLANE_ENCRYPTION_KEYS)"
        )
    return ""


async def plant(session: AsyncSession, box: SecretBox, model: Any, key_id: str) -> None:
    """The canaries of a key of the ring and of the current HMAC key, where they are not there yet."""
    canaries = {
        key_id: box.seal_under(key_id, _PLAIN, f"canary/{key_id}"),
        HMAC + box.hmac_key_id: _hash(box, box.hmac_key_id),
    }
    for name, sealed in canaries.items():
        row = insert_for(session)(model).values(key_id=name, sealed=sealed)
        await session.execute(row.on_conflict_do_nothing(index_elements=["key_id"]))


def _hash(box: SecretBox, hmac_key_id: str) -> str:
    return box.digest("canary", key_id=hmac_key_id).hex()


def _fits(box: SecretBox, row: Any) -> bool:
    """Whether the key of this name is the one that the canary was made with."""
    if row.key_id.startswith(HMAC):
        return hmac.compare_digest(_hash(box, row.key_id.removeprefix(HMAC)), row.sealed)
    places = [f"canary/{row.key_id}"]
    if box.knows_hmac_key(""):
        # As canaries were planted when there was one HMAC key.
        places.append(f"canary/{row.key_id}/hmac-{box.digest('canary', row.key_id, key_id='').hex()}")
    for place in places:
        try:
            return box.open(row.sealed, place) == _PLAIN
        except SecretError:
            continue
    return False
