"""A deployment's secrets: where they are bound, and the fingerprint of a wish."""

from collections.abc import Mapping

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


def fingerprints(box: SecretBox, user_id: str, model: str, channel: int, channel_token: str) -> Mapping[str, bytes]:
    """Equal for equal wishes of a user, by key id: one for each key that rows may have, the current one first. Keyed, so that a token
    cannot be guessed from it."""
    return box.blinds("wish", user_id, model, str(channel), channel_token)


def fingerprint_again(box: SecretBox, d: Deployment) -> bytes:
    """The fingerprint of a row under the current key. Of what has ended, whose token is gone, it is one without token: nobody looks."""
    token = open_column(box, d, "channel_token")
    return box.blind("wish", d.user_id, d.model, str(d.channel), token, key_id=box.current)
