"""Beginning and ending sign-ins at a provider."""

import base64
from datetime import timedelta

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession

from services.kit import keys
from services.kit.columns import now
from services.kit.secrets import SecretBox
from services.user_svc.oauth.models import OAuthState

PREFIX, ID_PREFIX = "state", "oas"
LIFETIME = timedelta(minutes=10)


def begin(session: AsyncSession, box: SecretBox, key: keys.Key, provider: str, browser_token: str, redirect_path: str) -> None:
    """Notes a sign-in, which ``key`` is the state of, for one browser."""
    session.add(
        OAuthState(
            id=key.id, provider=provider, digest=key.sha256(), browser=_browser(box, browser_token), redirect_path=redirect_path,
            expires_at=now() + LIFETIME,
        )
    )  # fmt: skip


async def take(session: AsyncSession, box: SecretBox, state: str, browser_token: str) -> OAuthState | None:
    """The sign-in of a state, once, in its browser and in time; None otherwise. One statement: of several at once, one takes it."""
    key = keys.parse(state, PREFIX, ID_PREFIX)
    if key is None:
        return None
    taken = (
        update(OAuthState)
        .where(OAuthState.id == key.id, OAuthState.digest == key.sha256(), OAuthState.browser == _browser(box, browser_token))
        .where(OAuthState.used_at.is_(None), OAuthState.expires_at > now())
        .values(used_at=now())
        .returning(OAuthState)
        .execution_options(synchronize_session=False)
    )
    return await session.scalar(taken)


def secrets_of(box: SecretBox, state_id: str) -> tuple[str, str]:
    """(PKCE verifier, nonce) of a sign-in: nobody can compute them without the server's key, so that they need not be stored."""
    verifier, nonce = (box.digest(f"oauth_states/{what}", state_id) for what in ("verifier", "nonce"))
    return _text(verifier), _text(nonce)


def _browser(box: SecretBox, browser_token: str) -> bytes:
    return box.digest("oauth_states/browser", browser_token)


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")
