"""Who calls: any credential becomes a Caller. Handlers never look at credentials."""

import hmac
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from services.kit.clerk import ClerkVerifier
from services.kit.db import ALL
from services.kit.errors import NotFound, Unauthenticated
from services.kit.ids import NO_ORG, to_uuid
from services.kit.settings import KitSettings, decode_key

AUDIENCE = "clawplane"
MAX_LIFETIME_S = 15 * 60
EVERYTHING = "*"
CLERK = "clerk:"
"""Stands before a user's id at Clerk where a user is looked up."""
_LEEWAY_S = 10
_CACHE_S = 60
_CACHE_SIZE = 10_000


@dataclass(frozen=True)
class Caller:
    """Who calls, where, and what they may do."""

    kind: str
    """"public", "user", "claw", "service" or "operator"."""
    subject: str
    """For the audit log: "usr_...", "ckey_...", "service:gateway", "operator"."""
    permissions: frozenset[str] = frozenset()
    org_id: str = ""
    """The organization that the call acts in; empty for services and operators."""
    user_id: str = ""
    email: str = ""
    deployment_id: str = ""
    """Set for claw keys: the deployment whose bot calls."""
    key_id: str = ""

    @property
    def is_platform(self) -> bool:
        """Services and operators see every organization."""
        return self.kind in {"service", "operator"}

    @property
    def tenant(self) -> str:
        """What the database filter follows."""
        return ALL if self.is_platform else self.org_id

    def may(self, permission: str) -> bool:
        """Whether the caller holds a permission."""
        return permission in self.permissions or EVERYTHING in self.permissions


PUBLIC = Caller("public", "public", org_id=NO_ORG)
NOBODY = "org_" + "f" * 32
"""An organization that nobody is a member of."""


@dataclass(frozen=True)
class Access:
    """What a user may do in an organization, as user_svc says."""

    user_id: str
    org_id: str
    permissions: frozenset[str]
    email: str = ""


AccessResolver = Callable[[str, str], Awaitable[Access | None]]
"""(user id, or "clerk:" and the id at Clerk; organization id or "") -> Access, or None when there is no such active user or membership."""
KeyResolver = Callable[[str], Awaitable[Caller | None]]
"""Key text -> Caller, or None when the key does not hold."""


@dataclass
class Authenticator:
    """Turns metadata into a Caller. Only a token's signature check is cached."""

    settings: KitSettings
    resolve_access: AccessResolver
    key_resolvers: Mapping[str, KeyResolver] = field(default_factory=dict)
    """Key prefix ("claw") -> how to look it up."""

    def __post_init__(self) -> None:
        self._trusted = {
            issuer: Ed25519PublicKey.from_public_bytes(decode_key(key, "service_public_keys"))
            for issuer, key in self.settings.service_public_keys.items()
        }
        self._operator = self.settings.operator_token.get_secret_value().encode()
        self._clerk = ClerkVerifier(self.settings) if self.settings.clerk_issuer else None
        self._checked: dict[str, tuple[float, dict[str, object]]] = {}

    async def caller(self, metadata: Sequence[tuple[str, str | bytes]]) -> Caller:
        """The caller of a call; Unauthenticated when a credential is missing or does not hold."""
        values = dict(metadata)
        header, wanted_org = values.get("authorization", ""), values.get("clawplane-org", "")
        if not isinstance(header, str) or not isinstance(wanted_org, str):
            raise Unauthenticated()
        if wanted_org and not _is_id(wanted_org, "org"):
            wanted_org = NOBODY
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated()
        caller = await self._from_token(token.strip(), wanted_org)
        if wanted_org and caller.org_id != wanted_org:
            raise NotFound("organization")
        return caller

    async def _from_token(self, token: str, wanted_org: str) -> Caller:
        resolver = self.key_resolvers.get(token.partition("_")[0])
        if resolver is not None:
            caller = await resolver(token)
            if caller is None:
                raise Unauthenticated()
            return caller
        if self._operator and hmac.compare_digest(token.encode(), self._operator):
            return Caller("operator", "operator", frozenset({EVERYTHING}))
        if self._clerk is not None and self._clerk.is_for(token):
            return await self._from_clerk(token, wanted_org)
        claims = self._claims(token)
        granted = frozenset(str(item) for item in claims["permissions"])  # type: ignore[attr-defined]
        user_id = str(claims.get("user", ""))
        if not user_id:
            return Caller("service", f"service:{claims['sub']}", granted)
        own_org = str(claims.get("org", ""))
        access = await self.resolve_access(user_id, own_org or wanted_org)
        if access is None:
            # A named organization that is not the user's looks like one that does not exist.
            raise NotFound("organization") if wanted_org and not own_org else Unauthenticated()
        allowed = access.permissions if EVERYTHING in granted else access.permissions & granted
        return Caller("user", user_id, allowed, access.org_id, user_id, access.email)

    async def _from_clerk(self, token: str, wanted_org: str) -> Caller:
        assert self._clerk is not None
        claims = self._known(token)
        if claims is None:
            claims = self._remember(token, await self._clerk.claims(token))
        access = await self.resolve_access(f"{CLERK}{claims['sub']}", wanted_org)
        if access is None:
            raise NotFound("organization") if wanted_org else Unauthenticated()
        return Caller("user", access.user_id, access.permissions, access.org_id, access.user_id, access.email)

    def _claims(self, token: str) -> dict[str, object]:
        return self._known(token) or self._remember(token, self._verify(token))

    def _known(self, token: str) -> dict[str, object] | None:
        cached = self._checked.get(token)
        return cached[1] if cached is not None and cached[0] > time.time() else None

    def _remember(self, token: str, claims: dict[str, object]) -> dict[str, object]:
        if len(self._checked) >= _CACHE_SIZE:
            self._checked.clear()
        self._checked[token] = (min(float(claims["exp"]), time.time() + _CACHE_S), claims)  # type: ignore[arg-type]
        return claims

    def _verify(self, token: str) -> dict[str, object]:
        try:
            issuer = jwt.decode(token, options={"verify_signature": False}).get("iss")
            key = self._trusted.get(issuer) if isinstance(issuer, str) else None
            if key is None:
                raise Unauthenticated()
            claims: dict[str, object] = jwt.decode(
                token, key=key, algorithms=["EdDSA"], audience=AUDIENCE, leeway=_LEEWAY_S,
                options={"require": ["exp", "iat", "iss", "aud", "sub"]},
            )  # fmt: skip
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
            # The last ones: whoever has no key can still send JSON that no parser likes.
            raise Unauthenticated() from None
        lifetime = float(claims["exp"]) - float(claims["iat"])  # type: ignore[arg-type]
        permissions = claims.get("permissions")
        if lifetime > MAX_LIFETIME_S or not isinstance(permissions, list):
            raise Unauthenticated()
        for name, prefix in (("user", "usr"), ("org", "org")):
            if name in claims and not _is_id(claims[name], prefix):
                raise Unauthenticated()
        return claims


def _is_id(value: object, prefix: str) -> bool:
    try:
        return isinstance(value, str) and bool(to_uuid(value, prefix))
    except ValueError:
        return False


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
