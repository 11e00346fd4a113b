"""Session tokens of Clerk: RS256, checked against Clerk's published keys."""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import httpx
import jwt
import structlog

from services.kit.errors import Unauthenticated, Unavailable
from services.kit.settings import KitSettings

log = structlog.get_logger()
_LEEWAY_S = 5
_REFRESH_S = 10.0
"""Keys are fetched again for a token that none of the known ones signed, but not more often: anyone can send such a token."""
_FETCH_TIMEOUT_S = 3.0
_FRESH_S = 3600
_BAD = (jwt.PyJWTError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


def fresh_until(claims: Mapping[str, Any]) -> float:
    """Until when a token's sign-in is fresh, by the minutes since Clerk last saw the first factor (fva); 0 when it does not say."""
    age = claims.get("fva")
    minutes = age[0] if isinstance(age, list) and age else None
    return float(claims.get("iat", 0)) - minutes * 60 + _FRESH_S if isinstance(minutes, int) and 0 <= minutes < _FRESH_S // 60 else 0.0


class ClerkVerifier:
    """Says who a session token is of. Keys come from the setting (a PEM) or from Clerk, and are fetched anew when they rotate."""

    def __init__(self, settings: KitSettings) -> None:
        self.settings = settings
        self._pem = settings.clerk_jwt_key
        self._url = settings.clerk_jwks_url or f"{settings.clerk_issuer.rstrip('/')}/.well-known/jwks.json"
        self._keys: dict[str, Any] = {}
        self._fetched_at = float("-inf")
        self._turn = asyncio.Lock()

    @staticmethod
    def is_for(token: str) -> bool:
        """Whether a token says that it is one of Clerk's kind."""
        try:
            return bool(jwt.get_unverified_header(token).get("alg") == "RS256")
        except _BAD:
            return False

    async def claims(self, token: str) -> dict[str, Any]:
        """The claims of a token that holds; Unauthenticated otherwise, Unavailable when Clerk's keys cannot be had."""
        try:
            key_id = str(jwt.get_unverified_header(token).get("kid", ""))
        except _BAD:
            raise Unauthenticated() from None
        key, fresh = await self._key(key_id, fresh=False)
        try:
            return self._check(token, key)
        except jwt.InvalidSignatureError:
            # The same name with another key: it was rotated in place.
            key, fresh = await self._key(key_id, fresh=True)
            if not fresh:
                raise Unauthenticated() from None
        except _BAD:
            raise Unauthenticated() from None
        try:
            return self._check(token, key)
        except _BAD:
            raise Unauthenticated() from None

    def _check(self, token: str, key: Any) -> dict[str, Any]:
        claims: dict[str, Any] = jwt.decode(
            token, key=key, algorithms=["RS256"], issuer=self.settings.clerk_issuer, leeway=_LEEWAY_S,
            # Clerk's session tokens name no audience; who may use one is said by azp.
            options={"require": ["exp", "nbf", "iss", "sub"], "verify_aud": False},
        )  # fmt: skip
        allowed = self.settings.clerk_authorized_parties
        if allowed and claims.get("azp") not in allowed:
            raise jwt.InvalidTokenError("azp")
        # Numbers that are no times: to find out is an error of the kinds above.
        float(claims["exp"]), float(claims.get("iat", 0))
        if claims.get("sts") == "pending" or not isinstance(claims["sub"], str) or not claims["sub"].startswith("user_"):
            raise jwt.InvalidTokenError("sts or sub")
        return claims

    async def _key(self, key_id: str, *, fresh: bool) -> tuple[Any, bool]:
        """The key of that name, and whether it was fetched just now."""
        if self._pem:
            return self._pem, False
        if not fresh and key_id in self._keys:
            return self._keys[key_id], False
        async with self._turn:
            if time.monotonic() - self._fetched_at < _REFRESH_S:
                if key_id not in self._keys:
                    raise Unauthenticated()
                return self._keys[key_id], False
            await self._fetch()
        if key_id not in self._keys:
            raise Unauthenticated()
        return self._keys[key_id], True

    async def _fetch(self) -> None:
        try:
            async with httpx.AsyncClient(timeout=_FETCH_TIMEOUT_S) as http:
                answer = await http.get(self._url)
                answer.raise_for_status()
                found = {str(one["kid"]): jwt.PyJWK.from_dict(one).key for one in answer.json()["keys"] if one.get("kty") == "RSA"}
        except (httpx.HTTPError, *_BAD) as error:
            log.warning("clerk.keys_not_fetched", error=type(error).__name__)
            raise Unavailable("Clerk's keys cannot be fetched right now", retry_after_s=2) from None
        self._keys, self._fetched_at = found, time.monotonic()
