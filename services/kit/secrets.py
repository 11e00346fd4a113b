"""Secrets at rest: envelope encryption, and keyed hashes for equality."""

import base64
import hashlib
import hmac
import os
from collections.abc import Mapping

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

VERSION = "v1"
_NONCE = 12


class SecretError(Exception):
    """A secret cannot be opened: wrong key, wrong place, or altered. Says which key id, never what."""


class SecretBox:
    """A ring of AES-256 keys. New secrets use the current key; old ones stay readable while their key is on the ring."""

    def __init__(self, keys: Mapping[str, bytes], current: str, hmac_key: bytes) -> None:
        if current not in keys:
            raise ValueError(f"CLAWPLANE_ENCRYPTION_KEYS has no key with the id {current!r} of CLAWPLANE_ENCRYPTION_KEY_ID")
        if any("." in key_id for key_id in keys):
            raise ValueError("a key id in CLAWPLANE_ENCRYPTION_KEYS must not contain a dot")
        self._keys = {key_id: AESGCM(key) for key_id, key in keys.items()}
        self._hmac_key = hmac_key
        self._derived: dict[str, bytes] = {}
        self.current = current

    def __repr__(self) -> str:
        return f"SecretBox(current={self.current!r})"

    def seal(self, plain: str, place: str) -> str:
        """Text -> ``v1.<key id>.<wrapped data key>.<nonce + ciphertext>``. ``place`` is table/column/row and must be given to open it."""
        data_key = AESGCM.generate_key(256)
        body = _encrypt(AESGCM(data_key), plain.encode(), place)
        return ".".join([VERSION, self.current, self._wrap(data_key, place), body])

    def open(self, sealed: str, place: str) -> str:
        """The text that was sealed at the same place; SecretError otherwise."""
        data_key, body = self._unwrap(sealed, place)
        try:
            return _decrypt(AESGCM(data_key), body, place).decode()
        except (InvalidTag, ValueError):
            raise SecretError("a secret was altered or moved") from None

    def rewrap(self, sealed: str, place: str) -> str:
        """The same secret under the current key; only the data key is wrapped anew."""
        if sealed.split(".")[1:2] == [self.current]:
            return sealed
        data_key, body = self._unwrap(sealed, place)
        return ".".join([VERSION, self.current, self._wrap(data_key, place), body])

    def _wrap(self, data_key: bytes, place: str) -> str:
        return _encrypt(self._keys[self.current], data_key, f"dek/{place}")

    def _unwrap(self, sealed: str, place: str) -> tuple[bytes, str]:
        parts = sealed.split(".")
        if len(parts) != 4 or parts[0] != VERSION:
            raise SecretError("a secret has another form")
        _, key_id, wrapped, body = parts
        if key_id not in self._keys:
            raise SecretError(f"no key with the id {key_id!r} is on the ring")
        try:
            return _decrypt(self._keys[key_id], wrapped, f"dek/{place}"), body
        except (InvalidTag, ValueError):
            raise SecretError(f"the key {key_id!r} does not open this secret") from None

    def digest(self, purpose: str, *parts: str) -> bytes:
        """Keyed hash of texts, 32 bytes: equal for equal parts, worthless without the key. Each purpose has its own key."""
        key = self._derived.get(purpose)
        if key is None:
            key = self._derived[purpose] = HKDF(SHA256(), 32, None, purpose.encode()).derive(self._hmac_key)
        mac = hmac.new(key, digestmod=hashlib.sha256)
        for part in parts:
            raw = part.encode()
            # The length keeps ("ab", "c") apart from ("a", "bc").
            mac.update(len(raw).to_bytes(8, "big") + raw)
        return mac.digest()


def _encrypt(key: AESGCM, plain: bytes, place: str) -> str:
    nonce = os.urandom(_NONCE)
    return _text(nonce + key.encrypt(nonce, plain, place.encode()))


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _decrypt(key: AESGCM, text: str, place: str) -> bytes:
    raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    # AESGCM of cryptography always takes 16-byte tags; anything shorter than nonce and tag is refused here.
    if len(raw) < _NONCE + 16 or _text(raw) != text:
        raise ValueError("too short, or another spelling of the same bytes")
    return key.decrypt(raw[:_NONCE], raw[_NONCE:], place.encode())
