"""Tokens that our own processes call each other with: signed here, checked by kit/auth.py."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from services.kit.auth import AUDIENCE, MAX_LIFETIME_S
from services.kit.settings import KitSettings


@dataclass
class TokenSigner:
    """Signs tokens as this process."""

    settings: KitSettings

    def __post_init__(self) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(self.settings.seed())

    def sign(self, permissions: Sequence[str], *, user: str = "", org: str = "", lifetime_s: int = 600) -> str:
        """A token for this process itself, or, with ``user``, for a person. At most 15 minutes."""
        if not 0 < lifetime_s <= MAX_LIFETIME_S:
            raise ValueError(f"a token lives 1 to {MAX_LIFETIME_S} seconds")
        now = int(time.time())
        name = self.settings.service_name
        claims: dict[str, object] = {
            "iss": name, "sub": name, "aud": AUDIENCE, "iat": now, "exp": now + lifetime_s, "permissions": list(permissions),
        }  # fmt: skip
        if user:
            claims["user"] = user
        if org:
            claims["org"] = org
        return jwt.encode(claims, self._key, algorithm="EdDSA")


def public_key(seed: bytes) -> bytes:
    """The public half of an Ed25519 seed, 32 bytes."""
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
