"""Keys that bots and programs send: prefix, environment, id, secret, checksum. Shown once, stored as a keyed hash."""

import hashlib
import hmac
import secrets as random
import uuid
import zlib
from dataclasses import dataclass

from services.kit import ids
from services.kit.secrets import SecretBox

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SECRET = 43
_CHECK = 6


@dataclass(frozen=True)
class Key:
    """A parsed key: ``cp_live_<id>_<secret>_<checksum>``."""

    prefix: str
    environment: str
    id: str
    """The identifier of the key's row, with ``id_prefix``."""
    text: str

    def __repr__(self) -> str:
        return f"Key({self.prefix}_{self.environment}_{self.id[-32:]}_...)"

    def digest(self, box: SecretBox, key_id: str | None = None) -> bytes:
        """What is stored: a keyed hash over the whole text, under an HMAC key; None means the current one."""
        return box.digest(f"key/{self.prefix}", self.text, key_id=key_id)

    def sha256(self) -> bytes:
        """A plain hash, for keys of our own making that live shortly: nobody guesses 256 random bits."""
        return hashlib.sha256(self.text.encode()).digest()

    def is_hashed_as(self, stored: bytes) -> bool:
        """Compares with a stored plain hash in constant time."""
        return hmac.compare_digest(self.sha256(), stored)

    def matches(self, box: SecretBox, stored: bytes, key_id: str | None = None) -> bool:
        """Compares with a stored digest in constant time. ``key_id``: of the HMAC key that it was made with, else nothing fits."""
        if key_id is not None and not box.knows_hmac_key(key_id):
            return False
        return hmac.compare_digest(self.digest(box, key_id), stored)


def mint(prefix: str, environment: str, id_prefix: str, row_id: str = "") -> Key:
    """A new key with 256 random bits; another text of the key ``row_id`` when that is given."""
    row = ids.to_uuid(row_id, id_prefix) if row_id else ids.uuid7()
    secret = "".join(random.choice(_ALPHABET) for _ in range(_SECRET))
    body = f"{prefix}_{environment}_{row.hex}_{secret}"
    return Key(prefix, environment, f"{id_prefix}_{row.hex}", f"{body}_{_checksum(body)}")


def parse(text: str, prefix: str, id_prefix: str) -> Key | None:
    """The parts of a key, or None when its form or checksum is wrong, so that a typing error costs no query."""
    parts = text.split("_")
    if len(parts) != 5 or parts[0] != prefix or parts[1] not in {"live", "test"} or len(parts[3]) != _SECRET:
        return None
    try:
        row = uuid.UUID(hex=parts[2])
    except ValueError:
        return None
    if row.hex != parts[2] or not hmac.compare_digest(_checksum("_".join(parts[:4])).encode(), parts[4].encode()):
        return None
    return Key(prefix, parts[1], f"{id_prefix}_{row.hex}", text)


def _checksum(body: str) -> str:
    number = zlib.crc32(body.encode())
    digits = []
    for _ in range(_CHECK):
        number, rest = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[rest])
    return "".join(reversed(digits))
