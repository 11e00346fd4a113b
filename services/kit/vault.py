"""A service's secret box, and the canary that tells a wrong key before any secret is lost."""

from typing import Any

from sqlalchemy import String, select
from sqlalchemy.orm import Mapped, mapped_column

from services.kit.columns import Timestamps
from services.kit.db import ALL, Database, insert_for
from services.kit.secrets import SecretBox, SecretError
from services.kit.settings import KitSettings, decode_key

_PLAIN = "clawplane"


class CanaryRow(Timestamps):
    """Mixin of each service's ``secret_canaries``: a known text under every key that was ever current."""

    key_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    sealed: Mapped[str] = mapped_column(String(512))


def open_box(settings: KitSettings) -> SecretBox:
    """The box of the settings' keys; ValueError names the setting that is wrong."""
    keys = {key_id: decode_key(key, "encryption_keys") for key_id, key in settings.encryption_keys.items()}
    return SecretBox(keys, settings.encryption_key_id, decode_key(settings.hmac_key, "hmac_key"))


async def check_keys(db: Database, box: SecretBox, model: Any) -> None:
    """SecretError when a key differs from the one that the database was written with. Plants the canary of a new key."""
    async with db.transaction(ALL) as session:
        # Planted first: of several processes that start at once, one plants and the others compare with it.
        planted = insert_for(session)(model).values(key_id=box.current, sealed=box.seal(_PLAIN, _place(box, box.current)))
        await session.execute(planted.on_conflict_do_nothing(index_elements=["key_id"]))
        for row in (await session.scalars(select(model))).all():
            try:
                if box.open(row.sealed, _place(box, row.key_id)) != _PLAIN:
                    raise SecretError("a canary changed")
            except SecretError:
                raise SecretError(
                    f"the database {db.name} was written with another key {row.key_id!r} or another CLAWPLANE_HMAC_KEY: "
                    "give back the keys that it was made with"
                ) from None


def _place(box: SecretBox, key_id: str) -> str:
    # The digest makes the canary fail under another HMAC key as well.
    return f"canary/{key_id}/hmac-{box.digest('canary', key_id).hex()}"
