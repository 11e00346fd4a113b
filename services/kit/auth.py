"""Who calls: any credential becomes a Caller. Handlers never look at credentials."""

import hmac
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from services.kit.clerk import ClerkVerifier, fresh_until
from services.kit.db import ALL
from services.kit.errors import NotFound, Unauthenticated
from services.kit.ids import NO_ORG, to_uuid
from services.kit.settings import KitSettings, decode_key

AUDIENCE = "clawplane"
MAX_LIFETIME_S = 15 * 60
EVERYTHING = "*"
FORWARD = "calls.forward"
"""The permission to say for whom a call is forwarded."""
FRESH_S = 3600
"""How long a sign-in counts as fresh; kit/clerk.py has the same."""
SESSION = "sess"
"""Prefix of a session's token."""
CLERK = "clerk:"
"""Stands before a user's id at Clerk where a user is looked up."""
_LEEWAY_S = 10
_CACHE_S = 60
_CACHE_SIZE = 10_000


@dataclass(frozen=True)
class Caller:
    """Who calls, where, and what they may do."""

    kind: str
    """"public", "user", "key", "claw", "service" or "operator"."""
    subject: str
    """For the audit log: "usr_...", "key_...", "service:gateway", "operator"."""
    permissions: frozenset[str] = frozenset()
    org_id: str = ""
    """The organization that the call acts in; empty for services and operators."""
    user_id: str = ""
    email: str = ""
    deployment_id: str = ""
    """Set for claw keys: the deployment whose bot calls."""
    key_id: str = ""
    """The key or session that the call is made with; empty for other credentials."""
    is_operator: bool = False
    """Whether this person may also act for the platform."""
    fresh_until: float = 0.0
    """Until when (seconds since 1970) the caller may do what asks for a fresh sign-in: 0 for keys, for ever for the platform's tokens."""
    rate: str = ""
    """How often this key may be used: "60/minute"; empty for no limit of its own."""

    def on_platform(self) -> "Caller":
        """The same person as an operator, for RPCs that are the platform's own; whoever is none stays what he is."""
        return replace(self, kind="operator", permissions=frozenset({EVERYTHING}), org_id="") if self.is_operator else self

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
UNKNOWN = Caller("unknown", "")
"""Whoever has not shown a credential that holds."""
NOBODY = "org_" + "f" * 32
"""An organization that nobody is a member of."""


@dataclass(frozen=True)
class Access:
    """What a user may do in an organization, as user_svc says."""

    user_id: str
    org_id: str
    permissions: frozenset[str]
    email: str = ""
    is_operator: bool = False


@dataclass(frozen=True)
class Session:
    """A session whose token was found to hold, as user_svc says."""

    id: str
    user_id: str
    expires_at: float
    """When it ends if it is not used any more, seconds since 1970."""
    fresh_until: float = 0.0
    """Until when the sign-in counts as fresh, seconds since 1970."""


class _Token:
    """A token whose signature was checked, and the caller that it made last."""

    __slots__ = ("access", "caller", "fresh_until", "good_until", "granted", "org", "user")

    def __init__(self, claims: Mapping[str, object], user: str, granted: frozenset[str], fresh_until: float = math.inf) -> None:
        self.user, self.granted, self.fresh_until = user, granted, fresh_until
        self.org = str(claims.get("org", "")) if not user.startswith(CLERK) else ""
        self.good_until = min(float(claims["exp"]), time.time() + _CACHE_S)  # type: ignore[arg-type]
        self.access: Access | None = None
        self.caller = Caller("service", f"service:{claims['sub']}", granted)
        """Of a service, until a person's access is known."""


AccessResolver = Callable[[str, str], Awaitable[Access | None]]
"""(user id, or "clerk:" and the id at Clerk; organization id or "") -> Access, or None when there is no such active user or membership."""
SessionResolver = Callable[[str], Awaitable[Session | None]]
"""Token -> session, or None when it does not hold."""
KeyResolver = Callable[[str], Awaitable[Caller | None]]
"""Key text -> Caller, or None when the key does not hold."""


@dataclass
class Authenticator:
    """Turns metadata into a Caller. Only a token's signature check is cached."""

    settings: KitSettings
    resolve_access: AccessResolver
    key_resolvers: Mapping[str, KeyResolver] = field(default_factory=dict)
    """Key prefix ("claw") -> how to look it up."""
    resolve_session: SessionResolver | None = None

    def __post_init__(self) -> None:
        self._trusted = {
            issuer: Ed25519PublicKey.from_public_bytes(decode_key(key, "service_public_keys"))
            for issuer, key in self.settings.service_public_keys.items()
        }
        self._operator = self.settings.operator_token.get_secret_value().encode()
        self._clerk = ClerkVerifier(self.settings) if self.settings.clerk_issuer else None
        self._checked: dict[str, _Token] = {}
        self._forwarders: dict[str, float] = {}
        # A resolver that remembers (kit/feed.py) has a ``peek``; with any other, nobody is known without waiting.
        self._peek: Callable[[str, str], Access | None] = getattr(self.resolve_access, "peek", lambda user, org: None)

    def known(self, metadata: Mapping[str, str | bytes]) -> Caller | None:
        """What ``caller`` would answer, without waiting, where the token and what its person may do are remembered. None elsewhere."""
        wanted_org: Any = metadata.get("clawplane-org", "")
        token = self._checked.get(metadata.get("authorization"))  # type: ignore[arg-type]  # bytes are no text that was checked
        if token is None or token.good_until < time.time():
            return None
        if token.user:
            access = self._peek(token.user, token.org or wanted_org)
            if access is None or access is not token.access:
                return None
        return token.caller if not wanted_org or token.caller.org_id == wanted_org else None

    async def caller(self, metadata: Mapping[str, str | bytes]) -> Caller:
        """The caller of a call; Unauthenticated when a credential is missing or does not hold."""
        header, wanted_org = metadata.get("authorization", ""), metadata.get("clawplane-org", "")
        if not isinstance(header, str) or not isinstance(wanted_org, str):
            raise Unauthenticated()
        if wanted_org and not _is_id(wanted_org, "org"):
            wanted_org = NOBODY
        token = self._checked.get(header)
        if token is None or token.good_until < time.time():
            found = await self._check(header, wanted_org)
            if isinstance(found, Caller):
                return self._in(found, wanted_org)
            token = found
        if not token.user:
            return self._in(token.caller, wanted_org)
        access = await self.resolve_access(token.user, token.org or wanted_org)
        if access is None:
            raise _no_access(wanted_org if not token.org else "")
        # The very same answer makes the very same caller.
        if access is not token.access:
            allowed = access.permissions if EVERYTHING in token.granted else access.permissions & token.granted
            token.caller = Caller(
                "user", access.user_id, allowed, access.org_id, access.user_id, access.email,
                is_operator=access.is_operator and EVERYTHING in token.granted, fresh_until=token.fresh_until,
            )  # fmt: skip
            token.access = access
        return self._in(token.caller, wanted_org)

    def _in(self, caller: Caller, wanted_org: str) -> Caller:
        if wanted_org and caller.org_id != wanted_org:
            raise NotFound("organization")
        return caller

    async def _of_session(self, text: str, wanted_org: str) -> Caller:
        session = await self.resolve_session(text) if self.resolve_session is not None else None
        if session is None or session.expires_at <= time.time():
            raise Unauthenticated()
        access = await self.resolve_access(session.user_id, wanted_org)
        if access is None:
            raise _no_access(wanted_org)
        return Caller(
            "user", access.user_id, access.permissions, access.org_id, access.user_id, access.email, key_id=session.id,
            is_operator=access.is_operator, fresh_until=session.fresh_until,
        )  # fmt: skip

    def may_forward(self, token: str | bytes | None) -> bool:
        """Whether a token says that its sender may tell for whom a call is forwarded: a service's, with that permission."""
        if not isinstance(token, str) or not token:
            return False
        known = self._forwarders.get(token)
        if known is None or known < time.time():
            try:
                claims = self._verify(token)
            except Unauthenticated:
                return False
            if claims.get("user") or not {FORWARD, EVERYTHING} & set(claims["permissions"]):  # type: ignore[call-overload]
                return False
            if len(self._forwarders) >= _CACHE_SIZE:
                self._forwarders.clear()
            self._forwarders[token] = min(float(claims["exp"]), time.time() + _CACHE_S)  # type: ignore[arg-type]
        return True

    async def _check(self, header: str, wanted_org: str) -> "Caller | _Token":
        """What a credential is that was not seen before, or that is no token."""
        scheme, _, text = header.partition(" ")
        text = text.strip()
        if scheme.lower() != "bearer" or not text:
            raise Unauthenticated()
        prefix = text.partition("_")[0]
        if prefix == SESSION:
            return await self._of_session(text, wanted_org)
        resolver = self.key_resolvers.get(prefix)
        if resolver is not None:
            caller = await resolver(text)
            if caller is None:
                raise Unauthenticated()
            return caller
        if self._operator and hmac.compare_digest(text.encode(), self._operator):
            return Caller("operator", "operator", frozenset({EVERYTHING}))
        if self._clerk is not None and self._clerk.is_for(text):
            claims = await self._clerk.claims(text)
            token = _Token(claims, f"{CLERK}{claims['sub']}", frozenset({EVERYTHING}), fresh_until(claims))
        else:
            claims = self._verify(text)
            token = _Token(claims, str(claims.get("user", "")), frozenset(claims["permissions"]))  # type: ignore[call-overload]
        if len(self._checked) >= _CACHE_SIZE:
            self._checked.clear()
        self._checked[header] = token
        return token

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
            lifetime = float(claims["exp"]) - float(claims["iat"])  # type: ignore[arg-type]
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
            # The last ones: whoever has no key can still send JSON that no parser likes.
            raise Unauthenticated() from None
        permissions = claims.get("permissions")
        if lifetime > MAX_LIFETIME_S or not isinstance(permissions, list) or not all(isinstance(one, str) for one in permissions):
            raise Unauthenticated()
        for name, prefix in (("user", "usr"), ("org", "org")):
            if name in claims and not _is_id(claims[name], prefix):
                raise Unauthenticated()
        return claims


def _no_access(wanted_org: str) -> Unauthenticated | NotFound:
    """A named organization that is not the user's looks like one that does not exist."""
    return NotFound("organization") if wanted_org else Unauthenticated()


def _is_id(value: object, prefix: str) -> bool:
    try:
        return isinstance(value, str) and bool(to_uuid(value, prefix))
    except ValueError:
        return False
