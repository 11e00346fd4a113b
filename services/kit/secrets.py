"""Secrets at rest: envelope encryption, blind indexes, and keyed hashes."""

import base64
import hashlib
import hmac
import os
import time
from collections.abc import Mapping

import structlog
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from services.kit.keyring import Ring, RingFile

log = structlog.get_logger()

VERSION = "v1"
_NONCE = 12
_LINGER_S = 60.0


class SecretError(Exception):
    """A secret cannot be opened: wrong key, wrong place, or altered. Says which key id, never what."""


class SecretBox:
    """Seals with the ring's current key and opens with any key of it; hashes with the HMAC keys, which the ring has nothing to do with.

    With a file, every seal sees the ring as it is in that moment: what a rotation has switched to is used at once.
    """

    def __init__(self, ring: Ring, hmac_keys: Mapping[str, bytes], hmac_key_id: str = "", file: RingFile | None = None) -> None:
        """``hmac_keys``: id -> key; the first key of all has the id ""."""
        self.hmac_key_id, self._hmac_keys, self._file = hmac_key_id, dict(hmac_keys), file
        self._derived: dict[tuple[str, str, str], bytes] = {}
        # A key that left the ring still opens for a while: rows that were read before are in use.
        self._lingering: dict[str, tuple[AESGCM, float]] = {}
        self._stamp = file.stamp() if file else None
        self.behind = ""
        """Why nothing may be sealed: a key is in use that this ring lacks (see kit/holders.py)."""
        self._take(ring)

    def __repr__(self) -> str:
        return f"SecretBox(current={self.current!r})"

    def _take(self, ring: Ring) -> None:
        self.ring = ring
        self._ciphers = {key.id: AESGCM(key.key) for key in ring.keys}

    @property
    def current(self) -> str:
        """The id of the key that seals."""
        return self.ring.current.id

    def refresh(self) -> None:
        """Follows the file; one that cannot be used is said in the log, and the ring stays as it was."""
        stamp = self._file.stamp() if self._file else None
        if self._file is None or stamp == self._stamp:
            return
        # Looked at before it is read: what is written in between is read again.
        self._stamp = stamp
        try:
            ring = self._file.load()
        except ValueError as error:
            log.error("keys.ring_unusable", error=str(error))
            return
        gone, until = set(self.ring.ids) - set(ring.ids), time.monotonic() + _LINGER_S
        self._lingering |= {key_id: (self._ciphers[key_id], until) for key_id in gone}
        self._derived = {key: value for key, value in self._derived.items() if key[0] == "hmac"}
        self._take(ring)
        log.info("keys.ring_read", current=self.current, keys=ring.ids)

    def seal(self, plain: str, place: str) -> str:
        """Text -> ``v1.<key id>.<wrapped data key>.<nonce + ciphertext>``. ``place`` is table/column/row and must be given to open it.

        Call it within the transaction that writes it: a rotation waits for those, and then looks for what they left behind.
        """
        self._may_use()
        return self.seal_under(self.current, plain, place)

    def seal_under(self, key_id: str, plain: str, place: str) -> str:
        """As ``seal``, with a named key of the ring: for canaries, which come before the key is used."""
        data_key = AESGCM.generate_key(256)
        body = _encrypt(AESGCM(data_key), plain.encode(), place)
        return ".".join([VERSION, key_id, self._wrap(key_id, data_key, place), body])

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
        return ".".join([VERSION, self.current, self._wrap(self.current, data_key, place), body])

    def _may_use(self) -> None:
        self.refresh()
        if self.behind:
            raise SecretError(self.behind)

    def _wrap(self, key_id: str, data_key: bytes, place: str) -> str:
        return _encrypt(self._ciphers[key_id], data_key, f"dek/{place}")

    def _unwrap(self, sealed: str, place: str) -> tuple[bytes, str]:
        parts = sealed.split(".")
        if len(parts) != 4 or parts[0] != VERSION:
            raise SecretError("a secret has another form")
        _, key_id, wrapped, body = parts
        try:
            return _decrypt(self._cipher(key_id), wrapped, f"dek/{place}"), body
        except (InvalidTag, ValueError):
            raise SecretError(f"the key {key_id!r} does not open this secret") from None

    def _cipher(self, key_id: str) -> AESGCM:
        if key_id not in self._ciphers:
            self.refresh()
        version = next((key.version for key in self.ring.keys if key.id == key_id), 0)
        if 0 < version < self.ring.minimum_version:
            raise SecretError(f"a secret is under the key {key_id!r} of version {version}, below the required {self.ring.minimum_version}")
        if version:
            return self._ciphers[key_id]
        cipher, until = self._lingering.get(key_id, (None, 0.0))
        if cipher is None or until < time.monotonic():
            raise SecretError(f"no key with the id {key_id!r} is on the ring")
        return cipher

    def blind(self, purpose: str, *parts: str, key_id: str) -> bytes:
        """Keyed hash of texts under a key of the ring, 32 bytes: a column that is looked up without being readable. The key id "" is the
        first HMAC key, with which such columns were made before they had a key id."""
        if not key_id:
            return self.digest(purpose, *parts, key_id="")
        derived = self._derived.get(("blind", key_id, purpose))
        if derived is None:
            key = next((key.key for key in self.ring.keys if key.id == key_id), None)
            if key is None:
                raise SecretError(f"no key with the id {key_id!r} is on the ring")
            derived = self._derived["blind", key_id, purpose] = _derive(key, f"blind index/{purpose}")
        return _mac(derived, parts)

    def blinds(self, purpose: str, *parts: str) -> dict[str, bytes]:
        """Key id -> keyed hash, under every key that rows may have: look for any of them, write the first, which is the current key's.

        Call it within the transaction that looks and writes, for the reason that ``seal`` has.
        """
        self._may_use()
        others = [key_id for key_id in self.ring.ids if key_id != self.current]
        first = [""] if "" in self._hmac_keys else []
        return {key_id: self.blind(purpose, *parts, key_id=key_id) for key_id in [self.current, *others, *first]}

    @property
    def hmac_key_ids(self) -> list[str]:
        """The ids of all HMAC keys that a stored hash may be under, the current one first."""
        return [self.hmac_key_id, *(key_id for key_id in self._hmac_keys if key_id != self.hmac_key_id)]

    def knows_hmac_key(self, key_id: str) -> bool:
        """Whether ``digest`` can be asked with this id."""
        return key_id in self._hmac_keys

    def digest(self, purpose: str, *parts: str, key_id: str | None = None) -> bytes:
        """Keyed hash of texts under an HMAC key, 32 bytes: equal for equal parts, worthless without the key. Each purpose has its own key.

        ``key_id``: of the key that the stored hash was made with; None means the current one, ``hmac_key_id``.
        """
        key_id = self.hmac_key_id if key_id is None else key_id
        derived = self._derived.get(("hmac", key_id, purpose))
        if derived is None:
            if key_id not in self._hmac_keys:
                raise SecretError(f"no key with the id {key_id!r} is in CLAWPLANE_HMAC_KEYS")
            derived = self._derived["hmac", key_id, purpose] = _derive(self._hmac_keys[key_id], purpose)
        return _mac(derived, parts)


def key_id_of(sealed: str) -> str:
    """The id of the key that a secret is wrapped with."""
    return sealed.split(".")[1]


def _derive(key: bytes, purpose: str) -> bytes:
    return HKDF(SHA256(), 32, None, purpose.encode()).derive(key)


def _mac(key: bytes, parts: tuple[str, ...]) -> bytes:
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
