"""The providers: where each sends the browser, and how it says who came back."""

import warnings
from abc import ABC, abstractmethod
from typing import Any

import httpx
import structlog
from authlib.deprecate import AuthlibDeprecationWarning
from authlib.integrations.base_client import OAuthError

from services.kit.errors import SignInFailed, Unavailable
from services.user_svc.oauth import rules
from services.user_svc.oauth.oidc import TIMEOUT_S, TLS, Issuer
from services.user_svc.oauth.rules import Profile
from services.user_svc.settings import UserSettings

with warnings.catch_warnings():
    # It would rather have httpx2, and says so at every start; all else here speaks by httpx.
    warnings.simplefilter("ignore", AuthlibDeprecationWarning)
    from authlib.integrations.httpx_client import AsyncOAuth2Client

log = structlog.get_logger()


class Provider(ABC):
    """One that people have accounts with."""

    name: str
    title: str
    scope: str

    def __init__(self, settings: UserSettings) -> None:
        self.client_id: str = getattr(settings, f"oauth_{self.name}_client_id")
        self._secret: str = getattr(settings, f"oauth_{self.name}_client_secret").get_secret_value()
        self.redirect_uri = f"{settings.public_url.rstrip('/')}/dashboard/oauth/callback"

    async def authorization_url(self, state: str, verifier: str, nonce: str) -> str:
        """The page to send the browser to. ``verifier`` leaves as its hash alone (PKCE, S256)."""
        async with self._client() as client:
            url, _ = client.create_authorization_url(await self.authorize_at(), state=state, code_verifier=verifier, **self.extras(nonce))
        return str(url)

    async def profile(self, code: str, verifier: str, nonce: str) -> Profile:
        """Who came back with a code; SignInFailed when the provider does not confirm it, Unavailable when it does not answer."""
        try:
            async with self._client() as client:
                token = await client.fetch_token(await self.token_at(), code=code, code_verifier=verifier)
                profile = await self.read(client, token, nonce)
        except OAuthError as error:
            log.warning("oauth.code_refused", provider=self.name, error=str(error.error)[:50])
            raise SignInFailed() from None
        except (httpx.HTTPError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("oauth.provider_failed", provider=self.name, error=type(error).__name__)
            raise Unavailable("the provider does not answer right now; begin again", retry_after_s=5) from None
        if not profile.subject:
            raise SignInFailed()
        return profile

    def _client(self) -> Any:
        return AsyncOAuth2Client(
            self.client_id, self._secret, token_endpoint_auth_method="client_secret_post", scope=self.scope,
            redirect_uri=self.redirect_uri, code_challenge_method="S256", timeout=TIMEOUT_S, verify=TLS,
        )  # fmt: skip

    def extras(self, nonce: str) -> dict[str, str]:
        """What the address says beside what OAuth asks for."""
        return {}

    @abstractmethod
    async def authorize_at(self) -> str:
        """Where the browser is sent."""

    @abstractmethod
    async def token_at(self) -> str:
        """Where codes are exchanged."""

    @abstractmethod
    async def read(self, client: Any, token: dict[str, Any], nonce: str) -> Profile:
        """Who a token is about."""


class _OpenId(Provider):
    """One that speaks OpenID Connect."""

    scope = "openid email profile"

    def __init__(self, settings: UserSettings) -> None:
        super().__init__(settings)
        self.issuer = Issuer(getattr(settings, f"oauth_{self.name}_url"), self.client_id)

    def extras(self, nonce: str) -> dict[str, str]:
        return {"nonce": nonce, "prompt": "select_account"}

    async def authorize_at(self) -> str:
        return await self.issuer.endpoint("authorization_endpoint")

    async def token_at(self) -> str:
        return await self.issuer.endpoint("token_endpoint")

    async def read(self, client: Any, token: dict[str, Any], nonce: str) -> Profile:
        return self.of(await self.issuer.claims(str(token.get("id_token", "")), nonce))

    @staticmethod
    @abstractmethod
    def of(claims: dict[str, Any]) -> Profile:
        """From the claims of an ID token that holds."""


class Google(_OpenId):
    """Google."""

    name, title = "google", "Google"
    of = staticmethod(rules.of_google)


class Microsoft(_OpenId):
    """Microsoft, for organizations and persons."""

    name, title = "microsoft", "Microsoft"
    of = staticmethod(rules.of_microsoft)


class GitHub(Provider):
    """GitHub, which has OAuth without OpenID: who somebody is has to be asked."""

    name, title = "github", "GitHub"
    scope = "read:user user:email"

    def __init__(self, settings: UserSettings) -> None:
        super().__init__(settings)
        self._url, self._api = settings.oauth_github_url.rstrip("/"), settings.oauth_github_api_url.rstrip("/")

    async def authorize_at(self) -> str:
        return f"{self._url}/login/oauth/authorize"

    async def token_at(self) -> str:
        return f"{self._url}/login/oauth/access_token"

    async def read(self, client: Any, token: dict[str, Any], nonce: str) -> Profile:
        user = (await client.get(f"{self._api}/user")).raise_for_status().json()
        emails = (await client.get(f"{self._api}/user/emails")).raise_for_status().json()
        return rules.of_github(user, emails)


def configured(settings: UserSettings) -> dict[str, Provider]:
    """Those that are set up, by name."""
    return {kind.name: kind(settings) for kind in (Google, GitHub, Microsoft) if getattr(settings, f"oauth_{kind.name}_client_id")}
