"""A deployment's secrets: where they are bound, and the fingerprint of a wish."""

from services.deployment_svc.deployments.models import Deployment
from services.kit.secrets import SecretBox


def place(deployment_id: str, column: str) -> str:
    """What a secret is bound to: moved to another row or column, it does not open."""
    return f"deployments/{column}/{deployment_id}"


def seal(box: SecretBox, deployment_id: str, column: str, plain: str) -> str | None:
    """The sealed text, or None for nothing."""
    return box.seal(plain, place(deployment_id, column)) if plain else None


def open_column(box: SecretBox, d: Deployment, column: str) -> str:
    """The secret of a column; "" when there is none."""
    sealed = getattr(d, f"{column}_sealed")
    return box.open(sealed, place(d.id, column)) if sealed else ""


def fingerprint(box: SecretBox, user_id: str, model: str, channel: int, channel_token: str) -> bytes:
    """Equal for equal wishes of a user. Keyed, so that a token cannot be guessed from it."""
    return box.digest("wish", user_id, model, str(channel), channel_token)
