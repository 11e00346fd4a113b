"""OpenID Connect: what a provider says of itself, its keys, and whether an ID token holds."""

import asyncio
import hmac
import time
from typing import Any

import httpx
import jwt
import structlog

from services.kit.errors import SignInFailed, Unavailable

log = structlog.get_logger()
TIMEOUT_S = 5.0
TLS = httpx.create_ssl_context()
"""Of all connections to providers: making one reads a file of certificates each time."""
_KEPT_S, _REFRESH_S = 3600.0, 10.0
"""Kept for an hour; read anew for a key that is not known, but not more often than every ten seconds."""
_LEEWAY_S = 60
_BAD = (jwt.PyJWTError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


class Issuer:
    """One provider. ``url``: the issuer, below which its configuration lies."""

    def __init__(self, url: str, client_id: str) -> None:
        self.url, self.client_id = url.rstrip("/"), client_id
        self._config: dict[str, Any] = {}
        self._keys: dict[str, Any] = {}
        self._read_at = float("-inf")
        self._turn = asyncio.Lock()

    async def endpoint(self, name: str) -> str:
        """Where something is: "authorization_endpoint", "token_endpoint"; Unavailable when the provider does not say."""
        await self._read(_KEPT_S)
        return str(self._config[name])

    async def claims(self, token: str, nonce: str) -> dict[str, Any]:
        """The claims of an ID token that holds, and was made for this sign-in; SignInFailed otherwise."""
        try:
            key_id = str(jwt.get_unverified_header(token).get("kid", ""))
            await self._read(_KEPT_S if key_id in self._keys else _REFRESH_S)
            claims: dict[str, Any] = jwt.decode(
                token, key=self._keys[key_id], algorithms=["RS256"], audience=self.client_id, leeway=_LEEWAY_S,
                options={"require": ["exp", "iat", "iss", "aud", "sub", "nonce"]},
            )  # fmt: skip
            # Of the issuer for all tenants, each tenant's name is part of its own.
            issuer = str(self._config["issuer"]).replace("{tenantid}", str(claims.get("tid", "")))
            if claims["iss"] != issuer or claims.get("azp", self.client_id) != self.client_id:
                raise jwt.InvalidIssuerError("iss or azp")
            if not hmac.compare_digest(str(claims["nonce"]).encode(), nonce.encode()):
                raise jwt.InvalidTokenError("nonce")
        except _BAD as error:
            log.warning("oauth.token_refused", issuer=self.url, error=type(error).__name__)
            raise SignInFailed() from None
        return claims

    async def _read(self, max_age_s: float) -> None:
        async with self._turn:
            if time.monotonic() - self._read_at < max_age_s:
                return
            try:
                async with httpx.AsyncClient(timeout=TIMEOUT_S, verify=TLS) as http:
                    config = (await http.get(f"{self.url}/.well-known/openid-configuration")).raise_for_status().json()
                    if "{tenantid}" not in config["issuer"] and config["issuer"] != self.url:
                        raise ValueError("another issuer")
                    found = (await http.get(config["jwks_uri"])).raise_for_status().json()["keys"]
                keys = {str(one["kid"]): jwt.PyJWK.from_dict(one, algorithm="RS256").key for one in found if one.get("kty") == "RSA"}
                if not (config["authorization_endpoint"] and config["token_endpoint"]):
                    raise ValueError("no endpoints")
            except (httpx.HTTPError, *_BAD) as error:
                log.warning("oauth.provider_not_read", issuer=self.url, error=type(error).__name__)
                raise Unavailable("the provider does not answer right now", retry_after_s=5) from None
            self._config, self._keys, self._read_at = config, keys, time.monotonic()
